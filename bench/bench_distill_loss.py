"""The mutual distillation loss, values and both gradients, against eager torch and torch.compile.

`ours` and its rivals run forward and backward through autograd; `ours-op` is the native call alone,
which computes the same values and gradients into buffers; `copy` reads and writes as many bytes as
the loss has to: both logits in, both gradients out. `ours-in-place` runs through autograd as well,
with gradients in the place of the logits, which are renewed outside the clock.
"""

from __future__ import annotations

import pytest
import torch
from measure import record_rate
from peers import (
    check_gradient,
    eager_losses,
    native_distill_loss,
    our_losses,
    our_losses_in_place,
    train_step,
    true_gradients,
)
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import DISTILL
from torch import Tensor

from fedkd_fast import ops

LARGE = 100_000  # logits of which a few rounds tell enough
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DISTILL, ids=str)
@pytest.mark.parametrize("impl", ["ours", "ours-in-place", "ours-op", "eager", "compile", "copy"])
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
    elif impl == "ours-in-place":
        kept = [mentor.detach().clone(), mentee.detach().clone()]

        def renew() -> None:
            for logits, values in zip((mentor, mentee), kept, strict=True):
                logits.grad = None
                logits.data.copy_(values)

        train_step(our_losses_in_place, mentor, mentee, labels)
        gradients = [mentor.grad, mentee.grad]
        check_against_truth(*kept, labels, *gradients)
        rounds = 1000 if mentor.numel() < LARGE else 30
        benchmark.pedantic(
            lambda: our_losses_in_place(mentor, mentee, labels).backward(),
            setup=renew,
            rounds=rounds,
        )
    elif impl == "ours-op":
        with torch.no_grad():
            out = ops.distill_buffers(mentor)
            gradients = native_distill_loss(mentor, mentee, labels, out)
            check_against_truth(mentor, mentee, labels, *gradients)
            benchmark(lambda: native_distill_loss(mentor, mentee, labels, out))
    else:
        losses = {"ours": our_losses, "eager": eager_losses}.get(impl) or torch.compile(
            eager_losses, dynamic=False
        )
        train_step(losses, mentor, mentee, labels)
        check_against_truth(mentor, mentee, labels, mentor.grad, mentee.grad)
        benchmark(lambda: train_step(losses, mentor, mentee, labels))
    record_rate(benchmark, "GBps", 2 * gradient_bytes / 1e9)


def check_against_truth(
    mentor: Tensor,
    mentee: Tensor,
    labels: Tensor,
    grad_mentor: Tensor | None,
    grad_mentee: Tensor | None,
) -> None:
    truth = true_gradients(mentor, mentee, labels)
    check_gradient(grad_mentor, truth[0])
    check_gradient(grad_mentee, truth[1])
