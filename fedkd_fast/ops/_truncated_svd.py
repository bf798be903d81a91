"""`truncated_svd` and `truncated_svd_list`: leading factors of one matrix, or of a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkd_fast.ops import _library
from fedkd_fast.reference import (
    Factors,
    Limits,
    Subspace,
    TruncatedSVD,
    padded,
    stop_of,
)


def truncated_svd(
    matrix: Tensor, *, energy: float | None = None, rank: int | None = None
) -> TruncatedSVD:
    """Factorise each matrix of a batch and keep the leading part that holds the wanted energy.

    ``matrix ≈ U · diag(S) · Vh``: `truncated_svd_list` for a batch in one tensor, padded.

    Args:
        matrix: (..., P, Q) float32, float64, bfloat16 or float16; any strides.
        energy: wanted share of the squared singular values, in (0, 1].
        rank: wanted rank instead, >= 0. Exactly one of `energy` and `rank` is given.

    Returns:
        `TruncatedSVD`, in float64 for float64 input and in float32 otherwise.

    Raises:
        ValueError: both or none of `energy` and `rank`, one out of range, or fewer than 2
            dimensions.
        RuntimeError: another dtype, or NaN or Inf in a matrix.
    """
    stop_of(1, energy, rank)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have 2 or more dimensions, got shape {tuple(matrix.shape)}")
    lead, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    matrices = list(matrix.detach().reshape(lead.numel(), rows, cols))
    return padded(truncated_svd_list(matrices, energy=energy, rank=rank), matrix)


def truncated_svd_list(
    matrices: Sequence[Tensor],
    *,
    energy: Limits | None = None,
    rank: Limits | None = None,
    error: Limits | None = None,
    floor: Limits | None = None,
    earlier: Sequence[Subspace | None] | None = None,
    budgets_bytes: Sequence[int | None] | None = None,
    seed: int = 0,
) -> list[Factors]:
    r"""Factorise the matrices of a whole model and keep the leading part of each.

    ``A ≈ leftᵀ · diag(sigma) · right``, stopped by one of

    * `energy` T: the smallest K with ``Σ_{i≤K} σ_i² / Σ_i σ_i² > T`` (FedKD, Nature Communications
      13:2032, eq (8); strict); 1 truncates nothing;
    * `rank`: ``K = min(rank, P, Q)``;
    * `error` e: the smallest K with ``|A - A_K|_F < e``;
    * `floor` s: every component with ``σ >= s``.

    The energy is that of the factors returned, not an estimate, and holds in exact arithmetic. With
    float32 input, a shorter side of more than 24, and at least a thousandth of the energy to lose,
    K may exceed the smallest: by 5 %, or by one component; with `floor`, components within a few
    per cent of it may fall on either side. Everything else is the optimum.

    Args:
        matrices: (P, Q) each, float32, float64, bfloat16 or float16, on one device; any strides.
        energy: wanted share of the squared singular values, in (0, 1]; one for all, or one each.
        rank: wanted rank, >= 0, likewise.
        error: largest Frobenius norm of what is left out, >= 0, likewise.
        floor: least singular value that is kept, >= 0, likewise.
        earlier: for each matrix `Factors.subspace()` of an earlier, similar one, or None: a warm
            start. Costs and last bits depend on it, what is promised does not.
        budgets_bytes: for each matrix the bytes that factors in float32, ``4·K·(P + Q + 1)``, have
            to stay below, or None. Where they cannot, no vectors are computed: the result has
            K = 0, and a `rank` above that.
        seed: of the random directions.

    Returns:
        `Factors` for each matrix, in float64 for float64 input and in float32 otherwise. Signs are
        fixed: the entry of each left vector with the largest magnitude is positive. A zero matrix
        has rank 0.

    Raises:
        ValueError: not exactly one stop, a limit out of its range, or lists of other lengths.
        RuntimeError: another dtype or shape, different devices, or NaN or Inf; names the matrix.

    Same input, earlier subspaces and seed give the same bits on one type of machine, for any number
    of threads. Matrices are shared out over threads, the longest first; where at least half of the
    rows of a float32 matrix are zero, the others alone are iterated on. A singular value beyond the
    range of the result's dtype is inf. Not differentiable. On CUDA the host waits once, for the
    ranks of all matrices; besides, for the norms where `error` or `floor` is wanted, and inside
    torch's solvers for each shape whose matrices do not all start from an earlier one.
    """
    stop, limits = stop_of(len(matrices), energy, rank, error, floor)
    if not matrices:
        return []
    known = [None] * len(matrices) if earlier is None else list(earlier)
    budgets = [None] * len(matrices) if budgets_bytes is None else list(budgets_bytes)
    for name, values in (("earlier", known), ("budgets_bytes", budgets)):
        if len(values) != len(matrices):
            raise ValueError(
                f"{name} must have one entry per matrix: {len(matrices)} matrices, "
                f"got {len(values)}"
            )
    sources = [_wide(matrix.detach()) for matrix in matrices]
    nothing = torch.empty(0, dtype=torch.float64, device="cpu")
    found = _library.native.truncated_svd(
        sources,
        stop,
        limits,
        [sources[0].new_empty(0, 0).float() if k is None else k.basis for k in known],
        [nothing if k is None else k.shares for k in known],
        [-1 if budget is None else max(0, budget) for budget in budgets],
        seed,
    )
    return [
        Factors(left, sigma, right, rank, captured / total if total else 1.0, share)
        for left, sigma, right, share, rank, (captured, total) in zip(
            *found[:4], found[4].tolist(), found[5].tolist(), strict=True
        )
    ]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix


@torch.library.register_fake("fedkd_fast::truncated_svd")
def _truncated_svd_fake(
    matrices: list[Tensor],
    stop: str,
    limits: list[float],
    bases: list[Tensor],
    shares: list[Tensor],
    budgets_bytes: list[int],
    seed: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    context = torch.library.get_ctx()
    widths = [context.new_dynamic_size() for _ in matrices]
    pairs = list(zip(matrices, widths, strict=True))
    return (
        [matrix.new_empty(width, matrix.shape[0]) for matrix, width in pairs],
        [matrix.new_empty(width) for matrix, width in pairs],
        [matrix.new_empty(width, matrix.shape[1]) for matrix, width in pairs],
        [
            torch.empty(context.new_dynamic_size(), dtype=torch.float64, device="cpu")
            for _ in matrices
        ],
        torch.empty(len(matrices), dtype=torch.int64, device="cpu"),
        torch.empty(len(matrices), 2, dtype=torch.float64, device="cpu"),
    )
