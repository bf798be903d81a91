"""What the coder does to Gaussian rows: the error and the bits of a symbol, by level.

A row of n numbers and squared norm e is coded with one step Δ. Its level is the ratio of its
standard deviation to the step, r = ``√(e / n) / Δ``, as ``log2(r)`` in sixteenths of an octave; it
also chooses the table of the entropy coder (`ops.rans_encode`). Numbers are multiplied by
``1 - 1/(12 r²)`` before they are rounded to a multiple of Δ: where two of these are about as near,
the smaller one is cheaper. It is what minimises error plus bits where a bit is worth
``Δ²/6 · ln 2``, as it is at this step. These tables only steer the encoder: nothing on the wire
depends on them.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Levels = NDArray[np.int16]

PER_OCTAVE = 16
# Rows below the lowest level are zeros; from SPLIT on, low bits of a symbol travel as they are.
LOWEST, SPLIT, HIGHEST = -48, 48, 335
_LEAST = 0.3  # of what numbers are multiplied by
_ESCAPE_BITS = 28  # of a symbol beyond its table, about


def shrink(ratio: Tensor) -> Tensor:
    """Return what numbers are multiplied by before they are rounded."""
    return (1.0 - 1.0 / (12.0 * ratio**2)).clamp(min=_LEAST)


@cache
def _shrink_table() -> NDArray[np.float32]:
    levels = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64, device="cpu")
    table: NDArray[np.float32] = shrink(2.0 ** (levels / PER_OCTAVE)).float().numpy()
    return table


def shrinks(levels: Levels) -> Tensor:
    """Return `shrink` for each of some levels, float32; outside of all levels that of the next."""
    places = levels.astype(np.int32) - LOWEST
    return torch.from_numpy(_shrink_table().take(places, mode="clip"))


def _below_split() -> tuple[Floats, Floats]:
    """Return squared error in steps² and bits of a symbol, for the levels below SPLIT."""
    ratio = 2.0 ** (
        torch.arange(LOWEST, SPLIT, dtype=torch.float64, device="cpu")[:, None] / PER_OCTAVE
    )
    symbol = torch.arange(-31, 32, dtype=torch.float64, device="cpu")
    edges = (torch.arange(-31, 33, dtype=torch.float64, device="cpu") - 0.5) / (
        ratio * shrink(ratio)
    )
    share = torch.special.ndtr(edges).diff(dim=1)
    density = torch.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    # ∫ x φ and ∫ x² φ over the cells.
    first = -density.diff(dim=1)
    second = share - (edges * density).diff(dim=1)
    error = ratio**2 * second - 2 * symbol * ratio * first + symbol**2 * share
    inside = symbol.abs() <= torch.ceil(5 * ratio) + 1
    bits = torch.where(inside, -torch.log2(share.clamp(min=2.0**-12)), _ESCAPE_BITS)
    return error.sum(1).numpy(), (share * bits).sum(1).numpy()


_ERROR, _BITS = _below_split()
_OCTAVES = 1 + (HIGHEST - SPLIT) // PER_OCTAVE
ERROR: Floats = np.concatenate([_ERROR, np.full(PER_OCTAVE * _OCTAVES, 1 / 12)])
BITS: Floats = np.concatenate(
    [_BITS] + [_BITS[-PER_OCTAVE:] + octave for octave in range(1, _OCTAVES + 1)]
)


# The same from _FLOOR on, where rows below LOWEST lose all of themselves and cost nothing.
_FLOOR = -640
_LOST = 4.0 ** (np.arange(_FLOOR, LOWEST) / PER_OCTAVE)
_LOST[0] = 0.0  # nothing at all
_ALL_ERROR, _ALL_BITS = np.concatenate([_LOST, ERROR]), np.concatenate([0.0 * _LOST, BITS])


def cost_of(levels: Floats) -> tuple[Floats, Floats]:
    """Return squared error in steps² and bits of a symbol, for levels of any value."""
    index = np.maximum(levels - (_FLOOR - 0.5), 0.0).astype(np.int32)
    return _ALL_ERROR.take(index, mode="clip"), _ALL_BITS.take(index, mode="clip")
