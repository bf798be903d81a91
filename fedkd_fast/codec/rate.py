"""Rate control: how many bits each row of a tensor gets to meet an error with few bytes.

The codec quantises rows (columns of a factor, or rows of a dense tensor) with mid-rise uniform
quantisers. For a Gaussian row of n entries and mean square m, b bits leave the error ``n·m·D(b)``.
The allocation minimises ``error + λ·bits`` for every row by itself, and bisects the one λ until the
sum of all errors meets the target: reverse water-filling with integer bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Uniform mid-rise quantisers of 2^b levels for a unit Gaussian, b = 0, 1, 2, …: half of the step
# that minimises the mean squared error (J. Max, IRE Trans. Inf. Theory 6, 1960; here by numerical
# minimisation of the exact integral), and that error.
HALF_STEP = np.array(
    [
        *(0.0, 0.797885, 0.497843, 0.293010, 0.167600, 0.094069, 0.052032, 0.028434),
        *(0.015381, 0.008249, 0.004393, 0.002325, 0.001224),
    ]
)
DISTORTION = np.array(
    [
        *(1.0, 3.6338e-1, 1.1885e-1, 3.7440e-2, 1.1543e-2, 3.4952e-3, 1.0400e-3, 3.0433e-4),
        *(8.7686e-5, 2.4919e-5, 6.9970e-6, 1.9444e-6, 5.3554e-7),
    ]
)
# One more bit is worth its price where energy / (price · count) exceeds this, from 1 bit on. The
# gains fall with every bit, so the number of thresholds passed is the best width.
_WORTH = 1.0 / (DISTORTION[1:-1] - DISTORTION[2:])
_BISECTIONS = 40
# Bits are integers and rows are not Gaussian: a closer hit than this would mean nothing.
CLOSE_ENOUGH = 0.995

Floats = NDArray[np.float64]
Widths = NDArray[np.uint8]


class Allocation(NamedTuple):
    """Bits for every row, and what they are expected to give."""

    bits: tuple[
        Widths, ...
    ]  # one array for each side: (left, right) for factors, (rows,) for dense
    error: float  # expected squared error, dropped rows included
    payload_bytes: int  # scales, widths and codes


def _row_bytes(count: int, bits: Widths) -> int:
    return int(np.sum((bits.astype(np.int64) * count + 7) // 8))


def _allocate(
    energies: Floats, sides: tuple[int, ...], side_info_bytes: int, price: float
) -> tuple[tuple[Widths, ...], float]:
    """Minimise ``error + price·bits`` row by row; a row is dropped where that is cheaper."""
    error = np.zeros_like(energies)
    cost = np.full_like(energies, price * 8 * side_info_bytes)
    bits = []
    for count in sides:
        width = 1 + np.searchsorted(_WORTH, energies / (price * count))
        bits.append(width.astype(np.uint8))
        distortion = energies * DISTORTION[width]
        error += distortion
        cost += distortion + price * count * width
    dropped = cost >= energies
    for kept in bits:
        kept[dropped] = 0
    return tuple(bits), float(np.where(dropped, energies, error).sum())


def _allocate_one(
    energy: float, count: int, side_info_bytes: int, target: float
) -> Allocation | None:
    """Take the narrowest codes that meet the target: a single row leaves nothing to weigh."""
    fitting = np.flatnonzero(energy * DISTORTION <= target)
    if not len(fitting):
        return None
    bits = fitting[:1].astype(np.uint8)
    side_info = side_info_bytes if bits[0] else 0
    error = energy * float(DISTORTION[bits[0]])
    return Allocation((bits,), error, side_info + _row_bytes(count, bits))


def allocate_bits(
    energies: Floats, sides: tuple[int, ...], side_info_bytes: int, target: float
) -> Allocation | None:
    """Choose widths so that the expected squared error is at most `target`.

    Args:
        energies: squared norm of every row, >= 0: ``σ_k²`` for factors.
        sides: entries of a row on each side: ``(P, Q)`` for factors, ``(n,)`` for dense rows. The
            errors of the sides add, as those of ``u_k`` and ``v_k`` do to first order.
        side_info_bytes: bytes that a kept row costs besides its codes.
        target: wanted sum of squared errors.

    Returns:
        The allocation, or None when even the widest codes do not reach the target.
    """
    largest = float(energies.max(initial=0.0))
    if largest == 0.0:
        empty = np.zeros(len(energies), np.uint8)
        return Allocation(tuple(empty for _ in sides), 0.0, 0) if target >= 0 else None
    if len(energies) == 1 and len(sides) == 1:
        return _allocate_one(largest, sides[0], side_info_bytes, target)
    # Prices are searched by exponent: 2^high drops every row, 2^low takes the widest codes.
    high = np.log2(largest)
    low = high - 2 * len(DISTORTION) - np.log2(max(sides)) - 12
    chosen = _allocate(energies, sides, side_info_bytes, 2.0**low)
    if chosen[1] > target:
        return None
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        candidate = _allocate(energies, sides, side_info_bytes, 2.0**middle)
        if candidate[1] > target:
            high = middle
            continue
        low, chosen = middle, candidate
        if candidate[1] >= CLOSE_ENOUGH * target:
            break
    bits, error = chosen
    kept = int(np.count_nonzero(bits[0]))
    codes = sum(_row_bytes(count, width) for count, width in zip(sides, bits, strict=True))
    return Allocation(bits, error, kept * side_info_bytes + codes)
