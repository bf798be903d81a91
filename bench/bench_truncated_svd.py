"""truncated_svd at energy 0.95 against full SVD, Gram + eigh, and svd_lowrank told the rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import SVD
from torch import Tensor

from fedkd_fast import ops, reference

ENERGY = 0.95
POWER = 0.75  # σ_k ~ k^-0.75: between single gradients and deltas of many Adam steps

Factors = tuple[Tensor, Tensor, Tensor]


def updates(batch: int, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = min(rows, cols)
    left = torch.linalg.qr(torch.randn(batch, rows, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(batch, cols, width, generator=generator))[0]
    return (left * torch.arange(1, width + 1).float() ** -POWER) @ right.mT


def ours(matrix: Tensor, rank: int) -> Factors:
    svd = ops.truncated_svd(matrix, energy=ENERGY)
    return svd.U, svd.S, svd.Vh


def torch_svd(matrix: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    return u[..., :kept], s[..., :kept], vh[..., :kept, :]


def gram_eigh(matrix: Tensor, rank: int) -> Factors:
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    s = values.clamp(min=0).sqrt().flip(-1)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    v = vectors.flip(-1)[..., :kept]
    return matrix @ v / s[..., None, :kept], s[..., :kept], v.mT


def svd_lowrank_oracle(matrix: Tensor, rank: int) -> Factors:
    """Told the true rank, which a real caller does not know."""
    u, s, v = torch.svd_lowrank(matrix, q=int(1.25 * rank) + 8, niter=2)
    return u, s, v.mT


IMPLS: dict[str, Callable[[Tensor, int], Factors]] = {
    "ours": ours,
    "torch.linalg.svd": torch_svd,
    "gram+eigh": gram_eigh,
    "svd_lowrank-oracle": svd_lowrank_oracle,
}


@pytest.mark.parametrize("shape", SVD, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_truncated_svd(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int, int]) -> None:
    benchmark.group = f"truncated_svd {shape}"
    matrix = updates(*shape)
    rank = int(ops.truncated_svd(matrix, energy=ENERGY).rank.max())
    u, s, vh = IMPLS[impl](matrix, rank)
    lost = (matrix - (u * s[..., None, :]) @ vh).double().square().sum((1, 2))
    assert bool((lost / matrix.double().square().sum((1, 2)) <= 1 - ENERGY).all())
    benchmark.extra_info.update(rank=rank)
    benchmark.pedantic(IMPLS[impl], (matrix, rank), rounds=5, warmup_rounds=1)
