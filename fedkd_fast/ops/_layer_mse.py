"""`layer_mse`, `projected_mse`: squared errors between layers of two models and all gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from fedkd_fast.ops import _library
from fedkd_fast.ops._autograd import Gradients, differentiable_once, scaled
from fedkd_fast.reference import LayerMse

_BLOCK = 16384  # values of a block of positions: kLayerMseBlock


def layer_mse(
    mentor: Tensor, mentee: Tensor, scale: Tensor, *, mask: Tensor | None = None
) -> LayerMse:
    """Compare one layer of two models, by attention maps or by hidden states, with all gradients.

    ``errors_n = mean (mentor_n - mentee_n)²`` and ``total = Σ_n scale_n · errors_n``: the terms of
    FedKD's eq (5) (Nature Communications 13:2032), divided by D where `scale` is ``1 / (N · D)``.

    Args:
        mentor: attention maps (N, heads, L, L), hidden states (N, L, H) or (N, H): float32,
            float64, bfloat16 or float16.
        mentee: same shape and device; of two dtypes, both are taken in the wider one.
        scale: (N,), finite, a constant to autograd.
        mask: (N, L) bool, True for tokens: what belongs to others, rows and columns of maps, is
            left out of the means. It may be NaN, and its gradients are 0. None: all count.

    Returns:
        `LayerMse`: `total` is differentiable, `errors` is not. A sample without tokens has the
        error 0.

    Raises:
        RuntimeError: a wrong shape, dtype or device.

    The same bits for any thread count. Gradients are computed with the error where one is wanted,
    and kept for backward: extra memory one tensor for each. Of float16, whose range they would
    leave, they are computed in backward. Differentiable once.
    """
    _check_layer(mentor, mask)
    if mentee.shape != mentor.shape:
        raise RuntimeError(
            f"mentee must have the shape of mentor, {tuple(mentor.shape)}, "
            f"got {tuple(mentee.shape)}"
        )
    common = torch.promote_types(mentor.dtype, mentee.dtype)
    values = mentor.to(common), mentee.to(common)
    arguments = *values, _real(scale, common), mask, torch.is_grad_enabled()
    return LayerMse(*_LayerMse.apply(*arguments))  # type: ignore[no-untyped-call]


def projected_mse(
    mentor: Tensor,
    mentee: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    mask: Tensor | None = None,
    weight_gradient: float = 1.0,
    products: torch.dtype | None = None,
) -> LayerMse:
    """Compare hidden states of two widths: `layer_mse` of mentor and ``mentee · weightᵀ``.

    Args:
        mentor: hidden states (N, L, H_t) or (N, H_t), as in `layer_mse`.
        mentee: (N, L, H_s) or (N, H_s), finite even where `mask` is False.
        weight: (H_t, H_s), W_h of FedKD's eq (5).
        scale: as in `layer_mse`.
        mask: likewise.
        weight_gradient: what the gradient of `weight` is multiplied by.
        products: dtype of the factors of the three products, None for that of the mentee; where
            autocast is on, its dtype is taken. bfloat16 is faster where the machine has it.

    Returns:
        As `layer_mse`.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    _check_layer(mentor, mask)
    if mentor.dim() == 4 or mentee.shape[:-1] != mentor.shape[:-1]:
        raise RuntimeError(
            "mentor and mentee must be hidden states that agree in samples and tokens, got "
            f"shapes {tuple(mentor.shape)} and {tuple(mentee.shape)}"
        )
    if weight.shape != (mentor.shape[-1], mentee.shape[-1]):
        raise RuntimeError(
            f"weight must have shape {(mentor.shape[-1], mentee.shape[-1])}, "
            f"got {tuple(weight.shape)}"
        )
    common = torch.promote_types(mentor.dtype, mentee.dtype)
    kind = mentee.device.type
    if torch.is_autocast_enabled(kind) and mentee.dtype != torch.float64:
        products = torch.get_autocast_dtype(kind)
    if products is None:
        products = mentee.dtype
    factors = mentee.to(products), weight.to(products)
    return LayerMse(
        *_ProjectedMse.apply(  # type: ignore[no-untyped-call]
            mentor.to(common), *factors, _real(scale, common), mask, weight_gradient
        )
    )


def _check_layer(mentor: Tensor, mask: Tensor | None) -> None:
    if mentor.dim() not in (2, 3, 4):
        raise RuntimeError(
            "mentor must have shape (N, heads, L, L), (N, L, H) or (N, H), "
            f"got {tuple(mentor.shape)}"
        )
    if mask is not None and mentor.dim() == 2:
        raise RuntimeError("mask must be None for states (N, H), which have no tokens")


def _real(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scale.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)


def _grouped(values: Tensor) -> Tensor:
    """View values as the native op takes them, (N, groups, positions, values)."""
    if values.dim() == 4:
        return values
    return values[:, None] if values.dim() == 3 else values[:, None, None]


class _Found(NamedTuple):
    total: Tensor  # ()
    errors: Tensor  # (N,)
    grad_mentor: Tensor | None  # in the shape of the native op; None or empty if not wanted
    grad_mentee: Tensor | None
    workspace: Tensor


def _call(
    mentor: Tensor, mentee: Tensor, scale: Tensor, mask: Tensor | None, *wanted: bool
) -> _Found:
    left, right, maps = _grouped(mentor), _grouped(mentee), mentor.dim() == 4 and mask is not None
    if torch.compiler.is_compiling():
        return _Found(*_library.native.layer_mse(left, right, scale, mask, maps, *wanted))
    gradients = [left.new_empty(left.shape) if one else None for one in wanted]
    return _write(left, right, scale, mask, maps, *gradients)


def _call_in_place(mentor: Tensor, mentee: Tensor, scale: Tensor, mask: Tensor | None) -> _Found:
    """Let the mentor's gradient take the memory of the mentee's values."""
    left, right = _grouped(mentor), _grouped(mentee)
    return _write(left, right, scale, mask, False, right, None)


def _write(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    maps: bool,
    grad_mentor: Tensor | None,
    grad_mentee: Tensor | None,
) -> _Found:
    results = scale.new_empty(()), torch.empty_like(scale)
    found = _Found(*results, grad_mentor, grad_mentee, layer_sums(left))
    _library.native.layer_mse_out(left, right, scale, mask, maps, *found)
    return found


def layer_sums(values: Tensor) -> Tensor:
    """Make the workspace: a double for each block of positions."""
    samples, groups, positions, length = values.shape
    blocks = -(-positions // max(1, _BLOCK // max(1, length)))
    return values.new_empty(samples, groups * blocks, dtype=torch.float64)


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a gradient in the shape of its layer; None where it is not wanted."""
    return None if gradient is None or len(gradient) != len(like) else gradient.view(like.shape)


def _give(ctx: Any, found: _Found) -> tuple[Tensor, Tensor]:
    """Return total and errors, as autograd functions do."""
    ctx.workspace = found.workspace  # until the stream has passed
    ctx.mark_non_differentiable(found.errors)
    ctx.set_materialize_grads(False)
    return found.total, found.errors


class _LayerMse(torch.autograd.Function):
    """Hands the gradients that the kernel has computed with the errors to backward."""

    @staticmethod
    def forward(
        ctx: Any,
        mentor: Tensor,
        mentee: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        with_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.late = mentor.dtype == torch.float16
        # What is told to need gradients is also told so where there is no graph for them.
        now = with_graph and not ctx.late
        wanted = ctx.needs_input_grad[:2] if now else (False, False)
        found = _call(mentor, mentee, scale, mask, *wanted)
        if ctx.late:
            ctx.save_for_backward(mentor, mentee, scale, mask)
        else:
            ctx.save_for_backward(*(_shaped(part, mentor) for part in found[2:4]))
        return _give(ctx, found)

    @staticmethod
    @differentiable_once("layer_mse")
    def backward(ctx: Any, outer: Tensor | None, *_: None) -> Gradients:
        if outer is None:
            return (None,) * 5
        wanted = ctx.needs_input_grad[:2]
        if ctx.late:
            mentor, mentee, scale, mask = ctx.saved_tensors
            found = _call(mentor, mentee, scale * outer, mask, *wanted)
            gradients: Gradients = tuple(_shaped(part, mentor) for part in found[2:4])
        else:
            gradients = scaled(ctx.saved_tensors, outer, wanted)
        return *gradients, None, None, None


class _ProjectedMse(torch.autograd.Function):
    """One residual serves all: the mentor's gradient in place, and a factor of the others."""

    @staticmethod
    def forward(
        ctx: Any,
        mentor: Tensor,
        mentee: Tensor,
        weight: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        weight_gradient: float,
    ) -> tuple[Tensor, Tensor]:
        product = functional.linear(mentee, weight).to(mentor.dtype)
        ctx.weight_gradient = weight_gradient
        ctx.late = mentor.dtype == torch.float16
        if ctx.late:
            found = _call(mentor, product, scale, mask, False, False)
            ctx.save_for_backward(mentee, weight, mentor, product, scale, mask)
        else:
            found = (
                _call(mentor, product, scale, mask, True, False)
                if torch.compiler.is_compiling()
                else _call_in_place(mentor, product, scale, mask)
            )
            ctx.save_for_backward(mentee, weight, _shaped(found.grad_mentor, mentor))
        return _give(ctx, found)

    @staticmethod
    @differentiable_once("projected_mse")
    def backward(ctx: Any, outer: Tensor | None, *_: None) -> Gradients:
        if outer is None:
            return (None,) * 6
        mentee, weight, *rest = ctx.saved_tensors
        for_mentor, for_mentee, for_weight = ctx.needs_input_grad[:3]
        if ctx.late:
            mentor, product, scale, mask = rest
            late = _call(mentor, product, scale * outer, mask, True, False)
            found = _shaped(late.grad_mentor, mentor)
        else:
            (found,) = scaled(rest, outer, [True])
        gradient = cast(Tensor, found)
        factor, states = gradient.to(mentee.dtype).flatten(0, -2), mentee.flatten(0, -2)
        return (
            gradient if for_mentor else None,
            _product(factor, weight, -1.0).view(mentee.shape) if for_mentee else None,
            _product(factor.mT, states, -ctx.weight_gradient) if for_weight else None,
            *(None, None, None),
        )


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    # Zeros: compiled, 0 · NaN is not left out.
    return torch.addmm(left.new_zeros(1), left, right, beta=0.0, alpha=factor)


@torch.library.register_fake("fedkd_fast::layer_mse")
def _layer_mse_fake(
    mentor: Tensor,
    mentee: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    masks_values: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    samples, *rest = mentor.shape
    gradients = [mentor.new_empty(samples if one else 0, *rest) for one in wanted]
    return scale.new_empty(()), torch.empty_like(scale), *gradients, layer_sums(mentor)


@torch.library.register_fake("fedkd_fast::layer_mse_out")
def _layer_mse_out_fake(*arguments: Any) -> None:
    return None
