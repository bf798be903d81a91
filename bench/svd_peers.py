"""Who factorises one matrix to an energy: fedkd_fast, and the calls that one has today.

Peers that cannot know the rank are given it ("told the rank"), which no real caller could.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from deltas import Pair, tall
from torch import Tensor

from fedkd_fast import ops
from fedkd_fast.reference import Factors, Subspace, select_rank


class Product(NamedTuple):
    """What a method found: ``left · diag(sigma) · right``."""

    left: Tensor  # (P, K)
    sigma: Tensor | None  # (K,); None where the method makes no SVD
    right: Tensor  # (K, Q)


@dataclass(frozen=True)
class Case:
    """A matrix, and what is known of it and of the one before by energy."""

    name: str
    matrix: Tensor
    squares: float  # |A|²
    optimum: dict[float, int]  # K
    earlier: dict[float, Factors]  # of the matrix of the round before

    @classmethod
    def of(cls, pair: Pair, energies: list[float]) -> Case:
        """Find the smallest ranks, and what a sender would know from the round before."""
        sigma = torch.linalg.svdvals(tall(pair.current.double()))
        return cls(
            pair.name,
            pair.current,
            float(pair.current.double().square().sum()),
            {energy: select_rank(sigma, energy) for energy in energies},
            {
                energy: ops.truncated_svd_list([pair.previous], energy=energy)[0]
                for energy in energies
            },
        )

    def subspace(self, start: str, energy: float) -> Subspace | None:
        """Return what the op is given at a start that is warm, a hint, or cold."""
        if start == "cold":
            return None
        basis, shares = self.earlier[energy].subspace()
        return Subspace(basis if start == "warm" else basis[:0], shares)


STARTS = ("warm", "hint", "cold")
Call = Callable[[Case, float], Product]


@dataclass(frozen=True)
class Method:
    """A way to factorise a matrix."""

    call: Call
    needs: tuple[str, ...] = ()  # modules
    complete: bool = False  # returns all components: one call serves every energy
    most_rounds: int | None = None  # of a slow one

    def missing(self) -> list[str]:
        """Import what it needs and return what is not there.

        A library that comes later has threads that no limit was set for.
        """
        found = []
        for module in self.needs:
            try:
                importlib.import_module(module)
            except ImportError:
                found.append(module.partition(".")[0])
        return found


# ---- ours ----------------------------------------------------------------------------------------


def ours(cases: list[Case], energy: float, start: str) -> list[Product]:
    found = ops.truncated_svd_list(
        [case.matrix for case in cases],
        energy=energy,
        earlier=[case.subspace(start, energy) for case in cases],
    )
    return [Product(one.left.mT, one.sigma, one.right) for one in found]


def ours_from(start: str) -> Call:
    return lambda case, energy: ours([case], energy, start)[0]


# ---- peers ---------------------------------------------------------------------------------------


def cut(product: Product, energy: float, squares: float) -> Product:
    """Keep the fewest components that hold the energy, or all of them."""
    left, sigma, right = product
    if sigma is None:
        return product
    short = int((sigma.double().square().cumsum(0) <= energy * squares).sum())
    kept = min(short + 1, len(sigma))
    return Product(left[:, :kept], sigma[:kept], right[:kept])


def torch_svd(case: Case, energy: float) -> Product:
    return Product(*torch.linalg.svd(case.matrix, full_matrices=False))


def torch_svd_tall(case: Case, energy: float) -> Product:
    """Spare LAPACK the wide matrices, which cost it two to three times as much."""
    u, s, vh = torch.linalg.svd(tall(case.matrix), full_matrices=False)
    return turned(case, u, s, vh)


def turned(case: Case, u: Tensor, s: Tensor | None, vh: Tensor) -> Product:
    """Turn factors of the tall matrix into those of the matrix."""
    rows, cols = case.matrix.shape
    return Product(u, s, vh) if rows >= cols else Product(vh.mT, s, u.mT)


def gram_eigh(case: Case, energy: float) -> Product:
    matrix = tall(case.matrix)
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    sigma = values.clamp(min=0).sqrt().flip(0)
    kept = select_rank(sigma, energy)
    sigma, v = sigma[:kept], vectors.flip(1)[:, :kept]
    return turned(case, matrix @ v / sigma, sigma, v.mT)


def svd_lowrank(case: Case, energy: float) -> Product:
    torch.manual_seed(0)
    width = min(int(1.25 * case.optimum[energy]) + 8, min(case.matrix.shape))
    u, s, v = torch.svd_lowrank(case.matrix, q=width, niter=2)
    return cut(Product(u, s, v.mT), energy, case.squares)


def numpy_svd(case: Case, energy: float) -> Product:
    """Factorise as FedKD's public code does; its search for the rank is not counted."""
    return Product(*map(torch.from_numpy, np.linalg.svd(case.matrix.numpy(), full_matrices=False)))


def sklearn_svd(case: Case, energy: float) -> Product:
    from sklearn.utils.extmath import randomized_svd

    found = randomized_svd(case.matrix.numpy(), case.optimum[energy], random_state=0)
    return Product(*map(torch.from_numpy, found))


def propack(case: Case, energy: float) -> Product:
    from scipy.sparse.linalg import svds

    found = svds(case.matrix.numpy(), case.optimum[energy], solver="propack")
    # It returns views that run backwards, which torch does not take.
    return Product(*(torch.from_numpy(one.copy()) for one in found))


def powersgd(case: Case, energy: float) -> Product:
    """Take PowerSGD's one step from the round before (Vogels, Karimireddy, Jaggi 2019)."""
    before = case.earlier[energy]
    rows, cols = case.matrix.shape
    matrix, start = tall(case.matrix), before.right if rows >= cols else before.left
    p = torch.linalg.qr(matrix @ start.mT).Q
    return turned(case, p, None, p.mT @ matrix)


_BLAS = "threadpoolctl"  # numpy and scipy bring a BLAS whose threads torch does not know

METHODS: dict[str, Method] = {
    **{f"ours, {start}": Method(ours_from(start)) for start in STARTS},
    "torch.linalg.svd": Method(torch_svd, complete=True),
    "torch.linalg.svd, P >= Q": Method(torch_svd_tall, complete=True),
    "Gram + eigh": Method(gram_eigh),
    "torch.svd_lowrank, told the rank": Method(svd_lowrank),
    "numpy.linalg.svd": Method(numpy_svd, (_BLAS,), complete=True),
    "sklearn randomized_svd, told the rank": Method(sklearn_svd, ("sklearn.utils.extmath", _BLAS)),
    "scipy svds propack, told the rank": Method(
        propack, ("scipy.sparse.linalg", _BLAS), most_rounds=1
    ),
    "PowerSGD, one warm step": Method(powersgd),
}
