"""truncated_svd_list on the CPU: its stops, budgets and starts, and what must not matter."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from svd_cases import lost_share, most_rank, problems
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.reference import Factors, Subspace

# What fp32 can make of a norm, as a share of the largest.
NORM_SLACK = 1e-5


def powerlaw(rows: int, cols: int, power: float = 0.8, seed: int = 0) -> Tensor:
    """A matrix with σ_k = k^-power, float32."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, side, generator=generator, dtype=torch.float64))[0]
    sigma = torch.arange(1, side + 1, dtype=torch.float64) ** -power
    return ((left * sigma) @ right.T).float()


def drifted(matrix: Tensor, share: float = 0.2) -> Tensor:
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9))
    return matrix + noise * (share * matrix.norm() / noise.norm())


# Square, tall, wide, small, and one that iterates only with a long tail.
MODEL = [powerlaw(150, 150), powerlaw(400, 90), powerlaw(90, 400), powerlaw(20, 30), powerlaw(9, 1)]


def same(first: list[Factors], second: list[Factors]) -> bool:
    return all(
        a.rank == b.rank and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("energy", [0.6, 0.95, 0.99, 0.9999, 1.0])
def test_a_whole_model_by_energy(energy: float) -> None:
    for matrix, factors in zip(MODEL, ops.truncated_svd_list(MODEL, energy=energy), strict=True):
        assert problems(matrix, energy, factors) == []
        assert factors.pays and energy < factors.energy + (energy == 1.0)


def test_one_limit_for_each() -> None:
    energies = [0.5, 0.9, 0.95, 0.98, 0.7]
    found = ops.truncated_svd_list(MODEL, energy=energies)
    for matrix, energy, factors in zip(MODEL, energies, found, strict=True):
        assert problems(matrix, energy, factors) == []


@pytest.mark.parametrize("rank", [0, 1, 7, 10_000])
def test_by_rank(rank: int) -> None:
    truth = reference.truncated_svd_list(MODEL, rank=rank)
    for found, wanted in zip(ops.truncated_svd_list(MODEL, rank=rank), truth, strict=True):
        assert found.rank == wanted.rank
        assert torch.allclose(found.sigma, wanted.sigma, rtol=NORM_SLACK, atol=NORM_SLACK)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6, 1.5])
def test_by_error(share: float) -> None:
    errors = [share * float(matrix.double().norm()) for matrix in MODEL]
    truth = reference.truncated_svd_list(MODEL, error=errors)
    found = ops.truncated_svd_list(MODEL, error=errors)
    for matrix, wanted, factors, best in zip(MODEL, errors, found, truth, strict=True):
        assert math.sqrt(lost_share(matrix, factors)) * matrix.double().norm() < wanted
        energy = max(0.0, 1 - share**2)
        assert best.rank <= factors.rank <= most_rank(tuple(matrix.shape), energy, best.rank)


@pytest.mark.parametrize("floor", [0.01, 0.05, 0.3, 2.0])
def test_by_floor(floor: float) -> None:
    # Components near the floor may fall on either side.
    near = 1.05
    most, least = (
        [one.rank for one in reference.truncated_svd_list(MODEL, floor=edge)]
        for edge in (floor / near, floor * near)
    )
    found = ops.truncated_svd_list(MODEL, floor=floor)
    for matrix, factors, low, high in zip(MODEL, found, least, most, strict=True):
        assert low <= factors.rank <= high
        skew = factors.left @ factors.left.T - torch.eye(factors.rank)
        assert factors.rank == 0 or float(skew.abs().max()) < NORM_SLACK
        # What is left out is what the floor says.
        singular = torch.linalg.svdvals(matrix.double())
        tail = float(singular[singular < floor / near].square().sum())
        assert (
            lost_share(matrix, factors) * float(singular.square().sum())
            <= tail + near * (high - low) * floor**2 + NORM_SLACK
            if factors.rank
            else True
        )


@pytest.mark.parametrize("kind", ["flat", "falling"])
def test_what_does_not_pay_is_said_without_vectors(kind: str) -> None:
    shapes = [(100, 100), (30, 40), (300, 80)]
    power = {"flat": 0.0, "falling": 1.5}[kind]
    matrices = [powerlaw(*shape, power=power) for shape in shapes]
    budgets = [4 * matrix.numel() for matrix in matrices]
    found = ops.truncated_svd_list(matrices, energy=0.9, budgets_bytes=budgets)
    truth = reference.truncated_svd_list(matrices, energy=0.9, budgets_bytes=budgets)
    for matrix, factors, wanted in zip(matrices, found, truth, strict=True):
        assert factors.pays is wanted.pays is (kind == "falling")
        assert len(factors.sigma) == len(factors.left) == len(factors.right)
        if factors.pays:
            assert problems(matrix, 0.9, factors) == []
        else:
            assert len(factors.sigma) == 0
            assert 4 * factors.rank * (sum(matrix.shape) + 1) >= matrix.nbytes


def test_the_budget_counts_to_the_byte() -> None:
    matrix = powerlaw(100, 90)
    rank = ops.truncated_svd_list([matrix], energy=0.9)[0].rank
    bytes_needed = 4 * rank * (100 + 90 + 1)
    for budget, pays in ((bytes_needed, False), (bytes_needed + 1, True), (None, True), (0, False)):
        (factors,) = ops.truncated_svd_list([matrix], energy=0.9, budgets_bytes=[budget])
        assert factors.pays is pays and factors.rank == rank


@pytest.mark.parametrize("shape", [(150, 150), (400, 140), (140, 400), (257, 131)])
@pytest.mark.parametrize("energy", [0.8, 0.9, 0.95])
def test_warm_and_hinted_starts_keep_every_promise(shape: tuple[int, int], energy: float) -> None:
    earlier = powerlaw(*shape, power=1.2)
    matrix = drifted(earlier)
    known = ops.truncated_svd_list([earlier], energy=energy)[0].subspace()
    cold = ops.truncated_svd_list([matrix], energy=energy)
    for start in (known, Subspace(known.basis[:0], known.shares)):
        warm = ops.truncated_svd_list([matrix], energy=energy, earlier=[start])
        assert problems(matrix, energy, warm[0]) == []
        # Another way leaves other last bits: the start was used.
        assert not same(warm, cold)


def test_images_of_small_values_beside_a_large_one_are_orthogonal() -> None:
    generator = torch.Generator().manual_seed(5)
    for rows, cols, energy in ((80, 40, 0.99), (192, 64, 0.998), (400, 150, 0.998)):
        matrix = torch.randn(rows, cols, generator=generator)
        matrix[:, :2] += torch.randn(rows, 1, generator=generator) * math.sqrt(cols) / 0.3
        (factors,) = ops.truncated_svd_list([matrix], energy=energy)
        assert problems(matrix, energy, factors) == []
        identity = torch.eye(factors.rank, dtype=torch.float64)
        for vectors in (factors.left.double(), factors.right.double()):
            assert float((vectors @ vectors.T - identity).abs().max()) < 4e-6


def test_slack_for_rounding_does_not_cost_components() -> None:
    # A flat tail: 5e-6 of the energy are several of its components.
    generator = torch.Generator().manual_seed(6)
    side, few, energy = 600, 5, 0.999
    sigma = torch.full((side,), ((1 - 0.998999) / (side - few)) ** 0.5, dtype=torch.float64)
    sigma[:few] = (0.998999 / few) ** 0.5
    left, right = (
        torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    matrix = ((left * sigma) @ right).float()
    (factors,) = ops.truncated_svd_list([matrix], energy=energy)
    assert problems(matrix, energy, factors) == []


def test_products_beyond_the_range_of_int8_run_in_fp32() -> None:
    # As on machines that do not multiply int8: 32-bit sums of more terms could overflow.
    rows, cols = 133_300, 136
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(rows, 20, generator=generator) * 0.85 ** torch.arange(20)
    matrix = left @ torch.randn(20, cols, generator=generator)
    matrix += 0.1 * torch.randn(rows, cols, generator=generator)
    known = ops.truncated_svd_list([drifted(matrix)], energy=0.9)[0].subspace()
    for start in (None, known):
        (factors,) = ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])
        assert 5 < factors.rank < 20
        assert problems(matrix, 0.9, factors) == []


@pytest.mark.parametrize(
    "start",
    [
        Subspace(torch.full((5, 120), torch.nan), torch.tensor([0.3, 0.2], dtype=torch.float64)),
        Subspace(torch.zeros(5, 120), torch.tensor([0.3, 0.2], dtype=torch.float64)),
        Subspace(torch.ones(5, 120), torch.tensor([0.3, 0.2], dtype=torch.float64)),
        Subspace(torch.full((5, 120), 1e38), torch.tensor([1.0], dtype=torch.float64)),
        Subspace(torch.full((5, 120), 3e38), torch.tensor([0.3, 0.2], dtype=torch.float64)),
        Subspace(torch.full((5, 120), 1e-40), torch.tensor([0.3, 0.2], dtype=torch.float64)),
        Subspace(torch.zeros(0, 0), torch.tensor([torch.nan], dtype=torch.float64)),
        Subspace(torch.zeros(0, 0), torch.tensor([0.1, 0.4], dtype=torch.float64)),
        Subspace(torch.zeros(0, 0), torch.tensor([-1.0], dtype=torch.float64)),
        Subspace(torch.zeros(0, 0), torch.zeros(3, dtype=torch.float64)),
        Subspace(torch.eye(100, 120), torch.full((100,), 0.01, dtype=torch.float64)),
    ],
)
def test_a_useless_start_costs_no_promise(start: Subspace) -> None:
    for matrix in (powerlaw(120, 100), powerlaw(300, 200)):
        length = matrix.shape[0]
        basis = start.basis.repeat(1, 3)[:, :length].contiguous() if length > 120 else start.basis
        known = Subspace(basis, start.shares)
        (factors,) = ops.truncated_svd_list([matrix], energy=0.9, earlier=[known])
        assert problems(matrix, 0.9, factors) == []


CALL_AFTER_SETTING_THREADS = """
import torch
torch.set_num_threads({threads})
from fedkd_fast import ops
matrices = [torch.randn(300, 400), torch.randn(500, 200)] * 2
for energy in (0.5, 0.9, 0.9999):
    ops.truncated_svd_list(matrices, energy=energy)
print("done")
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_number_of_threads_may_be_set_first(threads: int) -> None:
    # MKL then keeps that number for itself, and a factorisation among other threads waits for it.
    script = CALL_AFTER_SETTING_THREADS.format(threads=threads)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
def test_absolute_stops_at_any_scale_of_float64(scale: float) -> None:
    matrix = powerlaw(40, 30).double() * scale
    singular = torch.linalg.svdvals(matrix)
    floor = float(singular[9] + singular[10]) / 2
    assert ops.truncated_svd_list([matrix], floor=floor)[0].rank == 10
    rest = float((singular[10:] / scale).norm()) * scale
    assert ops.truncated_svd_list([matrix], error=rest * 1.01)[0].rank == 10


def test_threads_do_not_matter() -> None:
    matrices = [powerlaw(*shape, seed=n) for n, shape in enumerate([(150, 140), (300, 130)] * 3)]
    known = [one.subspace() for one in ops.truncated_svd_list(matrices, energy=0.9)]
    after = [drifted(matrix) for matrix in matrices]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(ops.truncated_svd_list(after, energy=0.9, earlier=known))
            found.append(ops.truncated_svd_list(after, energy=0.9))
            # Alone or among others, in any place.
            alone = [
                ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])[0]
                for matrix, start in zip(reversed(after), reversed(known), strict=True)
            ]
            assert same(alone[::-1], found[-2])
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[2]) and same(found[0], found[4])
    assert same(found[1], found[3]) and same(found[1], found[5])


def test_the_seed_matters_and_nothing_else_is_drawn() -> None:
    matrices = [powerlaw(300, 300)]  # smaller ones go the Gram way where products are slow
    runs = [ops.truncated_svd_list(matrices, energy=0.9, seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize("shape", [(1000, 140), (1000, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_cost_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ids = torch.arange(7, 1000, 5)
    matrix = torch.zeros(shape, dtype=dtype)
    matrix[ids] = powerlaw(len(ids), shape[1]).to(dtype)
    (factors,) = ops.truncated_svd_list([matrix], energy=0.9)
    assert problems(matrix.float(), 0.9, factors) == []
    # Vectors of 1000 entries are no start for 199 rows, a spectrum is.
    start = Subspace(factors.left.float(), factors.shares)
    (again,) = ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])
    assert problems(matrix.float(), 0.9, again) == []
    untouched = torch.ones(1000, dtype=torch.bool)
    untouched[ids] = False
    assert not bool(factors.left[:, untouched].any()) or dtype == torch.float64


def test_strides_and_sixteen_bits() -> None:
    matrix = powerlaw(120, 100)
    for view in (matrix.T.contiguous().T, matrix.T, torch.stack([matrix, matrix], 2)[:, :, 0]):
        (factors,) = ops.truncated_svd_list([view], energy=0.9)
        assert problems(view, 0.9, factors) == []
    for dtype in (torch.bfloat16, torch.float16):
        (factors,) = ops.truncated_svd_list([matrix.to(dtype)], energy=0.9)
        assert factors.left.dtype == torch.float32
        assert problems(matrix.to(dtype).float(), 0.9, factors) == []


def test_zero_and_empty_matrices_among_others() -> None:
    matrices = [torch.zeros(100, 90), powerlaw(100, 90), torch.zeros(0, 5), torch.zeros(5, 0)]
    found = ops.truncated_svd_list(matrices, energy=0.9)
    assert [one.rank for one in found][0::2] == [0, 0] and found[1].rank > 0
    for matrix, factors in zip(matrices, found, strict=True):
        assert factors.left.shape == (factors.rank, matrix.shape[0])
        assert factors.right.shape == (factors.rank, matrix.shape[1])
    assert found[0].energy == 1.0
    assert ops.truncated_svd_list([], energy=0.9) == []


def test_the_reference_stops_alike() -> None:
    for stop in ({"energy": 0.9}, {"rank": 3}, {"error": 0.5}, {"floor": 0.2}):
        found = ops.truncated_svd_list(MODEL[3:], **stop)  # type: ignore[arg-type]
        truth = reference.truncated_svd_list(MODEL[3:], **stop)  # type: ignore[arg-type]
        assert [one.rank for one in found] == [one.rank for one in truth]
        for ours, theirs in zip(found, truth, strict=True):
            assert torch.allclose(ours.shares[: ours.rank], theirs.shares[: ours.rank], atol=1e-12)


def test_bad_lists() -> None:
    matrix = powerlaw(100, 90)
    known = ops.truncated_svd_list([matrix], energy=0.9)[0].subspace()
    with pytest.raises(ValueError, match="energy must have one entry per matrix: 1 matr"):
        ops.truncated_svd_list([matrix], energy=[0.9, 0.8])
    with pytest.raises(ValueError, match="rank must be a whole number, got 2.5"):
        ops.truncated_svd_list([matrix], rank=2.5)
    with pytest.raises(ValueError, match="floor must be finite and >= 0, got inf"):
        ops.truncated_svd_list([matrix], floor=math.inf)
    with pytest.raises(ValueError, match="earlier must have one entry per matrix"):
        ops.truncated_svd_list([matrix], energy=0.9, earlier=[None, None])
    with pytest.raises(ValueError, match="budgets_bytes must have one entry per matrix"):
        ops.truncated_svd_list([matrix], energy=0.9, budgets_bytes=[])
    with pytest.raises(RuntimeError, match="matrix 1 must have 2 dimensions"):
        ops.truncated_svd_list([matrix, torch.ones(2, 3, 4)], energy=0.9)
    with pytest.raises(RuntimeError, match="matrix 1 holds NaN or Inf"):
        ops.truncated_svd_list([matrix, matrix / 0], energy=0.9)
    with pytest.raises(RuntimeError, match=r"basis 0 must have shape \(L, 100\), got \(9, 90\)"):
        start = Subspace(torch.ones(9, 90), known.shares)
        ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])
    with pytest.raises(RuntimeError, match="basis 0 must be float32"):
        start = Subspace(known.basis.double(), known.shares)
        ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])
    with pytest.raises(RuntimeError, match="basis 0 must come with shares"):
        start = Subspace(known.basis, known.shares[:0])
        ops.truncated_svd_list([matrix], energy=0.9, earlier=[start])


def test_constants_are_those_of_the_kernel() -> None:
    from svd_cases import FINEST_SHARE, SMALL_SIDE

    text = (Path(__file__).parents[1] / "csrc" / "common" / "truncated_svd.h").read_text()
    assert f"kSmallSide = {SMALL_SIDE};" in text
    assert f"kFinestShare = {FINEST_SHARE:.0e};".replace("e-03", "e-3") in text
