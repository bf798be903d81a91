"""Dense rows to integers of one step, and what that loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkd_fast import ops, reference

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 1023), (2, 1024), (7, 1025), (600, 33), (0, 5), (3, 0)]


def sample(shape: tuple[int, int], *, minus: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    taken = 0.7 * torch.randn(shape, generator=generator) if minus else None
    divisor = 0.05 + torch.rand(shape[0], generator=generator)
    divisor[1::3] = 0.0
    return values, taken, divisor


@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_specification(shape: tuple[int, int], minus: bool) -> None:
    values, taken, divisor = sample(shape, minus=minus)
    squares = ops.row_squares(values, taken)
    torch.testing.assert_close(squares, reference.row_squares(values, taken), rtol=2e-6, atol=0)
    sent, lost = ops.round_rows(values, taken, divisor, 0.3)
    wanted, least = reference.round_rows(values, taken, divisor, 0.3)
    assert torch.equal(sent, wanted)
    torch.testing.assert_close(lost, least, rtol=2e-6, atol=1e-12)


def test_integers_are_the_nearest_even_and_clamped() -> None:
    values = torch.tensor([[0.5, 1.5, -2.5, 3e9, -3e9, 0.49]])
    sent, lost = ops.round_rows(values, None, torch.ones(1), 1.0)
    assert sent.tolist() == [[0.0, 2.0, -2.0, 2**22 - 1, 1 - 2**22, 0.0]]
    assert float(lost) == pytest.approx(2 * (3e9 - 2**22) ** 2, rel=1e-5)


def test_order_and_threads_change_nothing() -> None:
    values, taken, divisor = sample((600, 333), minus=True)
    assert taken is not None
    wanted = [ops.row_squares(values, taken), *ops.round_rows(values, taken, divisor, 0.1)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        values, taken = values.T.contiguous().T, taken[:, None].expand(-1, 1, -1)[:, 0]
        found = [ops.row_squares(values, taken), *ops.round_rows(values, taken, divisor, 0.1)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_bad_arguments_are_named() -> None:
    values = torch.ones(2, 3)
    for call, message in [
        (lambda: ops.row_squares(values[0]), "values must have 2 dimensions"),
        (lambda: ops.row_squares(values.double()), "values has the wrong dtype"),
        (
            lambda: ops.row_squares(values, torch.ones(3, 2)),
            r"minus must have the shape of values, \(2, 3\), got \(3, 2\)",
        ),
        (
            lambda: ops.round_rows(values, None, torch.ones(3), 1.0),
            "divisor must have a number for each row, 2, got 3",
        ),
        (lambda: ops.round_rows(values, None, torch.ones(2).half(), 1.0), "divisor has the wrong"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_operators_are_registered_as_torch_wants_them() -> None:
    values, taken, divisor = sample((4, 9), minus=True)
    torch.library.opcheck(torch.ops.fedkd_fast.row_squares, (values, taken))
    torch.library.opcheck(torch.ops.fedkd_fast.round_rows, (values, taken, divisor, 0.5))
    with FakeTensorMode() as mode:
        fakes = [None if part is None else mode.from_tensor(part) for part in (values, taken)]
        sent, lost = ops.round_rows(*fakes, mode.from_tensor(divisor), 0.5)
        assert ops.row_squares(*fakes).shape == (4,)
    assert sent.shape == (4, 9) and lost.shape == ()
