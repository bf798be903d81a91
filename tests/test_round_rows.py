"""Dense rows to integers of one step, what that loses, and the step that loses what it may."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkd_fast import ops, reference
from fedkd_fast.reference_rounding import ZERO_LEVEL

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 1023), (2, 1024), (7, 1025), (600, 33), (0, 5)]


def sample(shape: tuple[int, int]) -> Tensor:
    """Rows of sizes between 1 and 2^-22, some of them zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    values *= 2.0 ** -(torch.arange(shape[0]) % 23)[:, None]
    values[1::5] = 0.0
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_specification(shape: tuple[int, int]) -> None:
    values = sample(shape)
    squares, largest = ops.measure_rows(values)
    wanted, most = reference.measure_rows(values)
    torch.testing.assert_close(squares, wanted, rtol=2e-6, atol=0)
    assert torch.equal(largest, most)
    for step in (-1000, -256, 77):
        multiplier, levels, lost = ops.round_rows(values, squares, step)
        factors, classes, least = reference.round_rows(values, squares, step)
        assert torch.equal(multiplier, factors)
        assert torch.equal(levels, classes)
        torch.testing.assert_close(lost, least, rtol=2e-6, atol=1e-12)


def test_what_is_lost_is_what_the_coder_loses() -> None:
    values = sample((40, 300))
    squares, _ = ops.measure_rows(values)
    multiplier, levels, lost = ops.round_rows(values, squares, -1000)
    codes, sizes = ops.rans_encode([values], multiplier, levels, [0])
    scale = torch.full((40,), 2.0 ** (-1000 / 256))
    (decoded,) = ops.rans_decode(codes, sizes, scale, levels, [40], [300], [0])
    assert float((values - decoded).double().square().sum()) == pytest.approx(float(lost), rel=1e-5)


def test_rows_far_below_the_largest_are_zeros() -> None:
    values = torch.ones(3, 4) * torch.tensor([1.0, 2.0**-15, 2.0**-16])[:, None]
    squares, _ = ops.measure_rows(values)
    levels = ops.round_rows(values, squares, -18 * 256)[1]
    assert levels.tolist() == [18 * 16, 3 * 16, ZERO_LEVEL]


def test_steps_too_fine_for_the_tables_send_nothing() -> None:
    values = torch.ones(2, 4)
    squares, _ = ops.measure_rows(values)
    multiplier, levels, lost = ops.round_rows(values, squares, -22 * 256)
    assert multiplier.tolist() == [0.0, 0.0] and levels.tolist() == [ZERO_LEVEL] * 2
    assert float(lost) == 8.0


def test_nan_and_inf_are_the_largest() -> None:
    values = torch.tensor([[1.0, math.nan, -math.inf], [1.0, -math.inf, 2.0], [-0.0, 0.0, 0.0]])
    largest = ops.measure_rows(values)[1]
    assert math.isnan(largest[0]) and largest[1:].tolist() == [math.inf, 0.0]


def test_order_and_threads_change_nothing() -> None:
    values = sample((600, 333))

    def found(values: Tensor) -> list[Tensor]:
        squares, largest = ops.measure_rows(values)
        step = ops.dense_step(values, squares, 0.05 * float(squares.sum()))
        return [squares, largest, *ops.round_rows(values, squares, step), torch.tensor(step)]

    wanted = found(values)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = found(values.T.contiguous().T)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(again, wanted, strict=True))


# ---- dense_step ----------------------------------------------------------------------------------


def lost_at(values: Tensor, step: int) -> float:
    return float(ops.round_rows(values, ops.measure_rows(values)[0], step)[2])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 200),
    st.floats(1e-9, 0.9),
    st.sampled_from(["normal", "heavy", "few", "one"]),
    st.integers(0, 2**20),
)
def test_the_step_loses_what_it_may(
    rows: int, length: int, share: float, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, generator=generator)
    if kind == "heavy":
        values = values**5
    elif kind == "few":
        values = (2 * values).round()
    elif kind == "one":
        values = values.sign()
    values[0, 0] = 1.5
    squares, _ = ops.measure_rows(values)
    allowed = share * float(squares.sum())
    step = ops.dense_step(values, squares, allowed)
    assert lost_at(values, step) <= allowed
    if kind == "normal" and rows * length > 1000:
        # No finer than halving finds, but by what is near enough.
        assert step >= reference.dense_step(values, squares, 0.99 * allowed)


@pytest.mark.parametrize("share", [0.3, 0.05, 1e-3, 1e-6])
def test_of_many_rows_some_stand_for_all(share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3000, 500, generator=generator)
    values *= torch.exp(1.5 * torch.randn(3000, 1, generator=generator))
    squares, _ = ops.measure_rows(values)
    allowed = share * float(squares.sum())
    found = lost_at(values, ops.dense_step(values, squares, allowed))
    assert 0.93 * allowed <= found <= 1.04 * allowed


@pytest.mark.parametrize(("large", "factor"), [(1, 1e3), (5, 100.0), (40, 30.0)])
@pytest.mark.parametrize("share", [0.2, 0.05, 0.01])
def test_a_few_large_rows_are_looked_at(large: int, factor: float, share: float) -> None:
    """They have most of what may be lost, and no other rows stand for them."""
    values = torch.randn(3000, 300, generator=torch.Generator().manual_seed(5))
    values[7 : 7 + large] *= factor
    squares, _ = ops.measure_rows(values)
    allowed = share * float(squares.sum())
    found = lost_at(values, ops.dense_step(values, squares, allowed))
    assert 0.93 * allowed <= found <= 1.02 * allowed


def test_beyond_a_step_that_loses_too_much_may_be_one_that_does_not() -> None:
    """Signs lose nothing at a step of one, and too much at a step of two thirds."""
    values = torch.randn(50, 50, generator=torch.Generator().manual_seed(3)).sign()
    squares, _ = ops.measure_rows(values)
    for share in (0.1, 0.05, 0.01):
        allowed = share * float(squares.sum())
        assert max(lost_at(values, step) for step in range(-256, 0)) > allowed
        step = ops.dense_step(values, squares, allowed)
        assert step >= 0 and lost_at(values, step) <= allowed


def test_the_finest_step_where_none_is_fine_enough() -> None:
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(4))
    squares, _ = ops.measure_rows(values)
    step = ops.dense_step(values, squares, 1e-20)
    _, levels, _ = ops.round_rows(values, squares, step)
    assert 335 - 8 <= int(levels.max()) <= 335


# ---- refusals ------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    values, squares = torch.ones(2, 3), torch.full((2,), 3.0).double()
    for call, message in [
        (lambda: ops.measure_rows(values[0]), "values must have 2 dimensions"),
        (lambda: ops.measure_rows(values.double()), "values has the wrong dtype"),
        (lambda: ops.round_rows(values, squares.float(), 0), "squares has the wrong dtype"),
        (
            lambda: ops.round_rows(values, squares[:1], 0),
            "squares must have a number for each row, 2, got 1",
        ),
        (lambda: ops.round_rows(values, squares, 32257), "step must lie within ±32256, got 32257"),
        (lambda: ops.dense_step(0 * values, 0 * squares, 1.0), "values must not all be zero"),
        (lambda: ops.dense_step(values[:0], squares[:0], 1.0), "values must not all be zero"),
        (lambda: ops.dense_step(values, squares * math.inf, 1.0), "squares must be finite"),
        (lambda: ops.dense_step(values, -squares, 1.0), "squares must be finite and none below"),
        (lambda: ops.round_rows(values, squares * math.nan, 0), "squares must be finite"),
        (lambda: ops.dense_step(values, squares, 0.0), "most_lost must be positive and finite"),
        (lambda: ops.dense_step(values, squares, math.nan), "most_lost must be positive"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_operators_are_registered_as_torch_wants_them() -> None:
    values = sample((4, 9))
    squares, _ = ops.measure_rows(values)
    torch.library.opcheck(torch.ops.fedkd_fast.measure_rows, (values,))
    torch.library.opcheck(torch.ops.fedkd_fast.round_rows, (values, squares, -500))
    torch.library.opcheck(torch.ops.fedkd_fast.dense_step, (values, squares, 0.1, False))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(values)
        measured = ops.measure_rows(fake)
        multiplier, levels, lost = ops.round_rows(fake, measured[0], -500)
    assert [part.shape for part in measured] == [(4,), (4,)]
    assert multiplier.shape == levels.shape == (4,) and lost.shape == ()
