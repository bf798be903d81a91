"""`row_squares` and `round_rows`: dense rows to integers of one step, and what that loses."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd_fast.ops import _library


def row_squares(values: Tensor, minus: Tensor | None = None) -> Tensor:
    """Return the squared norm of each row of ``values - minus``. On the CPU.

    Args:
        values: (R, n) float32.
        minus: (R, n) float32; nothing where it is None.

    Returns:
        (R,) float64, good to six digits; the same bits for any number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    squares: Tensor = _library.native.row_squares(values.detach(), minus)
    return squares


def round_rows(
    values: Tensor, minus: Tensor | None, divisor: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Round ``x = values - minus`` to integers: ``q = rint(x / divisor)``, to even. On the CPU.

    Integers are clamped to ``|q| <= 2^22 - 1``.

    Args:
        values: (R, n) float32.
        minus: (R, n) float32; nothing where it is None.
        divisor: (R,) float32, of each row; 0 sends a row of zeros.
        step: what the receiver multiplies integers with.

    Returns:
        q (R, n) as float32, the same on every machine, and ``|x - step · q|²``, a float64 scalar
        good to six digits; the same bits for any number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    sent, lost = _library.native.round_rows(values.detach(), minus, divisor, step)
    return sent, lost


@torch.library.register_fake("fedkd_fast::row_squares")
def _row_squares_fake(values: Tensor, minus: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[0], dtype=torch.float64)


@torch.library.register_fake("fedkd_fast::round_rows")
def _round_rows_fake(
    values: Tensor, minus: Tensor | None, divisor: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), values.new_empty((), dtype=torch.float64)
