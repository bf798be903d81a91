"""Where ops.distill_loss keeps its gradients: its own memory, the caller's, that of the logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from distillation_modes import EVERYTHING, PAPER, PUBLIC
from test_distill_loss import LABELS, LOGITS, evaluate, make_inputs
from torch import Tensor

from fedkd_fast import ops
from fedkd_fast.distillation import DistillationConfig


@pytest.mark.parametrize("config", [PAPER, PUBLIC, EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [7, 100])
def test_gradients_in_the_memory_of_the_logits(
    device: torch.device, classes: int, dtype: torch.dtype, config: DistillationConfig
) -> None:
    mentor, mentee, labels = make_inputs(9, classes, dtype, device)
    expected = evaluate(partial(ops.distill_loss, config=config), mentor, mentee, labels, dtype)
    weights = [logits.clone().requires_grad_() for logits in (mentor, mentee)]
    logits = [weight * 1 for weight in weights]
    found = ops.distill_loss(*logits, labels, config=config, in_place=True)
    found.total.backward()
    assert torch.equal(weights[0].grad.double().cpu(), expected["grad_mentor"])
    assert torch.equal(weights[1].grad.double().cpu(), expected["grad_mentee"])
    assert not torch.equal(logits[0], mentor)


def test_without_a_graph_the_logits_stay(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    before = mentor.clone()
    with torch.no_grad():
        ops.distill_loss(mentor.requires_grad_(), mentee, labels, in_place=True)
    assert torch.equal(mentor, before)


def test_in_place_tells_who_needs_the_logits(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    # The derivative of an exponential is what it returned.
    logits = [one.requires_grad_().exp() for one in (mentor, mentee)]
    found = ops.distill_loss(*logits, labels, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.total.backward()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("summary", torch.zeros(3), r"summary must be a contiguous tensor of shape \(7\) .* \(3\)"),
        ("statistics", torch.zeros(5, 4).double(), r"statistics must be .* \(5, 4\) .* dtype"),
        ("grad_mentee", torch.zeros(3, 4).t(), r"grad_mentee must be a contiguous tensor"),
        ("workspace", torch.zeros(7).double(), r"workspace must be .* shape \(73\) .* got \(7\)"),
        ("workspace", None, "workspace is needed where D is the mean over the batch"),
    ],
)
def test_wrong_buffers(
    device: torch.device, field: str, value: Tensor | None, message: str
) -> None:
    logits = LOGITS.to(device)
    wrong = {field: None if value is None else value.to(device)}
    buffers = ops.distill_buffers(logits, PUBLIC)._replace(**wrong)
    with pytest.raises(RuntimeError, match=message):
        ops.distill_loss_out(logits, logits.clone(), LABELS.to(device), buffers, config=PUBLIC)


def test_buffers_may_not_overlap_the_other_logits(device: torch.device) -> None:
    mentor, mentee = torch.zeros(2, 4, 3, device=device)
    buffers = ops.distill_buffers(mentor)._replace(grad_mentor=mentee)
    with pytest.raises(RuntimeError, match="grad_mentor must not overlap the logits"):
        ops.distill_loss_out(mentor, mentee, LABELS.to(device), buffers)


def test_gradient_buffers_may_not_overlap(device: torch.device) -> None:
    logits = LOGITS.to(device)
    buffers = ops.distill_buffers(logits)
    buffers = buffers._replace(grad_mentee=buffers.grad_mentor)
    with pytest.raises(RuntimeError, match="grad_mentor and grad_mentee must not overlap"):
        ops.distill_loss_out(logits, logits.clone(), LABELS.to(device), buffers)


@pytest.mark.parametrize("config", [PAPER, PUBLIC], ids=["paper", "public_code"])
def test_in_place_backward_scales_once(device: torch.device, config: DistillationConfig) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    whole = evaluate(partial(ops.distill_loss, config=config), mentor, mentee, labels, mentor.dtype)
    weights = [one.clone().requires_grad_() for one in (mentor, mentee)]
    found = ops.distill_loss(*(one * 1 for one in weights), labels, config=config, in_place=True)
    (found.total / 4).backward(retain_graph=True)
    assert weights[0].grad is not None
    assert torch.equal(4 * weights[0].grad.double().cpu(), whole["grad_mentor"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.total.backward()


def test_in_place_needs_logits_in_order(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    with pytest.raises(RuntimeError, match="in_place needs logits that are contiguous"):
        ops.distill_loss(mentor[:, :5], mentee[:, :5], labels.clamp(max=4), in_place=True)


def test_a_refused_call_in_place_leaves_the_logits(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    before = mentor.clone()
    with pytest.raises(RuntimeError, match="labels must be int64"):
        ops.distill_loss(mentor.requires_grad_(), mentee, labels.int(), in_place=True)
    assert torch.equal(mentor, before) and mentor._version == 0


def test_results_may_be_changed_in_place(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 7, torch.float32, device)
    mentor.requires_grad_()
    ops.distill_loss(mentor, mentee, labels).total.backward()
    expected, mentor.grad = mentor.grad, None
    found = ops.distill_loss(mentor, mentee, labels)
    found.task_mentor.mul_(9)
    total = found.total
    total /= 2
    total.backward()
    assert mentor.grad is not None and torch.equal(2 * mentor.grad, expected)
