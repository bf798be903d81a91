"""Closed forms of rate control: what they say of a tensor, and what then comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from updates import powerlaw

from fedkd_fast.codec.curves import SPACING, Curve, Spectrum, at_error, curves_of
from fedkd_fast.codec.gaussian import BITS, ERROR, HIGHEST, LOWEST, PER_OCTAVE, cost_of, shrink
from fedkd_fast.wire import Mode

# Samples of a Gaussian: mean squares and mean code lengths are off by a few parts of the root.
SAMPLES = 1 << 20
NOISE = 6 / math.sqrt(SAMPLES)


@pytest.mark.parametrize("level", [-48, -30, -16, 0, 7, 20, 40, 47, 64, 100])
def test_gaussian_rows_cost_what_the_table_says(level: int) -> None:
    generator = torch.Generator().manual_seed(level + 100)
    values = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    values *= 2.0 ** (level / PER_OCTAVE)
    ratio = torch.tensor(2.0 ** (level / PER_OCTAVE), dtype=torch.float64)
    whole = (values * shrink(ratio)).round()
    error = float((values - whole).square().mean())
    assert error == pytest.approx(ERROR[level - LOWEST], rel=NOISE)
    _, counts = whole.unique(return_counts=True)
    shares = counts.double() / SAMPLES
    entropy = float(-(shares * shares.log2()).sum())
    # Raw low bits and symbols that are never quite impossible cost a little.
    assert entropy - NOISE <= BITS[level - LOWEST] <= 1.01 * entropy + 0.01


def test_levels_out_of_range() -> None:
    error, bits = cost_of(np.array([LOWEST - 1.0, -200.0, -np.inf, HIGHEST + 5.0]))
    assert bits[:3].tolist() == [0.0, 0.0, 0.0]
    assert error[0] == pytest.approx(4.0 ** ((LOWEST - 1) / PER_OCTAVE))
    assert error[2] == 0.0 and error[3] == pytest.approx(1 / 12)


def spectrum_of(matrix: torch.Tensor) -> Spectrum:
    exact = matrix.double()
    return Spectrum(
        matrix.shape[0],
        matrix.shape[1],
        float(exact.square().sum()),
        torch.linalg.svdvals(exact).numpy(),
        exact.square().sum(1).numpy(),
    )


@pytest.mark.parametrize("share", [0.3, 0.05, 0.02, 1e-3, 1e-6])
def test_every_mode_reaches_the_error(share: float) -> None:
    spectrum = spectrum_of(powerlaw(96, 64))
    target = share * spectrum.total
    sizes = {}
    for curve in curves_of(spectrum, 0.5 * target):
        assert (np.diff(curve.steps) == SPACING).all()
        place = at_error(curve, target)
        assert place is not None and place.error == pytest.approx(target)
        assert curve.steps[0] < place.step < curve.steps[-1]
        sizes[place.mode] = place.size
    assert set(sizes) == {Mode.CODED_FACTORS, Mode.CODED_DENSE, Mode.CODED_HYBRID}
    if share >= 0.05:
        assert sizes[Mode.CODED_FACTORS] < sizes[Mode.CODED_DENSE]
    if share <= 1e-3:
        assert sizes[Mode.CODED_FACTORS] > sizes[Mode.CODED_HYBRID]


def test_flat_spectra_go_dense() -> None:
    noise = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    spectrum = spectrum_of(noise)
    target = 0.05 * spectrum.total
    places = [at_error(curve, target) for curve in curves_of(spectrum, target)]
    best = min((place for place in places if place), key=lambda place: place.size)
    assert best.mode is Mode.CODED_DENSE


def test_without_factors_there_is_one_mode_and_without_rows_another() -> None:
    whole = spectrum_of(powerlaw(32, 32))
    dense = curves_of(whole._replace(singular=np.empty(0)), 1e-3)
    assert [curve.mode for curve in dense] == [Mode.CODED_DENSE]
    factors = curves_of(whole._replace(row_energies=np.empty(0)), 1e-3)
    assert [curve.mode for curve in factors] == [Mode.CODED_FACTORS]


def test_places_beyond_the_ends() -> None:
    steps = SPACING * np.arange(4)
    curve = Curve(
        Mode.CODED_DENSE,
        steps,
        np.array([1.0, 2.0, 4.0, 8.0]),
        np.array([40.0, 30.0, 20.0, 10.0]),
        np.zeros(4, np.int64),
    )
    assert at_error(curve, 0.5) is None
    last = at_error(curve, 9.0)
    assert last is not None and (last.step, last.error, last.size) == (3 * SPACING, 8.0, 10.0)
    between = at_error(curve, math.sqrt(8.0))
    assert between is not None
    assert between.step == pytest.approx(1.5 * SPACING) and between.size == pytest.approx(25.0)
