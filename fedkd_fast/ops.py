"""The one door to the native ops: typed wrappers, fake kernels and autograd.

Every op has a specification of the same name in `fedkd_fast.reference` and a kernel of the same
name behind ``torch.ops.fedkd_fast``. Nothing here falls back to the specification: a missing binary
is an ImportError that names the command that mends it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkd_fast.reference import DistillLoss, TruncatedSVD

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
    matrix: Tensor,
    *,
    energy: float | None = None,
    rank: int | None = None,
    basis: Tensor | None = None,
) -> TruncatedSVD:
    r"""Factorise each matrix and keep the leading part that holds the wanted energy.

    ``matrix ≈ U · diag(S) · Vh`` with the smallest K for which
    ``Σ_{i≤K} σ_i² / Σ_i σ_i² > energy`` (FedKD, Nature Communications 13:2032, eq (8); strict), or
    with ``K = min(rank, P, Q)``. ``energy=1`` truncates nothing. A zero matrix has rank 0.

    Args:
        matrix: (..., P, Q) float32, float64, bfloat16 or float16; any strides.
        energy: wanted share of the squared singular values, in (0, 1].
        rank: wanted rank instead, >= 0. Exactly one of `energy` and `rank` is given.
        basis: (..., L, min(P, Q)) float32, a warm start: the short-side vectors of an earlier,
            similar matrix, `Vh` where P >= Q, else the transpose of `U`; rows of zeros pad. Wanted
            by energy, a float32 matrix that is nearly square, of a rank well below min(P, Q), then
            costs a subspace iteration. The energy is met all the same; the rank may exceed the
            smallest, the more the less alike the matrices are. A basis that does not serve is
            ignored.

    Returns:
        `TruncatedSVD`, in float64 for float64 input and in float32 otherwise. Signs are fixed: the
        entry of each left vector with the largest magnitude is positive.

    Raises:
        ValueError: both or none of `energy` and `rank`, one out of range, fewer than 2 dimensions,
            or a basis of another shape.
        RuntimeError: another dtype, or NaN or Inf in a matrix.

    Deterministic for one machine and thread count. Energies are computed in float64. Not
    differentiable. Cost: one Gram matrix and one symmetric eigenproblem of side min(P, Q). On CUDA
    the host waits for the scan that finds NaN and for the solvers, and a warm basis is not used.
    """
    if (energy is None) == (rank is None):
        raise ValueError(f"give exactly one of energy and rank, got energy={energy}, rank={rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    if rank is not None and rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}")
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have 2 or more dimensions, got shape {tuple(matrix.shape)}")
    source = matrix.detach()
    if source.dtype in (torch.bfloat16, torch.float16):
        source = source.float()
    lead, (rows, cols) = source.shape[:-2], source.shape[-2:]
    batch = source.reshape(lead.numel(), rows, cols)
    side = min(rows, cols)
    if basis is not None:
        if basis.dim() != matrix.dim() or (*basis.shape[:-2], basis.shape[-1]) != (*lead, side):
            raise ValueError(
                f"basis must have shape (*{tuple(lead)}, L, {side}), got {tuple(basis.shape)}"
            )
        basis = basis.detach().float().reshape(lead.numel(), basis.shape[-2], side)
    left, sigma, right, ranks, energies = _native.truncated_svd(
        batch, 1.0 if energy is None else energy, -1 if rank is None else rank, basis
    )
    kept = int(ranks.max()) if ranks.numel() else 0
    share = torch.where(energies[:, 1] > 0, energies[:, 0] / energies[:, 1], 1.0)
    return TruncatedSVD(
        left[:, :kept].mT.reshape(*lead, rows, kept),
        sigma[:, :kept].reshape(*lead, kept),
        right[:, :kept].reshape(*lead, kept, cols),
        ranks.reshape(lead),
        share.reshape(lead),
    )


@torch.library.register_fake("fedkd_fast::truncated_svd")
def _truncated_svd_fake(
    matrix: Tensor, energy: float, rank: int, basis: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, cols = matrix.shape
    width = min(rows, cols) if rank < 0 else min(rank, rows, cols)
    return (
        matrix.new_empty(batch, width, rows),
        matrix.new_empty(batch, width),
        matrix.new_empty(batch, width, cols),
        matrix.new_empty(batch, dtype=torch.int64),
        matrix.new_empty(batch, 2, dtype=torch.float64),
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
