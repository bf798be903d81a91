"""Entries of modes 7 to 9 whose streams are real: the same bytes on every machine.

Integers are made of a hash, and coded by the specification of the coder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from wire_frames import rows_payload

import fedkd_fast._C as _C
from fedkd_fast import reference, wire
from fedkd_fast.codec.common import to_bytes
from fedkd_fast.reference_rans import LARGEST
from fedkd_fast.wire import Entry, Mode

DEVIATION = 148  # of the sum of four bytes
FAR, FAR_OF_MANY = 29, 997  # one value of so many is far out, where symbols are escaped


def levels_of(entry: Entry) -> list[int]:
    """Levels of all rows in the stream."""
    if entry.mode is Mode.CODED_FACTORS:
        return wire.coded_factors_parts(entry).levels.tolist()
    if entry.mode is Mode.CODED_DENSE:
        return wire.coded_dense_parts(entry).levels.tolist()
    return wire.coded_hybrid_parts(entry).levels.tolist()


def stream_of(entry: Entry) -> memoryview:
    """The entropy-coded bytes of a payload."""
    if entry.mode is Mode.CODED_FACTORS:
        return wire.coded_factors_parts(entry).stream
    if entry.mode is Mode.CODED_DENSE:
        return wire.coded_dense_parts(entry).stream
    return wire.coded_hybrid_parts(entry).stream


def segments_of(entry: Entry, rows: int = 0) -> list[tuple[int, int]]:
    """Rows and their length of each segment; `rows` is the number of those with row codes."""
    count = math.prod(entry.shape)
    if entry.mode is Mode.CODED_DENSE:
        return [(entry.rank, count // entry.rank)]
    first = entry.shape[0]
    factors = [(entry.rank, first), (entry.rank, count // first)]
    return factors if entry.mode is Mode.CODED_FACTORS else [*factors, (rows, count // rows)]


def integers(seed: str, level: int, count: int) -> list[int]:
    """Integers of about the deviation that a level names, zeros below the lowest one."""
    if level < -48:
        return [0] * count
    noise = hashlib.shake_128(seed.encode()).digest(4 * count)
    deviation = _C.exp2_fixed(16 * level) / DEVIATION
    every = FAR if count < FAR_OF_MANY else FAR_OF_MANY
    found = []
    for i in range(count):
        value = round((sum(noise[4 * i : 4 * i + 4]) - 510) * deviation)
        if i % every == every - 1:
            value = (value or 1) * (3000 if i % 2 else 9)
        found.append(max(-LARGEST, min(LARGEST, value)))
    return found


def with_integers(entry: Entry, values: Sequence[torch.Tensor]) -> Entry:
    """Put the stream of these integers, a matrix a segment, behind a payload that has none."""
    levels = levels_of(entry)
    codes, _ = reference.rans_encode(
        values,
        torch.ones(len(levels)),
        torch.tensor(levels, dtype=torch.int16),
        [0] * len(values),
    )
    return replace(entry, payload=bytes(entry.payload) + to_bytes(codes))


def with_stream(entry: Entry, rows: int = 0) -> Entry:
    """Put a stream behind a payload that has none."""
    levels = levels_of(entry)
    values, at = [], 0
    for number, count in segments_of(entry, rows):
        part = [integers(f"{entry.name}{at + i}", levels[at + i], count) for i in range(number)]
        values.append(torch.tensor(part, dtype=torch.float32))
        at += number
    return with_integers(entry, values)


def factors(
    name: str, dtype: str, shape: tuple[int, ...], step: int, sigmas: Sequence[int]
) -> Entry:
    """An entry of mode CODED_FACTORS."""
    payload = wire.coded_factors_payload(step, sigmas, b"")
    return with_stream(Entry(name, dtype, shape, Mode.CODED_FACTORS, len(sigmas), payload))


def dense(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    step: int,
    base: int,
    codes: Sequence[int],
    width: int,
) -> Entry:
    """An entry of mode CODED_DENSE."""
    payload = wire.coded_dense_payload(step, base, width, bytes(codes), b"")
    return with_stream(Entry(name, dtype, shape, Mode.CODED_DENSE, len(codes), payload))


def hybrid(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    step: int,
    sigmas: Sequence[int],
    base: int,
    codes: Sequence[int],
    width: int,
) -> Entry:
    """An entry of mode CODED_HYBRID."""
    payload = wire.coded_hybrid_payload(step, sigmas, base, width, bytes(codes), b"")
    entry = Entry(name, dtype, shape, Mode.CODED_HYBRID, len(sigmas), payload)
    return with_stream(entry, len(codes))


def as_rows(entry: Entry, name: str, gaps: list[int], rows: int) -> Entry:
    """Nest an entry: its rows in a tensor of so many, each after so many that are left out."""
    payload = rows_payload(entry.mode, entry.rank, gaps, bytes(entry.payload))
    shape = (rows, *entry.shape[1:])
    return Entry(name, entry.dtype, shape, Mode.ROWS, len(gaps), payload)


FACTORS = [
    # Levels of 26 to 64: escapes of one and two words, rows with low bits and without.
    factors("query", "float32", (9, 40), -512, [40, 29, 29, 6]),
    factors("conv", "bfloat16", (4, 3, 2), -900, [-10, -30]),
    # Of the second one the left row is below the lowest level, and so is the right one.
    factors("wide", "float64", (2, 300), 300, [70, -40]),
]
DENSE = [
    dense("bias", "float16", (61,), -1500, 20, [1], 0),
    dense("rows", "bfloat16", (8, 33), -2000, 47, [1, 0, 7, 3, 26, 12, 0, 2], 5),
    dense("fine", "float64", (3, 5), -4000, 335, [1, 2, 60], 6),
    dense("quiet", "float32", (2, 2), 7, -49, [1, 1], 0),
]
HYBRID = [
    hybrid("key", "float32", (6, 8), -600, [37, 20], 5, [1, 4, 0], 3),
    hybrid("merged", "float16", (4, 10), -700, [0], -30, [1], 0),
]
ROWS = [
    as_rows(FACTORS[0], "emb.f", [3, 0, 0, 200, 1, 0, 0, 9, 0], 300),
    as_rows(DENSE[1], "emb.d", [0] * 8, 9),
    as_rows(HYBRID[0], "emb.h", [1, 0, 0, 0, 0, 0], 7),
]
# As large as kernels that multiply in tiles make their difference, and no multiple of a tile.
TILES = [factors("value", "float32", (67, 131), -300, [20 - k for k in range(21)])]
# Chunks of 32 lanes: one of 65536 symbols, which a row shares with the next, and one of the rest.
LANES = [
    dense("two", "float16", (2, 35000), -3000, -47, [1, 1], 0),
    dense("one", "float32", (1, 16384), -1000, -48, [1], 0),
]
# The example of the specification.
EXAMPLE_INTEGERS = [[5, -12, 3, 0, 20, -7, 60], [1, 0, -2, 9, 0, 0, 1]]
EXAMPLE = with_integers(
    Entry(
        "w",
        "float32",
        (2, 7),
        Mode.CODED_DENSE,
        2,
        wire.coded_dense_payload(-256, 52, 4, bytes([1, 14]), b""),
    ),
    [torch.tensor(EXAMPLE_INTEGERS, dtype=torch.float32)],
)
