"""The one door to the native ops: typed wrappers, fake kernels and autograd.

Every op has a specification of the same name in `fedkd_fast.reference` and a kernel of the same
name behind ``torch.ops.fedkd_fast``. Nothing here falls back to the specification: a missing binary
is an ImportError that names the command that mends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkd_fast.reference import (
    DistillLoss,
    Factors,
    Limits,
    Subspace,
    TruncatedSVD,
    padded,
    stop_of,
)

_LIBRARY = Path(__file__).parent / "libfedkd_fast_ops.so"


def _load() -> None:
    if not _LIBRARY.is_file():
        raise ImportError(
            f"{_LIBRARY.name} is missing from {_LIBRARY.parent}: build it with "
            "`pip install -e . --no-build-isolation` in the checkout, or reinstall fedkd-fast"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{_LIBRARY.name} does not fit this torch ({torch.__version__}; 2.10 or newer is "
            f"needed): {error}"
        ) from error


_load()
# Tests put another library of the same ops here.
_native = torch.ops.fedkd_fast


# ---- truncated_svd -------------------------------------------------------------------------------


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
    nothing = torch.empty(0, dtype=torch.float64)
    found = _native.truncated_svd(
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
        [torch.empty(context.new_dynamic_size(), dtype=torch.float64) for _ in matrices],
        torch.empty(len(matrices), dtype=torch.int64),
        torch.empty(len(matrices), 2, dtype=torch.float64),
    )


# ---- distill_loss --------------------------------------------------------------------------------


def distill_loss(
    mentor_logits: Tensor, mentee_logits: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> DistillLoss:
    """Compute both models' task and adaptive distillation losses and all gradients in one call.

    ``mentor_loss = mean_i [CE(y_i, t_i) + KL(s_i || t_i) / D_i]`` and
    ``mentee_loss = mean_i [CE(y_i, s_i) + KL(t_i || s_i) / D_i]`` with
    ``D_i = max(CE(y_i, t_i) + CE(y_i, s_i), 1e-6)``: FedKD (Nature Communications 13:2032),
    eqs (1)-(4), t the mentor's and s the mentee's softmax of row i. The denominator and the peer's
    probabilities are constants, so each loss has a gradient for its own model's logits only, and
    ``(mentor_loss + mentee_loss).backward()`` trains both.

    Args:
        mentor_logits: (R, C) float32, float64, bfloat16 or float16; finite.
        mentee_logits: (R, C), same dtype and device.
        labels: (R,) int64 in [0, C), or `ignore_index` for a row that does not count.
        ignore_index: the label of rows to leave out of the means; their gradients are 0.

    Returns:
        `DistillLoss`, float64 for float64 logits and float32 otherwise. Without a counted row both
        losses are 0.

    Raises:
        RuntimeError: a wrong shape, dtype or device; on the CPU also a label out of range. On CUDA
            such a label makes its row, and so the losses, NaN: raising would stall the stream.

    NaN or Inf in a row makes the losses NaN or Inf. The same bits for any thread count. One pass
    reads the logits and one writes both gradients, which are kept for backward: extra memory 2·R·C.
    Differentiable once.
    """
    mentor_loss, mentee_loss, statistics = _DistillLoss.apply(  # type: ignore[no-untyped-call]
        mentor_logits, mentee_logits, labels, ignore_index
    )
    return DistillLoss(mentor_loss, mentee_loss, *statistics.unbind())


class _DistillLoss(torch.autograd.Function):
    """Hands the gradients that the kernel has computed with the losses to backward."""

    @staticmethod
    def forward(
        ctx: Any, mentor_logits: Tensor, mentee_logits: Tensor, labels: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        mentor_loss, mentee_loss, pending_scale, statistics, grad_mentor, grad_mentee = (
            _native.distill_loss(mentor_logits, mentee_logits, labels, ignore_index)
        )
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pending_scale, grad_mentor, grad_mentee)
        return mentor_loss, mentee_loss, statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, mentor: Tensor | None, mentee: Tensor | None, statistics: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        pending_scale, grad_mentor, grad_mentee = ctx.saved_tensors
        wanted_mentor, wanted_mentee = ctx.needs_input_grad[:2]
        return (
            _scaled(grad_mentor, mentor, pending_scale) if wanted_mentor else None,
            _scaled(grad_mentee, mentee, pending_scale) if wanted_mentee else None,
            None,
            None,
        )


def _scaled(gradient: Tensor, outer: Tensor | None, pending_scale: Tensor) -> Tensor | None:
    if outer is None:
        return None
    factor = outer * pending_scale
    # On the CPU a look at the factor is cheap, and mostly saves a pass over the gradient.
    if factor.is_cpu and not torch.compiler.is_compiling() and factor.item() == 1.0:
        return gradient
    return gradient * factor


@torch.library.register_fake("fedkd_fast::distill_loss")
def _distill_loss_fake(
    mentor_logits: Tensor, mentee_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, classes = mentor_logits.shape
    double = mentor_logits.dtype == torch.float64
    real = torch.float64 if double else torch.float32
    return (
        mentor_logits.new_empty((), dtype=real),
        mentor_logits.new_empty((), dtype=real),
        mentor_logits.new_empty((), dtype=real),
        mentor_logits.new_empty(5, rows, dtype=real),
        mentor_logits.new_empty(rows, classes),
        mentor_logits.new_empty(rows, classes),
    )


# ---- pack_factors, unpack_factors, reconstruct ---------------------------------------------------


def pack_factors(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Quantise each row with its own step and width, and pack the codes without gaps.

    ``code = clamp(floor(value · 0.5 / scale) + 2^(b-1), 0, 2^b - 1)``; a row's codes form a
    little-endian bit stream, lowest bit first, that starts on a byte boundary.

    Args:
        values: (K, n) float32, finite.
        scale: (K,) float32, half of the row's quantisation step, at least 2^-125 where bits > 0.
        bits: (K,) uint8 in 0..16; a row of 0 bits takes no bytes and decodes to zeros. With values
            on a GPU, scale and bits may stay on the CPU: then nothing waits, and a CUDA graph can
            hold the call.

    Returns:
        Codes, uint8, of ``Σ_k ceil(n · bits[k] / 8)`` bytes; the same bytes on every machine.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a scale or width out of range.
    """
    codes: Tensor = _native.pack_factors(values.detach(), scale, bits)
    return codes


def unpack_factors(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    """Turn codes back into values, ``scale · (2 · code - (2^b - 1))``: the inverse of packing.

    Args:
        codes: uint8 of exactly ``Σ_k ceil(count · bits[k] / 8)`` bytes.
        scale: (K,) float32, half of the row's quantisation step.
        bits: (K,) uint8 in 0..16; scale and bits may stay on the CPU, as in `pack_factors`.
        count: values in a row, n.

    Returns:
        (K, n) float32; the same bits on every machine.

    Raises:
        RuntimeError: a wrong shape, dtype, device or length.
    """
    values: Tensor = _native.unpack_factors(codes, scale, bits, count)
    return values


def reconstruct(left: Tensor, right: Tensor) -> Tensor:
    """Multiply component-major factors in the fixed order of the wire format.

    ``out[i, j] = Σ_k left[k, i] · right[k, j]`` in float32, one fused multiply-add per term, k
    ascending from zero. Unlike a GEMM, the result has the same bits on every machine and for any
    thread count.

    Args:
        left: (K, P) float32.
        right: (K, Q) float32.

    Returns:
        (P, Q) float32; zeros for K = 0.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    product: Tensor = _native.reconstruct(left.detach(), right.detach())
    return product


@torch.library.register_fake("fedkd_fast::pack_factors")
def _pack_factors_fake(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    return values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("fedkd_fast::unpack_factors")
def _unpack_factors_fake(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    return codes.new_empty(bits.shape[0], count, dtype=torch.float32)


@torch.library.register_fake("fedkd_fast::reconstruct")
def _reconstruct_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])
