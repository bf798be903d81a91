"""truncated_svd at energy 0.95 against full SVD, Gram + eigh, and svd_lowrank told the rank.

The matrices stand for an update that follows another one: a fifth of it is new. `ours-warm` gets
the subspace of the one before.
"""

from __future__ import annotations

import pytest
from peers import DRIFT, ENERGY, SVDS, check_energy, updates
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import SVD

from fedkd_fast import ops


@pytest.mark.parametrize("shape", SVD, ids=str)
@pytest.mark.parametrize("impl", SVDS)
def test_truncated_svd(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int, int]) -> None:
    benchmark.group = f"truncated_svd {shape}"
    earlier = updates(*shape, seed=0)
    matrix = earlier + DRIFT * updates(*shape, seed=1)
    before = ops.truncated_svd(earlier, energy=ENERGY)
    basis = before.U.mT if shape[1] < shape[2] else before.Vh
    rank = int(ops.truncated_svd(matrix, energy=ENERGY).rank.max())
    check_energy(matrix, SVDS[impl](matrix, basis, rank))
    benchmark.extra_info.update(rank=rank)
    benchmark.pedantic(SVDS[impl], (matrix, basis, rank), rounds=5, warmup_rounds=1)
