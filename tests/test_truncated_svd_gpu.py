"""Lists of matrices of unlike shapes: every stop, budgets, and starts from earlier matrices."""

from __future__ import annotations

import math

import pytest
import torch
from svd_cases import SMALL_SIDE, most_rank
from test_truncated_svd import check_factors, spectrum
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.reference import Factors, Subspace

# As the GPU half has them: the share of the short side that a subspace may take, and how many of
# its small problems' rows stay in shared memory.
MOST_DIRECTIONS, NARROW = 0.5, 96

SHAPES = [(80, 70), (20, 30), (70, 80), (80, 70), (1, 5)]
POWERS = [0.9, 0.7, 1.1, 1.4, 1.0]
STOPS = {"energy": 0.8, "rank": 3, "error": 0.7, "floor": 0.3}


def updates(drift: float = 0.0) -> list[Tensor]:
    """Matrices of SHAPES, float32; `drift` of each is new."""
    return [
        (spectrum(*shape, power, seed) + drift * spectrum(*shape, 0.7, seed + 50)).float()
        for seed, (shape, power) in enumerate(zip(SHAPES, POWERS, strict=True))
    ]


def on(device: torch.device, start: Subspace) -> Subspace:
    return Subspace(start.basis.to(device), start.shares)


def run(
    device: torch.device,
    matrices: list[Tensor],
    earlier: list[Subspace | None] | None = None,
    **wanted: object,
) -> list[Factors]:
    starts = [start and on(device, start) for start in earlier] if earlier else None
    found = ops.truncated_svd_list(
        [matrix.to(device) for matrix in matrices],
        earlier=starts,
        **wanted,  # type: ignore[arg-type]
    )
    return [
        one._replace(left=one[0].cpu(), sigma=one[1].cpu(), right=one[2].cpu()) for one in found
    ]


def subspaces(matrices: list[Tensor], energy: float = 0.9) -> list[Subspace | None]:
    found = reference.truncated_svd_list([matrix.double() for matrix in matrices], energy=energy)
    return [Subspace(start.basis.float(), start.shares) for start in (f.subspace() for f in found)]


def hints(matrices: list[Tensor]) -> list[Subspace | None]:
    return [start and start._replace(basis=start.basis[:0]) for start in subspaces(matrices)]


def check(matrix: Tensor, found: Factors) -> None:
    """Orthonormal, descending, signed, and as close as the energy says."""
    assert found.pays and not found.shares.is_cuda and found.shares.dtype == torch.float64
    assert len(found.shares) >= found.rank
    if len(found.shares):
        captured = float(found.shares[: found.rank].sum())
        assert captured == pytest.approx(found.energy, abs=1e-5)
    check_factors(
        matrix,
        reference.TruncatedSVD(
            found.left.T,
            found.sigma,
            found.right,
            torch.tensor(found.rank),
            torch.tensor(found.energy),
        ),
    )


def check_energy(matrix: Tensor, found: Factors, energy: float) -> None:
    """More than `energy` is there, at about the least rank."""
    check(matrix, found)
    exact = matrix.double()
    lost = (exact - (found.left.double().T * found.sigma.double()) @ found.right.double()).square()
    assert float(lost.sum()) < (1 - energy) * float(exact.square().sum())
    (truth,) = reference.truncated_svd_list([matrix], energy=energy)
    assert truth.rank <= found.rank <= most_rank(matrix.shape, energy, truth.rank)


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_on_unlike_shapes(device: torch.device, stop: str, start: str) -> None:
    matrices = [*updates(0.1), torch.zeros(80, 70), torch.zeros(0, 4)]
    earlier = [*subspaces(updates()), None, None] if start == "warm" else None
    limit = STOPS[stop]
    found = run(device, matrices, earlier, **{stop: limit})
    truth = reference.truncated_svd_list(matrices, **{stop: limit})
    for matrix, ours, best in zip(matrices, found, truth, strict=True):
        if matrix.numel():
            check(matrix, ours)
        exact = stop == "rank" or min(matrix.shape) <= SMALL_SIDE
        more = 0 if exact else max(1, int(0.05 * best.rank))
        fewer = more if stop == "floor" else 0
        assert best.rank - fewer <= ours.rank <= best.rank + more
        if exact:
            assert torch.allclose(ours.sigma, best.sigma, atol=1e-5)
    assert [one.rank for one in found[-2:]] == [0, 0]
    assert [len(one.shares) for one in found[-2:]] == [0, 0]
    assert [one.energy for one in found[-2:]] == [1.0, 1.0]


@pytest.mark.parametrize("start", [subspaces, hints])
def test_starts_from_earlier_matrices(device: torch.device, start: object) -> None:
    matrices = updates(0.1)
    found = run(device, matrices, start(updates()), energy=0.9)  # type: ignore[operator]
    for matrix, ours in zip(matrices, found, strict=True):
        check_energy(matrix, ours, 0.9)


def test_limits_differ_from_matrix_to_matrix(device: torch.device) -> None:
    matrices, limits = updates(), [0.5, 0.9, 0.7, 0.8, 1.0]
    found = run(device, matrices, hints(matrices), energy=limits)
    for matrix, ours, limit in zip(matrices[:4], found, limits, strict=False):
        check_energy(matrix, ours, limit)
    assert found[4].rank == 1


def unlike() -> dict[str, Subspace]:
    """Starts that know nothing of a flat 80×70 matrix."""
    flat = torch.full((70,), 1 / 70, dtype=torch.float64)
    steep = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    basis = torch.eye(80)
    return {
        "too steep": Subspace(basis[:2], steep),
        "not of this matrix": Subspace(basis[60:68], flat),
        "NaN": Subspace(torch.full((8, 80), math.nan), flat),
        "huge": Subspace(torch.full((8, 80), 1e38), flat),
        "dependent": Subspace(torch.ones(8, 80) / 80**0.5, flat),
        "zero": Subspace(torch.zeros(8, 80), flat),
    }


@pytest.mark.parametrize("name", unlike())
def test_the_promise_does_not_depend_on_the_start(device: torch.device, name: str) -> None:
    matrix = spectrum(80, 70, 0.2).float()
    (found,) = run(device, [matrix], [unlike()[name]], energy=0.3)
    check_energy(matrix, found, 0.3)


def test_a_matrix_of_low_rank_fills_no_subspace(device: torch.device) -> None:
    matrix = (spectrum(80, 3, 0.1) @ spectrum(3, 70, 0.3)).float()
    (found,) = run(device, [matrix], subspaces([spectrum(80, 70, 0.5).float()]), energy=0.99)
    check_energy(matrix, found, 0.99)


def test_a_wide_subspace(device: torch.device) -> None:
    # 83 components are wanted, and a subspace of 104 is less than half of the side.
    matrix = spectrum(240, 230, 0.6).float()
    shares = torch.linalg.svdvals(matrix.double()).square()
    shares /= shares.sum()
    energy = float(shares[:83].sum()) - 1e-6
    assert NARROW < 104 <= MOST_DIRECTIONS * 230
    (found,) = run(device, [matrix], [Subspace(torch.empty(0, 240), shares)], energy=energy)
    check_energy(matrix, found, energy)


def test_budgets(device: torch.device) -> None:
    matrices = updates()
    truth = reference.truncated_svd_list(matrices, energy=0.8)
    bytes_of = [4 * f.rank * (sum(m.shape) + 1) for m, f in zip(matrices, truth, strict=True)]
    # Just enough, with room for a component more where the optimum is not promised, and too little.
    enough = [size + 4 * (sum(m.shape) + 1) + 1 for m, size in zip(matrices, bytes_of, strict=True)]
    for start in (None, subspaces(matrices)):
        for matrix, ours in zip(
            matrices, run(device, matrices, start, energy=0.8, budgets_bytes=enough), strict=True
        ):
            check_energy(matrix, ours, 0.8)
        short = run(device, matrices, start, energy=0.8, budgets_bytes=[*bytes_of[:4], None])
        for ours, best in zip(short[:4], truth, strict=False):
            assert not ours.pays and ours.rank >= best.rank and ours.energy == 0.0
            assert ours.left.numel() == ours.sigma.numel() == ours.right.numel() == 0
        assert short[4].pays


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("number", [1, 3])
def test_not_finite_names_the_matrix(device: torch.device, number: int, stop: str) -> None:
    matrices = updates()
    matrices[number][-1, -1] = math.nan
    matrices[4][0, 0] = math.inf
    with pytest.raises(RuntimeError, match=f"matrix {number} holds NaN or Inf"):
        run(device, matrices, subspaces(updates()), **{stop: STOPS[stop]})


def test_types_and_more_matrices_than_a_batch_takes(device: torch.device) -> None:
    matrices = [spectrum(3, 2, 1.0, seed) for seed in range(70)]
    matrices = [m if seed % 23 == 0 else m.float() for seed, m in enumerate(matrices)]
    found = run(device, matrices, energy=0.6)
    truth = reference.truncated_svd_list(matrices, energy=0.6)
    for ours, best in zip(found, truth, strict=True):
        assert ours.rank == best.rank and ours.sigma.dtype == best.sigma.dtype
        assert torch.allclose(ours.left, best.left, atol=1e-5)


def test_same_bits_again_from_the_same_start(device: torch.device) -> None:
    first, again = (
        run(device, updates(0.1), subspaces(updates()), energy=0.9, seed=3) for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
