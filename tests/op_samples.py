"""Every op with data and its truth, for tests that hold all ops to one rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.distillation import DistillationConfig

# Logits are float64, so kernel and specification differ by a handful of roundings each.
ROUNDINGS = 32
EPS = torch.finfo(torch.float64).eps

BITS = torch.tensor([4, 1, 0, 16, 7, 8], dtype=torch.uint8)
SCALE = torch.tensor([0.3, 1.0, 1.0, 1e-4, 0.03, 0.02])
COUNT = 1001
# Ways to code a row: with a table, with low bits that travel raw, not at all.
LEVELS = torch.tensor([0, 70, -60, 20], dtype=torch.int16)
MULTIPLIER = torch.tensor([1.0, 20.0, 1.0, 9.0])  # the last row has escaped symbols
CODED = 40
LOGIT_ROWS = 12


class Op(NamedTuple):
    """An op as a function of its data, and its truth.

    Scales and widths are the same for any seed and lie on the CPU, where nothing waits for them.
    """

    sample: Callable[[int], list[Tensor]]  # data by seed, on the CPU
    run: Callable[..., Any]
    truth: Callable[..., list[Tensor]]  # on the CPU
    eps: float = EPS  # of the arithmetic that float64 results come from
    finish: Callable[[Any], list[Tensor]] = list  # what torch does with what `run` returns

    def call(self, *data: Tensor) -> list[Tensor]:
        return self.finish(self.run(*data))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Losses(NamedTuple):
    found: reference.DistillLoss
    logits: list[Tensor]  # mentor's, mentee's


def with_graph(
    loss: Callable[..., reference.DistillLoss],
    config: DistillationConfig,
    mentor: Tensor,
    mentee: Tensor,
    labels: Tensor,
) -> Losses:
    logits = [mentor.detach().requires_grad_(), mentee.detach().requires_grad_()]
    return Losses(loss(*logits, labels, config=config), logits)


def losses_and_gradients(losses: Losses) -> list[Tensor]:
    gradients = torch.autograd.grad(losses.found.total, losses.logits, retain_graph=True)
    return [*(value.detach() for value in losses.found), *gradients]


# Of an earlier matrix with few components, so that a subspace is taken.
STEEP = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def of_low_rank(seed: int) -> list[Tensor]:
    return [noise(seed, 90, 3) @ noise(seed + 100, 3, 80)]


def svd_from_earlier(matrix: Tensor) -> list[Tensor]:
    earlier = reference.Subspace(matrix.new_empty(0, 90), STEEP)
    (found,) = ops.truncated_svd_list([matrix], energy=0.9, earlier=[earlier])
    return [found.sigma.double()]


def distill_loss(classes: int, config: DistillationConfig) -> Op:
    def sample(seed: int) -> list[Tensor]:
        labels = torch.arange(LOGIT_ROWS) * (seed + 3) % classes
        labels[5] = -100
        return [*(noise(s, LOGIT_ROWS, classes).double() for s in (seed, seed + 100)), labels]

    return Op(
        sample,
        lambda *data: with_graph(ops.distill_loss, config, *data),
        lambda *data: losses_and_gradients(with_graph(reference.distill_loss, config, *data)),
        finish=losses_and_gradients,
    )


class Compared(NamedTuple):
    found: reference.LayerMse
    layers: list[Tensor]  # that have gradients


def layer_mse(mse: Callable[..., reference.LayerMse], *shapes: tuple[int, ...]) -> Op:
    """Compare layers of these shapes, or project the second by the third."""
    specified = getattr(reference, mse.__name__)
    samples, tokens = shapes[0][0], shapes[0][-2]

    def sample(seed: int) -> list[Tensor]:
        layers = [noise(seed + 100 * i, *shape).double() for i, shape in enumerate(shapes)]
        mask = torch.arange(samples * tokens).view(samples, tokens) % (seed + 3) > 0
        return [*layers, noise(seed + 300, samples).double().abs(), mask]

    def compare(call: Callable[..., reference.LayerMse], data: Sequence[Tensor]) -> Compared:
        layers = [layer.detach().requires_grad_() for layer in data[:-2]]
        return Compared(call(*layers, data[-2], mask=data[-1]), layers)

    def finish(compared: Compared) -> list[Tensor]:
        total = compared.found.total
        gradients = torch.autograd.grad(total, compared.layers, retain_graph=True)
        return [*(value.detach() for value in compared.found), *gradients]

    return Op(
        sample,
        lambda *data: compare(mse, data),
        lambda *data: finish(compare(specified, data)),
        finish=finish,
    )


def encoded(values: Tensor) -> Tensor:
    return reference.rans_encode([values], MULTIPLIER, LEVELS, [0])[0]


def decoded(decode: Callable[..., list[Tensor]], codes: Tensor) -> list[Tensor]:
    sizes = torch.tensor([len(codes)])
    return decode(codes, sizes, 1 / MULTIPLIER, LEVELS, [len(LEVELS)], [CODED], [0])


OPS = {
    "distill_loss": distill_loss(1500, DistillationConfig.paper()),
    "distill_loss of few classes": distill_loss(100, DistillationConfig.paper()),
    "distill_loss over the batch": distill_loss(1500, DistillationConfig.public_code()),
    "distill_loss of few classes over the batch": distill_loss(
        100, DistillationConfig.public_code()
    ),
    "layer_mse of maps": layer_mse(ops.layer_mse, (2, 3, 70, 70), (2, 3, 70, 70)),
    "layer_mse of states": layer_mse(ops.layer_mse, (4, 9, 33), (4, 9, 33)),
    "projected_mse": layer_mse(ops.projected_mse, (4, 9, 33), (4, 9, 16), (33, 16)),
    "pack_factors": Op(
        lambda seed: [noise(seed, len(BITS), COUNT)],
        lambda values: [ops.pack_factors(values, SCALE, BITS)],
        lambda values: [reference.pack_factors(values, SCALE, BITS)],
    ),
    "unpack_factors": Op(
        lambda seed: [reference.pack_factors(noise(seed, len(BITS), COUNT), SCALE, BITS)],
        lambda codes: [ops.unpack_factors(codes, SCALE, BITS, COUNT)],
        lambda codes: [reference.unpack_factors(codes, SCALE, BITS, COUNT)],
    ),
    "reconstruct": Op(
        lambda seed: [noise(seed, 32, 130), noise(seed + 100, 32, 257)],
        lambda left, right: [ops.reconstruct(left, right)],
        lambda left, right: [reference.reconstruct(left, right)],
    ),
    "rans_encode": Op(
        lambda seed: [noise(seed, len(LEVELS), CODED)],
        lambda values: list(ops.rans_encode([values], MULTIPLIER, LEVELS, [0])),
        lambda values: list(reference.rans_encode([values], MULTIPLIER, LEVELS, [0])),
    ),
    "rans_decode": Op(
        lambda seed: [encoded(noise(seed, len(LEVELS), CODED))],
        lambda codes: decoded(ops.rans_decode, codes),
        lambda codes: decoded(reference.rans_decode, codes),
    ),
    "truncated_svd": Op(
        lambda seed: [noise(seed, 3, 40, 24)],
        lambda matrix: [ops.truncated_svd(matrix, energy=0.9).S.double()],
        lambda matrix: [reference.truncated_svd(matrix, energy=0.9).S.double()],
        torch.finfo(torch.float32).eps,
    ),
    "truncated_svd from earlier shares": Op(
        of_low_rank,
        svd_from_earlier,
        lambda matrix: [reference.truncated_svd_list([matrix], energy=0.9)[0].sigma.double()],
        torch.finfo(torch.float32).eps,
    ),
    "truncated_svd in float64": Op(
        lambda seed: [noise(seed, 3, 40, 24).double()],
        lambda matrix: [ops.truncated_svd(matrix, energy=0.9).S],
        lambda matrix: [reference.truncated_svd(matrix, energy=0.9).S],
    ),
}
# truncated_svd waits for the ranks, rans_encode for sizes, and rans_decode to know what to refuse.
ASYNCHRONOUS = [name for name in OPS if not name.startswith(("truncated_svd", "rans"))]
# Torch's products are its own.
ALL_OURS = [name for name in ASYNCHRONOUS if name != "projected_mse"]


def check(found: list[Tensor], truth: list[Tensor], eps: float = EPS) -> None:
    for ours, wanted in zip(found, truth, strict=True):
        ours = ours.cpu()
        if wanted.dtype != torch.float64:  # bytes and codes' values are the same everywhere
            assert torch.equal(ours, wanted)
            continue
        allowed = ROUNDINGS * eps * max(1.0, float(wanted.abs().max()))
        assert float((ours - wanted).abs().max()) <= allowed


def overwrite(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
