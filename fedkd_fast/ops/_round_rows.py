"""`measure_rows`, `round_rows`, `dense_step`: how dense rows become integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd_fast.ops import _library


def measure_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norm and the largest magnitude of each row. On the CPU.

    Args:
        values: (R, n) float32.

    Returns:
        (R,) float64, good to six digits, the same bits for any number of threads; and (R,) float32,
        NaN where a value is.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    squares, largest = _library.native.measure_rows(values.detach())
    return squares, largest


def round_rows(values: Tensor, squares: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tell how `rans_encode` is to round rows to the step Δ = 2^(step / 256). On the CPU.

    The level of a row is log2 of ``√(squares / n) / Δ``, to the nearest quarter of an octave. Rows
    below the coder's least level, or more than 62 quarters below the largest row, are sent as
    zeros, and all are where one lies beyond its largest level. The others become
    ``q = rint(x · multiplier)``, the multiplier ``(1 - 0.7 / (12 r²)) / Δ`` with r² = 4^level, its
    first factor 0.3 at least, and ``|q| <= 2^22 - 1``.

    Args:
        values: (R, n) float32.
        squares: (R,) float64, squared norms, as `measure_rows` has them.
        step: log2 Δ in 1/256 octave, within 126 octaves.

    Returns:
        The multipliers (R,) float32; the levels (R,) int16 in 1/16 octave, -2^15 where zeros are
        sent; and ``|x - Δ · q|²``, a float64 scalar good to six digits. The same bits for any
        number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a step out of its range.
    """
    multiplier, levels, lost = _library.native.round_rows(values.detach(), squares, step)
    return multiplier, levels, lost


def dense_step(values: Tensor, squares: Tensor, most_lost: float, whole: bool = False) -> int:
    """Find the coarsest step at which `round_rows` loses at most so much. On the CPU.

    Of many values some rows stand for all, so that what is lost may differ: by a few per cent, but
    for rows that have little in common. Where no step is fine enough, it is the finest one.

    Args:
        values: (R, n) float32, not all zero.
        squares: (R,) float64, squared norms, as `measure_rows` has them.
        most_lost: largest squared error, > 0.
        whole: look at all rows, which takes longer.

    Returns:
        log2 of the step in 1/256 octave; the same for any number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device, values of zeros, squares that are none, or
            `most_lost` not positive.
    """
    return int(_library.native.dense_step(values.detach(), squares, most_lost, whole))


@torch.library.register_fake("fedkd_fast::measure_rows")
def _measure_rows_fake(values: Tensor) -> tuple[Tensor, Tensor]:
    rows = values.shape[0]
    return values.new_empty(rows, dtype=torch.float64), values.new_empty(rows)


@torch.library.register_fake("fedkd_fast::round_rows")
def _round_rows_fake(values: Tensor, squares: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    multiplier, levels = (
        values.new_empty(values.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int16)
    )
    return multiplier, levels, values.new_empty((), dtype=torch.float64)


@torch.library.register_fake("fedkd_fast::dense_step")
def _dense_step_fake(values: Tensor, squares: Tensor, most_lost: float, whole: bool) -> Tensor:
    return values.new_empty((), dtype=torch.int64)
