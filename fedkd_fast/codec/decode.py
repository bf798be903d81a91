"""One wire entry -> one tensor, in every mode. The order of operations is part of the format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.codec.coding import Ints, decoded_values, scales_of
from fedkd_fast.codec.common import TORCH_DTYPES, from_bytes, matrix_shape
from fedkd_fast.codec.rows import placed, split
from fedkd_fast.reference_rans import CHUNK, FIRST_LEVEL
from fedkd_fast.wire import Entry, Mode, WireError

BACKENDS = ("native", "reference")

CHUNK_HEAD = 4 + 4 * 4  # bytes: of each chunk its size, and a state for each of four lanes or more


def backend_named(name: str) -> ModuleType:
    """Return the module that has the ops."""
    if name == "native":
        from fedkd_fast import ops

        return ops
    if name == "reference":
        from fedkd_fast import reference

        return reference
    raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")


Parts = Tensor | tuple[Tensor, Tensor]


def decode_entry(entry: Entry, backend: ModuleType) -> Tensor:
    """Decode any entry but an alias into a tensor of its shape and dtype.

    Raises:
        WireError: the bytes of an entropy-coded stream are none that an encoder writes.
    """
    return written_out(entry, decode_parts(entry, backend), backend)


def written_out(entry: Entry, parts: Parts, backend: ModuleType) -> Tensor:
    """Return the tensor of an entry that the parts stand for."""
    values = parts if isinstance(parts, Tensor) else backend.reconstruct(*parts)
    return values.reshape(entry.shape).to(TORCH_DTYPES[entry.dtype])


def decode_parts(entry: Entry, backend: ModuleType) -> Parts:
    """Decode any entry but an alias; factors stay two: (K, P) and (K, Q), whose product it is."""
    match entry.mode:
        case Mode.ZERO:
            return torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="cpu")
        case Mode.RAW:
            return from_bytes(entry.payload, TORCH_DTYPES[entry.dtype])
        case Mode.HALF:
            parts = wire.half_parts(entry)
            halves = from_bytes(parts.halves, torch.float16).double()
            return torch.ldexp(
                halves, torch.tensor(parts.exponent, dtype=torch.float64, device="cpu")
            )
        case Mode.ROWS:
            ids, sent = split(entry)
            return placed(decode_entry(sent, backend), ids, entry.shape)
        case Mode.PACKED_DENSE:
            return _packed_dense(entry, backend)
        case Mode.FACTORS:
            return _factors(entry)
        case Mode.PACKED_FACTORS:
            return _packed_factors(entry, backend)
        case _:
            return _coded(entry, backend)


def _factors(entry: Entry) -> tuple[Tensor, Tensor]:
    rows, cols = matrix_shape(entry.shape)
    parts = wire.factors_parts(entry)
    sigma = from_bytes(parts.sigma, torch.float32)
    left = from_bytes(parts.left, torch.float32).reshape(entry.rank, rows) * sigma[:, None]
    return left, from_bytes(parts.right, torch.float32).reshape(entry.rank, cols)


def _packed_dense(entry: Entry, backend: ModuleType) -> Tensor:
    parts = wire.packed_dense_parts(entry)
    values: Tensor = backend.unpack_factors(
        from_bytes(parts.codes, torch.uint8),
        from_bytes(parts.scale, torch.float32),
        from_bytes(parts.bits, torch.uint8),
        math.prod(entry.shape) // entry.rank,
    )
    return values


def _packed_factors(entry: Entry, backend: ModuleType) -> tuple[Tensor, Tensor]:
    rows, cols = matrix_shape(entry.shape)
    parts = wire.packed_factors_parts(entry)
    scale = from_bytes(parts.scale, torch.float32)
    bits_left, bits_right = (
        from_bytes(part, torch.uint8) for part in (parts.bits_left, parts.bits_right)
    )
    left = backend.unpack_factors(from_bytes(parts.codes_left, torch.uint8), scale, bits_left, rows)
    codes_right = from_bytes(parts.codes_right, torch.uint8)
    return left, unpacked_levels(codes_right, bits_right, cols, backend)


def unpacked_levels(codes: Tensor, widths: Tensor, count: int, backend: ModuleType) -> Tensor:
    """Return the integers that codes of these widths stand for, in steps of one half."""
    ones = torch.ones(widths.numel(), dtype=torch.float32, device="cpu")
    levels: Tensor = backend.unpack_factors(codes, ones, widths, count)
    return levels


class _Segment(NamedTuple):
    """Rows of a stream."""

    levels: Ints
    length: int
    scale: Tensor  # of each row


def _coded(entry: Entry, backend: ModuleType) -> Parts:
    sides: list[int] = []
    if entry.mode is not Mode.CODED_DENSE:
        sides += matrix_shape(entry.shape)
    rows = [entry.rank] * 2
    sigmas: Ints = np.empty(0, np.int16)
    if entry.mode is Mode.CODED_FACTORS:
        factors = wire.coded_factors_parts(entry)
        step, levels, stream = factors.step, factors.levels, factors.stream
        sigmas = np.asarray(factors.sigmas)
    else:
        read = wire.coded_dense_parts if entry.mode is Mode.CODED_DENSE else wire.coded_hybrid_parts
        parts = read(entry)
        step, levels, stream = parts.step, parts.levels, parts.stream
        if isinstance(parts, wire.CodedHybridParts):
            sigmas = np.asarray(parts.sigmas)
        else:
            rows = []
        rows.append(len(parts.codes))
        sides.append(math.prod(entry.shape) // len(parts.codes))
    scales = scales_of(entry.mode, step, sigmas)
    segments, left = [], np.asarray(levels)
    for count, side, scale in zip(rows, sides, scales, strict=True):
        segments.append(_Segment(left[:count], side, scale.expand(count)))
        left = left[count:]
    try:
        values = _stream_values(stream, segments, backend)
    except RuntimeError as error:
        _, corrupt, rule = str(error).partition("corrupt: ")
        if not corrupt:
            raise
        raise WireError(f"tensor {entry.name!r}: its stream is corrupt: {rule}") from None
    if entry.mode is not Mode.CODED_DENSE:
        values[:2] = _paid_for(values[0], values[1], segments[0].levels, segments[1].levels)
    if entry.mode is Mode.CODED_FACTORS:
        return values[0], values[1]
    return decoded_values(entry.mode, entry.shape, values, backend)


def _paid_for(left: Tensor, right: Tensor, *levels: Ints) -> tuple[Tensor, Tensor]:
    """Leave components out that are zero because one side takes no bytes, any number of them."""
    coded = torch.from_numpy((levels[0] >= FIRST_LEVEL) & (levels[1] >= FIRST_LEVEL))
    return (left, right) if bool(coded.all()) else (left[coded], right[coded])


def _stream_values(
    stream: memoryview, segments: Sequence[_Segment], backend: ModuleType
) -> list[Tensor]:
    """Decode the rows of a stream.

    The coder lays rows out before it looks at their bytes. What takes no bytes is kept from it, so
    that a few bytes cannot make it lay out many rows.
    """
    coded = [int(np.count_nonzero(s.levels >= FIRST_LEVEL)) for s in segments]
    symbols = sum(count * s.length for count, s in zip(coded, segments, strict=True))
    if len(stream) < CHUNK_HEAD * -(-symbols // CHUNK) or (stream and not symbols):
        raise RuntimeError(f"corrupt: it has {symbols} symbols in {len(stream)} bytes")
    sent = [s for count, s in zip(coded, segments, strict=True) if count]
    one = len(sent) == 1
    decoded = iter(
        backend.rans_decode(
            from_bytes(stream, torch.uint8),
            torch.tensor([len(stream)], device="cpu"),
            sent[0].scale if one else torch.cat([s.scale for s in sent]),
            torch.from_numpy(sent[0].levels if one else np.concatenate([s.levels for s in sent])),
            [len(s.levels) for s in sent],
            [s.length for s in sent],
            [0] * len(sent),
        )
        if sent
        else ()
    )
    return [
        next(decoded) if count else torch.zeros(len(s.levels), s.length, device="cpu")
        for count, s in zip(coded, segments, strict=True)
    ]
