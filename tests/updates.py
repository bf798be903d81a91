"""Updates that look like those of real layers, for tests of the codec."""

from __future__ import annotations

import torch


def powerlaw(rows: int, cols: int, power: float = 0.8, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with σ_k ~ k^-power: what updates of trained layers look like."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, width, generator=generator))[0]
    return (left * torch.arange(1, width + 1).float() ** -power) @ right.T


def relative_error(exact: torch.Tensor, decoded: torch.Tensor) -> float:
    total = float(exact.double().square().sum())
    return float((exact.double() - decoded.double()).square().sum()) / total


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "encoder.0.query.weight": powerlaw(96, 96),
        "encoder.0.ffn.weight": powerlaw(192, 96, 1.0, seed=1),
        "encoder.0.ffn.bias": torch.randn(192, generator=generator),
        "conv.weight": torch.randn(16, 3, 5, 5, generator=generator),
        "head.weight": torch.randn(3, 96, generator=generator),
        "scalar": torch.tensor(3.25),
        "counter": torch.tensor([5, 7]),
        "flags": torch.tensor([True, False, True]),
        "frozen": torch.zeros(50, 50),
        "empty": torch.empty(0, 4),
    }
