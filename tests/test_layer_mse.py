"""ops.layer_mse against its specification in float64, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fedkd_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MAPS = [(3, 2, 5, 5), (1, 1, 1, 1), (2, 3, 64, 64), (1, 2, 130, 130)]
STATES = [(2, 37, 384), (3, 7, 5), (1, 1, 20_000), (2, 400, 50), (5, 33)]
# A value passes a difference, a square, a factor and the rounding of its storage.
ROUNDINGS = 8
Loss = Callable[..., reference.LayerMse]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mentor, mentee = (noise(seed, *shape).to(dtype).to(device) for seed in (0, 1))
    scale = (torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) + 0.1).to(device)
    if not masked:
        return mentor, mentee, scale, None
    tokens = shape[-2]
    mask = torch.rand(shape[0], tokens, generator=torch.Generator().manual_seed(3)) < 0.7
    return mentor, mentee, scale, mask.to(device)


def evaluate(loss: Loss, dtype: torch.dtype, *parts: Tensor, **options: object) -> list[Tensor]:
    """Values and gradients in float64 on the CPU, of all parts but the last, the scale."""
    leaves = [part.detach().to(dtype).clone().requires_grad_() for part in parts[:-1]]
    found = loss(*leaves, parts[-1].to(torch.promote_types(dtype, torch.float32)), **options)
    found.total.backward()
    values = [found.total, found.errors, *(leaf.grad for leaf in leaves)]
    return [value.detach().double().cpu() for value in values]


def largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def check(
    ours: list[Tensor],
    plain: list[Tensor],
    truth: list[Tensor],
    gradients: torch.dtype,
    values: torch.dtype,
) -> None:
    for index, (found, torchs, wanted) in enumerate(zip(ours, plain, truth, strict=True)):
        stored = gradients if index >= 2 else values
        eps = torch.finfo(stored).eps
        allowed = 2 * largest(torchs - wanted) + ROUNDINGS * eps * largest(wanted)
        if stored == torch.float16:
            allowed += 2.0**-24  # the smallest step there is
        error = largest(found - wanted)
        assert error <= allowed, f"value {index}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS + STATES, ids=str)
def test_error_is_at_most_twice_that_of_the_reference(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, masked: bool
) -> None:
    if masked and len(shape) == 2:
        pytest.skip("states without tokens have no mask")
    mentor, mentee, scale, mask = inputs(shape, dtype, device, masked)
    arithmetic = torch.promote_types(dtype, torch.float32)
    truth = evaluate(reference.layer_mse, torch.float64, mentor, mentee, scale, mask=mask)
    plain = evaluate(reference.layer_mse, arithmetic, mentor, mentee, scale, mask=mask)
    ours = evaluate(ops.layer_mse, dtype, mentor, mentee, scale, mask=mask)
    check(ours, plain, truth, dtype, arithmetic)


@pytest.mark.parametrize("shape", [(3, 2, 6, 6), (3, 6, 20)], ids=str)
def test_what_does_not_count_is_not_looked_at(device: torch.device, shape: tuple[int, ...]) -> None:
    mentor, mentee, scale, mask = inputs(shape, torch.float32, device, True)
    assert mask is not None
    mask[1] = False
    expected = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale, mask=mask)
    tokens = mask[:, None, :, None] if len(shape) == 4 else mask[:, :, None]
    mentor = torch.where(tokens, mentor, torch.nan)
    if len(shape) == 4:
        mentee = torch.where(mask[:, None, None, :], mentee, torch.inf)
    found = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale, mask=mask)
    assert all(map(torch.equal, found, expected))
    assert found[1][1] == 0 and not found[2][1].any()
    assert not found[2].masked_select(~tokens.cpu()).any()


def test_nan_that_counts_shows(device: torch.device) -> None:
    mentor, mentee, scale, _ = inputs((3, 2, 6, 6), torch.float32, device, False)
    mentor[1, 0, 2, 3] = torch.nan
    total, errors, *gradients = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale)
    assert total.isnan() and errors.isnan().tolist() == [False, True, False]
    assert all(int(gradient.isnan().sum()) == 1 for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (0, 5)], ids=str)
def test_an_empty_batch_has_no_error(device: torch.device, shape: tuple[int, ...]) -> None:
    total, errors, *gradients = evaluate(
        ops.layer_mse, torch.float32, *inputs(shape, torch.float32, device, False)[:3]
    )
    assert total == 0 and len(errors) == 0
    assert [tuple(gradient.shape) for gradient in gradients] == [shape, shape]
    if len(shape) == 2:
        empty, weight = torch.zeros(shape, device=device), torch.ones(5, 5, device=device)
        _, _, *gradients = evaluate(
            ops.projected_mse, torch.float32, empty, empty, weight, torch.zeros(0, device=device)
        )
        assert [tuple(gradient.shape) for gradient in gradients] == [shape, shape, (5, 5)]


def test_only_gradients_that_are_wanted(device: torch.device) -> None:
    mentor, mentee, scale, _ = inputs((2, 2, 5, 5), torch.float32, device, False)
    expected = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale)
    for index, model in enumerate((mentor, mentee)):
        model.requires_grad_()
        ops.layer_mse(mentor, mentee, scale).total.backward()
        assert model.grad is not None
        assert torch.equal(model.grad.double().cpu(), expected[2 + index])
        model.requires_grad_(False)
    assert not ops.layer_mse(mentor, mentee, scale).total.requires_grad
    found = ops._library.native.layer_mse(mentor, mentee, scale, None, True, False, True)
    assert [part.numel() for part in found[2:4]] == [0, mentor.numel()]


def test_values_in_any_order(device: torch.device) -> None:
    mentor, mentee, scale, mask = inputs((3, 2, 8, 8), torch.float32, device, True)
    assert mask is not None
    expected = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale, mask=mask)
    odd = torch.zeros(mentor.numel() + 1, device=device)[1:].view(mentor.shape)  # not on 16 bytes
    odd.copy_(mentor)
    for left, right in (
        (mentor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), mentee.mT.contiguous().mT),
        (odd, mentee),
    ):
        leaves = left.requires_grad_(), right.detach().requires_grad_()
        found = ops.layer_mse(
            *leaves, scale.repeat_interleave(2)[::2], mask=mask.mT.contiguous().mT
        )
        gradients = torch.autograd.grad(found.total, leaves)
        # Vectors and single values add squares in different orders.
        assert torch.allclose(found.errors.double().cpu(), expected[1], rtol=1e-6)
        for one, other in zip(gradients, expected[2:], strict=True):
            assert torch.equal(one.double().cpu(), other)


def test_dtypes_meet_in_the_wider_one(device: torch.device) -> None:
    mentor, mentee, scale, _ = inputs((2, 4, 6), torch.float32, device, False)
    narrow = mentee.bfloat16().requires_grad_()
    found = ops.layer_mse(mentor, narrow, scale)
    found.total.backward()
    assert torch.equal(found.errors, ops.layer_mse(mentor, narrow.float(), scale).errors)
    wide = narrow.detach().float().requires_grad_()
    ops.layer_mse(mentor, wide, scale).total.backward()
    assert narrow.grad is not None and wide.grad is not None
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_layers_are_those_of_their_samples(dtype: torch.dtype, masked: bool) -> None:
    # Large enough for stores around the caches, which a sample alone is not.
    cpu = torch.device("cpu")
    samples = 40 if dtype == torch.float32 else 80
    mentor, mentee, scale, mask = inputs((samples, 4, 130, 130), dtype, cpu, masked)
    assert mentor.nbytes + mentee.nbytes > 16 << 20
    _, errors, *gradients, _ = ops._library.native.layer_mse(
        mentor, mentee, scale, mask, True, True, True
    )
    for sample in (0, 17, 39):
        part = slice(sample, sample + 1)
        _, alone, *parts, _ = ops._library.native.layer_mse(
            mentor[part],
            mentee[part],
            scale[part],
            None if mask is None else mask[part],
            *(True, True, True),
        )
        assert torch.equal(alone, errors[part])
        assert all(torch.equal(one, all_[part]) for one, all_ in zip(parts, gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count(dtype: torch.dtype) -> None:
    mentor, mentee, scale, mask = inputs((7, 3, 65, 65), dtype, torch.device("cpu"), True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(evaluate(ops.layer_mse, dtype, mentor, mentee, scale, mask=mask))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 4, 3)], ids=str)
def test_gradients_are_derivatives(shape: tuple[int, ...], masked: bool) -> None:
    mentor, mentee, scale, mask = inputs(shape, torch.float64, torch.device("cpu"), masked)
    leaves = [mentor.requires_grad_(), mentee.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda t, s: ops.layer_mse(t, s, scale, mask=mask).total * 3.0, leaves
    )
    if len(shape) == 3:
        weight = noise(7, 3, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda t, s, w: ops.projected_mse(t, s, w, scale, mask=mask).total * 3.0,
            [*leaves, weight],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_scales_and_repeats(device: torch.device, dtype: torch.dtype) -> None:
    mentor, mentee, scale, _ = inputs((2, 5, 8), dtype, device, False)
    weight = torch.eye(8, dtype=dtype, device=device).requires_grad_()
    leaves = [mentor.requires_grad_(), mentee.requires_grad_(), weight]
    for found in (
        ops.layer_mse(mentor, mentee, scale),
        ops.projected_mse(mentor, mentee, weight, scale),
    ):
        total, expected = found.total, None
        for factor in (1.0, 0.5, 1.0):
            for leaf in leaves:
                leaf.grad = None
            (total * factor).backward(retain_graph=True)
            gradients = [leaf.grad / factor for leaf in leaves if leaf.grad is not None]
            expected = expected or [gradient.clone() for gradient in gradients]
            assert all(map(torch.equal, gradients, expected))
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad.zero_()  # which are nobody else's
        total /= 2
        total.backward()
        assert mentor.grad is not None and expected is not None
        assert torch.equal(2 * mentor.grad, expected[0])
        mentor.grad = mentee.grad = weight.grad = None


def test_second_derivative_is_refused(device: torch.device) -> None:
    mentor, mentee, scale, _ = inputs((2, 4, 3), torch.float64, device, False)
    weight = torch.eye(3, dtype=torch.float64, device=device)
    mentor.requires_grad_()
    for name, total in (
        ("layer_mse", ops.layer_mse(mentor, mentee, scale).total),
        ("projected_mse", ops.projected_mse(mentor, mentee, weight, scale).total),
    ):
        (gradient,) = torch.autograd.grad(total, mentor, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} can be differentiated once"):
            gradient.square().sum().backward()


def test_small_gradients_in_float16_wait_for_their_scale(device: torch.device) -> None:
    # Before the scaler reaches them they are 3.5 times the smallest step of float16.
    scaler, share, difference, side = 2.0**16, 0.11, 2.0**-10, 32
    mentor = torch.full((2, 1, side, side), 0.25, dtype=torch.float16, device=device)
    mentee = (mentor - difference).requires_grad_()
    mentor.requires_grad_()
    scale = torch.full((2,), share, device=device)
    (ops.layer_mse(mentor, mentee, scale).total * scaler).backward()
    expected = torch.tensor(2 * difference * share / side**2 * scaler, dtype=torch.float64)
    rounding = torch.finfo(torch.float16).eps
    assert mentor.grad is not None and mentee.grad is not None
    assert torch.allclose(mentor.grad.double().cpu(), expected, rtol=rounding)
    assert torch.equal(mentee.grad, -mentor.grad)
    states, weight = mentor.detach().flatten(1, 2), torch.eye(side, device=device).half()
    leaves = [states.requires_grad_(), mentee.detach().flatten(1, 2).requires_grad_()]
    (ops.projected_mse(*leaves, weight, scale).total * scaler).backward()
    for leaf, sign in zip(leaves, (1, -1), strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.flatten(), sign * mentor.grad.flatten())


def test_memory_of_gradients_is_free_after_backward() -> None:
    mentor, mentee, scale, _ = inputs((2, 2, 5, 5), torch.float32, torch.device("cpu"), False)
    found = ops.layer_mse(mentor.requires_grad_(), mentee, scale)
    found.total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        found.total.backward()


def test_compiles_as_a_whole() -> None:
    mentor, mentee, scale, masks = inputs((2, 6, 8), torch.float32, torch.device("cpu"), True)
    assert masks is not None
    weight, mask = noise(9, 8, 8) / 3, masks

    def loss(t: Tensor, s: Tensor, w: Tensor, scale: Tensor) -> reference.LayerMse:
        plain = ops.layer_mse(t.sin(), s, scale, mask=mask)
        total = plain.total + ops.projected_mse(t.sin(), s, w, scale, mask=mask).total
        return reference.LayerMse(total, plain.errors)

    compiled = torch.compile(loss, fullgraph=True)
    for samples in (2, 1):
        parts = mentor[:samples], mentee[:samples], weight, scale[:samples]
        mask = masks[:samples]
        expected = evaluate(loss, torch.float32, *parts)
        found = evaluate(compiled, torch.float32, *parts)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_opcheck(wanted: tuple[bool, bool]) -> None:
    mentor, mentee, scale, mask = inputs((3, 2, 6, 6), torch.float32, torch.device("cpu"), True)
    torch.library.opcheck(
        torch.ops.fedkd_fast.layer_mse.default, (mentor, mentee, scale, mask, True, *wanted)
    )
    sums = mentor.new_empty(3, 2, dtype=torch.float64)
    outs = (torch.empty(()), torch.empty(3), torch.empty_like(mentor), None, sums)
    torch.library.opcheck(
        torch.ops.fedkd_fast.layer_mse_out.default,
        (mentor, mentee, scale, mask, True, *outs),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mentor": torch.zeros(2, 3, 4, 5, 6)}, r"mentor must have shape .* \(2, 3, 4, 5, 6\)"),
        ({"mentee": torch.zeros(2, 4, 7)}, r"shape of mentor, \(2, 4, 6\), got \(2, 4, 7\)"),
        ({"mentee": torch.zeros(2, 1, 4, 6)}, r"of mentor, \(2, 4, 6\), got \(2, 1, 4, 6\)"),
        ({"scale": torch.zeros(3)}, r"scale must have one entry per sample, 2, got shape \(3\)"),
        ({"mask": torch.zeros(2, 4)}, "mask must be bool"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"mask must have shape \(2, 4\), got"),
        ({"mentor": torch.zeros(2, 4, 0), "mentee": torch.zeros(2, 4, 0)}, "must have values"),
        (
            {"mentor": torch.zeros(2, 4, 6).long(), "mentee": torch.zeros(2, 4, 6).long()},
            "be float",
        ),
        (
            {
                "mentor": torch.zeros(2, 1, 4, 6),
                "mentee": torch.zeros(2, 1, 4, 6),
                "mask": torch.ones(2, 4, dtype=torch.bool),
            },
            "as many of them",
        ),
        ({"mentor": torch.zeros(2, 6), "mask": torch.ones(2, 4).bool()}, "mask must be None"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str, device: torch.device) -> None:
    arguments = {"mentor": torch.zeros(2, 4, 6), "mentee": torch.zeros(2, 4, 6)} | change
    scale = change.get("scale", torch.zeros(2)).to(device)
    mask = change.get("mask")
    with pytest.raises(RuntimeError, match=message):
        ops.layer_mse(
            arguments["mentor"].to(device),
            arguments["mentee"].to(device),
            scale,
            mask=None if mask is None else mask.to(device),
        )


def test_gradients_must_not_overlap(device: torch.device) -> None:
    memory = noise(0, 3, 2, 1, 4, 4).to(device)
    mentor, mentee, scale = memory[0], memory[1], torch.ones(2, device=device)
    expected = evaluate(ops.layer_mse, torch.float32, mentor, mentee, scale)
    total, errors = torch.zeros((), device=device), torch.zeros(2, device=device)
    sums = torch.zeros(2, 1, dtype=torch.float64)
    call = partial(
        ops._library.native.layer_mse_out,
        *(mentor, mentee, scale, None, True, total, errors),
    )
    sums = sums.to(device)
    before = memory.clone()
    call(mentor, mentee, sums)  # each in the place of a model, its own or the other
    assert torch.equal(memory[0].double().cpu(), expected[2])
    assert torch.equal(memory[1].double().cpu(), expected[3])
    memory.copy_(before)
    call(mentee, mentor, sums)
    assert torch.equal(memory[1].double().cpu(), expected[2])
    assert torch.equal(memory[0].double().cpu(), expected[3])
    with pytest.raises(RuntimeError, match="grad_mentor must not overlap mentor or mentee"):
        call(memory.flatten()[8:40].view(2, 1, 4, 4), None, sums)
    with pytest.raises(RuntimeError, match="grad_mentor and grad_mentee must not overlap"):
        call(memory[2], memory[2], sums)
    with pytest.raises(RuntimeError, match=r"sums must be a contiguous tensor of shape \(2, 1\)"):
        call(None, None, sums[:1])
