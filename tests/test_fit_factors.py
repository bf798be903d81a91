"""Factors to integers: one side rounded, the other fitted to it, and what that gains."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkd_fast import ops, reference
from fedkd_fast.codec.coding import NOISE, ROUNDING

# (N, Q, K): too few numbers for eight bits; for the gain alone; not too few; ranks beside those
# that vectors of zeros fill up to; more columns than one tile takes.
SHAPES = [
    (1, 1, 1),
    (50, 7, 3),
    (400, 90, 17),
    (800, 120, 100),
    (1100, 200, 63),
    (1100, 200, 64),
    (1100, 200, 65),
    (768, 768, 300),
    (4400, 96, 33),
]


class Case(NamedTuple):
    matrix: Tensor
    through: Tensor | None
    near: Tensor
    far: Tensor
    sigma: Tensor
    multiplier: Tensor
    near_shrink: Tensor
    far_shrink: Tensor
    scale: Tensor

    @property
    def whole(self) -> Tensor:
        exact = self.matrix.double()
        return exact if self.through is None else exact @ self.through.double()


def case(shape: tuple[int, int, int], *, finest: float = 0.8, decay: float = 0.6) -> Case:
    """Return factors of a matrix with a tail, the last of them in steps of 1 / `finest`."""
    far_count, near_count, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))
    bases = []
    for count in (near_count, far_count):
        noise = torch.randn(count, near_count, dtype=torch.float64, generator=generator)
        bases.append(torch.linalg.qr(noise)[0].T)
    sigma = torch.arange(1, near_count + 1, dtype=torch.float64) ** -decay
    matrix = ((bases[1] * sigma[:, None]).T @ bases[0]).float()
    multiplier = finest * math.sqrt(near_count) * sigma / sigma[rank - 1]
    shrinks = 0.9 + 0.1 * torch.rand(2, rank, generator=generator)
    parts = [part[:rank].float().contiguous() for part in (*bases, sigma, multiplier)]
    return Case(matrix, None, *parts, *shrinks, parts[2] / parts[3] ** 2)


def gain_of(given: Case, sent: Tensor, fitted: Tensor) -> tuple[float, float]:
    """Return what integers gain, and what they lose."""
    decoded = (fitted.double() * given.scale.double()[:, None]).T @ sent.double()
    total, lost = (float(x.square().sum()) for x in (given.whole, given.whole - decoded))
    return total - lost, lost


def close(given: Case, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare with the specification."""
    sent, fitted, gain = found
    wanted, best, best_gain = reference.fit_factors(*given)
    assert torch.equal(sent, wanted)
    off = (fitted - best).abs()
    # What eight bits leave moves a few numbers over the border of their cell.
    assert off.max() <= 1 + 0.01 * best.abs().max()
    assert (off > 0).float().mean() < 0.03
    true, lost = gain_of(given, sent, fitted)
    total = float(given.whole.square().sum())
    assert float(gain) == pytest.approx(true, abs=NOISE * lost + ROUNDING * total)
    assert true >= float(best_gain) - 1e-3 * lost


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_far_side_is_the_least_squares_fit(shape: tuple[int, int, int], order: str) -> None:
    given = case(shape)
    if order == "columns":
        given = given._replace(matrix=given.matrix.T.contiguous().T)
    close(given, ops.fit_factors(*given))


@pytest.mark.parametrize("shape", [(400, 90, 17), (1100, 200, 65), (4400, 96, 33)])
def test_the_order_of_the_matrix_does_not_matter(shape: tuple[int, int, int]) -> None:
    given = case(shape)
    wanted = ops.fit_factors(*given)
    # Neither rows nor columns lie in order.
    wide = torch.zeros(shape[0], shape[1], 2)
    wide[..., 0] = given.matrix
    for found, value in zip(
        ops.fit_factors(*given._replace(matrix=wide[..., 0])), wanted, strict=True
    ):
        assert torch.equal(found, value)


@pytest.mark.parametrize("shape", [(90, 50, 6), (1100, 200, 65), (4400, 96, 33)])
def test_a_product_is_not_written_out(shape: tuple[int, int, int]) -> None:
    given = case(shape)
    # All that the factors hold, and a little more.
    inner = given.near[: shape[2] - 2] * 1.5
    outer = given.matrix @ inner.T / 2.25
    product = given._replace(matrix=outer.T.contiguous().T, through=inner)
    left, sigma, right = torch.linalg.svd(product.whole, full_matrices=False)
    rank = len(inner)
    signs = torch.sign((right[:rank] * given.near[:rank].double()).sum(1, keepdim=True))
    product = Case(
        product.matrix,
        inner,
        (signs * right[:rank]).float(),
        (signs * left.T[:rank]).float(),
        sigma[:rank].float(),
        *(part[:rank] for part in given[5:]),
    )
    close(product, ops.fit_factors(*product))


def test_numbers_of_all_sizes_are_fitted() -> None:
    for power in (-40, 40):
        given = case((800, 120, 100))
        factor = 2.0**power
        given = given._replace(
            matrix=given.matrix * factor, sigma=given.sigma * factor, scale=given.scale * factor
        )
        close(given, ops.fit_factors(*given))


def test_equal_numbers_do_not_all_lose_the_same() -> None:
    # Rounded to the nearest in eight bits, each element is short by 0.2 %.
    shape = (1024, 256, 64)
    generator = torch.Generator().manual_seed(3)
    groups = torch.arange(256) % 64
    signs = torch.sign(torch.randn(1024, 64, generator=generator))
    matrix = (1.00195 * signs)[:, groups].contiguous()
    near = torch.nn.functional.one_hot(groups).T.float() / 2.0
    far = signs.T / 32.0
    sigma = torch.full((64,), 1.00195 * 64.0)
    ones = torch.ones(64)
    given = Case(matrix, None, near, far, sigma, 6.6 * ones, ones, ones, sigma / 6.6**2)
    assert matrix.shape == shape[:2]
    close(given, ops.fit_factors(*given))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    for shape in SHAPES:
        given = case(shape)
        wanted = ops.fit_factors(*given)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = ops.fit_factors(*given)
        finally:
            torch.set_num_threads(before)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other), shape


@pytest.mark.parametrize("shape", [(50, 7, 3), (1100, 200, 65)])
@pytest.mark.parametrize("kind", ["nothing is left", "the same twice"])
def test_what_is_not_independent_gains_nothing(shape: tuple[int, int, int], kind: str) -> None:
    given = case(shape)
    if kind == "nothing is left":
        given.multiplier[-1] = 1e-3
    else:
        given.near[-1], given.multiplier[-1] = given.near[0], given.multiplier[0]
        given.near_shrink[-1] = given.near_shrink[0]
    for module in (ops, reference):
        sent, fitted, gain = module.fit_factors(*given)
        assert float(gain) == -math.inf
        assert sent.shape == given.near.shape and fitted.shape == given.far.shape


def test_nothing_to_fit_gains_nothing() -> None:
    given = case((50, 7, 3))
    empty = given._replace(matrix=given.matrix[:0], far=given.far[:, :0])
    sent, fitted, gain = ops.fit_factors(*empty)
    assert fitted.shape == (3, 0) and float(gain) == 0.0
    assert torch.equal(sent, reference.fit_factors(*given)[0])


def test_vectors_of_one_magnitude() -> None:
    # What comes out of products has few values then, which eight bits would round all alike.
    walsh = torch.ones(1, 1)
    while len(walsh) < 256:
        walsh = torch.kron(walsh, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    generator = torch.Generator().manual_seed(5)
    near = walsh[1:9] / 16.0
    signs = torch.sign(torch.randn(8, 16384, generator=generator))
    far = torch.linalg.qr(signs.T.double())[0].T.float()
    sigma = 1.40975 * (1 + 0.001 * torch.arange(8, 0, -1) / 17)
    matrix = ((far * sigma[:, None]).T @ near).contiguous()
    ones = torch.ones(8)
    for level in (9.3, 36.6, 105.6):
        given = Case(matrix, None, near, far, sigma, level * ones, ones, ones, sigma / level**2)
        close(given, ops.fit_factors(*given))


def test_integers_stay_within_what_the_coder_takes() -> None:
    given = case((50, 7, 3))
    huge = given._replace(multiplier=given.multiplier * 1e9, scale=given.scale / 1e18)
    for module in (ops, reference):
        sent, fitted, _ = module.fit_factors(*huge)
        assert sent.abs().max() == fitted.abs().max() == 2**22 - 1


def test_bad_arguments_are_named() -> None:
    given = case((50, 7, 3))
    for wrong, message in [
        ({"matrix": given.matrix.T}, r"matrix, \(7, 50\), must be \(far, near\), \(50, 7\)"),
        ({"matrix": given.matrix.double()}, "matrix has the wrong dtype"),
        ({"through": torch.ones(7, 6)}, r"times through, \(7, 6\), must be \(far, near\)"),
        ({"near": given.near[:2]}, "same number of rows .* got 2 and 3"),
        ({"far": given.far[0]}, "far must have 2 dimensions"),
        ({"sigma": given.sigma[:2]}, "sigma must have a number for each row of near, 3, got 2"),
        ({"scale": given.scale.double()}, "scale has the wrong dtype"),
        ({"sigma": given.sigma.to("meta")}, "must be on the matrix's device, cpu, got meta"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.fit_factors(*given._replace(**wrong))
    with pytest.raises(RuntimeError, match="at least one, got 0 and 0"):
        ops.fit_factors(given.matrix, None, *(part[:0] for part in given[2:]))


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    given = case((50, 7, 3))
    torch.library.opcheck(torch.ops.fedkd_fast.fit_factors, tuple(given))
    with FakeTensorMode() as mode:
        fakes = [None if part is None else mode.from_tensor(part) for part in given]
        sent, fitted, gain = ops.fit_factors(*fakes)
    assert sent.shape == (3, 7) and fitted.shape == (3, 50)
    assert gain.shape == () and gain.dtype == torch.float64
