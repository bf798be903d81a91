"""Matrices that nobody chose, and what truncated_svd_list promises of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.reference import Factors, Subspace

# As common/truncated_svd.h has them.
SMALL_SIDE, FINEST_SHARE = 24, 1e-3
MOST_EXCESS = 0.05
# Vectors of n entries in float32: each entry of a product of two carries at most n roundings, of
# which the square root survives.
ROUNDINGS = 8.0
FLOAT32_EPS = torch.finfo(torch.float32).eps
# Energies that differ by less are equal: which of them is larger is a matter of rounding.
TIE = 1e-12

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "slow power": lambda k: k**-0.3,
    "power": lambda k: k**-0.8,
    "steep power": lambda k: k**-2.0,
    "exponential": lambda k: torch.exp(-k / (1 + k[-1] / 12)),
    "steps": lambda k: 4.0 ** -torch.floor(4 * (k - 1) / k[-1]),
    "one huge": lambda k: torch.where(k == 1, 1e4, k**-0.5),
    "repeated": lambda k: torch.floor((k + 6) / 7) ** -0.7,
    "rank-deficient": lambda k: torch.where(k <= 1 + k[-1] // 3, k**-0.5, 0.0),
    "near break-even": lambda k: 1.0 - 0.9 * k / k[-1],
}
STARTS = ("cold", "hint", "warm", "drifted", "misleading")
# Of the sizes drawn; the others are as drawn.
SIDES = (1, 2, 3, 7, 16, 31, 64, 65, 72, 96, 100, 128, 150, 200, 257, 320, 384, 512, 700, 1024)


class Case(NamedTuple):
    rows: int
    cols: int
    spectrum: str
    energy: float
    scale: float
    start: str
    seed: int


def _orthonormal(rows: int, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def build(case: Case) -> tuple[Tensor, Subspace | None]:
    """Make the matrix and what is known of an earlier one."""
    generator = torch.Generator().manual_seed(case.seed)
    side = min(case.rows, case.cols)
    sigma = SPECTRA[case.spectrum](torch.arange(1, side + 1, dtype=torch.float64))
    left, right = (_orthonormal(n, side, generator) for n in (case.rows, case.cols))
    matrix = (left * (sigma * case.scale)) @ right.T
    if case.start == "cold":
        return matrix.float(), None
    earlier = matrix
    if case.start == "drifted":
        noise = torch.randn(case.rows, case.cols, generator=generator, dtype=torch.float64)
        earlier = matrix + noise * (0.3 * matrix.norm() / noise.norm())
    elif case.start == "misleading":
        left, right = (_orthonormal(n, side, generator) for n in (case.rows, case.cols))
        earlier = (left * sigma.flip(0).cumsum(0).flip(0)) @ right.T
    known = reference.truncated_svd_list([earlier.float()], energy=case.energy)[0].subspace()
    if case.start == "hint":
        known = Subspace(known.basis[:0], known.shares)
    return matrix.float(), known


def most_rank(shape: tuple[int, ...], energy: float, best: int) -> int:
    """What is promised of the rank: the optimum, or a little more where fp32 iterates."""
    exact = min(shape) <= SMALL_SIDE or energy > 1 - FINEST_SHARE
    return best if exact else best + max(1, int(MOST_EXCESS * best))


def lost_share(matrix: Tensor, factors: Factors) -> float:
    """Return ``|A - leftᵀ·diag(sigma)·right|² / |A|²`` in float64."""
    # A power of two keeps the squares in range, and changes no ratio.
    factor = 2.0 ** -math.frexp(float(matrix.abs().max()))[1]
    exact = matrix.double() * factor
    product = (factors.left.double().T * (factors.sigma.double() * factor)) @ factors.right.double()
    return float((exact - product).square().sum() / exact.square().sum())


def problems(matrix: Tensor, energy: float, factors: Factors) -> list[str]:
    """Name every promise that the factors break; empty where all hold."""
    found = []
    if not bool(matrix.any()):
        return [] if factors.rank == 0 else [f"rank {factors.rank} of a zero matrix"]
    if energy < 1.0 and not lost_share(matrix, factors) < 1.0 - energy:
        found.append(f"energy: {lost_share(matrix, factors):.9g} is lost of {1 - energy:.9g}")
    singular = torch.linalg.svdvals(matrix.double() / matrix.abs().max().double())
    best = reference.select_rank(singular, min(1.0, energy + TIE))
    if factors.rank > most_rank(tuple(matrix.shape), energy, best):
        found.append(f"rank: {factors.rank}, the smallest is {best}")
    floor = ROUNDINGS * FLOAT32_EPS * math.sqrt(max(matrix.shape))
    identity = torch.eye(factors.rank, dtype=torch.float64)
    for name, side in (("left", factors.left.double()), ("right", factors.right.double())):
        skew = float((side @ side.T - identity).abs().max()) if factors.rank else 0.0
        if not skew <= floor:
            found.append(f"{name} vectors: off orthonormal by {skew:.2g}")
    if not bool((factors.sigma[:-1] >= factors.sigma[1:]).all()):
        found.append("sigma does not descend")
    if factors.rank:
        peaks = factors.left.gather(1, factors.left.abs().argmax(1, keepdim=True))
        if not bool((peaks > 0).all()):
            found.append("a sign is not fixed")
    return found


def problems_of(case: Case) -> list[str]:
    """Factorise the case, and name every promise that is broken."""
    matrix, known = build(case)
    factors = ops.truncated_svd_list([matrix], energy=case.energy, earlier=[known])[0]
    return problems(matrix, case.energy, factors)
