"""Matrices most of whose rows are zero, as the gradient of an embedding: the other rows alone.

A row of zeros carries no energy, so the factors of the other rows are those of the whole matrix,
and what is promised of them holds for it. How the rows travel is specified in `fedkd_fast.wire`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.codec.common import byte_view, dense_rows
from fedkd_fast.wire import Entry, Mode

# Shorter rows are not worth their ids, a byte or two each. Longer ones are, in any dtype, but where
# a factor or two of one bit a row would do: there an id a row can cost more than what is left out.
MIN_ROW = 16


class Rows(NamedTuple):
    """Some rows of a tensor whose other rows are zero, or a whole tensor."""

    ids: Tensor | None  # (R,) int64, ascending; None: all
    values: Tensor  # (R, …), or the tensor
    largest: float  # of the absolute values; NaN or Inf where one of them is; of integers 0
    squares: Tensor | None  # squared norms of the rows, or of those of the dense mode, if at hand


def touched(tensor: Tensor, *, exactly: bool, backend: ModuleType) -> Rows:
    """Return the rows that are not zero where they are at most half of all, else the whole tensor.

    Args:
        tensor: strided, on the CPU; or sparse, coalesced, with one sparse dimension.
        exactly: a row with a bit set anywhere is not zero; otherwise -0.0 is zero as well.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
    """
    if tensor.layout == torch.sparse_coo:
        ids, values = tensor.indices()[0], tensor.values()
        if 2 * len(ids) > len(tensor) or math.prod(tensor.shape[1:]) < MIN_ROW:
            return touched(tensor.to_dense(), exactly=exactly, backend=backend)
        if bool((ids[1:] <= ids[:-1]).any()):
            # Marked as coalesced, and is not.
            raise ValueError("indices of a sparse tensor must ascend")
        # What is listed may be zero.
        kept, largest, squares = _nonzero(values, len(values), exactly, backend)
        return _some(ids[kept], values[kept], largest, squares, kept)
    by_rows = tensor.dim() > 1 and len(tensor) > 1 and math.prod(tensor.shape[1:]) >= MIN_ROW
    if not tensor.numel() or not (by_rows or (tensor.is_floating_point() and not exactly)):
        return Rows(None, tensor, _largest(tensor), None)
    count = len(tensor) if by_rows else dense_rows(tuple(tensor.shape))
    kept, largest, squares = _nonzero(tensor, count, exactly, backend)
    if by_rows and 0 < 2 * len(kept) <= count:
        return _some(kept, tensor[kept], largest, squares, kept)
    return Rows(None, tensor, largest, squares)


def _some(
    ids: Tensor, values: Tensor, largest: float, squares: Tensor | None, kept: Tensor
) -> Rows:
    return Rows(ids, values, largest, None if squares is None else squares[kept])


def _nonzero(
    tensor: Tensor, count: int, exactly: bool, backend: ModuleType
) -> tuple[Tensor, float, Tensor | None]:
    """Look at a tensor in so many rows: ids of those not zero, largest absolute value, squares."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.int64, device="cpu"), 0.0, None
    if exactly or not tensor.is_floating_point():
        rows = torch.from_numpy(byte_view(tensor)).reshape(count, -1)
        return rows.amax(1).nonzero()[:, 0], _largest(tensor), None
    matrix = tensor.contiguous().reshape(count, -1)
    if tensor.dtype == torch.float32:
        squares, ends = backend.measure_rows(matrix)
    else:
        # Reductions to a number run at the speed of memory, and keep NaN; norms, any() and
        # count_nonzero() do not.
        squares, ends = None, torch.maximum(matrix.amax(1), -matrix.amin(1))
    return (ends != 0).nonzero()[:, 0], float(ends.amax()), squares


def _largest(tensor: Tensor) -> float:
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def placed(rows: Tensor, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this shape with these rows and zeros elsewhere."""
    whole = torch.zeros(shape, dtype=rows.dtype, device="cpu")
    whole[ids] = rows
    return whole


def whole_entry(shape: tuple[int, ...], ids: Tensor | None, rows: Entry) -> Entry:
    """Make the entry of a tensor from that of the rows that `touched` found."""
    if ids is None:
        return rows
    if rows.mode is Mode.ZERO:
        return replace(rows, shape=shape)
    return wire.rows_entry(shape, _gaps(ids.numpy()), rows)


def split(entry: Entry) -> tuple[Tensor, Entry]:
    """Return the ids, int64, and the entry of the rows of a decoded ROWS entry."""
    gaps, rows = wire.rows_parts(entry)
    return torch.from_numpy(_ids(np.frombuffer(gaps, np.uint8))), rows


def _gaps(ids: NDArray[np.int64]) -> bytes:
    """Encode how many rows are left out before each id, as varints."""
    gaps = np.diff(ids, prepend=-1) - 1
    # A digit for each seven bits of the largest gap, and which of them are written.
    shifts = np.arange(0, max(1, int(gaps.max()).bit_length()), 7)
    digits = gaps[:, None] >> shifts
    more = np.concatenate([digits[:, 1:] > 0, np.zeros((len(gaps), 1), np.bool_)], axis=1)
    written = (digits > 0) | (shifts == 0)
    codes = (digits & 0x7F) | (more << 7)
    return bytes(codes[written].astype(np.uint8))


def _ids(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Decode `_gaps`."""
    ends = np.flatnonzero(codes < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 7 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    gaps = np.add.reduceat((codes & 0x7F).astype(np.int64) << shifts, starts)
    return np.cumsum(gaps + 1) - 1
