"""Ops on sizes that nobody chose; apart, so that the ops' own tests also run without hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from svd_cases import SIDES, SPECTRA, STARTS, Case, problems_of
from test_pack_factors import sample

from fedkd_fast import ops, reference


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.lists(st.integers(0, 16), min_size=6, max_size=6),
    st.integers(0, 2**31),
)
def test_pack_factors_of_any_rows(rows: int, count: int, bits: list[int], seed: int) -> None:
    values, scale, widths = sample(rows, count, bits, seed)
    codes = ops.pack_factors(values, scale, widths)
    assert torch.equal(codes, reference.pack_factors(values, scale, widths))
    assert torch.equal(
        ops.unpack_factors(codes, scale, widths, count),
        reference.unpack_factors(codes, scale, widths, count),
    )


def svd_cases(largest: int) -> st.SearchStrategy[Case]:
    chosen = st.sampled_from([side for side in SIDES if side <= largest])
    side = chosen | st.integers(1, largest)
    usual = st.sampled_from([0.5, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 1.0])
    energy = usual | st.floats(0.05, 1 - 1e-9)
    scale = st.integers(-30, 30).map(lambda power: 10.0**power)
    spectrum, start = st.sampled_from(sorted(SPECTRA)), st.sampled_from(STARTS)
    return st.builds(Case, side, side, spectrum, energy, scale, start, st.integers(0, 2**31))


@settings(max_examples=300, deadline=None)
@given(svd_cases(320))
def test_truncated_svd_keeps_its_promises(case: Case) -> None:
    assert problems_of(case) == []


# The number of cases in which no energy may be missed.
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(svd_cases(1024))
def test_truncated_svd_keeps_its_promises_ten_thousand_times(case: Case) -> None:
    assert problems_of(case) == []
