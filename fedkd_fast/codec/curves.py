"""Error and bytes of a tensor in each mode of wf1, as functions of the quantisation step.

All coefficients of ``U·diag(σ)`` and ``V·diag(σ)`` weigh the same in the error of their product, so
one step Δ for all of them is the optimum (reverse water-filling): a column gets about
``log2(σ / (Δ√n))`` bits an entry, and columns that would become zeros are left out. With the closed
forms of `gaussian`, error and bytes are functions of Δ alone; every kind of rate control
reads them off here. What is sent is measured afterwards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkd_fast.codec.gaussian import PER_OCTAVE, Floats, cost_of
from fedkd_fast.reference_rounding import ROW_QUANTUM
from fedkd_fast.wire import Mode

Ints = NDArray[np.int64]

# A column is kept where its larger level reaches this: σ >= 0.57 Δ √max(P, Q).
KEPT_LEVEL = -13
# Between the steps that curves are known at, in sixteenths of an octave.
SPACING = 2.0
# Wider grids than this lead from nothing sent to nothing lost for any spectrum.
_MOST_POINTS = 320
_HEADS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256)
_BOTH = 0.1
# Factors that are smaller than this share of a dense tensor are smaller than any mixture.
_MIXED_SHARE = 0.6
# Of the squared norm: errors up to here are those of fine steps, Δ²/12 a number.
_FINE_SHARE = 0.05
_FEW_SYMBOLS, _CHUNK = 16384, 65536


class Spectrum(NamedTuple):
    """What the curves of a tensor depend on."""

    rows: int  # P
    cols: int  # Q
    total: float  # squared norm
    singular: Floats  # (K,) leading singular values, descending; empty: dense modes alone
    # (R,) squared norms of the rows of the dense mode, R divides P·Q; empty: factors alone
    row_energies: Floats


class Curve(NamedTuple):
    """One mode at ascending steps."""

    mode: Mode
    steps: Floats  # (G,) log2 Δ in sixteenths of an octave
    error: Floats  # (G,) expected squared error
    size: Floats  # (G,) expected payload bytes
    rank: Ints  # (G,) columns kept; 0 in dense mode


class Point(NamedTuple):
    """A place on a curve."""

    mode: Mode
    step: float  # log2 Δ in sixteenths of an octave
    error: float
    size: float
    rank: int


def stream_bytes(symbols: Floats, bits: Floats) -> Floats:
    """Return what the coder takes for so many symbols and bits: states, chunk table, codes."""
    chunks = np.ceil(symbols / _CHUNK)
    states = np.where(symbols < _FEW_SYMBOLS, 4, 32) * 4
    # A state ends half-way between what it must hold and what it can.
    return np.where(symbols > 0, chunks * (4 + 0.75 * states) + bits / 8, 0.0)


def log_level(squares: float | Floats) -> Floats:
    """Return the level of a standard deviation, from its square, at step 1."""
    with np.errstate(divide="ignore"):
        return 0.5 * PER_OCTAVE * np.log2(np.asarray(squares, np.float64))


def _grid(spectrum: Spectrum, least_error: float, most_error: float) -> Floats:
    """Return steps from where a dense tensor has the least error to where any has the most."""
    numel = spectrum.rows * spectrum.cols
    # Two full factors have twice as many numbers as the tensor: half an octave finer.
    least = min(least_error, _FINE_SHARE * spectrum.total)
    low = math.floor(float(log_level(12 * least / numel))) - PER_OCTAVE // 2 - 2
    high = low + 2.0
    if len(spectrum.row_energies):
        largest = float(spectrum.row_energies.max()) * len(spectrum.row_energies) / numel
        high = float(log_level(largest)) + 3 * PER_OCTAVE + 1
    if len(spectrum.singular):
        column = float(spectrum.singular[0]) ** 2 / max(spectrum.rows, spectrum.cols)
        high = max(high, float(log_level(column)) - KEPT_LEVEL + 1)
    # One column alone has this error, and of no column everything is lost.
    longer = max(spectrum.rows, spectrum.cols)
    high = min(high, float(log_level(12 * most_error / longer)) + PER_OCTAVE)
    points = min(math.ceil((high + 1 - low) / SPACING) + 1, _MOST_POINTS)
    return low + SPACING * np.arange(points, dtype=np.float64)


class _Columns(NamedTuple):
    """What each column costs at each step, (G, K)."""

    level: Floats  # of the longer side
    error_long: Floats
    error_short: Floats
    bits: Floats  # of both sides


def _columns(spectrum: Spectrum, steps: Floats) -> _Columns:
    long, short = max(spectrum.rows, spectrum.cols), min(spectrum.rows, spectrum.cols)
    sigma = np.rint(log_level(spectrum.singular**2))
    levels = [sigma - log_level(float(n)) - steps[:, None] for n in (long, short)]
    (error_long, bits_long), (error_short, bits_short) = (cost_of(level) for level in levels)
    scale = 4.0 ** (steps[:, None] / PER_OCTAVE)
    bits = long * bits_long + short * bits_short
    return _Columns(levels[0], scale * long * error_long, scale * short * error_short, bits)


def _factors(spectrum: Spectrum, steps: Floats, columns: _Columns) -> Curve:
    short = min(spectrum.rows, spectrum.cols)
    level, error_long, error_short, bits = columns
    kept = level >= KEPT_LEVEL
    rank = kept.sum(1)
    # The long side is fitted to the short one as it is sent. That undoes what the rounding of the
    # short one did within its own span, rank / short of it.
    free = 1.0 - rank / short
    energies = spectrum.singular**2
    error = spectrum.total - (kept * energies).sum(1)
    error += (kept * error_long).sum(1) + free * (kept * error_short).sum(1)
    # Roundings of both sides multiply, which matters for weak columns; most of it is undone
    # by the fit.
    error += _BOTH * (kept * error_long * error_short / np.maximum(energies, 1e-300)).sum(1)
    symbols = rank * float(spectrum.rows + spectrum.cols)
    gaps = rank / 8 + np.where(rank > 0, 16.0, 0.0)
    size = stream_bytes(symbols, (kept * bits).sum(1)) + gaps
    return Curve(Mode.CODED_FACTORS, steps, error, size, rank)


def _dense(spectrum: Spectrum, steps: Floats) -> Curve:
    count = len(spectrum.row_energies)
    length = spectrum.rows * spectrum.cols // count
    levels = ROW_QUANTUM * np.rint(log_level(spectrum.row_energies / length) / ROW_QUANTUM)
    finite = np.isfinite(levels)
    found, members = np.unique(levels[finite], return_counts=True)
    energies = np.array([spectrum.row_energies[levels == level].sum() for level in found])
    error, bits = cost_of(found - steps[:, None])
    coded = found - steps[:, None] >= -3 * PER_OCTAVE
    scale = 4.0 ** (steps[:, None] / PER_OCTAVE)
    error = np.where(coded, scale * error * members * length, energies).sum(1)
    symbols = (coded * members).sum(1) * float(length)
    width = math.ceil(math.log2(len(found) + 1)) if len(found) > 1 else 0
    size = stream_bytes(symbols, (bits * members * length).sum(1)) + 5 + count * width / 8
    return Curve(Mode.CODED_DENSE, steps, error, size, np.zeros(len(steps), np.int64))


def _hybrid(spectrum: Spectrum, steps: Floats, columns: _Columns, middle: float | None) -> Curve:
    heads = np.array([head for head in _HEADS if head <= len(spectrum.singular)])
    numel = float(spectrum.rows * spectrum.cols)
    _, error_long, error_short, bits = (part[:, : heads[-1]] for part in columns)
    # What the rounding of the head leaves joins the residual.
    left = spectrum.total - np.cumsum(spectrum.singular**2)[heads - 1]
    noise = np.cumsum(error_long + error_short, 1)[:, heads - 1]
    residual = log_level((np.maximum(left, 0.0) + noise) / numel) - steps[:, None]
    error, symbol_bits = cost_of(residual)
    scale = 4.0 ** (steps[:, None] / PER_OCTAVE)
    error *= scale * numel
    symbols = numel + heads * float(spectrum.rows + spectrum.cols)
    size = stream_bytes(
        np.broadcast_to(symbols, error.shape),
        numel * symbol_bits + np.cumsum(bits, 1)[:, heads - 1],
    )
    # With the bits at the price of this step: dD/dR = Δ²/6 · ln 2.
    best = np.argmin(error + scale * (8 * math.log(2) / 6) * size, axis=1)
    every = np.arange(len(steps))
    if middle is not None:
        # Near one error one head serves, and the curve has no jumps to miss it by.
        above = np.flatnonzero(error[every, best] > middle)
        best[:] = best[max(int(above[0]) - 1, 0) if len(above) else -1]
    size = size[every, best] + heads[best] / 8 + 21
    return Curve(Mode.CODED_HYBRID, steps, error[every, best], size, heads[best])


def curves_of(
    spectrum: Spectrum, least_error: float, most_error: float | None = None
) -> list[Curve]:
    """Return the curves of all modes that may be the smallest ones.

    Args:
        spectrum: of the tensor, not zero.
        least_error: smallest squared error that matters, > 0.
        most_error: largest one; everything may be lost where it is None.
    """
    steps = _grid(spectrum, least_error, spectrum.total if most_error is None else most_error)
    found: list[Curve] = []
    if len(spectrum.row_energies):
        found.append(_dense(spectrum, steps))
    if len(spectrum.singular):
        columns = _columns(spectrum, steps)
        found.append(_factors(spectrum, steps, columns))
        if len(found) > 1 and _may_mix(found[0], found[1], most_error):
            middle = None if most_error is None else 0.5 * (least_error + most_error)
            found.append(_hybrid(spectrum, steps, columns, middle))
    return found


def _may_mix(dense: Curve, factors: Curve, error: float | None) -> bool:
    """Tell whether a few factors and the rest may be smaller than either alone."""
    places = [None if error is None else at_error(curve, error) for curve in (dense, factors)]
    if places[0] is None or places[1] is None:
        return True
    return places[1].size > _MIXED_SHARE * places[0].size


def at_error(curve: Curve, target: float) -> Point | None:
    """Return where a curve reaches a squared error; None where it never is that small."""
    above = np.flatnonzero(curve.error > target)
    first = int(above[0]) if len(above) else len(curve.error)
    if first == 0:
        return None
    if first == len(curve.error):
        last = first - 1
        step, error, size = (float(a[last]) for a in (curve.steps, curve.error, curve.size))
        return Point(curve.mode, step, error, size, int(curve.rank[last]))
    low, high = (math.log(max(float(e), 1e-300)) for e in curve.error[first - 1 : first + 1])
    share = (math.log(target) - low) / (high - low) if high > low else 0.0
    share = min(max(share, 0.0), 1.0)
    size = (1 - share) * curve.size[first - 1] + share * curve.size[first]
    step = float(curve.steps[first - 1]) + share * SPACING
    return Point(curve.mode, step, target, float(size), int(curve.rank[first - 1]))
