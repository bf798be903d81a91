"""Tensors as integers of one step: the quantisers of wf1, and what the receiver makes of them.

With integers q and r, the step Δ, and σ rounded as the wire carries it:

* factors ``Σ_k (Δ² / σ_k) · q_k ⊗ r_k``, where q and r round ``U·diag(σ)/Δ`` and ``V·diag(σ)/Δ``;
  the longer side is fitted to the shorter one as it is sent, by least squares, before it is
  rounded;
* dense ``Δ · q``;
* hybrid: a few factors, and what they leave out, as it is decoded, densely with the same Δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.codec.curves import KEPT_LEVEL
from fedkd_fast.codec.gaussian import HIGHEST, LOWEST, PER_OCTAVE, shrinks
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.reference import Factors
from fedkd_fast.reference_rounding import ROW_QUANTUM
from fedkd_fast.wire import Mode

Ints = NDArray[np.int16]
Bytes = NDArray[np.uint8]

# Steps travel in 1/256 octave, a sixteenth of what levels and sigmas are measured in.
STEPS = 16
LARGEST = 2**22 - 1  # integer that the coder takes
# Columns of higher levels might hold integers beyond the largest, in a single peak.
_FINEST = HIGHEST - 8 * PER_OCTAVE
# What sums of products may be off by: shares of the squared norm, and of the error.
ROUNDING, NOISE = 1e-5, 1e-3


@dataclass(frozen=True)
class Coding:
    """A tensor as integers, before the entropy coder."""

    mode: Mode
    rank: int
    step: int  # log2 Δ in 1/256 octave
    sigmas: Ints  # (K,) log2 σ in 1/16 octave, descending
    base: int  # level of dense rows of code 1
    width: int
    codes: Bytes  # (R,) of dense rows: 0 for zeros, c for the level base - 4(c - 1)
    # Left (K, P) and right (K, Q), whose multipliers are 1; dense (R, n). Float32.
    segments: tuple[Tensor, ...]
    multiplier: Tensor  # of each row, which makes integers of it
    levels: Ints  # of all rows of all segments
    error: float  # squared, of what is decoded

    def integers(self) -> list[Tensor]:
        """Return what the coder makes of the segments."""
        parts = torch.split(self.multiplier, [len(segment) for segment in self.segments])
        return [
            (segment * part[:, None]).round_().clamp_(-LARGEST, LARGEST)
            for segment, part in zip(self.segments, parts, strict=True)
        ]

    def payload(self, stream: bytes, shift: int) -> bytes:
        """Return the payload of its entry, times 2^shift, given what the coder made of it."""
        step, sigmas = self.step + STEPS * PER_OCTAVE * shift, self.sigmas + PER_OCTAVE * shift
        if self.mode is Mode.CODED_FACTORS:
            return wire.coded_factors_payload(step, sigmas, stream)
        dense = (self.base, self.width, self.codes.tobytes())
        if self.mode is Mode.CODED_DENSE:
            return wire.coded_dense_payload(step, *dense, stream)
        return wire.coded_hybrid_payload(step, sigmas, *dense, stream)


def _powers(logs: NDArray[np.integer]) -> Tensor:
    """Return 2^(log / 256) as every receiver computes it."""
    return torch.from_numpy(_C.exp2_fixed(logs).astype(np.float32))


# ---- factors -------------------------------------------------------------------------------------


class _Columns:
    """The columns of a spectrum that are kept at a step: `least` to `most` of them."""

    def __init__(
        self, factors: Factors, shape: tuple[int, int], step: int, least: int, most: int
    ) -> None:
        sigma = factors.sigma[:most].double()
        sigma = sigma[sigma > 0]
        codes = torch.round(PER_OCTAVE * torch.log2(sigma)).to(torch.int32).numpy()
        self.halves = [_C.half_log2(n) for n in shape]
        level = (16 * codes - step - max(self.halves) + 8) >> 4
        kept = (level >= KEPT_LEVEL) | ((np.arange(len(level)) < least) & (level >= LOWEST))
        self.codes = codes[kept]
        self.step = step

    def levels(self) -> Ints:
        parts = [(16 * self.codes - self.step - half + 8) >> 4 for half in self.halves]
        return np.concatenate(parts).astype(np.int16)

    def shrinks(self) -> tuple[Tensor, Tensor]:
        """Return what the columns of left and right are multiplied by before they are rounded."""
        left, right = shrinks(self.levels()).chunk(2)
        return left, right

    def scales(self) -> Tensor:
        """Return Δ² / σ as the receiver computes it."""
        return _powers(2 * self.step - 16 * self.codes)

    def multipliers(self) -> Tensor:
        """Return σ / Δ."""
        return _powers(16 * self.codes - self.step)


class Source:
    """A matrix with leading factors, to be sent as factors.

    Args:
        matrix: (P, Q).
        factors: of the matrix, as `truncated_svd_list` gives them: the vectors of the longer side,
            the right one of a square, are the products with those of the shorter one.
        total: squared norm of the matrix.
    """

    def __init__(self, matrix: Tensor | LowRank, factors: Factors, total: float) -> None:
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.factors, self.total = factors, total
        self.tall = self.shape[0] > self.shape[1]
        sides = factors.right, factors.left
        self.short, self.long = sides if self.tall else sides[::-1]
        # The matrix with the longer side first: product of both where the second is not None.
        self.matrix: Tensor
        self.through: Tensor | None = None
        if isinstance(matrix, LowRank):
            tall = matrix if self.tall else matrix.T
            self.matrix, self.through = tall.left.T, tall.right
        else:
            self.matrix = matrix if self.tall else matrix.T


def code_factors(source: Source, step: int, backend: ModuleType, least: int = 0) -> Coding | None:
    """Quantise factors at a step.

    Args:
        source: the matrix.
        step: log2 Δ in 1/256 octave.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
        least: keep so many columns, even where the step is too coarse for them.

    Returns:
        None where no column is worth it, the step is too fine for the coder, or what is sent of the
        shorter side is not independent.
    """
    columns = _Columns(source.factors, source.shape, step, least, len(source.factors.sigma))
    rank = len(columns.codes)
    if not rank or columns.levels().max() > _FINEST:
        return None
    shrinks = columns.shrinks()
    near_shrink, far_shrink = shrinks[::-1] if source.tall else shrinks
    near, far, gain = backend.fit_factors(
        source.matrix,
        source.through,
        source.short[:rank],
        source.long[:rank],
        source.factors.sigma[:rank].float(),
        columns.multipliers(),
        near_shrink,
        far_shrink,
        columns.scales(),
    )
    if not math.isfinite(float(gain)):
        return None
    error = max(source.total - float(gain), 0.0)
    sides = (far, near) if source.tall else (near, far)
    return _factors_coding(columns, sides, (1 + NOISE) * error + ROUNDING * source.total)


def _factors_coding(columns: _Columns, sides: tuple[Tensor, Tensor], error: float) -> Coding:
    return Coding(
        mode=Mode.CODED_FACTORS,
        rank=len(columns.codes),
        step=columns.step,
        sigmas=columns.codes.astype(np.int16),
        base=0,
        width=0,
        codes=np.empty(0, np.uint8),
        segments=sides,
        multiplier=torch.ones(2 * len(columns.codes), device="cpu"),
        levels=columns.levels(),
        error=error,
    )


# ---- dense rows and the residual of a head -------------------------------------------------------


def code_dense(
    values: Tensor, squares: Tensor, step: int, backend: ModuleType, head: Coding | None = None
) -> Coding | None:
    """Quantise rows at a step.

    Args:
        values: (R, n).
        squares: (R,) squared norms of the rows.
        step: log2 Δ in 1/256 octave.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
        head: factors that left these values of a matrix.

    Returns:
        None where no row is worth it, or the step is too fine for the coder.
    """
    multiplier, found, lost = backend.round_rows(values, squares, step)
    levels: Ints = found.numpy()
    base = int(levels.max())
    if base == wire.ZERO_ROW:
        return None
    codes = np.where(
        levels == wire.ZERO_ROW, 0, 1 + (base - levels.astype(np.int64)) // ROW_QUANTUM
    )
    return Coding(
        mode=Mode.CODED_HYBRID if head else Mode.CODED_DENSE,
        rank=head.rank if head else values.shape[0],
        step=step,
        sigmas=head.sigmas if head else np.empty(0, np.int16),
        base=base,
        width=0 if bool((codes == 1).all()) else int(codes.max()).bit_length(),
        codes=codes.astype(np.uint8),
        segments=(*head.segments, values) if head else (values,),
        multiplier=torch.cat([head.multiplier, multiplier]) if head else multiplier,
        levels=np.concatenate([head.levels, levels]) if head else levels,
        error=float(lost),
    )


def code_hybrid(
    matrix: Tensor, rows: int, factors: Factors, step: int, rank: int, backend: ModuleType
) -> Coding | None:
    """Quantise `rank` factors and what is left, in so many rows, at one step."""
    shape = (matrix.shape[0], matrix.shape[1])
    columns = _Columns(factors, shape, step, 0, min(rank, len(factors.sigma) - 1))
    if not len(columns.codes) or columns.levels().max() > _FINEST:
        return None
    sides = [side[: len(columns.codes)] for side in (factors.left, factors.right)]
    multipliers = columns.multipliers()[:, None]
    left, right = ((side * multipliers).round_() for side in sides)
    left_out = backend.reconstruct(left * columns.scales()[:, None], right).neg_().add_(matrix)
    left_out = left_out.reshape(rows, -1)
    squares, _ = backend.measure_rows(left_out)
    return code_dense(
        left_out, squares, step, backend, _factors_coding(columns, (left, right), 0.0)
    )


# ---- what the receiver makes of them -------------------------------------------------------------


def scales_of(mode: Mode, step: int, sigmas: Ints) -> list[Tensor]:
    """Return the float32 factor of each row of a stream's integers: left, right, dense."""
    scales = []
    if mode is not Mode.CODED_DENSE:
        logs = 2 * step - 16 * sigmas.astype(np.int64)
        scales += [_powers(logs), torch.ones(len(sigmas), device="cpu")]
    if mode is not Mode.CODED_FACTORS:
        scales.append(_powers(np.array([step])))
    return scales


def decoded_values(
    mode: Mode, shape: tuple[int, ...], parts: Sequence[Tensor], backend: ModuleType
) -> Tensor:
    """Put a tensor together from decoded values; the order of operations is fixed."""
    if mode is Mode.CODED_DENSE:
        return parts[0].reshape(shape)
    product: Tensor = backend.reconstruct(parts[0], parts[1])
    if mode is Mode.CODED_HYBRID:
        product += parts[2].reshape(product.shape)
    return product.reshape(shape)
