"""The mutual distillation loss, values and both gradients, against eager torch and torch.compile.

`ours` and its rivals run forward and backward through autograd; `ours-op` is the native call alone,
which computes the same values and gradients; `copy` reads and writes as many bytes as the loss has
to: both logits in, both gradients out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import record_rate
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import DISTILL
from torch import Tensor
from torch.nn import functional

from fedkd_fast import ops, reference
from fedkd_fast.reference import DENOMINATOR_FLOOR

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A gradient is at most about 2, times 1 / R; torch's own kernels round bfloat16 several times.
GRADIENT_ROUNDINGS = 16

Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(mentor: Tensor, mentee: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Write the loss the way one does in torch, with each log-softmax computed once."""
    log_t, log_s = mentor.log_softmax(1), mentee.log_softmax(1)
    ce_t = functional.nll_loss(log_t, labels, reduction="none")
    ce_s = functional.nll_loss(log_s, labels, reduction="none")
    kl_t = functional.kl_div(log_t, log_s.detach(), reduction="none", log_target=True).sum(1)
    kl_s = functional.kl_div(log_s, log_t.detach(), reduction="none", log_target=True).sum(1)
    weight = 1 / (ce_t + ce_s).detach().clamp(min=DENOMINATOR_FLOOR)
    return (ce_t + kl_t * weight).mean(), (ce_s + kl_s * weight).mean()


def ours(mentor: Tensor, mentee: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return ops.distill_loss(mentor, mentee, labels)[:2]


def train_step(losses: Losses, mentor: Tensor, mentee: Tensor, labels: Tensor) -> None:
    mentor.grad = mentee.grad = None
    mentor_loss, mentee_loss = losses(mentor, mentee, labels)
    (mentor_loss + mentee_loss).backward()


def check(gradient: Tensor | None, truth: Tensor | None) -> None:
    assert gradient is not None and truth is not None
    error = float((gradient.double() - truth).abs().max()) * len(gradient)
    assert error <= GRADIENT_ROUNDINGS * torch.finfo(gradient.dtype).eps, error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DISTILL, ids=str)
@pytest.mark.parametrize("impl", ["ours", "ours-op", "eager", "compile", "copy"])
def test_distill_loss(
    benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int], dtype: str
) -> None:
    benchmark.group = f"distill_loss {shape} {dtype}"
    rows, classes = shape
    noise = torch.Generator().manual_seed(0)
    mentor, mentee = (
        torch.randn(shape, generator=noise).to(DTYPES[dtype]).requires_grad_() for _ in range(2)
    )
    labels = torch.randint(0, classes, (rows,), generator=noise)
    gradient_bytes = 2 * mentor.numel() * mentor.element_size()

    if impl == "copy":
        source = torch.stack([mentor, mentee]).detach()
        target = torch.empty_like(source)
        benchmark(lambda: target.copy_(source))
    elif impl == "ours-op":
        with torch.no_grad():
            *_, grad_mentor, grad_mentee = native(mentor, mentee, labels)
            check_against_truth(mentor, mentee, labels, grad_mentor, grad_mentee)
            benchmark(lambda: native(mentor, mentee, labels))
    else:
        losses = {"ours": ours, "eager": eager}.get(impl) or torch.compile(eager, dynamic=False)
        train_step(losses, mentor, mentee, labels)
        check_against_truth(mentor, mentee, labels, mentor.grad, mentee.grad)
        benchmark(lambda: train_step(losses, mentor, mentee, labels))
    record_rate(benchmark, "GBps", 2 * gradient_bytes / 1e9)


def native(mentor: Tensor, mentee: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = torch.ops.fedkd_fast.distill_loss(mentor, mentee, labels, -100)
    return result


def check_against_truth(
    mentor: Tensor,
    mentee: Tensor,
    labels: Tensor,
    grad_mentor: Tensor | None,
    grad_mentee: Tensor | None,
) -> None:
    with torch.enable_grad():
        wide = [logits.detach().double().requires_grad_() for logits in (mentor, mentee)]
        train_step(lambda *inputs: reference.distill_loss(*inputs)[:2], wide[0], wide[1], labels)
    check(grad_mentor, wide[0].grad)
    check(grad_mentee, wide[1].grad)
