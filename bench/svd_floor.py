"""What a warm start cannot do without, at the speed of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deltas import tall
from svd_peers import Case
from torch import Tensor

REPEATS = 2  # the best of them, beside the bench's own rounds


@dataclass(frozen=True)
class Part:
    """Work of one kind and the seconds that it takes."""

    amount: float
    seconds: float

    @classmethod
    def at_rate_of(cls, amount: float, done: float, call: Callable[[], object]) -> Part:
        """Measure a call that does `done` of the work."""
        best = float("inf")
        for _ in range(REPEATS):
            began = time.thread_time()
            call()
            best = min(best, time.thread_time() - began)
        return cls(amount, amount / done * best)


@dataclass(frozen=True)
class Floor:
    """The least work for a matrix M×N, M >= N, at rank K, and no direction more than K.

    Rows of zeros are read, and count for nothing else.

    * bytes: the matrix is read once, the factors are written once; at the rate of a copy of the
      matrix.
    * coarse: half a pass and a whole pass from an earlier basis, ``3 · 2MNK`` operations, at the
      rate of int8 or fp32 at that shape, whichever is faster.
    * exact: the product that certifies the energy, ``2MNK``, an orthonormal basis, ``4NK²``, the
      Gram matrix of the images, ``MK²`` by its symmetry, and the vectors, ``2(M+N)K²``; at the rate
      of fp32 at the shape of the first.
    * eigen: ``9 K³`` at the rate of torch.linalg.eigh in fp32.
    """

    bytes: Part
    coarse: Part
    exact: Part
    eigen: Part

    @classmethod
    def measure(cls, case: Case, energy: float) -> Floor:
        """Take the rates at the shapes of this case."""
        whole, rank = case.matrix, max(1, case.optimum[energy])
        matrix = tall(whole[whole.any(1)])
        long, short = matrix.shape
        product = 2.0 * long * short * rank
        rows = torch.ones(rank, short)
        target = torch.empty_like(whole)
        size = 4.0 * whole.numel()
        exact = Part.at_rate_of(
            product + 4 * short * rank**2 + long * rank**2 + 2 * (long + short) * rank**2,
            product,
            lambda: rows @ matrix.mT,
        )
        levels, bits = rows.to(torch.int8), matrix.sign().to(torch.int8)
        coarse = min(
            Part(3 * product, 3 * product / exact.amount * exact.seconds),
            Part.at_rate_of(3 * product, product, lambda: torch._int_mm(levels, bits.mT)),
            key=lambda part: part.seconds,
        )
        # Of the images of random directions: no eigenvalue is the same as another.
        images = gram(matrix, rank)
        return cls(
            Part.at_rate_of(
                size + 4.0 * rank * sum(whole.shape), 2 * size, lambda: target.copy_(whole)
            ),
            coarse,
            exact,
            Part.at_rate_of(9.0 * rank**3, 9.0 * rank**3, lambda: torch.linalg.eigh(images)),
        )

    @property
    def seconds(self) -> float:
        """All parts one after the other."""
        parts = (self.bytes, self.coarse, self.exact, self.eigen)
        return sum(part.seconds for part in parts)

    @staticmethod
    def summary(floors: list[Floor]) -> dict[str, Any]:
        """Tell shares of the parts and the rates, in 10⁹ bytes or operations a second."""
        total = sum(floor.seconds for floor in floors)
        found: dict[str, Any] = {}
        for name in ("bytes", "coarse", "exact", "eigen"):
            parts: list[Part] = [getattr(floor, name) for floor in floors]
            spent = sum(part.seconds for part in parts)
            found[name] = {
                "share": round(spent / total, 3),
                "giga_per_s": float(f"{sum(part.amount for part in parts) / spent / 1e9:.3g}"),
            }
        return found


def gram(matrix: Tensor, rank: int) -> Tensor:
    noise = torch.randn(rank, matrix.shape[1], generator=torch.Generator().manual_seed(0))
    images = noise @ matrix.mT
    return images @ images.mT
