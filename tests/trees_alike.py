"""Whether two trees of state are the same, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def alike(one: Any, other: Any) -> bool:
    """Compare two trees; a tuple is a list, as after reading, and NaN is equal to itself."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _bits(one) == _bits(other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)  # in the same order
            and all(alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(map(alike, one, other))
        )
    return type(one) is type(other) and repr(one) == repr(other)


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
