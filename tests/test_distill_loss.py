"""ops.distill_loss against its specification in float64, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from distillation_modes import MODES, PAPER, PUBLIC
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.ops._distill_loss import _mode
from fedkd_fast.reference import DistillLoss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 2), (32, 2), (33, 7), (64, 20), (5, 65), (50, 1000), (3, 1025), (9, 30522)]
SMALL, LARGE, EXTREME = 1.0, 30.0, 1e4  # standard deviations of the logits
IGNORED = -100

# A value passes a handful of roundings of its own size on the way: shift by the maximum,
# exponential, sum, logarithm, divisions by the sum, D and n.
ROUNDINGS = 8
EPS64 = torch.finfo(torch.float64).eps
# Central differences of step h are off by about h² from the series and eps / h from rounding.
STEP = 1e-5
DIFFERENCE_ERROR = ROUNDINGS * (STEP**2 + EPS64 / STEP)

Loss = Callable[..., DistillLoss]


def native_arguments(
    mentor: Tensor, mentee: Tensor, labels: Tensor, config: DistillationConfig
) -> tuple[object, ...]:
    return mentor, mentee, labels, None, None, IGNORED, *_mode(config, mentor), True


def make_inputs(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, scale: float = SMALL
) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1000 * rows + classes)
    mentor = (torch.randn(rows, classes, generator=noise) * scale).to(dtype)
    mentee = (torch.randn(rows, classes, generator=noise) * scale).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=noise)
    labels[1::4] = IGNORED
    return mentor.to(device), mentee.to(device), labels.to(device)


def evaluate(
    loss: Loss, mentor: Tensor, mentee: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Values and gradients in float64 on the CPU, from logits in `dtype`."""
    mentor = mentor.detach().to(dtype).clone().requires_grad_()
    mentee = mentee.detach().to(dtype).clone().requires_grad_()
    result = loss(mentor, mentee, labels)
    result.total.backward()
    values = dict(result._asdict(), grad_mentor=mentor.grad, grad_mentee=mentee.grad)
    return {name: value.detach().double().cpu() for name, value in values.items()}


def exact_divergences(mentor: Tensor, mentee: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Divergences in the widest numbers there are: sums of thousands of terms in float64, as the
    specification has them, are no better than those of the kernels, and on some machines worse."""
    logs = []
    for logits in (mentor, mentee):
        wide = logits.detach().cpu().double().numpy().astype(np.longdouble)
        shifted = wide - wide.max(1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
    heeded = (labels != IGNORED).cpu().numpy()
    own, other = logs
    return {
        name: torch.from_numpy(((np.exp(p) * (p - q)).sum(1) * heeded).astype(np.float64))
        for name, p, q in (("kl_mentor", other, own), ("kl_mentee", own, other))
    }


def largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def kernel_eps(name: str, dtype: torch.dtype) -> float:
    """Gradients are stored in the dtype of the logits, everything else at least in float32."""
    if name.startswith("grad") or dtype == torch.float64:
        return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


@pytest.mark.parametrize("scale", [SMALL, LARGE, EXTREME])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_error_is_at_most_twice_that_of_the_reference(
    device: torch.device, rows: int, classes: int, dtype: torch.dtype, scale: float
) -> None:
    mentor, mentee, labels = make_inputs(rows, classes, dtype, device, scale)
    truth = evaluate(reference.distill_loss, mentor, mentee, labels, torch.float64)
    truth.update(exact_divergences(mentor, mentee, labels))
    # The kernel computes 16-bit logits in float32.
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    plain = evaluate(reference.distill_loss, mentor, mentee, labels, arithmetic)
    ours = evaluate(ops.distill_loss, mentor, mentee, labels, dtype)
    smallest = float(truth["denominator"].min())
    for name, value in truth.items():
        error, size = largest(ours[name] - value), max(1.0, largest(value))
        # The truth has roundings of its own, in float64, and divides them by D.
        truth_error = ROUNDINGS * EPS64 * (size + 1 / smallest)
        allowed = 2 * largest(plain[name] - value) + truth_error
        allowed += ROUNDINGS * kernel_eps(name, dtype) * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_against_reference(
    mentor: Tensor, mentee: Tensor, labels: Tensor, dtype: torch.dtype, **options: object
) -> None:
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    specified = partial(reference.distill_loss, **options)
    truth = evaluate(specified, mentor, mentee, labels, torch.float64)
    plain = evaluate(specified, mentor, mentee, labels, arithmetic)
    ours = evaluate(partial(ops.distill_loss, **options), mentor, mentee, labels, dtype)
    smallest = min(1.0, float(truth["denominator"].min()))
    for name, value in truth.items():
        size = max(1.0, largest(value))
        allowed = 2 * largest(plain[name] - value) + ROUNDINGS * kernel_eps(name, dtype) * size
        # A denominator is squared where gradients flow through it.
        allowed += ROUNDINGS * EPS64 * (size + 1 / smallest**2)
        error = largest(ours[name] - value)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("classes", [2, 3, 7, 20, 64, 65, 1000, 4099, 30522])
def test_sizes_from_one_row_to_thousands(
    device: torch.device, rows: int, classes: int, dtype: torch.dtype, sure: bool
) -> None:
    rows = min(rows, 2**19 // classes)
    mentor, mentee, labels = make_inputs(rows, classes, dtype, device)
    if sure:  # a teacher without a doubt, not always of the label
        mentor = torch.zeros_like(mentor)
        mentor[torch.arange(rows), torch.arange(rows) % classes] = 200.0
    check_against_reference(mentor, mentee, labels, dtype)


@pytest.mark.parametrize("config", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (19, 20), (5, 65), (3, 1025)])
def test_every_mode_is_that_of_the_reference(
    device: torch.device, rows: int, classes: int, dtype: torch.dtype, config: DistillationConfig
) -> None:
    mentor, mentee, labels = make_inputs(rows, classes, dtype, device)
    noise = torch.Generator().manual_seed(rows)
    weight = torch.rand(rows, generator=noise).to(device) + 0.1
    weight[2::5] = 0.0
    pull = torch.randn(rows, generator=noise).to(device)
    check_against_reference(
        *(mentor, mentee, labels, dtype),
        **{"config": config, "sample_weight": weight, "denominator_grad": pull},
    )


@pytest.mark.parametrize("margin", [8.0, 11.0])
@pytest.mark.parametrize("classes", [2, 20, 1500])
def test_easy_samples_keep_relative_accuracy(
    device: torch.device, classes: int, margin: float
) -> None:
    # CE_t + CE_s is far below 1 here, and everything is divided by it.
    mentor, mentee, labels = make_inputs(16, classes, torch.float32, device)
    labels = labels.clamp(min=0)
    boost = margin + torch.log(torch.tensor(float(classes)))
    for logits in (mentor, mentee):
        logits[torch.arange(16), labels] = logits.amax(1) + boost.to(device)
    truth = evaluate(reference.distill_loss, mentor, mentee, labels, torch.float64)
    ours = evaluate(ops.distill_loss, mentor, mentee, labels, torch.float32)
    eps = torch.finfo(torch.float32).eps
    # An error of eps / 2 in a logit's distance to the maximum is that much relative in exp().
    floor = ROUNDINGS * eps * (margin + float(boost))
    for name in ("ce_mentor", "ce_mentee", "denominator"):
        assert largest(ours[name] / truth[name] - 1) <= floor, name
    for name in ("kl_mentor", "kl_mentee"):
        assert largest((ours[name] - truth[name]) / truth["denominator"]) <= floor, name
    for name in ("grad_mentor", "grad_mentee"):
        assert largest(ours[name] - truth[name]) * 16 <= floor, name


def test_gradient_is_the_derivative_with_peer_and_denominator_fixed(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(4, 5, torch.float64, device)
    ours = evaluate(ops.distill_loss, mentor, mentee, labels, torch.float64)
    fixed = ours["denominator"].to(device)
    counted = labels != IGNORED

    def loss(own: Tensor, peer: Tensor) -> Tensor:
        own_log, peer_log = own.log_softmax(1), peer.log_softmax(1)
        cross_entropy = -own_log.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        divergence = (peer_log.exp() * (peer_log - own_log)).sum(1)
        return (cross_entropy + divergence / fixed)[counted].mean()

    for name, own, peer in (("grad_mentor", mentor, mentee), ("grad_mentee", mentee, mentor)):
        for index in range(own.numel()):
            step = torch.zeros_like(own).flatten()
            step[index] = STEP
            step = step.reshape(own.shape)
            slope = float(loss(own + step, peer) - loss(own - step, peer)) / (2 * STEP)
            assert abs(slope - float(ours[name].flatten()[index])) <= DIFFERENCE_ERROR


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_have_no_divergence(device: torch.device, dtype: torch.dtype) -> None:
    mentor, _, labels = make_inputs(33, 77, dtype, device, LARGE)
    result = ops.distill_loss(mentor, mentor.clone(), labels)
    assert largest(result.kl_mentor) == 0.0
    assert largest(result.kl_mentee) == 0.0
    assert torch.equal(result.mentor_loss, result.mentee_loss)


def test_divergence_is_never_negative(device: torch.device) -> None:
    mentor, _, labels = make_inputs(2000, 5, torch.float32, device, LARGE)
    mentee = mentor * (1 + torch.finfo(torch.float32).eps)
    result = ops.distill_loss(mentor, mentee, labels)
    assert float(result.kl_mentor.min()) >= 0.0
    assert float(result.kl_mentee.min()) >= 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    mentor, mentee, labels = make_inputs(12, 40, dtype, device)
    expected = ops.distill_loss(mentor, mentee, labels)
    wide = torch.zeros(12, 100, dtype=dtype, device=device)
    wide[:, 7:47] = mentor
    by_column = mentee.t().contiguous().t()
    pairs = torch.stack([labels, labels], 1)
    got = ops.distill_loss(wide[:, 7:47], by_column, pairs[:, 0])
    for name in DistillLoss._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_ignored_rows_leave_no_trace(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(9, 6, torch.float32, device)
    ignored = labels == IGNORED
    mentor[ignored] = float("nan")
    whole = evaluate(ops.distill_loss, mentor, mentee, labels, torch.float32)
    kept = ~ignored
    part = evaluate(ops.distill_loss, mentor[kept], mentee[kept], labels[kept], torch.float32)
    assert torch.equal(whole["mentor_loss"], part["mentor_loss"])
    assert torch.equal(whole["grad_mentee"][kept.cpu()], part["grad_mentee"])
    for name in ("ce_mentor", "kl_mentee", "grad_mentor", "grad_mentee"):
        assert largest(whole[name][ignored.cpu()]) == 0.0
    assert bool((whole["denominator"][ignored.cpu()] == 1.0).all())


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_learn_from_costs_nothing(
    device: torch.device, rows: int, dtype: torch.dtype
) -> None:
    mentor, mentee, labels = make_inputs(rows, 4, dtype, device)
    values = evaluate(ops.distill_loss, mentor, mentee, torch.full_like(labels, IGNORED), dtype)
    for name in ("mentor_loss", "mentee_loss", "grad_mentor", "grad_mentee"):
        assert largest(values[name]) == 0.0


def test_ignore_index_may_be_a_class(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(8, 3, torch.float32, device)
    labels = labels.clamp(min=0)
    marked = torch.where(labels == 0, IGNORED, labels)
    expected = ops.distill_loss(mentor, mentee, marked)
    got = ops.distill_loss(mentor, mentee, labels, ignore_index=0)
    assert torch.equal(got.mentor_loss, expected.mentor_loss)


def test_not_finite_logits_show_in_the_loss(device: torch.device) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        mentor, mentee, labels = make_inputs(8, 70, torch.float32, device)
        mentor[2, 69] = bad
        result = ops.distill_loss(mentor, mentee, labels)
        assert not bool(result.mentor_loss.isfinite())
        assert bool(result.kl_mentor[[0, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_scales_and_repeats(device: torch.device, dtype: torch.dtype) -> None:
    mentor, mentee, labels = make_inputs(8, 5, dtype, device)
    once = evaluate(ops.distill_loss, mentor, mentee, labels, dtype)
    mentor.requires_grad_()
    mentee.requires_grad_()
    total = 4 * ops.distill_loss(mentor, mentee, labels).total
    total.backward(retain_graph=True)
    total.backward()
    # Powers of two scale without rounding.
    assert torch.equal(mentor.grad.double().cpu(), 8 * once["grad_mentor"])
    assert torch.equal(mentee.grad.double().cpu(), 8 * once["grad_mentee"])


def test_only_total_is_differentiable(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(8, 5, torch.float32, device)
    mentee.requires_grad_()
    result = ops.distill_loss(mentor, mentee, labels)
    assert result.total.requires_grad and not any(value.requires_grad for value in result[1:])
    result.total.backward()
    assert mentor.grad is None
    assert largest(mentee.grad) > 0.0


def test_float16_gradients_survive_many_rows(device: torch.device) -> None:
    # 1e-4 / 40000 is below the range of float16; a gradient scaler multiplies before that.
    rows, scaler = 40_000, 2.0**16
    logits = torch.zeros(rows, 2, dtype=torch.float16, device=device)
    logits[:, 0] = 9.0
    mentor, mentee = logits.requires_grad_(), logits.detach()
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    (ops.distill_loss(mentor, mentee, labels).total * scaler).backward()
    expected = torch.sigmoid(torch.tensor(-9.0, dtype=torch.float64)) * scaler / rows
    error = largest(mentor.grad.double().cpu()[:, 1] - expected)
    assert error <= ROUNDINGS * torch.finfo(torch.float16).eps * float(expected)


def test_second_derivative_is_refused(device: torch.device) -> None:
    mentor, mentee, labels = make_inputs(4, 3, torch.float64, device)
    mentor.requires_grad_()
    loss = ops.distill_loss(mentor, mentee, labels).total * mentor.sum()
    (gradient,) = torch.autograd.grad(loss, mentor, create_graph=True)
    with pytest.raises(RuntimeError, match="distill_loss can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("config", [PAPER, PUBLIC], ids=["paper", "public_code"])
@pytest.mark.parametrize("classes", [20, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count(
    dtype: torch.dtype, classes: int, config: DistillationConfig
) -> None:
    arguments = native_arguments(
        *make_inputs(128, classes, dtype, torch.device("cpu"), LARGE), config
    )
    one = torch.ops.fedkd_fast.distill_loss(*arguments)
    torch.set_num_threads(2)
    try:
        two = torch.ops.fedkd_fast.distill_loss(*arguments)
    finally:
        torch.set_num_threads(1)
    # All but the workspace, which is not written where a row does not count.
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], two[:-1], strict=True))


def test_torch_compile_keeps_it_in_one_graph() -> None:
    mentor, mentee, labels = make_inputs(6, 5, torch.float32, torch.device("cpu"))
    mentor.requires_grad_()
    compiled = torch.compile(
        lambda *inputs: ops.distill_loss(*inputs).total, fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(mentor, mentee, labels), mentor)
    (expected,) = torch.autograd.grad(ops.distill_loss(mentor, mentee, labels).total, mentor)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("config", [PAPER, PUBLIC], ids=["paper", "public_code"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(
    device: torch.device, runs_on_simt: bool, dtype: torch.dtype, config: DistillationConfig
) -> None:
    if runs_on_simt:
        pytest.skip("its library has no fake kernels")
    mentor, mentee, labels = make_inputs(6, 5, dtype, device)
    # The workspace is not written where a row does not count.
    arguments = native_arguments(mentor, mentee, labels.clamp(min=0), config)
    torch.library.opcheck(torch.ops.fedkd_fast.distill_loss.default, arguments)
    torch.library.opcheck(
        torch.ops.fedkd_fast.distill_loss_out.default,
        (*arguments, *ops.distill_buffers(mentor, config)),
    )


@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_out_of_range(device: torch.device, runs_cuda_kernels: bool, label: int) -> None:
    mentor, mentee, labels = make_inputs(8, 5, torch.float32, device)
    labels[6] = label
    if runs_cuda_kernels:
        result = ops.distill_loss(mentor, mentee, labels)
        assert bool(result.mentor_loss.isnan()) and bool(result.kl_mentor[6].isnan())
        return
    message = rf"labels must lie in \[0, 5\) or equal ignore_index -100, got {label} in row 6"
    with pytest.raises(RuntimeError, match=message):
        ops.distill_loss(mentor, mentee, labels)


LOGITS, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mentor", "mentee", "labels", "message"),
    [
        (LOGITS[0], LOGITS, LABELS, r"mentor_logits must have shape \(R, C\), got \(3,\)"),
        (LOGITS, LOGITS[:, :2], LABELS, r"mentee_logits must have the shape .* got \(4, 2\)"),
        (LOGITS[:, :0], LOGITS[:, :0], LABELS, "mentor_logits must have at least one class"),
        (LOGITS, LOGITS, LABELS[:3], r"one entry per row of logits, 4, got shape \(3\)"),
        (LOGITS, LOGITS, LABELS[:, None], "labels must have one entry per row of logits"),
        (LOGITS, LOGITS.double(), LABELS, "mentor_logits and mentee_logits must have one dtype"),
        (LOGITS.int(), LOGITS.int(), LABELS, "mentor_logits must be float32, float64, bfloat16"),
        (LOGITS, LOGITS, LABELS.int(), "labels must be int64"),
    ],
)
def test_wrong_arguments(
    device: torch.device, mentor: Tensor, mentee: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.distill_loss(mentor.to(device), mentee.to(device), labels.to(device))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match="mentor_logits and labels must be on one device"):
        ops.distill_loss(LOGITS.cuda(), LOGITS.cuda(), LABELS)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "sample_weight must be finite and .* in row 1"),
        (torch.tensor([1.0, 1.0, 1.0, torch.inf]), "sample_weight must be finite and .* in row 3"),
        (torch.ones(3), r"sample_weight must have one entry per row of logits, 4, got shape \(3\)"),
    ],
)
def test_wrong_weights(
    device: torch.device, runs_cuda_kernels: bool, weight: Tensor, message: str
) -> None:
    arguments = LOGITS.to(device), LOGITS.to(device), LABELS.to(device)
    if runs_cuda_kernels and len(weight) == 4:
        result = ops.distill_loss(*arguments, sample_weight=weight.to(device))
        assert bool(result.total.isnan())
        return
    with pytest.raises(RuntimeError, match=message):
        ops.distill_loss(*arguments, sample_weight=weight.to(device))
