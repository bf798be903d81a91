"""The ops once more in plain torch: the executable specification, slow and clear.

Each function states what its namesake in `fedkd_fast.ops` must compute. Run in float64 it is the
truth that kernels are tested against; nothing in the package uses it unless the caller asks for
``backend="reference"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.reference_rans import rans_decode as rans_decode
from fedkd_fast.reference_rans import rans_encode as rans_encode
from fedkd_fast.reference_rounding import dense_step as dense_step
from fedkd_fast.reference_rounding import fit_factors as fit_factors
from fedkd_fast.reference_rounding import measure_rows as measure_rows
from fedkd_fast.reference_rounding import round_rows as round_rows

PAPER = DistillationConfig.paper()

# ---- truncated_svd -------------------------------------------------------------------------------


class TruncatedSVD(NamedTuple):
    """Factors of a batch of matrices, padded with zeros to the largest rank K of the batch."""

    U: Tensor  # (..., P, K) orthonormal columns
    S: Tensor  # (..., K) descending
    Vh: Tensor  # (..., K, Q) orthonormal rows
    rank: Tensor  # (...) int64
    energy: Tensor  # (...) float64, captured share of Σσ²; 1 for a zero matrix


class Subspace(NamedTuple):
    """What is worth knowing of a matrix when a similar one comes."""

    basis: Tensor  # (K, max(P, Q)) float32, the long-side vectors in order; K = 0: only the shares
    shares: Tensor  # (S,) float64 on the CPU, leading σ²/Σσ², descending


class Factors(NamedTuple):
    """Leading factors of one matrix; component-major, as they travel."""

    left: Tensor  # (K, P) orthonormal rows
    sigma: Tensor  # (K,) descending
    right: Tensor  # (K, Q) orthonormal rows
    rank: int  # that was wanted: K, or more than K = 0 where it did not pay
    energy: float  # captured share of Σσ²; 1 for a zero matrix
    shares: Tensor  # (S,) float64 on the CPU, leading σ²/Σσ²; S >= K

    @property
    def pays(self) -> bool:
        """Whether the factors are within their budget, and here."""
        return self.rank == len(self.sigma)

    def subspace(self) -> Subspace:
        """Return where a similar matrix may start from; the side of Q where both are as long."""
        wide = self.left.shape[1] <= self.right.shape[1]
        return Subspace(self.right if wide else self.left, self.shares)


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
    matrix: Tensor, *, energy: float | None = None, rank: int | None = None
) -> TruncatedSVD:
    """Specify `ops.truncated_svd`: ``torch.linalg.svd``, cut by energy or rank, signs fixed."""
    lead, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    matrices = list(matrix.detach().reshape(lead.numel(), rows, cols))
    found = truncated_svd_list(matrices, energy=energy, rank=rank) if matrices else []
    return padded(found, matrix)


def padded(found: Sequence[Factors], matrix: Tensor) -> TruncatedSVD:
    """Put the factors of a batch of matrices, (..., P, Q), into one tensor a side."""
    lead, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    width = max((len(one.sigma) for one in found), default=0)
    left = matrix.new_zeros(len(found), width, rows, dtype=dtype)
    sigma = matrix.new_zeros(len(found), width, dtype=dtype)
    right = matrix.new_zeros(len(found), width, cols, dtype=dtype)
    for index, one in enumerate(found):
        kept = len(one.sigma)
        left[index, :kept], sigma[index, :kept], right[index, :kept] = one[:3]
    return TruncatedSVD(
        left.mT.reshape(*lead, rows, width),
        sigma.reshape(*lead, width),
        right.reshape(*lead, width, cols),
        torch.tensor([one.rank for one in found], dtype=torch.int64, device="cpu").reshape(lead),
        torch.tensor([one.energy for one in found], dtype=torch.float64, device="cpu").reshape(
            lead
        ),
    )


Limits: TypeAlias = float | Sequence[float]


def stop_of(
    count: int,
    energy: Limits | None = None,
    rank: Limits | None = None,
    error: Limits | None = None,
    floor: Limits | None = None,
) -> tuple[str, list[float]]:
    """Tell which one of the four stops is given, and its limit for each of `count` matrices.

    Raises:
        ValueError: none or several of them, another number of limits than matrices, or one out of
            its range.
    """
    stops = {"energy": energy, "rank": rank, "error": error, "floor": floor}
    given = {name: limits for name, limits in stops.items() if limits is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of energy, rank, error and floor, got {given}")
    ((name, limits),) = given.items()
    each = [*map(float, limits)] if isinstance(limits, Sequence) else [float(limits)] * count
    if len(each) != count:
        raise ValueError(
            f"{name} must have one entry per matrix: {count} matrices, got {len(each)}"
        )
    for limit in each:
        if name == "energy" and not 0.0 < limit <= 1.0:
            raise ValueError(f"energy must lie in (0, 1], got {limit}")
        if name != "energy" and not (limit >= 0.0 and math.isfinite(limit)):
            raise ValueError(f"{name} must be finite and >= 0, got {limit}")
        if name == "rank" and limit != int(limit):
            raise ValueError(f"rank must be a whole number, got {limit}")
    return name, each


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
    """Specify `ops.truncated_svd_list`: ``torch.linalg.svd`` of each matrix, cut and signed.

    What is known of earlier matrices and the seed make the op faster, never better: they are not
    looked at.
    """
    del earlier, seed
    stop, limits = stop_of(len(matrices), energy, rank, error, floor)
    budgets = budgets_bytes or [None] * len(matrices)
    return [
        _truncated_svd(matrix, stop, limit, budget)
        for matrix, limit, budget in zip(matrices, limits, budgets, strict=True)
    ]


def _truncated_svd(matrix: Tensor, stop: str, limit: float, budget: int | None) -> Factors:
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    squares = s.square()
    total = float(squares.sum())
    if total == 0:
        kept = 0
    elif stop == "rank":
        kept = min(int(limit), s.numel())
    elif stop == "floor":
        kept = int((s >= limit).sum())
    elif stop == "error":
        # |A - A_K|² < error²
        ratio = limit / math.sqrt(total)
        share = 1.0 - ratio * ratio
        kept = select_rank(s, share) if share > 0 else 0
    else:
        kept = select_rank(s, limit)
    wanted = kept
    if budget is not None and 4 * kept * (sum(matrix.shape) + 1) >= budget:
        kept = 0
    left, sigma, right = u.mT[:kept], s[:kept], vh[:kept]  # (K, P), (K,), (K, Q)
    if kept:
        peaks = left.gather(1, left.abs().argmax(1, keepdim=True))
        signs = torch.where(peaks < 0, -1.0, 1.0).double()  # (K, 1)
        left, right = left * signs, right * signs
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return Factors(
        left.to(dtype),
        sigma.to(dtype),
        right.to(dtype),
        wanted,
        float(squares[:kept].sum()) / total if total else 1.0,
        squares / total if total else squares[:0],
    )


# ---- distill_loss --------------------------------------------------------------------------------

# Smallest denominator CE_t + CE_s; csrc/common/distill_loss.h has the same number.
DENOMINATOR_FLOOR = 1e-6


class DistillLoss(NamedTuple):
    """The loss to differentiate, its parts, and the statistics of each row, detached."""

    total: Tensor  # () L_t + L_s; each logit has the gradient that the configuration gives it
    mentor_loss: Tensor  # () L_t = task_mentor + distill_mentor
    mentee_loss: Tensor  # () L_s
    task_mentor: Tensor  # () weighted mean of task_weight · CE_t
    task_mentee: Tensor  # ()
    distill_mentor: Tensor  # () weighted mean of distill_weight · τ² · KL(s||t) / D
    distill_mentee: Tensor  # ()
    ce_mentor: Tensor  # (R,) in nats; 0 on rows that do not count
    ce_mentee: Tensor  # (R,)
    kl_mentor: Tensor  # (R,) KL(s||t) at the temperature, what the mentor minimises
    kl_mentee: Tensor  # (R,) KL(t||s), what the mentee minimises
    denominator: Tensor  # (R,) D; 1 on rows that do not count, and where it is constant


def distill_loss(
    mentor_logits: Tensor,
    mentee_logits: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    denominator_grad: Tensor | None = None,
    ignore_index: int = -100,
    config: DistillationConfig = PAPER,
) -> DistillLoss:
    """Specify `ops.distill_loss` in the dtype of the logits, for autograd to differentiate."""
    counted = labels != ignore_index
    weight = counted.to(mentor_logits.dtype)
    if sample_weight is not None:
        counted = counted & (sample_weight != 0)
        weight = torch.where(counted, sample_weight.to(weight.dtype), 0.0)
    weight = weight / torch.where(weight.sum() > 0, weight.sum(), 1.0)  # (R,), sums to 1
    zero = weight.new_zeros(())

    def cross_entropy(logits: Tensor) -> Tensor:
        found = functional.cross_entropy(
            logits,
            torch.where(counted, labels, 0),
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        return torch.where(counted, found, zero)

    def divergence(target: Tensor, own: Tensor) -> Tensor:
        log_target = (target / config.temperature).log_softmax(1)
        if config.targets == "detached":
            log_target = log_target.detach()
        log_own = (own / config.temperature).log_softmax(1)
        found = (log_target.exp() * (log_target - log_own)).sum(1)
        # Rounding can carry a divergence below zero; its gradient must pass all the same.
        return torch.where(counted, found + (-found.detach()).clamp(min=0), zero)

    def denominator(total: Tensor) -> Tensor:
        if config.denominator == "constant":
            return torch.ones_like(total)
        if config.denominator == "batch":
            total = (weight * total).sum().expand_as(total)
        return torch.where(counted, total.clamp(min=DENOMINATOR_FLOOR), 1.0)

    factor = config.divergence_factor(mentor_logits.shape[1])
    parts = []
    for own, peer in ((mentor_logits, mentee_logits), (mentee_logits, mentor_logits)):
        teacher = peer if config.loss == "joint" else peer.detach()
        ce, kl = cross_entropy(own), divergence(teacher, own)
        divisor = denominator(ce + cross_entropy(teacher))
        if config.denominator_gradient == "detached":
            divisor = divisor.detach()
        task = (weight * config.task_weight * ce).sum()
        parts.append((ce, kl, task, (weight * factor * kl / divisor).sum()))
    (ce_t, kl_t, task_t, distill_t), (ce_s, kl_s, task_s, distill_s) = parts
    divisor = denominator(ce_t + ce_s)
    total = task_t + distill_t + task_s + distill_s
    if denominator_grad is not None:
        # Adds nothing to the value.
        change = divisor - divisor.detach()
        total = total + (weight * denominator_grad.detach() * change).sum()
    return DistillLoss(
        total,
        (task_t + distill_t).detach(),
        (task_s + distill_s).detach(),
        *(value.detach() for value in (task_t, task_s, distill_t, distill_s)),
        *(value.detach() for value in (ce_t, ce_s, kl_t, kl_s, divisor)),
    )


# ---- layer_mse, projected_mse --------------------------------------------------------------------


class LayerMse(NamedTuple):
    """Squared error between one layer of two models: what to differentiate, and what it is of."""

    total: Tensor  # () Σ_n scale_n · errors_n
    errors: Tensor  # (N,) mean squared error of each sample, detached


def layer_mse(
    mentor: Tensor, mentee: Tensor, scale: Tensor, *, mask: Tensor | None = None
) -> LayerMse:
    """Specify `ops.layer_mse` in the dtype of the values, for autograd to differentiate."""
    counts = torch.ones_like(mentor, dtype=torch.bool)
    if mask is not None and mentor.dim() == 3:
        counts = mask[:, :, None].expand_as(mentor)
    elif mask is not None:
        counts = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(mentor)
    squares = torch.where(counts, mentor - mentee, 0.0).square().flatten(1).sum(1)
    errors = squares / counts.flatten(1).sum(1).clamp(min=1)
    return LayerMse((scale.detach() * errors).sum(), errors.detach())


def projected_mse(
    mentor: Tensor,
    mentee: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    mask: Tensor | None = None,
    weight_gradient: float = 1.0,
) -> LayerMse:
    """Specify `ops.projected_mse`, likewise."""
    # The value of the weight with a multiple of its gradient.
    weight = weight.detach() + weight_gradient * (weight - weight.detach())
    return layer_mse(mentor, mentee @ weight.mT, scale, mask=mask)


# ---- pack_factors, unpack_factors, reconstruct ---------------------------------------------------


def pack_factors(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Specify `ops.pack_factors`, one row and one bit at a time."""
    rows, places = [], torch.arange(16, device=values.device)
    for row, step, width in zip(values.float(), scale.float(), bits.tolist(), strict=True):
        if width == 0:
            continue
        half = 2 ** (width - 1)
        cells = torch.floor(row * (0.5 / step)).clamp(-half, half - 1)
        codes = cells.to(torch.int64) + half
        stream = (codes[:, None] >> places[:width]) & 1  # (n, b), lowest bit first
        flat = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).reshape(-1, 8)
        rows.append((flat << places[:8]).sum(1).to(torch.uint8))
    return torch.cat(rows) if rows else values.new_empty(0, dtype=torch.uint8)


def unpack_factors(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    """Specify `ops.unpack_factors`, one row and one bit at a time."""
    values = codes.new_zeros(bits.numel(), count, dtype=torch.float32)
    start, places = 0, torch.arange(16, device=codes.device)
    for index, width in enumerate(bits.tolist()):
        size = -(-count * width // 8)
        stream = (codes[start : start + size, None].long() >> places[:8]) & 1
        start += size
        if width:
            code = stream.flatten()[: count * width].reshape(count, width) << places[:width]
            values[index] = scale[index].float() * (2 * code.sum(1) - (2**width - 1)).float()
    return values


def reconstruct(left: Tensor, right: Tensor) -> Tensor:
    """Specify `ops.reconstruct`, bit for bit: one fused multiply-add per term, k ascending."""
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float32)
    for column, row in zip(left.double(), right.double(), strict=True):
        # The product of two float32 is exact in float64.
        total = _sum_to_odd(total.double(), column[:, None] * row[None, :]).float()
    return total


def _sum_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y in float64, an inexact sum rounded to its neighbour whose last bit is set.

    Rounded to nearest, a sum could fall on a tie between two float32, and the next rounding would
    no longer know on which side of it the exact one lies. The last bit keeps it off ties, on its
    side of them: float64 has more than two bits beyond float32.
    """
    total = x + y
    # What the rounding left out, exactly (Knuth's TwoSum); NaN where the sum is infinite.
    part = total - x
    error = (x - (total - part)) + (y - part)
    wrong = (error.abs() > 0) & (total.view(torch.int64) % 2 == 0)
    return torch.where(wrong, total.nextafter(error.sign() * torch.inf), total)
