"""`distill_loss`: both models' losses on the logits and all gradients in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.ops import _library
from fedkd_fast.ops._autograd import Gradients, differentiable_once, scaled
from fedkd_fast.reference import PAPER, DistillLoss

_STATISTICS = 5  # rows of statistics
_SUMMARY = 7  # scalars: losses, tasks, divergences, pending scale
# What gradients need that wait for the mean of D: doubles, and values of each row.
_MEANS, _ROW_STATES = 9, 32


class DistillBuffers(NamedTuple):
    """Memory that `distill_loss_out` writes to; `distill_buffers` makes it."""

    total: Tensor  # () L_t + L_s
    summary: Tensor  # (7,) L_t, L_s, task_t, task_s, distill_t, distill_s, pending scale
    statistics: Tensor  # (5, R) CE_t, CE_s, KL(s||t), KL(t||s), D
    grad_mentor: Tensor  # (R, C) of total, once multiplied by the pending scale
    grad_mentee: Tensor  # (R, C)
    workspace: Tensor | None  # float64; None where D is not the mean over the batch


def distill_loss(
    mentor_logits: Tensor,
    mentee_logits: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    denominator_grad: Tensor | None = None,
    ignore_index: int = -100,
    config: DistillationConfig = PAPER,
    in_place: bool = False,
) -> DistillLoss:
    """Compute both models' task and adaptive distillation losses and all gradients in one call.

    ``L_t = mean_i [task · CE(y_i, t_i) + distill · τ² · KL(s_i || t_i) / D_i]`` and
    ``L_s = mean_i [task · CE(y_i, s_i) + distill · τ² · KL(t_i || s_i) / D_i]`` with
    ``D_i = max(CE(y_i, t_i) + CE(y_i, s_i), 1e-6)``: FedKD (Nature Communications 13:2032),
    eqs (1)-(4), t the mentor's and s the mentee's softmax of row i. What gradients flow through,
    and the other forms that D and KL may take, are the fields of `DistillationConfig`; with
    ``denominator="constant"``, D = 1 in every row.

    Args:
        mentor_logits: (R, C) float32, float64, bfloat16 or float16; finite.
        mentee_logits: (R, C), same dtype and device.
        labels: (R,) int64 in [0, C), or `ignore_index` for a row that does not count.
        sample_weight: (R,) weights of the rows in the means, >= 0; a row of weight 0 does not
            count. None for equal ones.
        denominator_grad: (R,) derivative of the caller's further terms with respect to D_i,
            relative to the row's share of the weights; with D over the batch, their weighted mean
            is taken, and with a constant D it has no effect. For terms that D divides, where
            gradients flow through it.
        ignore_index: the label of rows to leave out of the means; their gradients are 0.
        config: the modes; those of hidden states and attention do not matter here.
        in_place: let the gradients take the memory of the logits, which nobody may read afterwards:
            then a few values of each row, and on the CPU one row of both models for each thread,
            are all the memory that it needs, and one backward is all there is. Contiguous logits
            only; not while compiling.

    Returns:
        `DistillLoss`, float64 for float64 logits and float32 otherwise; `total` alone is
        differentiable. Without a counted row the losses are 0.

    Raises:
        RuntimeError: a wrong shape, dtype or device; on the CPU also a label or weight out of
            range. On CUDA such a row, and so the losses, become NaN: raising would stall the
            stream.

    NaN or Inf in a row makes the losses NaN or Inf. The same bits for any thread count. Gradients
    are computed with the losses where one is wanted, and kept for backward: extra memory 2·R·C.
    Differentiable once.
    """
    if mentor_logits.dim() != 2:
        raise RuntimeError(
            f"mentor_logits must have shape (R, C), got {tuple(mentor_logits.shape)}"
        )
    if in_place and not (mentor_logits.is_contiguous() and mentee_logits.is_contiguous()):
        raise RuntimeError("in_place needs logits that are contiguous")
    total, summary, statistics = _DistillLoss.apply(  # type: ignore[no-untyped-call]
        mentor_logits,
        mentee_logits,
        labels,
        _real(sample_weight, mentor_logits),
        _real(denominator_grad, mentor_logits),
        ignore_index,
        config,
        in_place and not torch.compiler.is_compiling(),
        torch.is_grad_enabled(),
    )
    return DistillLoss(total, *summary.unbind()[:-1], *statistics.unbind())


def distill_buffers(logits: Tensor, config: DistillationConfig = PAPER) -> DistillBuffers:
    """Make buffers for logits of this shape, (R, C), dtype and device, and this configuration."""
    shape = logits.shape
    return _buffers(logits, config, logits.new_empty(shape), logits.new_empty(shape))


def _buffers(
    logits: Tensor, config: DistillationConfig, grad_mentor: Tensor, grad_mentee: Tensor
) -> DistillBuffers:
    rows = logits.shape[0]
    real = _real_dtype(logits)
    waits = config.denominator == "batch" and len(grad_mentor) == rows
    return DistillBuffers(
        logits.new_empty((), dtype=real),
        logits.new_empty(_SUMMARY, dtype=real),
        logits.new_empty((_STATISTICS, rows), dtype=real),
        grad_mentor,
        grad_mentee,
        logits.new_empty(_workspace(rows, real), dtype=torch.float64) if waits else None,
    )


def _workspace(rows: int, real: torch.dtype) -> int:
    return _MEANS + _ROW_STATES * rows // (1 if real == torch.float64 else 2)


def distill_loss_out(
    mentor_logits: Tensor,
    mentee_logits: Tensor,
    labels: Tensor,
    out: DistillBuffers,
    *,
    sample_weight: Tensor | None = None,
    denominator_grad: Tensor | None = None,
    ignore_index: int = -100,
    config: DistillationConfig = PAPER,
) -> None:
    """Compute `distill_loss` into buffers, without autograd: the least that a call can cost.

    ``total``'s gradients are ``out.grad_mentor · out.summary[-1]`` and likewise for the mentee; the
    factor is 1 on the CPU but for float16, where it keeps gradients in range. A gradient buffer may
    be the logits of its own model, which are then overwritten.

    Args:
        mentor_logits: as in `distill_loss`, like all that follow.
        mentee_logits: likewise.
        labels: likewise.
        out: contiguous buffers, as `distill_buffers` makes them.
        sample_weight: likewise, in the dtype of ``out.total``.
        denominator_grad: likewise, in that dtype.
        ignore_index: likewise.
        config: likewise.

    Raises:
        RuntimeError: as `distill_loss`; a buffer of another shape, dtype or device, or one that
            overlaps logits that it is not.
    """
    _library.native.distill_loss_out(
        mentor_logits,
        mentee_logits,
        labels,
        sample_weight,
        denominator_grad,
        ignore_index,
        *_mode(config, mentor_logits),
        True,
        *out,
    )


def _mode(
    config: DistillationConfig, logits: Tensor
) -> tuple[str, bool, bool, bool, float, float, float, float]:
    """Return a configuration as the native op takes it."""
    joint = config.loss == "joint"
    classes = logits.shape[1] if logits.dim() > 1 else 1
    return (
        config.denominator,
        config.denominator_gradient == "attached",
        joint,
        joint and config.targets == "attached",
        config.task_weight,
        config.divergence_factor(max(classes, 1)),
        config.temperature,
        config.label_smoothing,
    )


def _real_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _real(values: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return values of the rows in the dtype of the arithmetic; constants to autograd."""
    return None if values is None else values.detach().to(_real_dtype(logits))


class _DistillLoss(torch.autograd.Function):
    """Hands the gradients that the kernel has computed with the losses to backward."""

    @staticmethod
    def forward(
        ctx: Any,
        mentor_logits: Tensor,
        mentee_logits: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        denominator_grad: Tensor | None,
        ignore_index: int,
        config: DistillationConfig,
        in_place: bool,
        with_graph: bool,
    ) -> tuple[Tensor, ...]:
        # What is told to need gradients is also told so where there is no graph for them.
        wanted = with_graph and any(ctx.needs_input_grad[:2])
        shape = mentor_logits.shape
        arguments = (
            *(mentor_logits, mentee_logits, labels, sample_weight, denominator_grad, ignore_index),
            *_mode(config, mentor_logits),
            wanted,
        )
        if torch.compiler.is_compiling():
            out = DistillBuffers(*_library.native.distill_loss(*arguments))
        else:
            if not wanted:
                gradients = mentor_logits[:0], mentee_logits[:0]
            elif in_place:
                gradients = mentor_logits, mentee_logits
            else:
                gradients = mentor_logits.new_empty(shape), mentor_logits.new_empty(shape)
            out = _buffers(mentor_logits, config, *gradients)
            _library.native.distill_loss_out(*arguments, *out)
        ctx.in_place = in_place and wanted
        kept = out.grad_mentor, out.grad_mentee
        if ctx.in_place:
            # Who has kept the logits for its own backward must not take these for them.
            torch.autograd.graph.increment_version(kept)
            kept = kept[0].detach(), kept[1].detach()
        # Memory that is free after backward, whoever still holds the losses.
        ctx.save_for_backward(*kept)
        ctx.summary = out.summary  # for its last value, which nobody else sees
        ctx.workspace = out.workspace  # until the stream has passed
        ctx.mark_non_differentiable(out.summary, out.statistics)
        ctx.set_materialize_grads(False)
        return out.total, out.summary, out.statistics

    @staticmethod
    @differentiable_once("distill_loss")
    def backward(ctx: Any, outer: Tensor | None, *_: None) -> Gradients:
        if outer is None:
            return (None,) * 9
        factor = outer * ctx.summary[-1]
        gradients = scaled(ctx.saved_tensors, factor, ctx.needs_input_grad[:2], ctx.in_place)
        return *gradients, *(None,) * 7


@torch.library.register_fake("fedkd_fast::distill_loss")
def _distill_loss_fake(
    mentor_logits: Tensor, mentee_logits: Tensor, labels: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    rows, classes = mentor_logits.shape
    real = _real_dtype(mentor_logits)
    denominator, wanted = arguments[3], arguments[-1]
    kept = rows if wanted else 0
    waits = denominator == "batch" and wanted
    return (
        mentor_logits.new_empty((), dtype=real),
        mentor_logits.new_empty(_SUMMARY, dtype=real),
        mentor_logits.new_empty(_STATISTICS, rows, dtype=real),
        mentor_logits.new_empty(kept, classes),
        mentor_logits.new_empty(kept, classes),
        mentor_logits.new_empty(_workspace(rows, real) if waits else 0, dtype=torch.float64),
    )


@torch.library.register_fake("fedkd_fast::distill_loss_out")
def _distill_loss_out_fake(*arguments: Any) -> None:
    return None
