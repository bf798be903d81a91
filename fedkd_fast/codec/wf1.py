"""wf1: the mode and the step of each tensor that meet its error with the fewest bytes.

`curves` says where each mode reaches the wanted error; the most promising ones are built
(`coding`), measured and corrected, their integers go through the entropy coder, and the smallest
payload is sent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.codec.coding import (
    STEPS,
    Coding,
    Source,
    code_dense,
    code_factors,
    code_hybrid,
    decoded_values,
    scales_of,
)
from fedkd_fast.codec.common import (
    ITEMSIZES,
    TORCH_DTYPES,
    VECTOR_SHARE,
    dense_rows,
    matrix_shape,
    to_bytes,
)
from fedkd_fast.codec.curves import Curve, Point, Spectrum, at_error, curves_of
from fedkd_fast.codec.gaussian import PER_OCTAVE
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.reference import Factors
from fedkd_fast.wire import Entry, Mode, half_payload

# Errors are aimed a little below what is allowed, so that one attempt mostly does; a tensor is
# coded again where it would use less than this share of it.
AIM, FULL_USE = 0.99, 0.95
ATTEMPTS = 8
# Modes that may be this much larger than the most promising one are tried as well.
MARGIN = 1.03
# All modes are, where more than this may be lost: symbols of dense rows are so rare there that they
# take up to several times the bytes that curves expect.
_MUCH_LOST = 0.35
# Where less than this may be lost, float32 sums cannot tell whether it was.
EXACT_SHARE = 1e-3
_STRIDE = 64  # a quarter of an octave
_STEEPEST = 2 * math.log(2) / (STEPS * PER_OCTAVE)  # growth a step of errors that are all rounding
_REMEMBERED = 8  # misses of the curves
_MANY = 8  # columns whose miss says something of the next tensor's
# Values that wait for the entropy coder: some megabytes, whose memory is then used again.
_MOST_WAITING = 1 << 20
_WIDE = ("float32", "float64")
_SUMS = 1e-5  # what sums of squares in float32 are off by, at most
_MOST_AIM = 0.9995  # of a squared norm: not to aim at losing all of it
_HALF_HEAD, _MOST_EXPONENT = 2, 126  # bytes, octaves
# Squared norms that leave float32 room for squares; and from where on it has room for errors, too,
# which are not measured otherwise where numbers are wide.
_USUAL, _USUAL_WIDE = (2.0**-80, 2.0**80), 2.0**-40


class Item:
    """A tensor to be encoded; `shift` is the power of two that it was divided by.

    Args:
        template: its entry in mode RAW; the payload is not looked at.
        exact: float32 or float64, not all zero. One that is `LowRank`, float32, has factors and may
            lose at least EXACT_SHARE.
        vector: whether it is one, which may lose less.
        factors: leading ones of the matrix, or None for dense modes alone.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
        squares: squared norms of the rows of `exact`, or of those of the dense mode, where somebody
            has measured them.
    """

    def __init__(
        self,
        template: Entry,
        exact: Tensor | LowRank,
        *,
        vector: bool,
        factors: Factors | None,
        backend: ModuleType,
        squares: Tensor | None = None,
    ) -> None:
        self.template, self.share = template, VECTOR_SHARE if vector else 1.0
        self.shift, self.factors = 0, factors
        self.exact: Tensor | LowRank = exact
        self.matrix: Tensor | LowRank
        self.squares = (
            torch.empty(0, dtype=torch.float64, device="cpu") if squares is None else squares
        )
        if isinstance(exact, LowRank):
            self.matrix = exact.matrix()
            self.total = exact.squared_norm()
            return
        # In order: equal numbers become equal bytes, however they lie in memory.
        exact = exact.contiguous()
        self._spread(exact, backend)
        least = _USUAL_WIDE if template.dtype in _WIDE else _USUAL[0]
        if not least < self.total < _USUAL[1]:
            # Squares must stay inside float32.
            self.shift = math.frexp(max(abs(float(extreme)) for extreme in exact.aminmax()))[1]
            self.squares = self.squares[:0]
            self._spread(torch.ldexp(exact, torch.tensor(-self.shift, device="cpu")), backend)
            if factors is not None:
                sigma = torch.ldexp(factors.sigma, torch.tensor(-self.shift, device="cpu"))
                self.factors = factors._replace(sigma=sigma)

    def _spread(self, exact: Tensor, backend: ModuleType) -> None:
        """Look at a tensor as a matrix, and as the rows of the dense mode."""
        shape = self.template.shape
        self.exact = exact
        self.matrix = exact.reshape(matrix_shape(shape) if len(shape) > 1 else (1, -1)).float()
        self.dense = self.matrix.reshape(dense_rows(shape), -1)
        if len(self.squares) and not len(self.squares) % len(self.dense):
            # Short rows share a scale with their neighbours.
            self.squares = self.squares.reshape(len(self.dense), -1).sum(1)
        else:
            self.squares, _ = backend.measure_rows(self.dense)
        self.total = float(self.squares.sum())

    @cached_property
    def source(self) -> Source:
        """The matrix with its factors."""
        assert self.factors is not None
        return Source(self.matrix, self.factors, self.total)

    def curves(self, least_share: float, most_share: float | None = None) -> list[Curve]:
        """Return what the modes cost between these shares of the squared norm."""
        factors = self.factors
        spectrum = Spectrum(
            self.matrix.shape[0],
            self.matrix.shape[1],
            self.total,
            np.empty(0) if factors is None else factors.sigma.double().numpy(),
            self.squares.numpy(),
        )
        most_error = None if most_share is None else most_share * self.total
        return curves_of(spectrum, least_share * self.total, most_error)


class Coded(NamedTuple):
    """What a tensor becomes."""

    entry: Entry | None  # None where raw bytes are smaller than any
    error: float  # squared, of what the receiver will have


def _measured(coding: Coding, item: Item, allowed: float, backend: ModuleType) -> float:
    """Return the squared error of what the receiver will have."""
    dtype, dense = item.template.dtype, coding.mode is Mode.CODED_DENSE
    # Rows are rounded as the receiver decodes them; of factors float32 sums alone are known.
    if (dense and dtype == "float32") or (allowed >= EXACT_SHARE and dtype in _WIDE):
        return coding.error
    assert isinstance(item.exact, Tensor)
    scales = scales_of(coding.mode, coding.step, coding.sigmas)
    integers = coding.integers()
    parts = [part * scale[:, None] for part, scale in zip(integers, scales, strict=True)]
    decoded = decoded_values(coding.mode, item.template.shape, parts, backend)
    decoded = decoded.to(TORCH_DTYPES[item.template.dtype]).double()
    return float((decoded - item.exact.double().reshape(decoded.shape)).square().sum())


class Biases:
    """By how much errors miss what the curves say, as seen in the message so far.

    The curves know neither the tails of real columns nor how the two roundings of factors mix; both
    depend on the mode and on the shape.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[float]] = {}

    def of(self, kind: Hashable) -> float:
        """Return what errors of a kind are over what is aimed at."""
        seen = self._seen.get(kind, [])[-_REMEMBERED:]
        return math.exp(sum(seen) / (len(seen) + 0.5))

    def note(self, kind: Hashable, ratio: float) -> None:
        """Remember an error over what was aimed at."""
        self._seen.setdefault(kind, []).append(math.log(min(4.0, max(0.25, ratio))))


def densely(item: Item, allowed: float, backend: ModuleType) -> Coding | None:
    """Find the coarsest dense coding that loses at most the share `allowed`."""
    aim = target = (1 - _SUMS) * allowed * item.total
    best: Coding | None = None
    tried: set[int] = set()
    whole = False
    for _ in range(ATTEMPTS):
        step = backend.dense_step(item.dense, item.squares, aim, whole)
        coding = None
        if step not in tried:
            tried.add(step)
            coding = code_dense(item.dense, item.squares, step, backend)
        if coding is None:
            if whole:
                break
            # Some rows do not stand for all.
            whole, aim = True, target
            continue
        error = _measured(coding, item, allowed, backend)  # Inf where it overflows 16 bits
        if error <= target and (best is None or coding.step > best.step):
            best = replace(coding, error=error)
        if FULL_USE * target <= error <= target:
            break
        # More or less than a look at some rows said, or than float32 has.
        aim *= min(4.0, max(0.25, AIM * target / max(error, 1e-300)))
        aim = min(aim, _MOST_AIM * item.total)
    return best


def meeting(
    item: Item, curve: Curve, allowed: float, biases: Biases, backend: ModuleType
) -> Coding | None:
    """Find the coarsest coding of a mode that loses at most the share `allowed`."""
    if curve.mode is Mode.CODED_DENSE:
        return densely(item, allowed, backend)
    target = allowed * item.total
    short, long = sorted(item.matrix.shape)
    kind = curve.mode, round(math.log2(long / short))
    aim = AIM * target / biases.of(kind)
    place = at_error(curve, aim)
    best: Coding | None = None
    # The next coarser step that is too coarse, its error and columns.
    failed: tuple[int, float, int] | None = None
    slope, before, span = 0.5 * _STEEPEST, None, math.inf
    for attempt in range(ATTEMPTS):
        if place is None:
            break
        coding = _coding(item, place, best, backend)
        if coding is None:
            # Too coarse for the last column, perhaps.
            if best and math.floor(STEPS * place.step) > best.step:
                failed = math.floor(STEPS * place.step), math.inf, best.rank
            place = place._replace(step=place.step - 1)
            continue
        error = _measured(coding, item, allowed, backend)  # Inf where it overflows 16 bits
        many = curve.mode is not Mode.CODED_FACTORS or coding.rank >= _MANY
        if attempt == 0 and many and error < math.inf:
            biases.note(kind, error / aim)
        # Of numbers that keep to a few values, a coarser step may have the smaller error.
        if error <= target and (best is None or coding.step > best.step):
            best = replace(coding, error=error)
            more = curve.mode is Mode.CODED_FACTORS and failed and failed[2] < best.rank
            if failed and (failed[0] <= best.step or more):
                failed = None  # with fewer columns, coarser steps fail that now may do
        elif error > target and (failed is None or coding.step < failed[0]):
            failed = coding.step, error, coding.rank
        if FULL_USE * target <= error <= target:
            break
        if before is not None and coding.step != before[0] and error < math.inf:
            slope = math.log(max(error, 1e-300) / before[1]) / (coding.step - before[0])
            slope = min(max(slope, 0.1 * _STEEPEST), _STEEPEST)
        before = (coding.step, max(error, 1e-300)) if error < math.inf else None
        if best is None or (attempt == 0 and error <= target):
            aim *= min(4.0, max(0.25, AIM * target / max(error, 1e-300)))
            place = at_error(curve, aim)
            continue
        # The curve has done what it can: from here on the columns of the best are kept.
        gain = math.log(AIM * target / max(best.error, 1e-300))
        if failed is None:
            ahead = min(gain / slope, _STRIDE)
        else:
            # Between the two, by their errors; by half where that gained less than half.
            span, wider = failed[0] - best.step, span
            if span < 2:
                break
            share = gain / max(math.log(failed[1] / max(best.error, 1e-300)), 1e-9)
            ahead = 0.5 * span if span > 0.5 * wider else span * min(max(share, 0.1), 0.9)
            ahead = min(ahead, span - 1)
        place = place._replace(step=(best.step + max(1.0, ahead)) / STEPS)
    return best


def _coding(item: Item, place: Point, finer: Coding | None, backend: ModuleType) -> Coding | None:
    """Code a tensor at a place of a curve, with no fewer columns than a finer coding has."""
    step = math.floor(STEPS * place.step)
    assert item.factors is not None
    if place.mode is Mode.CODED_FACTORS:
        return code_factors(item.source, step, backend, finer.rank if finer else 0)
    assert isinstance(item.matrix, Tensor)
    rows = item.dense.shape[0]
    return code_hybrid(item.matrix, rows, item.factors, step, place.rank, backend)


def _half(item: Item, exact: Tensor, allowed: float) -> Coded | None:
    """Encode as float16 times a power of two, where that is exact enough."""
    largest = max(abs(float(extreme)) for extreme in exact.aminmax())
    # Below float16's largest number, 65504, by as little as a power of two can be.
    exponent = math.frexp(largest)[1] - 15
    if abs(exponent + item.shift) > _MOST_EXPONENT:
        return None
    values = torch.ldexp(exact, torch.tensor(-exponent, device="cpu")).half()
    decoded = torch.ldexp(values.double(), torch.tensor(exponent, device="cpu"))
    decoded = decoded.to(TORCH_DTYPES[item.template.dtype]).double()
    error = float((decoded - exact.double()).square().sum())
    if error > allowed * item.total:
        return None
    payload = half_payload(exponent + item.shift, to_bytes(values))
    return Coded(replace(item.template, mode=Mode.HALF, payload=payload), error)


def _codings(item: Item, allowed: float, biases: Biases, backend: ModuleType) -> Iterator[Coding]:
    """Yield what may be the smallest coding."""
    if item.factors is None:
        coding = densely(item, allowed, backend)
        if coding is not None:
            yield coding
        return
    curves = item.curves(0.5 * allowed, 1.5 * allowed)
    places = [(curve, at_error(curve, allowed * item.total)) for curve in curves]
    ranked = sorted(
        ((place.size, curve) for curve, place in places if place), key=lambda found: found[0]
    )
    found = False
    for size, curve in ranked:
        if found and size > MARGIN * ranked[0][0] and allowed < _MUCH_LOST:
            break
        coding = meeting(item, curve, allowed, biases, backend)
        if coding is not None:
            found = True
            yield coding


def encode(items: Sequence[Item], allowed: Sequence[float], backend: ModuleType) -> list[Coded]:
    """Encode tensors so that each loses at most a share of its squared norm.

    ``|x - decoded|² ≤ allowed·|x|²``, truncation, quantisation and the rounding of the dtype
    together, with the smallest of all modes.

    Args:
        items: the tensors; integers of many go through one call of the entropy coder.
        allowed: share that each may lose, in (0, 1).
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
    """
    biases = Biases()
    found = [Coded(None, 0.0)] * len(items)
    held = [_unencoded(item) for item in items]
    pending: list[tuple[int, Coding]] = []

    def settle() -> None:
        for (index, coding), stream in zip(pending, streams(pending, backend), strict=True):
            item = items[index]
            payload = coding.payload(stream, item.shift)
            if len(payload) < held[index]:
                held[index] = len(payload)
                entry = replace(item.template, mode=coding.mode, rank=coding.rank, payload=payload)
                found[index] = Coded(entry, coding.error)
        pending.clear()

    waiting = 0
    for index, (item, share) in enumerate(zip(items, allowed, strict=True)):
        for coding in _codings(item, share, biases, backend):
            pending.append((index, coding))
            waiting += sum(segment.numel() for segment in coding.segments)
        if waiting > _MOST_WAITING:
            settle()
            waiting = 0
    settle()
    for index, item in enumerate(items):
        if isinstance(item.exact, Tensor) and _HALF_HEAD + 2 * item.exact.numel() < held[index]:
            found[index] = _half(item, item.exact, allowed[index]) or found[index]
    return found


def _unencoded(item: Item) -> int:
    """Return the bytes of a tensor as it is."""
    if isinstance(item.exact, LowRank):
        return 2**63  # it would have to be written out first
    return math.prod(item.template.shape) * ITEMSIZES[item.template.dtype]


def streams(codings: Sequence[tuple[int, Coding]], backend: ModuleType) -> list[bytes]:
    """Return what the entropy coder makes of the integers of each coding."""
    if not codings:
        return []
    levels = torch.from_numpy(np.concatenate([coding.levels for _, coding in codings]))
    codes, sizes = backend.rans_encode(
        [part for _, coding in codings for part in coding.segments],
        torch.cat([coding.multiplier for _, coding in codings]),
        levels,
        [owner for owner, (_, coding) in enumerate(codings) for _ in coding.segments],
    )
    ends = np.cumsum(sizes.numpy())
    return [part.tobytes() for part in np.split(codes.numpy(), ends[:-1])]
