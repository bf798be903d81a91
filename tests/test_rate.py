"""Bit allocation: the table of quantisers, and targets met with few bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedkd_fast import ops
from fedkd_fast.codec.rate import DISTORTION, HALF_STEP, allocate_bits

# The Gaussian as a quadrature: points of equal distance within ±8 standard deviations, weighted by
# the density. Of 2^19 points 128 lie in a cell at 12 bits, and the midpoint rule's error falls with
# the square of that number; the table has five digits.
POINTS = 2**19
VALUES = ((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS - 0.5) * 16
WEIGHTS = torch.exp(-0.5 * VALUES**2) * (16 / POINTS) / (2 * math.pi) ** 0.5
PRECISION = 128.0**-1


def gaussian_error(bits: int, half_step: float) -> float:
    values = VALUES.float()[None]
    scale, widths = torch.tensor([half_step]).float(), torch.tensor([bits]).to(torch.uint8)
    back = ops.unpack_factors(ops.pack_factors(values, scale, widths), scale, widths, POINTS)
    return float((WEIGHTS * (back[0].double() - VALUES) ** 2).sum())


@pytest.mark.parametrize("bits", range(1, len(HALF_STEP)))
def test_table_is_what_the_best_quantiser_does(bits: int) -> None:
    error = gaussian_error(bits, HALF_STEP[bits])
    assert error == pytest.approx(DISTORTION[bits], rel=PRECISION)
    assert all(error < gaussian_error(bits, HALF_STEP[bits] * factor) for factor in (0.95, 1.05))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.05, 0.01, 1e-4])
def test_target_is_met_and_used(share: float) -> None:
    energies = np.arange(1, 201, dtype=np.float64) ** -1.5
    target = share * energies.sum()
    found = allocate_bits(energies, (400, 300), 6, target)
    assert found is not None
    assert 0.9 * target <= found.error <= target
    left, right = found.bits
    assert ((left > 0) == (right > 0)).all()
    kept = left > 0
    assert (np.diff(left[kept].astype(int)) <= 0).all(), "stronger columns get more bits"
    codes = ((left.astype(int) * 400 + 7) // 8 + (right.astype(int) * 300 + 7) // 8).sum()
    assert found.payload_bytes == 6 * kept.sum() + codes


def test_smaller_targets_cost_more() -> None:
    energies = np.arange(1, 101, dtype=np.float64) ** -1.0
    sizes = []
    for share in (0.5, 0.2, 0.1, 0.05, 0.02):
        found = allocate_bits(energies, (64,), 0, share * energies.sum())
        assert found is not None
        sizes.append(found.payload_bytes)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_it_beats_equal_bits() -> None:
    energies = np.arange(1, 201, dtype=np.float64) ** -1.5
    equal = 4
    found = allocate_bits(energies, (400,), 0, float(DISTORTION[equal] * energies.sum()))
    assert found is not None
    assert found.payload_bytes < equal * 400 * 200 / 8


def test_unreachable_and_empty_targets() -> None:
    energies = np.ones(4)
    assert allocate_bits(energies, (10,), 0, 1e-12) is None
    assert allocate_bits(energies, (10,), 0, -1.0) is None
    zero = allocate_bits(np.zeros(3), (10, 20), 6, 0.0)
    assert zero is not None and zero.payload_bytes == 0 and not zero.bits[0].any()
    dropped = allocate_bits(energies, (10,), 0, 5.0)
    assert dropped is not None and dropped.error <= 5.0
