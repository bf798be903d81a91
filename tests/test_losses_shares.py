"""Layers of texts that the samples of a batch have in common, against the equations in float64."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_losses import (
    CLASSES,
    LENGTH,
    MENTEE_HIDDEN,
    MENTEE_LAYERS,
    MENTOR_HEADS,
    MENTOR_HIDDEN,
    MENTOR_LAYERS,
    PAIRS,
    SAMPLES,
    close,
    leaves,
    make_output,
    weights,
)
from test_losses_modes import LABELS, MASK, MODES, TOKEN_LABELS, WEIGHT
from torch import Tensor

from fedkd_fast import reference
from fedkd_fast.losses import DistillationConfig, MutualDistillationLoss

TEXTS = 5  # as many as make_output gives
N = 3
# Text 3 belongs to nobody, text 0 to two samples, and sample 2 has one text only.
SHARE = torch.tensor(
    [[0.5, 0.25, 0.25, 0, 0], [0.4, 0, 0, 0, 0.6], [0, 0, 0, 0, 1.0]], dtype=torch.float64
)


def outputs(tokens: bool, width: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """N samples over TEXTS texts."""
    found = []
    for seed, hidden, layers in ((1, MENTOR_HIDDEN, MENTOR_LAYERS), (2, width, MENTEE_LAYERS)):
        one = make_output(seed, hidden, MENTOR_HEADS, layers, mask=MASK, tokens=tokens)
        one.logits = one.logits.detach()[:N].clone().requires_grad_()
        found.append(one)
    return found[0], found[1]


def make_loss(config: DistillationConfig, width: int) -> MutualDistillationLoss:
    torch.manual_seed(3)
    return MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=width, layer_pairs=PAIRS
    ).double()


def layer_term(
    config: DistillationConfig,
    mentor: SimpleNamespace,
    mentee: SimpleNamespace,
    projections: list[Tensor],
    labels: Tensor,
    weight: Tensor,
) -> Tensor:
    """h of the batch, by the specification of each layer's error."""
    rows = reference.distill_loss(
        mentor.logits.reshape(-1, CLASSES),
        mentee.logits.reshape(-1, CLASSES),
        labels.flatten(),
        sample_weight=weight[:, None].expand(N, labels.numel() // N).flatten(),
        config=config,
    )
    counted = (labels != -100).reshape(N, -1)
    denominator = cross_entropies(config, mentor, mentee, labels, weight).reshape(N, -1)
    if config.denominator_gradient == "detached":
        denominator = denominator.detach()
    # The specification hands D out without its gradient.
    assert close(denominator.detach()[counted], rows.denominator.reshape(N, -1)[counted])
    tokens = counted.sum(1)
    mean = torch.where(counted, denominator, 0.0).sum(1) / tokens.clamp(min=1)
    sample = weight * (tokens > 0)
    terms = []
    mask = None if config.padding == "included" else MASK.bool()
    for index, (top, low) in enumerate(PAIRS):
        for wanted, factor, wide, narrow in (
            (
                config.hidden,
                config.hidden_weight,
                mentor.hidden_states[top + 1],
                mentee.hidden_states[low + 1] @ projections[index].mT
                if projections
                else mentee.hidden_states[low + 1],
            ),
            (
                config.attention,
                config.attention_weight,
                mentor.attentions[top],
                mentee.attentions[low],
            ),
        ):
            if wanted:
                for text in range(TEXTS):
                    # One text at a time: its error with all gradients.
                    only = torch.eye(TEXTS, dtype=torch.float64)[text]
                    error = reference.layer_mse(wide, narrow, only, mask=mask).total
                    for n in range(N):
                        if tokens[n]:
                            terms.append(sample[n] * SHARE[n, text] * factor * error / mean[n])
    return torch.stack(terms).sum() / sample.sum()


def cross_entropies(
    config: DistillationConfig,
    mentor: SimpleNamespace,
    mentee: SimpleNamespace,
    labels: Tensor,
    weight: Tensor,
) -> Tensor:
    """D of each row."""
    rows = [
        torch.nn.functional.cross_entropy(
            one.logits.reshape(-1, CLASSES),
            labels.flatten(),
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        for one in (mentor, mentee)
    ]
    total = rows[0] + rows[1]
    if config.denominator == "batch":
        share = (labels.flatten() != -100) * weight.repeat_interleave(labels.numel() // N)
        total = ((share * total).sum() / share.sum()).expand_as(total)
    elif config.denominator == "constant":
        total = torch.ones_like(total)
    return total


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize(
    "mode",
    ["paper", "attached", "batch", "batch attached", "constant", "joint attached", "public_code"],
)
def test_shared_texts_cost_what_the_equations_say(mode: str, tokens: bool) -> None:
    config = MODES[mode]
    learned = config.projection == "learned"
    width = MENTEE_HIDDEN if learned else MENTOR_HIDDEN
    labels = (TOKEN_LABELS if tokens else LABELS)[:N]
    mentor, mentee = outputs(tokens, width)
    loss, alone = make_loss(config, width), make_loss(without_layers(config), width)
    places = [*leaves(mentor), *leaves(mentee), *weights(loss)]
    got = loss(mentor, mentee, labels, MASK, WEIGHT[:N], SHARE)
    found = torch.autograd.grad(got.total, places, allow_unused=True)

    rest = alone(mentor, mentee, labels, sample_weight=WEIGHT[:N])
    hidden = layer_term(config, mentor, mentee, weights(loss), labels, WEIGHT[:N])
    assert close(got.hidden, hidden.detach())
    assert close(got.mentor, rest.mentor + hidden.detach())
    assert close(got.mentee, rest.mentee + hidden.detach())
    # A joint loss has h of both models. Separate ones have it once: each model's gradient is that
    # of its own loss, but for W_h, which learns from both.
    joint = config.loss == "joint"
    wanted = torch.autograd.grad(
        rest.total + (2 if joint else 1) * hidden, places, allow_unused=True
    )
    outer = len(weights(loss))
    for index, (one, two) in enumerate(zip(found, wanted, strict=True)):
        zero = torch.zeros_like(places[index])
        factor = 2 if not joint and index >= len(places) - outer else 1
        assert close(zero if one is None else one, factor * (zero if two is None else two))


def without_layers(config: DistillationConfig) -> DistillationConfig:
    return dataclasses.replace(config, hidden=False, attention=False)


@pytest.mark.parametrize("mode", ["paper", "joint attached"])
def test_a_text_for_each_sample_changes_nothing(mode: str) -> None:
    found = []
    for share in (None, torch.eye(SAMPLES)):
        mentor = make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS, mask=MASK)
        mentee = make_output(2, MENTOR_HIDDEN, MENTOR_HEADS, MENTEE_LAYERS, mask=MASK)
        losses = make_loss(MODES[mode], MENTOR_HIDDEN)(
            mentor, mentee, LABELS, MASK, layer_share=share
        )
        losses.total.backward()
        found.append([*losses, *(leaf.grad for leaf in leaves(mentor) + leaves(mentee))])
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def test_gradcheck_agrees_where_nothing_is_constant() -> None:
    config = MODES["everything by sample"]
    mentor, mentee = outputs(False, MENTOR_HIDDEN)
    loss = make_loss(config, MENTOR_HIDDEN)

    def total(logits_t: Tensor, logits_s: Tensor, states: Tensor) -> Tensor:
        states_s = (*mentee.hidden_states[:-1], states)
        return loss(
            SimpleNamespace(**{**vars(mentor), "logits": logits_t}),
            SimpleNamespace(**{**vars(mentee), "logits": logits_s, "hidden_states": states_s}),
            LABELS[:N],
            MASK,
            layer_share=SHARE,
        ).total

    assert torch.autograd.gradcheck(total, (mentor.logits, mentee.logits, mentee.hidden_states[-1]))


@pytest.mark.parametrize("shape", [(N + 1, TEXTS), (N,), (N, TEXTS, 1)])
def test_shares_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    mentor, mentee = outputs(False, MENTEE_HIDDEN)
    loss = make_loss(DistillationConfig(), MENTEE_HIDDEN)
    message = rf"layer_share must have shape \({N}, texts\), got \({shape[0]},"
    with pytest.raises(ValueError, match=message):
        loss(mentor, mentee, LABELS[:N], layer_share=torch.ones(shape))


def test_shares_of_other_texts_are_refused() -> None:
    mentor, mentee = outputs(False, MENTEE_HIDDEN)
    loss = make_loss(DistillationConfig(), MENTEE_HIDDEN)
    with pytest.raises(ValueError, match=rf"\({TEXTS}, {LENGTH}, .* for {TEXTS + 1} samples"):
        loss(mentor, mentee, LABELS[:N], layer_share=torch.ones(N, TEXTS + 1))
