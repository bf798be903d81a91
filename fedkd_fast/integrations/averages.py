"""Numbers of models on their way through frameworks that average them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.tensors import as_tensors
from fedkd_fast.updates import EXACT_INTEGERS, exact_integers, largest

_MARGIN = 2.0**-24  # of a dtype's range, left to sums of replies


def can_be_averaged(value: Tensor, held: Tensor | None) -> bool:
    """Tell whether a sum of such values, times the weights of clients, is likely to be a number.

    Frameworks add up in the dtype at hand; whoever sends numbers at its end would end the run.
    Numbers that were held before, as in masks, are no matter of who sends them.
    """
    if value.dtype == torch.int64:
        if exact_integers(value):
            return True
        outside = (value > EXACT_INTEGERS) | (value < -EXACT_INTEGERS)
    elif value.dtype in (torch.float32, torch.float64, torch.bfloat16):
        most = torch.finfo(value.dtype).max * _MARGIN
        if largest(value) <= most:
            return True
        outside = value.abs() > most
    else:
        return True
    return held is not None and not bool((outside & (value != held)).any())


def counted(name: str, value: object, held: Tensor | None) -> object:
    """Return integers in the floating dtype of what is held of them, if that can hold them."""
    if held is None or not held.is_floating_point() or not isinstance(value, Tensor | np.ndarray):
        return value
    found = as_tensors({name: value}, "the reply", finite=False)[name]
    if found.is_floating_point() or found.dtype == torch.bool:
        return value
    floating = found.to(held.dtype)
    return floating if torch.equal(floating.to(found.dtype), found) else value


def like(name: str, value: Tensor, held: Tensor) -> Tensor:
    """Return a value in the dtype of what is held of it; averages of integers are rounded.

    Raises:
        ValueError: it holds what that dtype cannot.
    """
    if held.is_floating_point():
        return value.to(held.dtype) if value.is_floating_point() else value
    if not value.is_floating_point():
        return value
    whole = value.round()
    found = whole.nan_to_num().to(held.dtype)
    if not torch.equal(found.to(whole.dtype), whole):
        raise ValueError(f"{name!r} holds NaN, Inf or what is beyond {held.dtype}")
    return found
