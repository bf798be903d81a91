"""The mutual distillation loss as a module, against its equations written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fedkd_fast.losses import (
    DistillationConfig,
    MutualDistillationLoss,
    MutualLosses,
    map_layers,
)

SAMPLES, LENGTH, CLASSES = 5, 6, 4
MENTOR_HIDDEN, MENTEE_HIDDEN = 8, 6
MENTOR_HEADS, MENTEE_HEADS = 4, 2
MENTOR_LAYERS, MENTEE_LAYERS = 4, 2
PAIRS = map_layers(MENTOR_LAYERS, MENTEE_LAYERS)
FLOOR = 1e-6
IGNORED = -100
# Sums of a few hundred float64 terms of size 1 to 10.
TOLERANCE = 1000 * torch.finfo(torch.float64).eps


def make_output(
    seed: int,
    hidden: int,
    heads: int,
    layers: int,
    *,
    mask: Tensor | None = None,
    tokens: bool = False,
    length: int = LENGTH,
) -> SimpleNamespace:
    """Stand in for a model output; all tensors are leaves."""
    noise = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).requires_grad_()

    maps = []
    for _ in range(layers):
        scores = leaf(SAMPLES, heads, length, length).detach()
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        maps.append(scores.softmax(-1).requires_grad_())
    return SimpleNamespace(
        logits=leaf(SAMPLES, length, CLASSES) if tokens else leaf(SAMPLES, CLASSES),
        hidden_states=tuple(leaf(SAMPLES, length, hidden) for _ in range(layers + 1)),
        attentions=tuple(maps),
    )


def make_pair(**options: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    return (
        make_output(1, MENTOR_HIDDEN, MENTOR_HEADS, MENTOR_LAYERS, **options),
        make_output(2, MENTEE_HIDDEN, MENTEE_HEADS, MENTEE_LAYERS, **options),
    )


def make_loss(config: DistillationConfig | None = None) -> MutualDistillationLoss:
    torch.manual_seed(3)
    return MutualDistillationLoss(
        config, mentor_hidden=MENTOR_HIDDEN, mentee_hidden=MENTEE_HIDDEN, layer_pairs=PAIRS
    ).double()


def detached(output: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(
        logits=output.logits.detach(),
        hidden_states=tuple(state.detach() for state in output.hidden_states),
        attentions=tuple(attention.detach() for attention in output.attentions),
    )


def leaves(output: SimpleNamespace) -> list[Tensor]:
    return [output.logits, *output.hidden_states, *output.attentions]


def expected_losses(
    mentor: SimpleNamespace,
    mentee: SimpleNamespace,
    labels: Tensor,
    projections: Sequence[Tensor],
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations (1)-(7), sample by sample and token by token."""
    if mask is None:
        mask = torch.ones(SAMPLES, mentor.hidden_states[0].shape[1])
    tokens = labels.dim() == 2
    mentor_terms, mentee_terms, hidden_terms = [], [], []
    for i in range(SAMPLES):
        places = [(i, j) for j in range(labels.shape[1])] if tokens else [(i,)]
        sums = []
        for place in places:
            if labels[place] == IGNORED:
                continue
            log_t, log_s = mentor.logits[place].log_softmax(0), mentee.logits[place].log_softmax(0)
            ce_t, ce_s = -log_t[labels[place]], -log_s[labels[place]]
            total = float((ce_t + ce_s).detach())
            kl_t = (log_s.exp().detach() * (log_s.detach() - log_t)).sum()
            kl_s = (log_t.exp().detach() * (log_t.detach() - log_s)).sum()
            mentor_terms.append(ce_t + kl_t / max(total, FLOOR))
            mentee_terms.append(ce_s + kl_s / max(total, FLOOR))
            sums.append(total)
        if not sums:
            continue
        real = mask[i].bool()
        error = torch.zeros((), dtype=torch.float64)
        for (top, low), projection in zip(PAIRS, projections, strict=True):
            narrow = mentee.hidden_states[low + 1][i][real] @ projection.T
            error = error + (mentor.hidden_states[top + 1][i][real] - narrow).square().mean()
            left = mentor.attentions[top][i].mean(0)[real][:, real]
            right = mentee.attentions[low][i].mean(0)[real][:, real]
            error = error + (left - right).square().mean()
        hidden_terms.append(error / max(sum(sums) / len(sums), FLOOR))
    hidden = torch.stack(hidden_terms).mean()
    return torch.stack(mentor_terms).mean() + hidden, torch.stack(mentee_terms).mean() + hidden


LABELS = torch.tensor([0, 3, 1, 2, 2])
TOKEN_LABELS = torch.tensor(
    [
        [IGNORED, 1, 2, IGNORED, 0, 3],
        [IGNORED, 0, IGNORED, IGNORED, IGNORED, IGNORED],
        [IGNORED] * LENGTH,
        [1, 2, 3, 0, 1, 2],
        [3, 3, IGNORED, 3, 3, IGNORED],
    ]
)
LENGTHS = [6, 3, 5, 1, 4]
MASK = (torch.arange(LENGTH)[None, :] < torch.tensor(LENGTHS)[:, None]).long()


def weights(loss: MutualDistillationLoss) -> list[Tensor]:
    return list(loss.parameters())


def close(left: Tensor, right: Tensor) -> bool:
    return bool(((left - right).abs() <= TOLERANCE * right.abs().clamp(min=1)).all())


CASES = pytest.mark.parametrize(
    ("tokens", "labels", "mask"),
    [(False, LABELS, None), (False, LABELS, MASK), (True, TOKEN_LABELS, None)],
    ids=["classes", "padding", "tokens"],
)


@CASES
def test_values_are_those_of_the_equations(
    tokens: bool, labels: Tensor, mask: Tensor | None
) -> None:
    mentor, mentee = make_pair(tokens=tokens, mask=mask)
    loss = make_loss()
    got = loss(mentor, mentee, labels, mask)
    mentor_loss, mentee_loss = expected_losses(mentor, mentee, labels, weights(loss), mask)
    assert close(got.mentor, mentor_loss)
    assert close(got.mentee, mentee_loss)
    assert close(got.task_mentor + got.distill_mentor + got.hidden, mentor_loss)
    assert close(got.task_mentee + got.distill_mentee + got.hidden, mentee_loss)
    assert close(got.total, mentor_loss + mentee_loss - got.hidden)


@CASES
def test_total_gives_each_parameter_the_gradient_of_its_own_loss(
    tokens: bool, labels: Tensor, mask: Tensor | None
) -> None:
    mentor, mentee = make_pair(tokens=tokens, mask=mask)
    loss = make_loss()
    loss(mentor, mentee, labels, mask).total.backward()
    got = [leaf.grad for leaf in [*leaves(mentor), *leaves(mentee), *weights(loss)]]
    for leaf in [*leaves(mentor), *leaves(mentee), *weights(loss)]:
        leaf.grad = None
    expected_losses(mentor, detached(mentee), labels, weights(loss), mask)[0].backward()
    expected_losses(detached(mentor), mentee, labels, weights(loss), mask)[1].backward()
    expected = [leaf.grad for leaf in [*leaves(mentor), *leaves(mentee), *weights(loss)]]
    assert [a is None for a in got] == [b is None for b in expected]
    assert all(close(a, b) for a, b in zip(got, expected, strict=True) if b is not None)


def test_only_total_is_differentiable() -> None:
    got = make_loss()(*make_pair(), LABELS)
    assert [name for name in MutualLosses._fields if getattr(got, name).requires_grad] == ["total"]


def test_padding_does_not_change_the_loss() -> None:
    mentor, mentee = make_pair(mask=MASK)
    loss = make_loss()
    extra = 3

    def padded(output: SimpleNamespace, seed: int) -> SimpleNamespace:
        noise = torch.Generator().manual_seed(seed)
        states = []
        for state in output.hidden_states:
            junk = torch.randn(SAMPLES, extra, state.shape[-1], generator=noise).double()
            states.append(torch.cat([state, junk], 1))
        maps = []
        for attention in output.attentions:
            wide = torch.nn.functional.pad(attention, (0, extra))
            junk = torch.rand(*wide.shape[:2], extra, wide.shape[3], generator=noise).double()
            maps.append(torch.cat([wide, junk], 2))
        return SimpleNamespace(logits=output.logits, hidden_states=states, attentions=maps)

    mask = torch.nn.functional.pad(MASK, (0, extra))
    expected = loss(mentor, mentee, LABELS, MASK)
    got = loss(padded(mentor, 5), padded(mentee, 6), LABELS, mask)
    for name in MutualLosses._fields:
        assert close(getattr(got, name), getattr(expected, name)), name


def test_equal_head_counts_are_compared_head_by_head() -> None:
    mentor = make_output(1, MENTOR_HIDDEN, 2, MENTOR_LAYERS)
    mentee = make_output(2, MENTOR_HIDDEN, 2, MENTEE_LAYERS)
    loss = MutualDistillationLoss(
        DistillationConfig(hidden=False), mentor_hidden=8, mentee_hidden=8, layer_pairs=PAIRS
    )
    log_t, log_s = mentor.logits.log_softmax(1), mentee.logits.log_softmax(1)
    total = -(log_t + log_s).gather(1, LABELS[:, None])[:, 0]
    error = sum(
        (mentor.attentions[top] - mentee.attentions[low]).square().mean((1, 2, 3))
        for top, low in PAIRS
    )
    assert close(loss(mentor, mentee, LABELS).hidden, (error / total).mean())


def test_parts_can_be_switched_off() -> None:
    mentor, mentee = make_pair()
    both = make_loss()(mentor, mentee, LABELS)
    hidden = make_loss(DistillationConfig(attention=False))(mentor, mentee, LABELS)
    attention = make_loss(DistillationConfig(hidden=False))(mentor, mentee, LABELS)
    none_config = DistillationConfig(hidden=False, attention=False)
    bare = SimpleNamespace(logits=mentor.logits, hidden_states=None, attentions=None)
    none = MutualDistillationLoss(none_config, mentor_hidden=1, mentee_hidden=1, layer_pairs=[])
    assert close(hidden.hidden + attention.hidden, both.hidden)
    assert float(none(bare, mentee, LABELS).hidden) == 0.0
    assert not list(make_loss(DistillationConfig(hidden=False)).parameters())


def test_hidden_states_without_tokens() -> None:
    mentor, mentee = make_pair()
    for output in (mentor, mentee):
        output.hidden_states = tuple(state[:, 0] for state in output.hidden_states)
    loss = make_loss(DistillationConfig(attention=False))
    got = loss(mentor, mentee, LABELS)
    mentor.hidden_states = tuple(state[:, None] for state in mentor.hidden_states)
    mentee.hidden_states = tuple(state[:, None] for state in mentee.hidden_states)
    assert close(got.hidden, loss(mentor, mentee, LABELS).hidden)


def test_nothing_counts() -> None:
    mentor, mentee = make_pair()
    got = make_loss()(mentor, mentee, torch.full((SAMPLES,), IGNORED))
    got.total.backward()
    assert all(float(value.detach()) == 0.0 for value in got)
    assert float(mentee.hidden_states[1].grad.abs().max()) == 0.0


def test_sixteen_bit_outputs_are_summed_in_float32() -> None:
    mentor, mentee = make_pair()
    for output in (mentor, mentee):
        output.logits = output.logits.bfloat16()
        output.hidden_states = tuple(state.bfloat16() for state in output.hidden_states)
        output.attentions = tuple(attention.bfloat16() for attention in output.attentions)
    got = make_loss().bfloat16()(mentor, mentee, LABELS)
    assert {value.dtype for value in got} == {torch.float32}
    got.total.backward()


def test_projections_start_as_identity_where_widths_agree() -> None:
    square = MutualDistillationLoss(mentor_hidden=4, mentee_hidden=4, layer_pairs=[(1, 0), (3, 1)])
    assert len(square.projections) == 2
    assert all(torch.equal(weight, torch.eye(4)) for weight in weights(square))
    wide = make_loss()
    assert [tuple(weight.shape) for weight in weights(wide)] == [(8, 6), (8, 6)]


def test_projections_are_learned() -> None:
    mentor, mentee = make_pair()
    loss = make_loss(DistillationConfig(attention=False))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    before = loss(mentor, mentee, LABELS)
    before.total.backward()
    optimizer.step()
    after = loss(mentor, mentee, LABELS)
    assert float(after.hidden) < float(before.hidden)
    assert torch.equal(after.task_mentee, before.task_mentee)


@pytest.mark.parametrize(
    ("mentor", "mentee", "pairs"),
    [
        (12, 4, [(2, 0), (5, 1), (8, 2), (11, 3)]),
        (12, 2, [(5, 0), (11, 1)]),
        (6, 6, [(index, index) for index in range(6)]),
        (5, 2, [(2, 0), (4, 1)]),
        (12, 5, [(3, 0), (5, 1), (7, 2), (9, 3), (11, 4)]),
        (3, 1, [(2, 0)]),
    ],
)
def test_map_layers(mentor: int, mentee: int, pairs: list[tuple[int, int]]) -> None:
    assert map_layers(mentor, mentee) == pairs


@pytest.mark.parametrize("mentee", [0, 5])
def test_map_layers_refuses(mentee: int) -> None:
    with pytest.raises(ValueError, match=rf"mentee_layers must lie in 1..4, got {mentee}"):
        map_layers(4, mentee)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mentor_hidden": 0}, "mentor_hidden must be at least 1, got 0"),
        ({"mentee_hidden": -2}, "mentee_hidden must be at least 1, got -2"),
        ({"layer_pairs": []}, "layer_pairs must not be empty"),
        ({"layer_pairs": [(0, -1)]}, r"layer_pairs must hold indices >= 0, got \(0, -1\)"),
    ],
)
def test_wrong_construction(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MutualDistillationLoss(
            **{"mentor_hidden": 8, "mentee_hidden": 6, "layer_pairs": PAIRS, **arguments}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attentions": ()},
            r'attentions of the mentee are .*attn_implementation="eager"',
        ),
        ({"attentions": None}, "attentions of the mentee are missing"),
        ({"attentions": (None, None)}, "attentions of the mentee are missing"),
        ({"hidden_states": None}, "call the model with output_hidden_states=True"),
        (
            {"hidden_states": (torch.zeros(5, 6, 6).double(),) * 2},
            "entry 2 of hidden_states of the mentee",
        ),
        ({"hidden_states": (torch.zeros(5, 6, 7),) * 3}, "hidden_states .* must have width 6"),
        (
            {"hidden_states": (torch.zeros(5, 4, 6).double(),) * 3},
            "must agree in samples and tokens",
        ),
        ({"attentions": (torch.zeros(5, 2, 4, 4),) * 2}, r"agree in N and L, got \(5, 4, 6, 6\)"),
        ({"logits": torch.zeros(5, 3)}, r"must have one shape, got \(5, 4\) and \(5, 3\)"),
    ],
)
def test_outputs_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    mentor, mentee = make_pair()
    changed = SimpleNamespace(**{**vars(mentee), **changes})
    with pytest.raises(ValueError, match=message):
        make_loss()(mentor, changed, LABELS)


def test_labels_and_mask_that_do_not_fit() -> None:
    mentor, mentee = make_pair()
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\), got \(4,\)"):
        make_loss()(mentor, mentee, LABELS[:4])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(5, 6\), got \(5, 4\)"):
        make_loss()(mentor, mentee, LABELS, MASK[:, :4])
    mentor.logits = mentor.logits[0]
    with pytest.raises(ValueError, match=r"logits must have shape \(N, C\) or \(N, L, C\), got"):
        make_loss()(mentor, mentee, LABELS)
