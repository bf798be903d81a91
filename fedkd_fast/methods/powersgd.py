"""PowerSGD (Vogels et al., NeurIPS 2019): updates of rank r by one subspace iteration a message.

A tensor of more than one dimension is a matrix M (P, Q), its first dimension against the others;
what the last message left out has been added to it (error feedback, on both legs)::

    A = orthonormal(M·B);  B ← Mᵀ·A;  M̂ = A·Bᵀ

B, (Q, r), starts the next message's iteration; the first one is drawn. Bytes: ``4·r·(P + Q)``, and
4 for each entry of vectors and of matrices where that would not be less.

The paper all-reduces A and B between workers, so that one iteration serves their mean. A star has
no such sum on the way: here each leg compresses its own message, the clients theirs and the server
the mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedkd_fast.methods.base import Method
from fedkd_fast.methods.fedavg import FEDAVG
from fedkd_fast.methods.packing import State
from fedkd_fast.trees import Tree


class SubspaceIteration:
    """Factors ``name/left``, (P, r), and ``name/right``, (Q, r), of matrices; other tensors raw.

    Args:
        rank: r; more: more bytes, finer updates.
        seed: of the first B.
    """

    def __init__(self, rank: int, seed: int) -> None:
        self._rank = rank
        self._generator = torch.Generator().manual_seed(seed)
        self._right: dict[str, Tensor] = {}  # B of the last message

    def _sides(self, value: Tensor) -> tuple[int, int] | None:
        """Return P and Q of what travels as factors."""
        if value.ndim < 2:
            return None
        rows, columns = value.shape[0], math.prod(value.shape[1:])
        return (rows, columns) if self._rank * (rows + columns) < rows * columns else None

    def layout(self, like: State) -> dict[str, Tensor]:
        """Return empty factors, or the tensors that travel as they are."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            sides = self._sides(value)
            if sides is None:
                found[name] = torch.zeros_like(value)
            else:
                found[f"{name}/left"], found[f"{name}/right"] = (
                    torch.zeros(side, self._rank, device="cpu") for side in sides
                )
        return found

    def pack(self, update: State) -> dict[str, Tensor]:
        """Iterate once from where the last message ended."""
        found: dict[str, Tensor] = {}
        for name, value in update.items():
            sides = self._sides(value)
            if sides is None:
                found[name] = value
                continue
            matrix = value.float().reshape(sides)
            start = self._right.get(name)
            if start is None:
                start = torch.randn(sides[1], self._rank, generator=self._generator, device="cpu")
            left = torch.linalg.qr(matrix @ start).Q.contiguous()
            right = matrix.T @ left
            self._right[name] = right
            found[f"{name}/left"], found[f"{name}/right"] = left, right
        return found

    def unpack(self, packed: State, like: State) -> dict[str, Tensor]:
        """Multiply factors out."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            if self._sides(value) is None:
                found[name] = packed[name]
            else:
                product = packed[f"{name}/left"] @ packed[f"{name}/right"].T
                found[name] = product.reshape(value.shape).to(value.dtype)
        return found

    def state(self) -> Tree:
        """Return where the next iterations start, and where the random numbers are."""
        return {"right": dict(self._right), "generator": self._generator.get_state()}

    def load(self, state: Tree) -> None:
        """Go on from there."""
        self._right = dict(state["right"])
        self._generator.set_state(state["generator"])


def _packing(config: Any, seed: int) -> SubspaceIteration:
    return SubspaceIteration(config.rank, seed)


POWERSGD = Method(
    "powersgd", FEDAVG.make_learner, exchanges=True, packing=_packing, feedback="both"
)
