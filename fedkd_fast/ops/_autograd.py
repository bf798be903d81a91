"""What the differentiable ops share: gradients that were computed with the loss, once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def scaled(
    gradients: Sequence[Tensor], factor: Tensor, wanted: Sequence[bool], in_place: bool = False
) -> Gradients:
    """Return gradients · factor, without a pass over them where the factor is seen to be 1.

    In place, autograd refuses to hand the gradients out once more.
    """
    # On the CPU a look at the factor is cheap, and mostly saves a pass over the gradients.
    one = factor.is_cpu and not torch.compiler.is_compiling() and factor.item() == 1.0

    def times_factor(gradient: Tensor) -> Tensor:
        if one:
            return gradient
        return gradient.mul_(factor) if in_place else gradient * factor

    return tuple(
        times_factor(gradient) if there else None
        for gradient, there in zip(gradients, wanted, strict=True)
    )


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as they are; to differentiate them is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            f"{ctx.op} can be differentiated once only: its gradients have no gradients, so no "
            "loss can be made of them (create_graph=True)"
        )


def differentiable_once(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate the backward of an autograd function: gradients of gradients are an error.

    Torch's own `once_differentiable` lets them pass as constants, and a loss of them without an
    error, where the gradient of the result is a constant itself, as it is of a sum.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *outer: Tensor | None) -> Gradients:
            # What is compiled never has a graph of its gradients.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *outer)
            with torch.no_grad():
                gradients = backward(ctx, *outer)
            there = [gradient for gradient in gradients if gradient is not None]
            if not there:
                return gradients
            anchor = there[0].new_zeros((), requires_grad=True)
            found = iter(_NoSecondDerivative.apply(op, anchor, *there))  # type: ignore[no-untyped-call]
            return tuple(None if gradient is None else next(found) for gradient in gradients)

        return guarded

    return decorate
