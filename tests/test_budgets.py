"""Budgets of less than a bit a number: what is left of a message is used."""

from __future__ import annotations

import pytest
import torch
from updates import relative_error

from fedkd_fast import Compressor, decompress


def gaussian(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scope", ["tensor", "message"])
@pytest.mark.parametrize(
    ("bits", "most"), [(0.05, 0.97), (0.1, 0.93), (0.2, 0.87), (0.3, 0.81), (0.5, 0.7)]
)
def test_small_budgets_are_used(bits: float, most: float, scope: str) -> None:
    """Gaussian numbers have no structure: factors of a few columns lose least of them."""
    matrix = gaussian(512, 512)
    limit = int(bits * matrix.numel() / 8)
    frame = Compressor(budget_bytes=limit, scope=scope).compress({"w": matrix})
    assert 0.94 * limit <= len(frame) <= limit
    assert relative_error(matrix, decompress(frame)["w"]) <= most


@pytest.mark.parametrize("bits", [0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("scope", ["tensor", "message"])
def test_small_budgets_of_several_tensors_are_used(scope: str, bits: float) -> None:
    update = {"w": gaussian(512, 256), "v": 0.1 * gaussian(4096, 32, seed=2)}
    limit = int(bits * sum(value.numel() for value in update.values()) / 8)
    frame = Compressor(budget_bytes=limit, scope=scope).compress(update)
    assert 0.88 * limit <= len(frame) <= limit


@pytest.mark.parametrize("scope", ["tensor", "message"])
def test_budgets_between_nothing_and_whole_signs_are_used(scope: str) -> None:
    """Dense rows of signs are whole or nothing; factors are in between."""
    signs = {"w": gaussian(100, 70).sign()}
    frame = Compressor(bits_per_param=0.5, scope=scope).compress(signs)
    assert relative_error(signs["w"], decompress(frame)["w"]) <= 0.77


@pytest.mark.parametrize("scope", ["tensor", "message"])
def test_exact_factors_of_few_values_lose_what_floats_do(scope: str) -> None:
    signs = {"w": gaussian(100, 2).sign() @ gaussian(2, 100, seed=2).sign()}
    for bits in (0.7, 1.0, 1.3):
        frame = Compressor(bits_per_param=bits, scope=scope).compress(signs)
        assert len(frame) <= bits * 100 * 100 / 8
        assert relative_error(signs["w"], decompress(frame)["w"]) <= 5e-10
