"""A case of the GPU benches, and what the builders of cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Specifications that run on the CPU term by term are given a part of the result.
CHECKED_VALUES = 2**18
# A sum of K products in float32 is off by at most about K roundings of the sum of magnitudes.
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs on the device."""

    calls: dict[str, Callable[[], Any]]
    # (impl, its result) -> the error against the specification in float64; AssertionError if wrong.
    check: Callable[[str, Any], float]
    moved_bytes: int  # inputs read once, results written once
    flops: int | None = None


def noise(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def copying(moved_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def spread(rows: int, row_values: int) -> Tensor:
    """Choose rows, first and last among them, that hold about CHECKED_VALUES together."""
    wanted = min(rows, max(2, CHECKED_VALUES // max(1, row_values)))
    return torch.linspace(0, rows - 1, wanted).round().long().unique()
