"""`distill_loss`: both models' losses on the logits and all gradients in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkd_fast.ops import _library
from fedkd_fast.reference import DistillLoss


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
            _library.native.distill_loss(mentor_logits, mentee_logits, labels, ignore_index)
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
