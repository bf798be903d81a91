"""truncated_svd against float64: spectra, orthonormality, true error and optimal rank."""

from __future__ import annotations

import math

import pytest
import torch
from svd_cases import SMALL_SIDE, Case, build, lost_share, most_rank

from fedkd_fast import ops, reference

FLOAT32_EPS = torch.finfo(torch.float32).eps
# Factors are computed in float64 and rounded once: each entry of a product of two unit vectors of n
# entries carries at most n roundings, of which the square root survives.
ROUNDINGS = 8.0

SHAPES = [
    (96, 96),
    (192, 80),
    (64, 64),
    (96, 40),
    (40, 96),
    (31, 17),
    (17, 31),
    (1, 9),
    (9, 1),
    (1, 1),
    (128, 3),
]


def spectrum(rows: int, cols: int, power: float, seed: int = 0) -> torch.Tensor:
    """A matrix with σ_k ~ k^-power, float64."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, width, generator=generator, dtype=torch.float64))[0]
    sigma = torch.arange(1, width + 1, dtype=torch.float64) ** -power
    return (left * sigma) @ right.T


def factorise(
    device: torch.device, matrix: torch.Tensor, **wanted: float
) -> reference.TruncatedSVD:
    """Run the op on the device, and bring the factors home."""
    svd = ops.truncated_svd(matrix.to(device), **wanted)  # type: ignore[arg-type]
    return reference.TruncatedSVD(*(part.cpu() for part in svd))


def check_factors(matrix: torch.Tensor, svd: reference.TruncatedSVD) -> None:
    """Orthonormal, descending, sign-fixed, and as close to the matrix as the energy says."""
    exact, rank = matrix.double(), int(svd.rank)
    left, sigma, right = svd.U.double()[:, :rank], svd.S.double()[:rank], svd.Vh.double()[:rank]
    floor = ROUNDINGS * FLOAT32_EPS * math.sqrt(max(matrix.shape))
    identity = torch.eye(rank, dtype=torch.float64)
    if rank:
        assert float((left.T @ left - identity).abs().max()) <= floor
        assert float((right @ right.T - identity).abs().max()) <= floor
        assert bool((sigma[:-1] >= sigma[1:]).all())
        peaks = left.gather(0, left.abs().argmax(0, keepdim=True))
        assert bool((peaks > 0).all())
    total = float(exact.square().sum())
    lost = float((exact - (left * sigma) @ right).square().sum())
    if total:
        assert lost / total == pytest.approx(1 - float(svd.energy), abs=floor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.98, 0.9999, 1.0])
def test_energy_rank_is_the_optimum(
    device: torch.device, shape: tuple[int, int], energy: float
) -> None:
    matrix = spectrum(*shape, power=0.7).float()
    found = factorise(device, matrix, energy=energy)
    truth = reference.truncated_svd(matrix, energy=energy)
    assert int(truth.rank) <= int(found.rank) <= most_rank(shape, energy, int(truth.rank))
    assert energy == 1.0 or float(found.energy) > energy
    if int(found.rank) == int(truth.rank):
        floor = ROUNDINGS * FLOAT32_EPS * float(truth.S[0])
        exact = min(shape) <= SMALL_SIDE
        assert float((found.S - truth.S).max()) <= floor
        assert not exact or float((truth.S - found.S).max()) <= floor
    check_factors(matrix, found)


def test_strict_inequality_at_a_tie(device: torch.device) -> None:
    # Four equal singular values: two of them hold exactly half, which is not more than half.
    matrix = torch.eye(4)
    assert int(factorise(device, matrix, energy=0.5).rank) == 3
    assert int(reference.truncated_svd(matrix, energy=0.5).rank) == 3


def test_a_tie_that_rounding_decides_counts_as_a_miss(device: torch.device) -> None:
    for seed in range(190, 200):
        matrix, _ = build(Case(2, 2, "flat", 0.5, 0.01, "cold", seed))
        (factors,) = ops.truncated_svd_list([matrix.to(device)], energy=0.5)
        left, sigma, right = (part.cpu() for part in factors[:3])
        assert lost_share(matrix, factors._replace(left=left, sigma=sigma, right=right)) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    matrix = spectrum(48, 20, 0.8).to(dtype)
    svd = factorise(device, matrix, energy=0.97)
    assert svd.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_factors(matrix, svd)


def test_float64_keeps_float64_accuracy(device: torch.device) -> None:
    matrix = spectrum(30, 30, 3.0)
    svd = factorise(device, matrix, energy=1.0)
    truth = torch.linalg.svdvals(matrix)
    floor = ROUNDINGS * torch.finfo(torch.float64).eps * math.sqrt(30)
    assert float((svd.S - truth).abs().max()) <= floor
    assert float((svd.U.T @ svd.U - torch.eye(30)).abs().max()) <= floor


@pytest.mark.parametrize("rank", [0, 1, 5, 20, 99])
def test_rank_is_capped(device: torch.device, rank: int) -> None:
    svd = factorise(device, spectrum(20, 30, 0.5).float(), rank=rank)
    assert svd.U.shape == (20, min(rank, 20)) and int(svd.rank) == min(rank, 20)


@pytest.mark.parametrize("true_rank", [1, 3, 10])
def test_low_rank_input_is_recovered(device: torch.device, true_rank: int) -> None:
    matrix = spectrum(60, 40, 0.3)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    low = ((u[:, :true_rank] * s[:true_rank]) @ vh[:true_rank]).float()
    svd = factorise(device, low, energy=1 - 1e-9)
    assert int(svd.rank) <= true_rank + 1  # rounding to float32 adds a tail of about 1e-14
    check_factors(low, svd)


def test_full_energy_of_a_rank_deficient_matrix_is_orthonormal(device: torch.device) -> None:
    matrix = torch.zeros(12, 8)
    matrix[:, 0] = 1.0
    matrix[3, 1] = 2.0
    svd = factorise(device, matrix, energy=1.0)
    assert int(svd.rank) == 8
    check_factors(matrix, svd)


def test_repeated_singular_values(device: torch.device) -> None:
    matrix = torch.linalg.qr(spectrum(50, 50, 0.0))[0].float()
    svd = factorise(device, matrix, energy=0.91)
    assert int(svd.rank) == 46
    check_factors(matrix, svd)


def test_one_huge_entry(device: torch.device) -> None:
    matrix = torch.full((20, 30), 1e-6)
    matrix[3, 4] = 1e6
    svd = factorise(device, matrix, energy=0.99)
    assert int(svd.rank) == 1
    check_factors(matrix, svd)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e18, 1e30])
def test_scale_does_not_matter(device: torch.device, scale: float) -> None:
    matrix = spectrum(33, 21, 0.8).float()
    plain = factorise(device, matrix, energy=0.95)
    scaled = factorise(device, (matrix.double() * scale).float(), energy=0.95)
    assert int(plain.rank) == int(scaled.rank)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_energy_is_a_share_at_any_scale(device: torch.device, scale: float) -> None:
    svd = factorise(device, torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) * scale, rank=1)
    assert float(svd.energy) == pytest.approx(9 / 14)


def test_zero_and_empty_matrices(device: torch.device) -> None:
    zero = factorise(device, torch.zeros(2, 5, 7), energy=0.9)
    assert zero.rank.tolist() == [0, 0] and zero.U.shape == (2, 5, 0)
    assert zero.energy.tolist() == [1.0, 1.0]
    for shape in [(0, 4), (4, 0), (0, 3, 4), (3, 0, 4)]:
        svd = factorise(device, torch.empty(shape), energy=0.9)
        assert svd.S.numel() == 0


def test_batch_with_different_ranks_is_padded_with_zeros(device: torch.device) -> None:
    batch = torch.stack([spectrum(24, 16, power).float() for power in (0.2, 3.0)])
    batch = torch.cat([batch, torch.zeros(1, 24, 16)])
    svd = factorise(device, batch, energy=0.9)
    assert svd.rank[0] > svd.rank[1] > svd.rank[2] == 0
    assert bool((svd.S[1, int(svd.rank[1]) :] == 0).all())
    for index in range(3):
        single = factorise(device, batch[index], energy=0.9)
        check_factors(batch[index], single)
        assert int(single.rank) == int(svd.rank[index])
    assert factorise(device, batch.reshape(3, 1, 24, 16), energy=0.9).U.shape[:2] == (3, 1)


def test_strides_do_not_matter(device: torch.device) -> None:
    matrix = spectrum(40, 60, 0.8).float()
    wide = torch.zeros(40, 120)
    wide[:, ::2] = matrix
    for view in (wide[:, ::2], matrix.T.contiguous().T):
        assert not view.is_contiguous()
        assert torch.equal(
            factorise(device, view, energy=0.9).S, factorise(device, matrix, energy=0.9).S
        )


def test_same_bits_again(device: torch.device) -> None:
    batch = torch.stack([spectrum(30, 20, 0.6, seed).float() for seed in range(4)])
    first, second = (factorise(device, batch, energy=0.95) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(device: torch.device, bad: float) -> None:
    batch = torch.randn(3, 4, 5)
    batch[1, 2, 3] = bad
    with pytest.raises(RuntimeError, match="matrix 1 holds NaN or Inf"):
        factorise(device, batch, energy=0.9)


def test_bad_arguments() -> None:
    matrix = torch.randn(4, 4)
    with pytest.raises(ValueError, match="exactly one of energy, rank, error and floor"):
        ops.truncated_svd(matrix)
    with pytest.raises(ValueError, match="exactly one of energy, rank, error and floor"):
        ops.truncated_svd(matrix, energy=0.5, rank=1)
    for energy in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got"):
            ops.truncated_svd(matrix, energy=energy)
    with pytest.raises(ValueError, match="rank must be finite and >= 0, got -1"):
        ops.truncated_svd(matrix, rank=-1)
    with pytest.raises(ValueError, match="2 or more dimensions"):
        ops.truncated_svd(torch.randn(4), rank=1)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        ops.truncated_svd(torch.ones(4, 4, dtype=torch.int64), rank=1)


def test_opcheck() -> None:
    matrices = [spectrum(12, 8, 0.5).float(), spectrum(70, 80, 0.5).float()]
    found = ops.truncated_svd_list(matrices, energy=0.9)
    starts = [one.subspace() for one in found]
    nothing = [[torch.empty(0, 0)] * 2, [torch.empty(0, dtype=torch.float64)] * 2]
    known = [[start.basis for start in starts], [start.shares for start in starts]]
    for stop, limits in (("energy", [0.9, 0.8]), ("rank", [3.0, 4.0]), ("floor", [0.2, 0.3])):
        for earlier in (nothing, known):
            arguments = (matrices, stop, limits, *earlier, [-1, 500], 0)
            torch.library.opcheck(torch.ops.fedkd_fast.truncated_svd, arguments)
