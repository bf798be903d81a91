"""truncated_svd at energy 0.95 against full SVD, Gram + eigh, and svd_lowrank told the rank.

The matrices stand for an update that follows another one: a fifth of it is new. `ours-warm` gets
the subspace of the one before.
"""

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
DRIFT = 0.2

Factors = tuple[Tensor, Tensor, Tensor]


def updates(batch: int, rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, cols)
    left = torch.linalg.qr(torch.randn(batch, rows, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(batch, cols, width, generator=generator))[0]
    return (left * torch.arange(1, width + 1).float() ** -POWER) @ right.mT


def ours(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    svd = ops.truncated_svd(matrix, energy=ENERGY)
    return svd.U, svd.S, svd.Vh


def ours_warm(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    svd = ops.truncated_svd(matrix, energy=ENERGY, basis=basis)
    return svd.U, svd.S, svd.Vh


def torch_svd(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    return u[..., :kept], s[..., :kept], vh[..., :kept, :]


def gram_eigh(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    s = values.clamp(min=0).sqrt().flip(-1)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    v = vectors.flip(-1)[..., :kept]
    return matrix @ v / s[..., None, :kept], s[..., :kept], v.mT


def svd_lowrank_oracle(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    """Told the true rank, which a real caller does not know."""
    u, s, v = torch.svd_lowrank(matrix, q=int(1.25 * rank) + 8, niter=2)
    return u, s, v.mT


IMPLS: dict[str, Callable[[Tensor, Tensor, int], Factors]] = {
    "ours": ours,
    "ours-warm": ours_warm,
    "torch.linalg.svd": torch_svd,
    "gram+eigh": gram_eigh,
    "svd_lowrank-oracle": svd_lowrank_oracle,
}


@pytest.mark.parametrize("shape", SVD, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_truncated_svd(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int, int]) -> None:
    benchmark.group = f"truncated_svd {shape}"
    earlier = updates(*shape, seed=0)
    matrix = earlier + DRIFT * updates(*shape, seed=1)
    before = ops.truncated_svd(earlier, energy=ENERGY)
    basis = before.U.mT if shape[1] < shape[2] else before.Vh
    rank = int(ops.truncated_svd(matrix, energy=ENERGY).rank.max())
    u, s, vh = IMPLS[impl](matrix, basis, rank)
    lost = (matrix - (u * s[..., None, :]) @ vh).double().square().sum((1, 2))
    assert bool((lost / matrix.double().square().sum((1, 2)) <= 1 - ENERGY).all())
    benchmark.extra_info.update(rank=rank)
    benchmark.pedantic(IMPLS[impl], (matrix, basis, rank), rounds=5, warmup_rounds=1)
