"""The ops once more in plain torch: the executable specification, slow and clear.

Each function states what its namesake in `fedkd_fast.ops` must compute. Run in float64 it is the
truth that kernels are tested against; nothing in the package uses it unless the caller asks for
``backend="reference"``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# ---- truncated_svd -------------------------------------------------------------------------------


class TruncatedSVD(NamedTuple):
    """Factors of a batch of matrices, padded with zeros to the largest rank K of the batch."""

    U: Tensor  # (..., P, K) orthonormal columns
    S: Tensor  # (..., K) descending
    Vh: Tensor  # (..., K, Q) orthonormal rows
    rank: Tensor  # (...) int64
    energy: Tensor  # (...) float64, captured share of Σσ²; 1 for a zero matrix


def select_rank(singular: Tensor, energy: float) -> int:
    """Find the smallest K with ``Σ_{i≤K} σ_i² / Σ σ_i² > energy`` (FedKD eq (8), strict).

    ``K = searchsorted(cumsum(σ²), energy · Σσ², right) + 1``, at most the number of σ; ``energy=1``
    keeps all of them and an all-zero spectrum none.

    Args:
        singular: (n,) descending singular values.
        energy: wanted share, in (0, 1].
    """
    if energy >= 1.0:
        return singular.numel()
    cumulative = singular.double().square().cumsum(0)
    if not singular.numel() or cumulative[-1] == 0:
        return 0
    index = int(torch.searchsorted(cumulative, energy * cumulative[-1], right=True))
    return min(index + 1, singular.numel())


def truncated_svd(
    matrix: Tensor,
    *,
    energy: float | None = None,
    rank: int | None = None,
    basis: Tensor | None = None,
) -> TruncatedSVD:
    """Specify `ops.truncated_svd`: ``torch.linalg.svd``, cut by energy or rank, signs fixed.

    A warm `basis` makes the op faster, never better: it is not looked at.
    """
    del basis
    lead, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    work = matrix.detach().reshape(lead.numel(), rows, cols).double()
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    parts = []
    for one in work:
        u, s, vh = torch.linalg.svd(one, full_matrices=False)
        if not s.numel() or s[0] == 0:
            kept = 0
        elif rank is not None:
            kept = min(rank, s.numel())
        else:
            kept = select_rank(s, 1.0 if energy is None else energy)
        u, s_kept, vh = u[:, :kept], s[:kept], vh[:kept]
        if kept:
            peaks = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
            signs = torch.where(peaks < 0, -1.0, 1.0).double()
            u, vh = u * signs, vh * signs[:, None]
        total = s.square().sum()
        share = s_kept.square().sum() / total if total > 0 else torch.ones((), dtype=torch.float64)
        parts.append((u, s_kept, vh, kept, share))
    width = max((part[3] for part in parts), default=0)
    left = work.new_zeros(len(parts), rows, width)
    sigma = work.new_zeros(len(parts), width)
    right = work.new_zeros(len(parts), width, cols)
    for index, (u, s_kept, vh, kept, _) in enumerate(parts):
        left[index, :, :kept], sigma[index, :kept], right[index, :kept] = u, s_kept, vh
    ranks = torch.tensor([part[3] for part in parts], dtype=torch.int64)
    shares = torch.tensor([float(part[4]) for part in parts], dtype=torch.float64)
    return TruncatedSVD(
        left.to(dtype).reshape(*lead, rows, width),
        sigma.to(dtype).reshape(*lead, width),
        right.to(dtype).reshape(*lead, width, cols),
        ranks.reshape(lead),
        shares.reshape(lead),
    )


# ---- distill_loss --------------------------------------------------------------------------------

# Smallest denominator CE_t + CE_s of a sample; csrc/common/distill_loss.h has the same number.
DENOMINATOR_FLOOR = 1e-6


class DistillLoss(NamedTuple):
    """Both losses, differentiable, and the statistics of each row, detached."""

    mentor_loss: Tensor  # () mean over counted rows of CE_t + KL(s||t) / D
    mentee_loss: Tensor  # () mean over counted rows of CE_s + KL(t||s) / D
    ce_mentor: Tensor  # (R,) in nats; 0 on ignored rows
    ce_mentee: Tensor  # (R,)
    kl_mentor: Tensor  # (R,) KL(s||t), what the mentor minimises
    kl_mentee: Tensor  # (R,) KL(t||s), what the mentee minimises
    denominator: Tensor  # (R,) D; 1 on ignored rows


def distill_loss(
    mentor_logits: Tensor, mentee_logits: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> DistillLoss:
    """Specify `ops.distill_loss` in the dtype of the logits, for autograd to differentiate."""
    counted = labels != ignore_index
    index = torch.where(counted, labels, 0)[:, None]
    log_t = mentor_logits.log_softmax(1)  # (R, C)
    log_s = mentee_logits.log_softmax(1)
    zero = log_t.new_zeros(())
    ce_t = torch.where(counted, -log_t.gather(1, index)[:, 0], zero)  # (R,)
    ce_s = torch.where(counted, -log_s.gather(1, index)[:, 0], zero)
    fixed_t, fixed_s = log_t.detach(), log_s.detach()
    # Rounding can carry a divergence below zero; its gradient must pass all the same.
    kl_t = (fixed_s.exp() * (fixed_s - log_t)).sum(1)
    kl_s = (fixed_t.exp() * (fixed_t - log_s)).sum(1)
    kl_t = torch.where(counted, kl_t + (-kl_t.detach()).clamp(min=0), zero)
    kl_s = torch.where(counted, kl_s + (-kl_s.detach()).clamp(min=0), zero)
    total = (ce_t + ce_s).detach().clamp(min=DENOMINATOR_FLOOR)
    denominator = torch.where(counted, total, torch.ones_like(total))
    count = counted.sum().clamp(min=1)
    return DistillLoss(
        (ce_t + kl_t / denominator).sum() / count,
        (ce_s + kl_s / denominator).sum() / count,
        ce_t.detach(),
        ce_s.detach(),
        kl_t.detach(),
        kl_s.detach(),
        denominator,
    )


# ---- pack_factors, unpack_factors, reconstruct ---------------------------------------------------


def pack_factors(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Specify `ops.pack_factors`, one row and one bit at a time."""
    rows = []
    for row, step, width in zip(values.float(), scale.float(), bits.tolist(), strict=True):
        if width == 0:
            continue
        half = 2 ** (width - 1)
        cells = torch.floor(row * (0.5 / step)).clamp(-half, half - 1)
        codes = cells.to(torch.int64) + half
        stream = (codes[:, None] >> torch.arange(width)) & 1  # (n, b), lowest bit first
        flat = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).reshape(-1, 8)
        rows.append((flat << torch.arange(8)).sum(1).to(torch.uint8))
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8)


def unpack_factors(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    """Specify `ops.unpack_factors`, one row and one bit at a time."""
    values = torch.zeros(bits.numel(), count, dtype=torch.float32)
    start = 0
    for index, width in enumerate(bits.tolist()):
        size = -(-count * width // 8)
        stream = (codes[start : start + size, None].long() >> torch.arange(8)) & 1
        start += size
        if width:
            code = stream.flatten()[: count * width].reshape(count, width) << torch.arange(width)
            values[index] = scale[index].float() * (2 * code.sum(1) - (2**width - 1)).float()
    return values


def reconstruct(left: Tensor, right: Tensor) -> Tensor:
    """Specify `ops.reconstruct`: float32 with one rounding per term, k ascending.

    The product of two float32 is exact in float64; adding the float32 sum there rounds once more
    (to 53 bits) before the float32 rounding. That double rounding differs from a true fused
    multiply-add only in ties broken beyond the 53rd bit, which the tests account for.
    """
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32)
    for column, row in zip(left.double(), right.double(), strict=True):
        total = (total.double() + column[:, None] * row[None, :]).float()
    return total
