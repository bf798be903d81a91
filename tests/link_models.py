"""A small model of many kinds of tensors, and what training might make of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def model(seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(60, 24, generator=made),
        "conv": torch.randn(16, 3, 5, 5, generator=made),
        "bias": torch.randn(60, generator=made),
        "half": torch.randn(20, 20, generator=made).bfloat16(),
        "batches": torch.tensor(7),
    }


def moved(weights: Mapping[str, Tensor], seed: int, size: float = 0.05) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1000 + seed)
    return {
        name: value + (size * torch.randn(value.shape, generator=made)).to(value.dtype)
        if value.is_floating_point()
        else value + 1
        for name, value in weights.items()
    }
