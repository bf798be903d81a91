"""robust.check_norms: which updates are out of proportion to the round's."""

from __future__ import annotations

import itertools
import math

import pytest
from decoded import random_updates

from fedkd_fast.robust import check_norms
from fedkd_fast.updates import Client, squared_norm


def test_norms_out_of_proportion() -> None:
    norms: dict[Client, float] = {"b": 30.1, 2: 10.0, 1: 9.0, "a": 30.0, 3: 1.0}
    refused = check_norms(norms, 3.0)
    assert list(refused) == ["b"]
    assert refused["b"] == (
        "update of client b has norm 30.1: it must be at most limit = 3 times 10, the median norm "
        "of the round"
    )
    assert list(check_norms({**norms, 0: math.inf, 4: math.nan}, 3.0)) == [0, 4, "b"]
    for few in ({}, {0: 1.0}, {0: 1.0, 1: 1e9}, {0: 0.0, 1: 0.0, 2: 5.0}):
        assert check_norms(few, 1.5) == {}
    assert list(check_norms({0: 1.0, 1: math.inf}, 1.5)) == [1]
    for limit in (1.0, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="limit must be above 1 and finite, got"):
            check_norms(norms, limit)


def test_half_of_the_norms_always_remains() -> None:
    for norms in itertools.product([0.1, 1.0, 50.0, 1e9], repeat=4):
        assert len(check_norms(dict(enumerate(norms)), 1.01)) <= 2


def test_norms_of_updates_serve_the_check() -> None:
    updates = {**random_updates(5), 9: random_updates(1, seed=99, size=1e30)[0]}
    norms = {one: math.sqrt(squared_norm(update)) for one, update in updates.items()}
    assert list(check_norms(norms, 10.0)) == [9]
