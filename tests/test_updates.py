"""updates: norms in factor space, and what is seen to be finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decoded import as_vector, in_numpy, random_updates

from fedkd_fast import WireError, aggregate, wire
from fedkd_fast.codec.common import factors_entry
from fedkd_fast.reference import Factors
from fedkd_fast.tensors import tied_names
from fedkd_fast.updates import norm_bound, squared_norm, surely_finite

# What the docstring of squared_norm promises of a root, in squares; of what components add up to.
PROMISED = 2e-12


@pytest.mark.parametrize("client", range(3))
def test_squared_norm(client: int) -> None:
    update = random_updates(3)[client]
    wanted = float((as_vector(in_numpy(update)) ** 2).sum())
    assert squared_norm(update) == pytest.approx(wanted, rel=PROMISED)
    assert squared_norm(dict(reversed(update.items()))) == squared_norm(update)
    assert squared_norm({**update, "n": torch.tensor([5])}) == squared_norm(update)


@pytest.mark.parametrize("kept", [1.0, 1e-3, 1e-6])
def test_squared_norm_of_what_nearly_cancels(kept: float) -> None:
    """Large components cancel but for a small one: Gram matrices alone lose it."""
    generator = torch.Generator().manual_seed(0)
    big = [torch.randn(3, side, generator=generator) * 1e2 for side in (50, 40)]
    small = [torch.randn(1, side, generator=generator) for side in (50, 40)]
    small[0] *= kept
    left = torch.cat([big[0], -big[0], small[0]])
    right = torch.cat([big[1], big[1], small[1]])
    components = float((left.double().norm(dim=1) * right.double().norm(dim=1)).sum())
    wanted = float(small[0].double().norm() * small[1].double().norm())
    norm = math.sqrt(squared_norm({"w": (left, right)}))
    assert norm == pytest.approx(wanted, rel=0.0, abs=PROMISED / 2 * components)
    assert norm < norm_bound({"w": (left, right)}) < wanted * (1 + 1e-5) + 1e-7 * components
    gone = squared_norm({"w": (left[:6], right[:6])})
    assert 0.0 <= math.sqrt(gone) < PROMISED / 2 * components


@pytest.mark.parametrize("client", range(3))
def test_norm_bound_is_close(client: int) -> None:
    update = random_updates(3)[client]
    norm = float(np.linalg.norm(as_vector(in_numpy(update))))
    assert norm < norm_bound(update) < norm * (1 + 1e-5)
    assert norm_bound({**update, "b": torch.tensor([math.nan])}) == math.inf
    assert norm_bound({**update, "b": torch.tensor([1e200], dtype=torch.float64)}) == math.inf


def test_squared_norm_of_wide_ranks_and_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = tuple(torch.randn(9, side, generator=generator) for side in (4, 5))
    wanted = float((factors[0].double().T @ factors[1].double()).square().sum())
    assert squared_norm({"w": (factors[0], factors[1])}) == pytest.approx(wanted, rel=PROMISED)
    assert squared_norm({}) == 0.0
    assert squared_norm({"w": (torch.zeros(0, 4), torch.zeros(0, 5))}) == 0.0
    assert squared_norm({"w": torch.zeros(0), "h": torch.full((2,), 6e4).half()}) > 7e9
    assert squared_norm({"w": torch.full((3,), 1e30)}) == pytest.approx(3e60)
    assert squared_norm({"w": torch.full((3,), 1e200, dtype=torch.float64)}) == math.inf
    halves = {str(one): torch.full((1,), 1e154, dtype=torch.float64) for one in range(4)}
    assert squared_norm(halves) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_squared_norm_of_what_is_not_finite_is_infinite(value: float) -> None:
    bad = torch.tensor([1.0, value])
    assert squared_norm({"b": bad, "c": torch.ones(1)}) == math.inf
    assert squared_norm({"w": (bad[None], torch.zeros(1, 3))}) == math.inf
    assert squared_norm({"b": bad, "c": torch.tensor([math.inf])}) == math.inf


def test_surely_finite_knows_the_dtype() -> None:
    wide = torch.full((1, 2), 3e2), torch.full((1, 2), 3e2)
    assert surely_finite(wide, torch.float32) and not surely_finite(wide, torch.float16)
    assert surely_finite(torch.tensor([2**60]), torch.int64)
    assert not surely_finite(torch.tensor([1.0, math.nan]), torch.float32)
    assert surely_finite((torch.zeros(0, 2), torch.zeros(0, 2)), torch.float32)


def test_factors_that_overflow_16_bits_poison_no_mean() -> None:
    side, ones = torch.full((1, 4), 1e3), torch.ones(1)
    factors = Factors(side, ones, side, 1, 1.0, ones)
    frame = wire.encode([factors_entry("w", "float16", (4, 4), factors)])
    with pytest.raises(WireError, match="tensor 'w' decodes to NaN or Inf"):
        aggregate([frame], strict=True)


def test_tensors_without_memory_are_not_tied() -> None:
    blank = torch.empty(3, device="meta")
    assert tied_names({"a": blank, "b": torch.empty(3, device="meta")}) == {}
