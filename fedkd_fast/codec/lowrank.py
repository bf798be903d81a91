"""Sums of factors: a matrix that is never written out while its rank is small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkd_fast.reference import Factors

# Up to this share of the shorter side, factors of a sum are cheaper than the sum: to hold, …
STACKED_SHARE = 0.5
# … and to factorise and encode, where no dense mode can be smaller.
ENCODED_SHARE = 0.25
_USUAL, _LEFT = (2.0**-60, 2.0**60), 0.05  # squared norms, and what parts must leave of theirs


class LowRank:
    """``leftᵀ · right``, in place of the matrix.

    Args:
        left: (K, P) float32.
        right: (K, Q) float32.
        shape: of the tensor; its first dimension is P, the others make Q.
        dtype: of the tensor.
    """

    def __init__(
        self, left: Tensor, right: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.left, self.right, self.shape, self.dtype = left, right, shape, dtype

    @property
    def worth_keeping(self) -> bool:
        """Whether encoding the factors is cheaper than encoding the matrix."""
        side = min(self.left.shape[1], self.right.shape[1])
        if len(self.left) > ENCODED_SHARE * side or self.dtype != torch.float32:
            return False
        squares = [one.double().square().sum(1) for one in (self.left, self.right)]
        total = self.squared_norm()
        # Parts that nearly cancel, or leave float32's middle, lose in products what they are worth.
        return _USUAL[0] < total < _USUAL[1] and total > _LEFT * float(squares[0] @ squares[1])

    @property
    def T(self) -> LowRank:
        """The transpose, as a matrix."""
        return LowRank(self.right, self.left, (self.right.shape[1], self.left.shape[1]), self.dtype)

    def matrix(self) -> LowRank:
        """View the tensor as P×Q."""
        return LowRank(self.left, self.right, (self.left.shape[1], self.right.shape[1]), self.dtype)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Multiply the matrix with another one."""
        return self.left.T @ (self.right @ other)

    def dense(self) -> Tensor:
        """Write the tensor out."""
        return (self.left.T @ self.right).reshape(self.shape).to(self.dtype)

    def squared_norm(self) -> float:
        """Return the sum of squares of the matrix."""
        grams = [side.double() @ side.double().T for side in (self.left, self.right)]
        return float((grams[0] * grams[1]).sum())

    def factors(self, energy: float) -> Factors:
        """Return leading factors that hold this share of the energy: QR of both sides, SVD between.

        ``left = R_p · Q_pᵀ``, ``right = R_q · Q_qᵀ``: the singular values of ``R_pᵀ · R_q`` are
        those of the product, at ``O((P + Q)·K² + K³)``.
        """
        q_left, r_left = torch.linalg.qr(self.left.T.double())
        q_right, r_right = torch.linalg.qr(self.right.T.double())
        u, s, vh = torch.linalg.svd(r_left @ r_right.T)
        squares = s.square()
        shares = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        held = shares.cumsum(0)
        rank = min(int((held <= energy).sum()) + 1, len(s)) if float(s[0]) > 0 else 0
        return Factors(
            (q_left @ u[:, :rank]).T.float().contiguous(),
            s[:rank].float(),
            (vh[:rank] @ q_right.T).float().contiguous(),
            rank,
            float(held[rank - 1]) if rank else 1.0,
            shares,
        )


def distinct(values: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors without data of the same shapes, and the names that share an earlier value."""
    blanks = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in values.items()
    }
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(value), name) for name, value in values.items()}
    return blanks, {name: owner for name, owner in owners.items() if owner != name}


def stacked(
    pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...], dtype: torch.dtype
) -> LowRank:
    """Return the sum of ``leftᵀ · right`` over pairs."""
    left, right = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    return LowRank(left, right, shape, dtype)
