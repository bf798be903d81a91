"""The calls that the benches compare with, and the inputs on which they meet; for any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fedkd_fast import ops, reference
from fedkd_fast.ops._layer_mse import layer_sums
from fedkd_fast.reference import DENOMINATOR_FLOOR

# ---- distill_loss --------------------------------------------------------------------------------

# A gradient is at most about 2, times 1 / R; torch's own kernels round bfloat16 several times.
GRADIENT_ROUNDINGS = 16

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_losses(mentor: Tensor, mentee: Tensor, labels: Tensor) -> Tensor:
    """Write the loss the way one does in torch, with each log-softmax computed once."""
    log_t, log_s = mentor.log_softmax(1), mentee.log_softmax(1)
    ce_t = functional.nll_loss(log_t, labels, reduction="none")
    ce_s = functional.nll_loss(log_s, labels, reduction="none")
    kl_t = functional.kl_div(log_t, log_s.detach(), reduction="none", log_target=True).sum(1)
    kl_s = functional.kl_div(log_s, log_t.detach(), reduction="none", log_target=True).sum(1)
    weight = 1 / (ce_t + ce_s).detach().clamp(min=DENOMINATOR_FLOOR)
    return (ce_t + kl_t * weight).mean() + (ce_s + kl_s * weight).mean()


def our_losses(mentor: Tensor, mentee: Tensor, labels: Tensor) -> Tensor:
    return ops.distill_loss(mentor, mentee, labels).total


def our_losses_in_place(mentor: Tensor, mentee: Tensor, labels: Tensor) -> Tensor:
    return ops.distill_loss(mentor, mentee, labels, in_place=True).total


def native_distill_loss(
    mentor: Tensor, mentee: Tensor, labels: Tensor, out: ops.DistillBuffers
) -> tuple[Tensor, Tensor]:
    """Call the kernel alone, which computes values and gradients without autograd."""
    ops.distill_loss_out(mentor, mentee, labels, out)
    return out.grad_mentor, out.grad_mentee


def train_step(losses: Losses, mentor: Tensor, mentee: Tensor, labels: Tensor) -> None:
    mentor.grad = mentee.grad = None
    losses(mentor, mentee, labels).backward()


def true_gradients(mentor: Tensor, mentee: Tensor, labels: Tensor) -> list[Tensor]:
    """Both gradients of the specification, in float64."""
    with torch.enable_grad():
        wide = [logits.detach().double().requires_grad_() for logits in (mentor, mentee)]
        train_step(lambda *inputs: reference.distill_loss(*inputs).total, wide[0], wide[1], labels)
    return [logits.grad for logits in wide if logits.grad is not None]


def check_gradient(gradient: Tensor | None, truth: Tensor) -> float:
    """Return the largest error of a gradient, times R; fail where it is too large."""
    assert gradient is not None, "there is no gradient"
    error = float((gradient.double() - truth).abs().max()) * len(gradient)
    allowed = GRADIENT_ROUNDINGS * torch.finfo(gradient.dtype).eps
    assert error <= allowed, f"a gradient is off by {error:.3g}, allowed are {allowed:.3g}"
    return error


# ---- layer_mse, projected_mse --------------------------------------------------------------------

Layers = list[Tensor]  # mentor's and mentee's of each pair
Compare = Callable[[Layers, Tensor], Tensor]


def eager_maps(layers: Layers, scale: Tensor) -> Tensor:
    """Each sample with a weight of its own, as D asks for."""
    pairs = zip(layers[::2], layers[1::2], strict=True)
    errors = [(mentor - mentee).square().mean((1, 2, 3)) for mentor, mentee in pairs]
    return (torch.stack(errors).sum(0) * scale).sum()


def our_maps(layers: Layers, scale: Tensor) -> Tensor:
    pairs = zip(layers[::2], layers[1::2], strict=True)
    return torch.stack([ops.layer_mse(*pair, scale).total for pair in pairs]).sum()


def native_maps(layers: Layers, scale: Tensor, out: Layers) -> tuple[Tensor, ...]:
    """Call the kernel alone, which writes both gradients of each pair into `out`."""
    results = scale.new_empty(()), torch.empty_like(scale)
    for mentor, mentee, *gradients in zip(
        layers[::2], layers[1::2], out[::2], out[1::2], strict=True
    ):
        sums = layer_sums(mentor)
        arguments = mentor, mentee, scale, None, True
        ops._library.native.layer_mse_out(*arguments, *results, *gradients, sums)
    return tuple(out)


def eager_states(layers: Layers, scale: Tensor) -> Tensor:
    mentor, mentee, weight = layers
    return ((mentor - functional.linear(mentee, weight)).square().mean((1, 2)) * scale).sum()


def our_states(layers: Layers, scale: Tensor) -> Tensor:
    return ops.projected_mse(*layers, scale).total


def our_states_bf16(layers: Layers, scale: Tensor) -> Tensor:
    return ops.projected_mse(*layers, scale, products=torch.bfloat16).total


def layer_step(compare: Compare, layers: Layers, scale: Tensor) -> tuple[Tensor | None, ...]:
    for layer in layers:
        layer.grad = None
    compare(layers, scale).backward()
    return tuple(layer.grad for layer in layers)


def check_layers(
    found: tuple[Tensor | None, ...], compare: Compare, layers: Layers, scale: Tensor, eps: float
) -> float:
    """Return the largest error of a gradient, relative to its largest value."""
    with torch.enable_grad():
        wide = [layer.detach().double().requires_grad_() for layer in layers]
        truth = layer_step(compare, wide, scale.double())
    worst = 0.0
    for gradient, wanted in zip(found, truth, strict=True):
        assert gradient is not None and wanted is not None, "there is no gradient"
        error = float((gradient.double() - wanted).abs().max() / wanted.abs().max())
        assert error <= GRADIENT_ROUNDINGS * eps, f"a gradient is off by {error:.3g}"
        worst = max(worst, error)
    return worst


# ---- truncated_svd -------------------------------------------------------------------------------

ENERGY = 0.95
POWER = 0.75  # σ_k ~ k^-0.75: between single gradients and deltas of many Adam steps
DRIFT = 0.2  # the part of an update that is new

Factors = tuple[Tensor, Tensor, Tensor]
Earlier = list[reference.Subspace]  # of each matrix


def updates(
    batch: int, rows: int, cols: int, seed: int, device: torch.device | None = None
) -> Tensor:
    # The numbers are those of the CPU; their factorisation takes a CPU minutes for a whole model.
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, cols)
    left, right = (
        torch.linalg.qr(torch.randn(batch, side, width, generator=generator).to(device))[0]
        for side in (rows, cols)
    )
    return (left * torch.arange(1, width + 1, device=device).float() ** -POWER) @ right.mT


def our_svd(matrix: Tensor, earlier: Earlier, rank: int) -> Factors:
    svd = ops.truncated_svd(matrix, energy=ENERGY)
    return svd.U, svd.S, svd.Vh


def our_warm_svd(matrix: Tensor, earlier: Earlier, rank: int) -> Factors:
    found = ops.truncated_svd_list(list(matrix), energy=ENERGY, earlier=earlier)
    return reference.padded(found, matrix)[:3]


def torch_svd(matrix: Tensor, earlier: Earlier, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    return u[..., :kept], s[..., :kept], vh[..., :kept, :]


def gram_eigh(matrix: Tensor, earlier: Earlier, rank: int) -> Factors:
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    s = values.clamp(min=0).sqrt().flip(-1)
    kept = max(reference.select_rank(one, ENERGY) for one in s)
    v = vectors.flip(-1)[..., :kept]
    return matrix @ v / s[..., None, :kept], s[..., :kept], v.mT


def svd_lowrank_oracle(matrix: Tensor, earlier: Earlier, rank: int) -> Factors:
    """Told the true rank, which a real caller does not know."""
    u, s, v = torch.svd_lowrank(matrix, q=int(1.25 * rank) + 8, niter=2)
    return u, s, v.mT


SVDS: dict[str, Callable[[Tensor, Earlier, int], Factors]] = {
    "ours": our_svd,
    "ours-warm": our_warm_svd,
    "torch.linalg.svd": torch_svd,
    "gram+eigh": gram_eigh,
    "svd_lowrank-oracle": svd_lowrank_oracle,
}


def check_energy(matrix: Tensor, factors: Factors) -> float:
    """Return the largest lost share of a matrix's energy; fail where it exceeds 1 - ENERGY."""
    u, s, vh = factors
    lost = (matrix - (u * s[..., None, :]) @ vh).double().square().sum((1, 2))
    share = float((lost / matrix.double().square().sum((1, 2))).max())
    assert share <= 1 - ENERGY, f"{share:.4f} of the energy is lost, allowed are {1 - ENERGY:.4f}"
    return share
