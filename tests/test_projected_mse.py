"""ops.projected_mse against its specification in float64, and in products of 16 bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_layer_mse import DTYPES, ROUNDINGS, check, evaluate, inputs, largest, noise

from fedkd_fast import ops, reference

ROW = list(enumerate([(1, 8), (1, 8), (8, 8)]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((2, 9, 24), 10), ((3, 7), 7), ((2, 5, 8), 33)])
def test_projected_error_is_at_most_twice_that_of_the_reference(
    device: torch.device, shape: tuple[int, ...], width: int, dtype: torch.dtype, masked: bool
) -> None:
    if masked and len(shape) == 2:
        pytest.skip("states without tokens have no mask")
    mentor, _, scale, mask = inputs(shape, dtype, device, masked)
    mentee = noise(4, *shape[:-1], width).to(dtype).to(device)
    weight = (noise(5, shape[-1], width) / width**0.5).to(dtype).to(device)
    options = {"mask": mask, "weight_gradient": 2.0}
    parts = mentor, mentee, weight, scale
    truth = evaluate(reference.projected_mse, torch.float64, *parts, **options)
    # Products of 16-bit values are rounded to 16 bits, by torch as well.
    plain = evaluate(reference.projected_mse, dtype, *parts, **options)
    ours = evaluate(ops.projected_mse, dtype, *parts, **options)
    check(ours, plain, truth, dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_small_row_compiles(dtype: torch.dtype) -> None:
    mentor, mentee, weight = (noise(seed, *size).to(dtype) for seed, size in ROW)
    scale = torch.ones(1)
    expected = evaluate(ops.projected_mse, dtype, mentor, mentee, weight, scale)
    compiled = torch.compile(ops.projected_mse, fullgraph=True)
    found = evaluate(compiled, dtype, mentor, mentee, weight, scale)
    eps = torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert largest(one - other) <= ROUNDINGS * eps * max(1.0, largest(other))


def test_products_in_16_bits() -> None:
    mentor, mentee, scale, mask = inputs((4, 9, 32), torch.float32, torch.device("cpu"), True)
    weight = noise(8, 32, 32) / 32**0.5
    parts = mentor, mentee, weight, scale
    full = evaluate(ops.projected_mse, torch.float32, *parts, mask=mask)
    narrow = evaluate(
        partial(ops.projected_mse, products=torch.bfloat16), torch.float32, *parts, mask=mask
    )
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(ops.projected_mse, torch.float32, *parts, mask=mask)
        doubles = evaluate(ops.projected_mse, torch.float64, *parts, mask=mask)
    assert all(map(torch.equal, narrow, cast))
    exact = evaluate(reference.projected_mse, torch.float64, *parts, mask=mask)
    for index, (one, other) in enumerate(zip(narrow, full, strict=True)):
        assert 0 < largest(one - other) <= 2**-6 * max(1.0, largest(other)), index
    for one, other in zip(doubles, exact, strict=True):
        assert largest(one - other) <= 1e-14


@pytest.mark.parametrize(
    ("mentee", "weight", "message"),
    [
        ((2, 5, 3), (6, 3), r"agree in samples and tokens, got shapes \(2, 4, 6\) and \(2, 5, 3\)"),
        ((2, 4, 3), (3, 6), r"weight must have shape \(6, 3\), got \(3, 6\)"),
    ],
)
def test_bad_projections(mentee: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.projected_mse(
            torch.zeros(2, 4, 6), torch.zeros(mentee), torch.zeros(weight), torch.zeros(2)
        )
