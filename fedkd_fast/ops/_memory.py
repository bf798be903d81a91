"""Memory for results of ops."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd_fast.ops import _library

_WORTHWHILE = 4 << 20  # bytes from which a huge page pays


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor without values, on the device of `like`, in pages as large as there are."""
    made = like.new_empty(shape, dtype=dtype)
    if made.is_cpu and made.nbytes >= _WORTHWHILE:
        _library.native.prefer_huge_pages(made)
    return made


@torch.library.register_fake("fedkd_fast::prefer_huge_pages")
def _prefer_huge_pages_fake(fresh: Tensor) -> None:
    return None
