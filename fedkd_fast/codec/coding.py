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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.codec.curves import KEPT_LEVEL, ROW_QUANTUM
from fedkd_fast.codec.gaussian import HIGHEST, LOWEST, PER_OCTAVE, Floats, shrink
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.reference import Factors
from fedkd_fast.wire import Mode

Ints = NDArray[np.int16]
Bytes = NDArray[np.uint8]
_Product = Callable[[Tensor, Tensor], Tensor]

# Steps travel in 1/256 octave, a sixteenth of what levels and sigmas are measured in.
STEPS = 16
LARGEST = 2**22 - 1  # integer that the coder takes
MOST_ROW_CODES = 63
# Rows of tensors have heavier tails than Gaussians, which want less of it.
DENSE_SHRINK = 0.7
# Steps of Newton's method at most, by what residuals have to shrink, and the one that the last step
# may start from: it is squared.
_NEWTON, _FALLING, _CLOSE = 8, 0.7, 0.05
# Columns of higher levels might hold integers beyond the largest, in a single peak.
_FINEST = HIGHEST - 8 * PER_OCTAVE
# Numbers of a side that are too few for what is rounded in eight bits to cancel: in what is sent,
# and in the error that is promised.
_FEW, _FEW_MEASURED = 1 << 16, 1 << 17
_WINDOW, _DICE = 61, 1 << 22  # between the windows of rows; numbers in all
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
    segments: tuple[Tensor, ...]  # integers as float32: left (K, P), right (K, Q), dense (R, n)
    levels: Ints  # of all rows of all segments
    error: float  # squared, of what is decoded

    def payload(self, stream: bytes, shift: int) -> bytes:
        """Return the payload of its entry, times 2^shift, given what the coder made of it."""
        step, sigmas = self.step + STEPS * PER_OCTAVE * shift, self.sigmas + PER_OCTAVE * shift
        if self.mode is Mode.CODED_FACTORS:
            return wire.coded_factors_payload(step, sigmas, stream)
        dense = (self.base, self.width, self.codes.tobytes())
        if self.mode is Mode.CODED_DENSE:
            return wire.coded_dense_payload(step, *dense, stream)
        return wire.coded_hybrid_payload(step, sigmas, *dense, stream)


def _rounded(values: Tensor, scale: Tensor | float) -> Tensor:
    return (values / scale).round_().clamp_(-LARGEST, LARGEST)


def row_squares(values: Tensor) -> Floats:
    """Return the squared norm of each row."""
    # Sums of a row in float32 are good to six digits.
    norms: Floats = torch.linalg.vector_norm(values, dim=1).double().numpy()
    return norms**2


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
        left, right = _shrinks(self.levels()).chunk(2)
        return left, right

    def scales(self) -> Tensor:
        """Return Δ² / σ as the receiver computes it."""
        logs = 2 * self.step - 16 * self.codes
        return torch.tensor([_C.exp2_fixed(int(e)) for e in logs], dtype=torch.float32)

    def multipliers(self) -> Tensor:
        """Return σ / Δ."""
        logs = 16 * self.codes - self.step
        return torch.tensor([_C.exp2_fixed(int(e)) for e in logs], dtype=torch.float32)


def _shrinks(levels: Ints, strength: float = 1.0) -> Tensor:
    return shrink(2.0 ** (torch.from_numpy(levels) / PER_OCTAVE), strength).float()


class Source:
    """A matrix with leading factors, to be sent as factors; keeps what several steps share.

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
        self._stored, self._matrix = matrix, matrix if self.tall else matrix.T
        sides = factors.right, factors.left
        self.short, self._long = sides if self.tall else sides[::-1]

    @cached_property
    def _narrow(self) -> Tensor | None:
        """The matrix in bfloat16, where that is what the machine multiplies fastest."""
        if isinstance(self._stored, LowRank) or not _multiplies_bfloat16():
            return None
        narrow = _dithered(self._stored)
        return narrow if self.tall else narrow.T

    def products(self, sent: Tensor, multipliers: Tensor) -> Tensor:
        """Return ``sent · matrixᵀ``, (K, N), for what short vectors times `multipliers` round to.

        Of the exact vectors the products are known. Those of what was rounded off are small, and
        eight bits of them suffice, if what these leave out has nothing to do with the vectors.
        """
        rank = len(sent)
        # Two roundings: whether they are fused may depend on how threads share the elements.
        off = self.short[:rank] * multipliers[:, None]
        torch.sub(sent, off, out=off)
        known = self._long[:rank] * (self.factors.sigma[:rank].float() * multipliers)[:, None]
        narrow = self._narrow if known.numel() >= _FEW else None
        if narrow is None:
            return known.add_((self._matrix @ off.T).T)
        return known.add_(_dithered(off) @ narrow.T)


def _dithered(matrix: Tensor) -> Tensor:
    """Round to bfloat16, up or down by a fixed die: on average, nothing is lost.

    To the nearest, equal numbers, as those of updates by signs, would all lose the same share.
    """
    rows, cols = matrix.shape
    # Rows see shifted windows of few numbers, which stay in a cache.
    stride = max(1, min(_WINDOW, _DICE // rows))
    dice = _dice((rows * stride + cols - 1).bit_length()).as_strided((rows, cols), (stride, 1))
    bits = (matrix.contiguous().view(torch.int32) + dice).bitwise_and_(-65536)
    return bits.view(torch.float32).bfloat16()


@cache
def _dice(length_bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << 16, (1 << length_bits,), dtype=torch.int32, generator=generator)


def _inverse(beside: Tensor, product: _Product) -> Tensor | None:
    """Return F with ``(I + E)⁻¹ = I + F`` for the correlations E of vectors that were orthogonal.

    Newton's ``F ← F - (I + F)·R`` with ``R = (I + E)·(I + F) - I`` takes products of small numbers
    alone, so that a few bits of each suffice, and whose bits do not depend on the number of threads
    as those of LAPACK's blocked factorisations do. None where I + E is singular.
    """
    inverse = product(beside, beside).sub_(beside)
    before = math.inf
    for _ in range(_NEWTON):
        rest = product(beside, inverse).add_(beside).add_(inverse)
        largest = float(torch.linalg.vector_norm(rest))
        if not largest < _FALLING * before:
            break
        inverse -= product(inverse, rest).add_(rest)
        if largest < _CLOSE:
            return inverse
        before = largest
    whole = beside.double()
    whole.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(whole)
    if int(failed):
        return None
    whole = torch.cholesky_inverse(factor)
    whole.diagonal().sub_(1.0)
    return whole.float()


def _quick_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in eight bits, and round what comes out to as many."""
    return (left.bfloat16() @ right.bfloat16()).float()


def _product_for(numel: int, few: int) -> _Product:
    """Return how to multiply where what is rounded off may cancel over so many numbers."""
    return _quick_product if numel >= few and _multiplies_bfloat16() else torch.matmul


@cache
def _multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def code_factors(source: Source, step: int, least: int = 0) -> Coding | None:
    """Quantise factors at a step.

    Args:
        source: the matrix.
        step: log2 Δ in 1/256 octave.
        least: keep so many columns, even where the step is too coarse for them.

    Returns:
        None where no column is worth it, the step is too fine for the coder, or what is sent of the
        shorter side is not independent.
    """
    columns = _Columns(source.factors, source.shape, step, least, len(source.factors.sigma))
    if not len(columns.codes) or columns.levels().max() > _FINEST:
        return None
    scales, multipliers = columns.scales(), columns.multipliers()
    shrinks = columns.shrinks()
    near, far = shrinks[::-1] if source.tall else shrinks
    sent = (source.short[: len(scales)] * (multipliers * near)[:, None]).round_()
    # Sums of squares of integers, exact in any order.
    norms = torch.linalg.vector_norm(sent, dim=1, dtype=torch.float64).float()
    if not float(norms.min()) > 0.0:
        return None
    products = source.products(sent, multipliers).div_(norms[:, None])  # (K, N)
    product = _product_for(products.numel(), _FEW)
    beside = product(sent, sent.T).div_(norms[:, None]).div_(norms).fill_diagonal_(0.0)
    inverse = _inverse(beside, product)
    if inverse is None:
        return None
    # With the rows of R = I + E scaled to one, the X that fits A best is (I + F)·R·A, and any X
    # has |A - Xᵀ·R|² = |A|² + <X, X - 2·R·A + E·X>.
    back = scales * norms
    other = product(inverse, products).add_(products).mul_((far / back)[:, None]).round_()
    fitted = other * back[:, None]
    # Small integers stay exact in eight bits; multiples of them would all be off by one share.
    product = _product_for(products.numel(), _FEW_MEASURED)
    off = product(beside * back, other).add_(fitted).sub_(products, alpha=2.0)
    error = source.total + float(off.mul_(fitted).sum(1).double().sum())
    sides = (other, sent) if source.tall else (sent, other)
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
        levels=columns.levels(),
        error=error,
    )


# ---- dense rows and the residual of a head -------------------------------------------------------


def _row_codes(values: Tensor, step: int) -> tuple[int, int, Bytes]:
    """Return base, width and codes of the levels of rows, in quarters of an octave."""
    squares = row_squares(values) / values.shape[1]
    with np.errstate(divide="ignore"):
        level = np.rint((0.5 * PER_OCTAVE * np.log2(squares) - step / STEPS) / ROW_QUANTUM)
    level = np.where(np.isfinite(level), level, -(2.0**15)).astype(np.int64)
    top = int(level.max())
    coded = ROW_QUANTUM * level >= LOWEST
    code = np.where(coded, 1 + top - level, 0)
    code = np.where(code > MOST_ROW_CODES, 0, code)  # 15 octaves below the largest row
    width = 0 if bool((code == 1).all()) else int(code.max()).bit_length()
    return ROW_QUANTUM * top, width, code.astype(np.uint8)


def _row_levels(base: int, codes: Bytes) -> Ints:
    levels = base - ROW_QUANTUM * (codes.astype(np.int64) - 1)
    return np.where(codes == 0, wire.ZERO_ROW, levels).astype(np.int16)


def code_dense(values: Tensor, step: int, head: Coding | None = None) -> Coding | None:
    """Quantise rows (R, n) at a step; with a head they are what its decoded factors leave out."""
    scale = float(np.float32(_C.exp2_fixed(step)))
    base, width, codes = _row_codes(values, step)
    if not LOWEST <= base <= HIGHEST:
        return None
    levels = _row_levels(base, codes)
    sent = _rounded(values, scale / _shrinks(levels, DENSE_SHRINK)[:, None])
    if width:
        sent[torch.from_numpy(codes == 0)] = 0.0
    error = float(row_squares(values - sent * scale).sum())
    none = np.empty(0, np.int16)
    return Coding(
        mode=Mode.CODED_HYBRID if head else Mode.CODED_DENSE,
        rank=head.rank if head else values.shape[0],
        step=step,
        sigmas=head.sigmas if head else none,
        base=base,
        width=width,
        codes=codes,
        segments=(*(head.segments if head else ()), sent),
        levels=np.concatenate([head.levels if head else none, levels]),
        error=error,
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
    decoded = backend.reconstruct(left * columns.scales()[:, None], right)
    head = _factors_coding(columns, (left, right), 0.0)
    return code_dense((matrix - decoded).reshape(rows, -1), step, head)


# ---- what the receiver makes of them -------------------------------------------------------------


def scales_of(mode: Mode, step: int, sigmas: Ints) -> list[Tensor]:
    """Return the float32 factor of each row of a stream's integers: left, right, dense."""
    scales = []
    if mode is not Mode.CODED_DENSE:
        logs = 2 * step - 16 * sigmas.astype(np.int64)
        left = torch.tensor([_C.exp2_fixed(int(e)) for e in logs], dtype=torch.float32)
        scales += [left, torch.ones(len(sigmas))]
    if mode is not Mode.CODED_FACTORS:
        scales.append(torch.tensor([_C.exp2_fixed(step)], dtype=torch.float32))
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
