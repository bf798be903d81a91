"""Every mode of the mutual distillation loss against its equations in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import distillation_modes
import pytest
import torch
import torch.nn.functional as F
from test_losses import (
    CLASSES,
    IGNORED,
    LENGTH,
    MENTEE_HIDDEN,
    MENTEE_LAYERS,
    MENTOR_HEADS,
    MENTOR_HIDDEN,
    MENTOR_LAYERS,
    PAIRS,
    SAMPLES,
    close,
    detached,
    leaves,
    make_output,
    weights,
)
from torch import Tensor

from fedkd_fast import ops
from fedkd_fast.losses import DistillationConfig, MutualDistillationLoss

MODES = {
    **distillation_modes.MODES,
    "paper": distillation_modes.PAPER,
    "padding": DistillationConfig(padding="included"),
    "logits attached": DistillationConfig(
        hidden=False, attention=False, denominator_gradient="attached"
    ),
}
MASK = torch.tensor([[1] * (LENGTH - i) + [0] * i for i in range(SAMPLES)])
LABELS = torch.tensor([0, 3, IGNORED, 1, 2])
TOKEN_LABELS = torch.arange(SAMPLES * LENGTH).reshape(SAMPLES, LENGTH) % CLASSES
TOKEN_LABELS[1] = IGNORED  # a sample without a label
TOKEN_LABELS[2, ::2] = IGNORED
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5], dtype=torch.float64)


class Batch(NamedTuple):
    labels: Tensor
    mask: Tensor
    weight: Tensor


def equations(
    config: DistillationConfig,
    mentor: SimpleNamespace,
    mentee: SimpleNamespace,
    projections: Sequence[Tensor],
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """L_t and L_s, with gradients through all that the configuration does not hold constant."""
    labels = batch.labels.reshape(SAMPLES, -1)  # (N, T)
    counted = (labels != IGNORED) & (batch.weight > 0)[:, None]
    tokens = counted.sum(1)
    row = counted * batch.weight[:, None]
    row = row / row.sum()
    sample = batch.weight * (tokens > 0)
    sample = sample / sample.sum()

    def log_softmax(output: SimpleNamespace, temperature: float) -> Tensor:
        return (output.logits.reshape(SAMPLES, -1, CLASSES) / temperature).log_softmax(2)

    def cross_entropy(output: SimpleNamespace) -> Tensor:
        log = log_softmax(output, 1.0)
        at_label = log.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
        smoothing = config.label_smoothing
        return -(1 - smoothing) * at_label - smoothing * log.mean(2)

    def divergence(target: SimpleNamespace, own: SimpleNamespace) -> Tensor:
        log_target = log_softmax(target, config.temperature)
        if config.targets == "detached":
            log_target = log_target.detach()
        found = (log_target.exp() * (log_target - log_softmax(own, config.temperature))).sum(2)
        found = config.distill_weight * config.temperature**2 * found
        return found / CLASSES if config.kl_reduction == "mean" else found

    ce_t, ce_s = cross_entropy(mentor), cross_entropy(mentee)
    denominator = ce_t + ce_s
    if config.denominator == "batch":
        denominator = (row * denominator).sum().expand_as(row)
    elif config.denominator == "constant":
        denominator = torch.ones_like(denominator)
    if config.denominator_gradient == "detached":
        denominator = denominator.detach()
    of_sample = torch.where(counted, denominator, 0.0).sum(1) / tokens.clamp(min=1)
    of_sample = torch.where(tokens > 0, of_sample, 1.0)

    mask = batch.mask.double()
    if config.padding == "included":
        mask = torch.ones_like(mask)
    position = mask / mask.sum(1, keepdim=True)
    error = torch.zeros(SAMPLES, dtype=torch.float64)
    for index, (top, low) in enumerate(PAIRS):
        if config.hidden:
            narrow = mentee.hidden_states[low + 1]
            if projections:
                narrow = narrow @ projections[index].mT
            gap = (mentor.hidden_states[top + 1] - narrow).square().mean(2)
            error = error + config.hidden_weight * (gap * position).sum(1)
        if config.attention:
            gap = (mentor.attentions[top] - mentee.attentions[low]).square().mean(1)
            pairs = gap * position[:, :, None] * position[:, None, :]
            error = error + config.attention_weight * pairs.sum((1, 2))
    hidden = (sample * error / of_sample).sum()
    return tuple(
        (row * (config.task_weight * ce + kl / denominator)).sum() + hidden
        for ce, kl in ((ce_t, divergence(mentee, mentor)), (ce_s, divergence(mentor, mentee)))
    )


@pytest.mark.parametrize("labels", [LABELS, TOKEN_LABELS], ids=["samples", "tokens"])
@pytest.mark.parametrize("config", MODES.values(), ids=list(MODES))
def test_values_and_gradients_are_those_of_the_equations(
    config: DistillationConfig, labels: Tensor
) -> None:
    learned = config.projection == "learned"
    width = MENTEE_HIDDEN if learned else MENTOR_HIDDEN
    tokens = labels.dim() > 1
    mentor = make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS, mask=MASK, tokens=tokens)
    mentee = make_output(2, width, MENTOR_HEADS, MENTEE_LAYERS, mask=MASK, tokens=tokens)
    torch.manual_seed(3)
    loss = MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=width, layer_pairs=PAIRS
    ).double()
    batch = Batch(labels, MASK, WEIGHT)
    places = [*leaves(mentor), *leaves(mentee), *weights(loss)]

    got = loss(mentor, mentee, labels, MASK, sample_weight=WEIGHT)
    got.total.backward()
    found = [place.grad for place in places]
    for place in places:
        place.grad = None

    both = equations(config, mentor, mentee, weights(loss), batch)
    assert close(got.mentor, both[0].detach())
    assert close(got.mentee, both[1].detach())
    assert close(got.task_mentor + got.distill_mentor + got.hidden, got.mentor)
    if config.loss == "joint":
        assert close(got.total.detach(), (both[0] + both[1]).detach())
        (both[0] + both[1]).backward()
    else:
        equations(config, mentor, detached(mentee), weights(loss), batch)[0].backward()
        equations(config, detached(mentor), mentee, weights(loss), batch)[1].backward()
    for place, gradient in zip(places, found, strict=True):
        wanted = torch.zeros_like(place) if place.grad is None else place.grad
        assert close(torch.zeros_like(place) if gradient is None else gradient, wanted)


def test_identity_needs_one_width() -> None:
    with pytest.raises(ValueError, match=r"mentor_hidden=8 and mentee_hidden=6"):
        MutualDistillationLoss(
            DistillationConfig.public_code(), mentor_hidden=8, mentee_hidden=6, layer_pairs=PAIRS
        )


def test_a_sample_weight_of_another_shape_is_refused() -> None:
    output = SimpleNamespace(logits=torch.zeros(3, 2))
    loss = MutualDistillationLoss(DistillationConfig(hidden=False, attention=False))
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(3,\), got \(2,\)"):
        loss(output, output, torch.zeros(3, dtype=torch.int64), sample_weight=torch.ones(2))


def test_a_constant_denominator_is_deep_mutual_learning() -> None:
    noise = torch.Generator().manual_seed(4)
    logits = [3 * torch.randn(7, CLASSES, generator=noise, dtype=torch.float64) for _ in range(2)]
    mentor, mentee = (one.requires_grad_() for one in logits)
    labels = torch.tensor([0, 2, IGNORED, 1, 1, 3, 0])
    counted = labels != IGNORED
    pull = torch.ones(7, dtype=torch.float64)
    constant = DistillationConfig(denominator="constant")
    plain = ops.distill_loss(mentor, mentee, labels, config=constant)
    assert torch.equal(plain.denominator, torch.ones_like(plain.denominator))
    found = torch.autograd.grad(plain.total, (mentor, mentee))
    for own, peer, loss, gradient in zip(
        (mentor, mentee), (mentee, mentor), plain[1:3], found, strict=True
    ):
        target = peer.detach()[counted].log_softmax(1)
        wanted = F.cross_entropy(own[counted], labels[counted]) + F.kl_div(
            own[counted].log_softmax(1), target, log_target=True, reduction="batchmean"
        )
        assert close(loss, wanted.detach())
        assert close(gradient, *torch.autograd.grad(wanted, own))
    # It has no gradient that could be attached, whoever pulls.
    attached = dataclasses.replace(constant, denominator_gradient="attached")
    pulled = ops.distill_loss(mentor, mentee, labels, denominator_grad=pull, config=attached)
    same = zip(found, torch.autograd.grad(pulled.total, (mentor, mentee)), strict=True)
    assert torch.equal(pulled.total, plain.total)
    assert all(torch.equal(one, other) for one, other in same)


def test_the_native_op_knows_three_denominators() -> None:
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    mode = "row", False, False, False, 1.0, 1.0, 1.0, 0.0
    with pytest.raises(RuntimeError, match="must be sample, batch or constant, got row"):
        torch.ops.fedkd_fast.distill_loss(logits, logits, labels, None, None, -100, *mode, True)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        (
            "denominator",
            "row",
            ValueError,
            "denominator must be one of sample, batch, constant, got 'row'",
        ),
        ("loss", None, ValueError, "loss must be one of separate, joint, got None"),
        ("hidden", 1, TypeError, "hidden must be True or False, got 1"),
        ("distill_weight", "1", TypeError, "distill_weight must be a number, got '1'"),
        ("task_weight", -1.0, ValueError, "task_weight must be finite and at least 0, got -1.0"),
        ("temperature", 0.0, ValueError, "temperature must be above 0, got 0.0"),
        ("label_smoothing", 1.0, ValueError, "label_smoothing must be below 1, got 1.0"),
    ],
)
def test_wrong_configuration(
    field: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DistillationConfig(**{field: value})


@pytest.mark.parametrize("mode", ["paper", "public_code", "attached"])
def test_torch_compile_keeps_it_in_one_graph(mode: str) -> None:
    config = MODES[mode]
    mentor = make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS, mask=MASK)
    mentee = make_output(2, MENTOR_HIDDEN, MENTOR_HEADS, MENTEE_LAYERS, mask=MASK)
    loss = MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=MENTOR_HIDDEN, layer_pairs=PAIRS
    ).double()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (loss, compiled):
        call(mentor, mentee, LABELS, MASK).total.backward()
        gradients.append([leaf.grad for leaf in leaves(mentor) + leaves(mentee)])
        for leaf in leaves(mentor) + leaves(mentee):
            leaf.grad = None
    for plain, traced in zip(*gradients, strict=True):
        assert (plain is None) == (traced is None)
        assert plain is None or close(plain, traced)


def test_under_autocast_products_are_rounded_and_sums_are_not() -> None:
    mentor = make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS)
    mentee = make_output(2, MENTEE_HIDDEN, MENTOR_HEADS, MENTEE_LAYERS)
    for output in (mentor, mentee):
        output.logits = output.logits.detach().bfloat16().requires_grad_()
        output.hidden_states = tuple(state.detach().float() for state in output.hidden_states)
        output.attentions = tuple(layer.detach().float() for layer in output.attentions)
    loss = MutualDistillationLoss(
        mentor_hidden=MENTOR_HIDDEN, mentee_hidden=MENTEE_HIDDEN, layer_pairs=PAIRS
    )
    exact = loss(mentor, mentee, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(mentor, mentee, LABELS)
    rounded.total.backward()
    assert rounded.total.dtype == torch.float32
    assert not torch.equal(rounded.hidden, exact.hidden)
    # Each product with W_h is rounded to 8 bits.
    allowed = 2**-7 * float(exact.hidden)
    assert abs(float(rounded.hidden - exact.hidden)) <= allowed
    assert mentor.logits.grad is not None and loss.projections[0].weight.grad is not None


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    config = DistillationConfig(hidden=False, attention=False)
    logits = [torch.randn(8, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    labels = torch.arange(8) % 5
    loss = MutualDistillationLoss(config)

    def step(rows: slice, share: float) -> None:
        outputs = [SimpleNamespace(logits=one[rows]) for one in logits]
        (share * loss(*outputs, labels[rows]).total).backward()

    step(slice(None), 1.0)
    whole = [one.grad for one in logits]
    for one in logits:
        one.grad = None
    step(slice(0, 2), 0.25)
    step(slice(2, 8), 0.75)
    assert all(close(one.grad, gradient) for one, gradient in zip(logits, whole, strict=True))


@pytest.mark.parametrize("mode", ["paper", "attached", "public_code"])
@pytest.mark.parametrize("tokens", [False, True])
def test_gradients_in_the_memory_of_the_logits(mode: str, tokens: bool) -> None:
    labels = TOKEN_LABELS if tokens else LABELS
    found = []
    for in_place in (False, True):
        outputs = [
            make_output(seed, MENTOR_HIDDEN, MENTOR_HEADS, layers, mask=MASK, tokens=tokens)
            for seed, layers in ((1, MENTOR_LAYERS), (2, MENTEE_LAYERS))
        ]
        loss = MutualDistillationLoss(
            MODES[mode],
            mentor_hidden=MENTOR_HIDDEN,
            mentee_hidden=MENTOR_HIDDEN,
            layer_pairs=PAIRS,
            in_place=in_place,
        ).double()
        parameters = [leaf for output in outputs for leaf in leaves(output)]
        logits = [output.logits * 1 for output in outputs]
        before = logits[0].detach().clone()
        shown = [
            SimpleNamespace(**{**vars(output), "logits": one})
            for output, one in zip(outputs, logits, strict=True)
        ]
        losses = loss(*shown, labels, MASK, WEIGHT)
        assert torch.equal(logits[0].detach(), before) != in_place
        gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
        found.append([*losses, *(one for one in gradients if one is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "mode", ["public_code", "everything", "everything by sample", "everything constant"]
)
def test_where_nothing_is_constant_gradcheck_agrees(mode: str) -> None:
    config = MODES[mode]
    mentor = make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS, mask=MASK)
    mentee = make_output(2, MENTOR_HIDDEN, MENTOR_HEADS, MENTEE_LAYERS, mask=MASK)
    loss = MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=MENTOR_HIDDEN, layer_pairs=PAIRS
    ).double()

    def total(logits_t: Tensor, logits_s: Tensor, states: Tensor) -> Tensor:
        outputs = (
            SimpleNamespace(**{**vars(mentor), "logits": logits_t}),
            SimpleNamespace(
                **{
                    **vars(mentee),
                    "logits": logits_s,
                    "hidden_states": (*mentee.hidden_states[:-1], states),
                }
            ),
        )
        return loss(*outputs, LABELS, MASK).total

    inputs = mentor.logits, mentee.logits, mentee.hidden_states[-1]
    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("mode", ["paper", "attached", "public_code"])
def test_an_empty_batch_costs_nothing(mode: str) -> None:
    config = MODES[mode]
    mentor, mentee = (
        SimpleNamespace(
            logits=torch.zeros(0, CLASSES, requires_grad=True),
            hidden_states=(torch.zeros(0, LENGTH, MENTOR_HIDDEN),) * 5,
            attentions=(torch.zeros(0, MENTOR_HEADS, LENGTH, LENGTH),) * 4,
        )
        for _ in range(2)
    )
    loss = MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=MENTOR_HIDDEN, layer_pairs=PAIRS
    )
    got = loss(mentor, mentee, torch.zeros(0, dtype=torch.int64))
    got.total.backward()
    assert all(float(value.detach()) == 0.0 for value in got)
