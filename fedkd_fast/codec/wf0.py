"""wf0: whole bits for each column or row, no entropy coder; the smallest mode of those.

Every entry is decoded again from its own bytes before it is accepted, so the promised error is that
of the receiver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.codec.common import dense_rows, matrix_shape, to_bytes
from fedkd_fast.codec.decode import decode_entry, unpacked_levels
from fedkd_fast.codec.rate import HALF_STEP, Allocation, allocate_bits
from fedkd_fast.reference import Factors
from fedkd_fast.wire import Entry, Mode

# Payloads up to this many bytes are not worth the time: their line in the directory weighs as much.
WORTH_BYTES = 64
# A factor row costs one float32 scale and two widths, a dense row one scale and one width.
FACTOR_ROW_BYTES, DENSE_ROW_BYTES = 6, 5
# The search stops when the achieved error lies in this part of the target.
FULL_USE = 0.95
# Gaussian rows of some thousand numbers do not exceed the range of their codes by this factor.
_PEAKED = 1.5
ATTEMPTS = 6


def _quantise(
    rows: Tensor, bits: np.ndarray[Any, Any], backend: ModuleType
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows at their best Gaussian step; return scales, widths and codes."""
    widths = torch.from_numpy(bits)
    rms = rows.double().square().mean(1).sqrt()
    scale = (rms * torch.from_numpy(HALF_STEP[bits])).float()
    # A row that is nearly one peak would lose it: its step covers the peak, if that is better.
    wide = torch.linalg.vector_norm(rows, math.inf, dim=1) / (2.0 ** widths.float() - 1.0)
    peaked = torch.nonzero((wide > _PEAKED * scale) & (widths > 0))[:, 0]
    if len(peaked):
        few, narrow = rows[peaked], widths[peaked]
        errors = [_error(few, step, narrow, backend) for step in (scale[peaked], wide[peaked])]
        scale[peaked] = torch.where(errors[1] < errors[0], wide[peaked], scale[peaked])
    return scale, widths, backend.pack_factors(rows, scale, widths)


def _error(rows: Tensor, scale: Tensor, widths: Tensor, backend: ModuleType) -> Tensor:
    """Return the squared error of each row."""
    codes = backend.pack_factors(rows, scale, widths)
    decoded: Tensor = backend.unpack_factors(codes, scale, widths, rows.shape[1])
    return (decoded - rows).double().square().sum(1)


def _gain(levels: Tensor, rows: Tensor) -> Tensor:
    """Return the least-squares factor of each row: ``<levels, rows> / |levels|²``."""
    exact = levels.double()
    return (exact * rows.double()).sum(1) / exact.square().sum(1)


def _packed_factors(
    template: Entry, factors: Factors, allocation: Allocation, backend: ModuleType
) -> Entry | None:
    bits_left, bits_right = allocation.bits
    kept = np.flatnonzero(bits_left)
    if not len(kept):
        return None
    index = torch.from_numpy(kept)
    left, right = factors.left[index], factors.right[index]
    _, widths_left, codes_left = _quantise(left, bits_left[kept], backend)
    _, widths_right, codes_right = _quantise(right, bits_right[kept], backend)
    # Only the product of the two scales matters: it is refitted to the levels that are sent.
    scale = factors.sigma[index].double()
    scale *= _gain(unpacked_levels(codes_left, widths_left, left.shape[1], backend), left)
    scale *= _gain(unpacked_levels(codes_right, widths_right, right.shape[1], backend), right)
    parts = (scale.float(), widths_left, widths_right, codes_left, codes_right)
    payload = b"".join(to_bytes(part) for part in parts)
    return Entry(
        template.name, template.dtype, template.shape, Mode.PACKED_FACTORS, len(kept), payload
    )


def _packed_dense(
    template: Entry, rows: Tensor, allocation: Allocation, backend: ModuleType
) -> Entry:
    (bits,) = allocation.bits
    scale, widths, codes = _quantise(rows, bits, backend)
    payload = to_bytes(scale) + to_bytes(widths) + to_bytes(codes)
    return Entry(
        template.name, template.dtype, template.shape, Mode.PACKED_DENSE, rows.shape[0], payload
    )


def _squared_error(entry: Entry, exact: Tensor, backend: ModuleType) -> float:
    return float((decode_entry(entry, backend).double() - exact.double()).square().sum())


def _search(
    expected: Callable[[float], Allocation | None],
    build: Callable[[Allocation], Entry | None],
    exact: Tensor,
    target: float,
    backend: ModuleType,
) -> Entry | None:
    """Find the smallest entry whose decoded error is at most `target`.

    The allocation knows Gaussian rows; real ones are off by a factor that changes slowly, so a few
    corrections of the aim bring the measured error just below the target.
    """
    best, aim = None, target
    # Small tensors have few allocations: the aim may have to move on for another one to come up.
    errors: dict[bytes, float] = {}
    for _ in range(ATTEMPTS):
        allocation = expected(aim)
        if allocation is None:
            break
        widths = b"".join(bits.tobytes() for bits in allocation.bits)
        if widths not in errors:
            entry = build(allocation)
            if entry is None:
                break
            errors[widths] = _squared_error(entry, exact, backend)
            smaller = best is None or len(entry.payload) < len(best.payload)
            if errors[widths] <= target and smaller:
                best = entry
        error = errors[widths]
        if FULL_USE * target <= error <= target:
            break
        if error == 0.0:
            aim *= 2.0
            continue
        aim *= min(2.0, 0.985 * target / error)
    return best


def encode(
    template: Entry, exact: Tensor, allowed: float, factors: Factors | None, backend: ModuleType
) -> Entry:
    """Encode so that the decoded entry loses at most the share `allowed` of the squared norm.

    ``|x - decoded|² ≤ allowed·|x|²``, truncation and quantisation together, with the smallest of
    packed factors, packed rows and raw bytes.

    Args:
        template: the raw entry, which also is what is returned when nothing smaller fits.
        exact: the tensor, float32 or float64, not all zero, and `representable`.
        allowed: share to lose, in (0, 1).
        factors: the leading ones of the tensor as a matrix, or None for dense modes alone.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
    """
    if len(template.payload) <= WORTH_BYTES:
        return template
    total = float(exact.double().square().sum())
    target = allowed * total

    def candidates() -> Iterator[tuple[int, Callable[[], Entry | None]]]:
        rows = exact.reshape(dense_rows(template.shape), -1).float()
        row_energies = rows.double().square().sum(1).numpy()

        def dense(aim: float) -> Allocation | None:
            return allocate_bits(row_energies, (rows.shape[1],), 0, aim)

        expected = dense(target)
        if expected is not None:
            yield (
                expected.payload_bytes + DENSE_ROW_BYTES * rows.shape[0],
                lambda: _search(
                    dense,
                    lambda allocation: _packed_dense(template, rows, allocation, backend),
                    *(exact, target, backend),
                ),
            )
        if factors is None:
            return
        energies = factors.sigma.double().square().numpy()
        tail = max(0.0, total - float(energies.sum()))

        def factored(aim: float) -> Allocation | None:
            sides = matrix_shape(template.shape)
            return allocate_bits(energies, sides, FACTOR_ROW_BYTES, aim - tail)

        expected = factored(target)
        if expected is not None:
            yield (
                expected.payload_bytes,
                lambda: _search(
                    factored,
                    lambda allocation: _packed_factors(template, factors, allocation, backend),
                    *(exact, target, backend),
                ),
            )

    best = template
    for expected_bytes, build in sorted(candidates(), key=lambda candidate: candidate[0]):
        if expected_bytes >= len(best.payload):
            break
        entry = build()
        if entry is not None and len(entry.payload) < len(best.payload):
            best = entry
    return best
