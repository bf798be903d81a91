"""Ops on sizes that nobody chose; apart, so that the ops' own tests also run without hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack_factors import sample
from test_truncated_svd import check_factors

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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.999), st.integers(0, 2**31))
def test_truncated_svd_of_any_shape(rows: int, cols: int, energy: float, seed: int) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    svd = ops.truncated_svd(matrix, energy=energy)
    assert int(svd.rank) == int(reference.truncated_svd(matrix, energy=energy).rank)
    check_factors(matrix, svd)
