"""Any message, and any bytes that should be one: hypothesis chooses. On the CPU."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_cases import HOSTILE, check, refused, sample

from fedkd_fast import ops


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_message(data: st.DataObject) -> None:
    shape = st.tuples(st.integers(0, 4), st.integers(0, 200))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=4))
    rises = data.draw(st.lists(st.integers(0, 1), min_size=len(shapes), max_size=len(shapes)))
    levels = data.draw(st.lists(st.integers(-60, 335), min_size=1, max_size=6))
    tails, seed = data.draw(st.floats(0, 4)), data.draw(st.integers(0, 1000))
    owner = np.cumsum([0, *rises[1:]]).tolist()
    check(sample(shapes, levels, owner, tails=tails, seed=seed))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_bytes(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(HOSTILE))
    codes, _ = ops.rans_encode(*message)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(codes) - 1))
        codes[place] = data.draw(st.integers(0, 255))
    refused(message, codes)


@given(code=st.binary(max_size=200), level=st.integers(-50, 335), count=st.integers(0, 70))
@settings(max_examples=200, deadline=None)
def test_bytes_of_nobody(code: bytes, level: int, count: int) -> None:
    refused(sample([(1, count)], [level]), torch.tensor(list(code), dtype=torch.uint8))
