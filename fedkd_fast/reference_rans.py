"""The specification of `rans_encode` and `rans_decode`: table set 1 of the wire format.

A level l is the logarithm of the ratio of a row's standard deviation to its step, in 1/16 octaves.
From 48 on, every 16 levels leave one more low bit to travel raw, so that the rest is coded by one
of the 96 tables, which are those of l in -48..47. A table has frequencies, 4096 together, of
symbols -31..31 and of an escape; symbols without a frequency are escaped.

A stream is

1. the low bits of each row that has some: a little-endian bit stream, lowest bit first, that starts
   on a byte; unused bits of the last byte are zero;
2. the chunk table, the bytes of each chunk as uint32;
3. the chunks.

Rows that are coded are cut into pieces of at most 65536 symbols, and a chunk takes pieces in order
while it has at most 65536 symbols. A chunk has 32 lanes, or 4 if it has fewer than 16384 symbols.
It is its lanes' states as uint32, then words of 16 bits. A decoder takes a piece in groups of as
many symbols as there are lanes; of the last one there may be fewer, which are the first lanes'. Of
each lane's state x, its low 12 bits point into the cumulative frequencies of the table and so name
the symbol; x becomes ``f · (x >> 12) + slot - cumulative``. Then all lanes of the group, in order,
whose state is below 2^16 shift a word in from below. Then the lanes, in order, whose symbol is the
escape, read it raw: 15 bits of its zigzag number a word, of which at most two, bit 15 of the first
says that there is a second, which is not zero. All states end at 2^16, with all words used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]

FIRST_LEVEL, RAW_LEVEL, MOST_LEVEL = -48, 48, 335
REACH, ESCAPE = 31, 63
LARGEST = 2**22 - 1
REST = 2**16
CHUNK, FEW_SYMBOLS = 65536, 16384


class Table(NamedTuple):
    """Of symbols by their index, h + 31 or 63 for the escape."""

    support: int
    frequency: Integers
    before: Integers  # cumulative
    symbol: Integers  # by slot


def table(level: int) -> Table:
    """Return the table that a level in -48..47 names."""
    # Only here: the ops go without the extension that has the tables.
    from fedkd_fast import _C

    *stored, escape = _C.gaussian_tables[level - FIRST_LEVEL]
    frequency = np.array([*stored[:0:-1], *stored, escape], np.int64)
    support = max(h for h, f in enumerate(stored) if f)
    before = np.cumsum(frequency) - frequency
    return Table(support, frequency, before, np.repeat(np.arange(64), frequency))


def raw_bits(level: int) -> int:
    """Low bits of a value that travel raw."""
    return 0 if level < RAW_LEVEL else (level - RAW_LEVEL) // 16 + 1


class Row(NamedTuple):
    """A row of a stream; `place` is its number in the message."""

    place: int
    length: int
    level: int

    @property
    def bits(self) -> int:
        """Low bits that travel raw."""
        return raw_bits(self.level)

    @property
    def low_bytes(self) -> int:
        """What they take."""
        return (self.length * self.bits + 7) // 8


class Piece(NamedTuple):
    """Values of a row, by its index in the stream."""

    row: int
    begin: int
    end: int


def stream_rows(
    rows: Sequence[int], counts: Sequence[int], owner: Sequence[int], levels: Sequence[int]
) -> list[list[Row]]:
    """Return the rows of each stream that are coded."""
    streams: list[list[Row]] = [[] for _ in range(owner[-1] + 1 if owner else 0)]
    place = 0
    for number, count, stream in zip(rows, counts, owner, strict=True):
        for _ in range(number):
            if levels[place] >= FIRST_LEVEL and count > 0:
                streams[stream].append(Row(place, count, levels[place]))
            place += 1
    return streams


def chunks(rows: Sequence[Row]) -> list[list[Piece]]:
    """Cut the rows of a stream."""
    found: list[list[Piece]] = []
    free = 0
    for index, row in enumerate(rows):
        for begin in range(0, row.length, CHUNK):
            piece = Piece(index, begin, min(begin + CHUNK, row.length))
            size = piece.end - begin
            if not found or size > free:
                found.append([])
                free = CHUNK
            found[-1].append(piece)
            free -= size
    return found


def groups(pieces: Sequence[Piece]) -> Iterator[tuple[int, slice]]:
    """Yield the row and the values of each group of a chunk."""
    lanes = lane_count(pieces)
    for row, begin, end in pieces:
        for first in range(begin, end, lanes):
            yield row, slice(first, min(first + lanes, end))


def lane_count(pieces: Sequence[Piece]) -> int:
    """Return how many lanes a chunk has."""
    return 4 if sum(end - begin for _, begin, end in pieces) < FEW_SYMBOLS else 32


def quantise(values: Tensor, multiplier: Tensor) -> Integers:
    """Return the integers of rows."""
    scaled = values.float() * multiplier[:, None]
    scaled = torch.where(scaled > -LARGEST, scaled, float(-LARGEST))
    return scaled.clamp(max=LARGEST).round().to(torch.int64).numpy()


def split(q: Integers, bits: int) -> tuple[Integers, Integers]:
    """Return high and low parts."""
    raised = q + (1 << bits >> 1)
    return raised >> bits, raised & ((1 << bits) - 1)


def escape_words(high: int) -> list[int]:
    """Return the words of an escaped symbol."""
    zigzag = 2 * high if high >= 0 else -2 * high - 1
    return [zigzag] if zigzag < 2**15 else [zigzag % 2**15 + 2**15, zigzag >> 15]


def encode_chunk(pieces: Sequence[Piece], rows: Sequence[Row], highs: Sequence[Integers]) -> bytes:
    """Code the high parts of a chunk; runs backwards, so that a decoder runs forwards."""
    states = np.full(lane_count(pieces), REST, np.int64)
    words: list[int] = []  # the last one first
    for row, part in reversed(list(groups(pieces))):
        code = table(rows[row].level - 16 * rows[row].bits)
        high = highs[row][part]
        escaped = np.abs(high) > code.support
        for h in high[escaped][::-1]:
            words += escape_words(int(h))[::-1]
        symbol = np.where(escaped, ESCAPE, high + REACH)
        frequency, state = code.frequency[symbol], states[: len(high)]
        full = state >= frequency << 20
        words += (state[full] % 2**16)[::-1].tolist()
        state = np.where(full, state >> 16, state)
        quotient, rest = np.divmod(state, frequency)
        states[: len(high)] = (quotient << 12) + code.before[symbol] + rest
    return states.astype("<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def rans_encode(
    values: Sequence[Tensor], multiplier: Tensor, levels: Tensor, owner: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``q = rint(value · multiplier)``, clamped to ``|q| < 2^22``, as the module describes."""
    numbers, counts = [len(s) for s in values], [s.shape[1] for s in values]
    ends = np.cumsum(numbers).tolist()
    integers = [
        q
        for segment, end in zip(values, ends, strict=True)
        for q in quantise(segment, multiplier[end - len(segment) : end])
    ]
    streams = []
    for rows in stream_rows(numbers, counts, owner, levels.tolist()):
        parts = [split(integers[row.place], row.bits) for row in rows]
        low = b"".join(
            np.packbits(part[:, None] >> np.arange(row.bits) & 1, bitorder="little").tobytes()
            for row, (_, part) in zip(rows, parts, strict=True)
        )
        coded = [encode_chunk(chunk, rows, [high for high, _ in parts]) for chunk in chunks(rows)]
        lengths = struct.pack(f"<{len(coded)}I", *map(len, coded))
        streams.append(low + lengths + b"".join(coded))
    codes = torch.from_numpy(np.frombuffer(b"".join(streams), np.uint8).copy())
    return codes, torch.tensor([len(stream) for stream in streams], dtype=torch.int64, device="cpu")


def require(holds: bool, rule: str) -> None:
    """Refuse a stream that breaks a rule."""
    if not holds:
        raise RuntimeError(rule)


def decode_chunk(code: bytes, pieces: Sequence[Piece], rows: Sequence[Row]) -> list[Integers]:
    """Return the high parts of each group."""
    lanes = lane_count(pieces)
    require(len(code) % 2 == 0 and len(code) >= 4 * lanes, "a chunk must have an even size")
    states = np.frombuffer(code, "<u4", lanes).astype(np.int64)
    require(bool((states >= REST).all()), "a state must be at least 65536")
    words = np.frombuffer(code, "<u2", offset=4 * lanes).astype(np.int64)
    at, found = 0, []

    def take(count: int) -> Integers:
        nonlocal at
        require(at + count <= len(words), "words are missing")
        at += count
        return words[at - count : at]

    for row, part in groups(pieces):
        bits = rows[row].bits
        tables = table(rows[row].level - 16 * bits)
        state = states[: part.stop - part.start]
        slot = state & 4095
        symbol = tables.symbol[slot]
        state[:] = tables.frequency[symbol] * (state >> 12) + slot - tables.before[symbol]
        short = state < REST
        state[short] = state[short] << 16 | take(int(short.sum()))
        high = symbol - REACH
        least, most = split(np.array([-LARGEST, LARGEST]), bits)[0]
        for lane in np.flatnonzero(symbol == ESCAPE):
            zigzag = int(take(1)[0])
            if zigzag >= 2**15:
                more = int(take(1)[0])
                require(0 < more < 2**15, "an escaped symbol must be as short as it can")
                zigzag = zigzag % 2**15 | more << 15
            high[lane] = -(zigzag + 1 >> 1) if zigzag % 2 else zigzag >> 1
            escapes = abs(high[lane]) > tables.support and least <= high[lane] <= most
            require(bool(escapes), "an escaped symbol must lie outside of its table")
        found.append(high)
    require(bool((states == REST).all()), "states must end at 65536")
    require(at == len(words), "words are left")
    return found


def decode_stream(code: bytes, rows: Sequence[Row]) -> list[Integers]:
    """Return the integers of each row."""
    cut = chunks(rows)
    head = sum(row.low_bytes for row in rows)
    require(len(code) >= head + 4 * len(cut), "low bits or chunk table are missing")
    lengths = struct.unpack_from(f"<{len(cut)}I", code, head)
    ends = head + 4 * len(cut) + np.cumsum([0, *lengths])
    require(ends[-1] == len(code), "its chunk table does not add up to its size")
    integers = [np.zeros(row.length, np.int64) for row in rows]
    for pieces, begin, end in zip(cut, ends, ends[1:], strict=False):
        high = decode_chunk(code[begin:end], pieces, rows)
        for (index, part), group in zip(groups(pieces), high, strict=True):
            integers[index][part] = group
    at = 0
    for q, row in zip(integers, rows, strict=True):
        packed = np.frombuffer(code, np.uint8, row.low_bytes, at)
        at += row.low_bytes
        bits = np.unpackbits(packed, bitorder="little").astype(np.int64)
        require(not bits[row.length * row.bits :].any(), "bits behind low parts must be zero")
        low = bits[: row.length * row.bits].reshape(row.length, row.bits) << np.arange(row.bits)
        q[:] = (q << row.bits) + low.sum(1) - (1 << row.bits >> 1)
        require(bool((np.abs(q) <= LARGEST).all()), "an integer must be at most 4194303")
    return integers


def rans_decode(
    codes: Tensor,
    sizes: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    owner: Sequence[int],
) -> list[Tensor]:
    """``value = scale · q``, of streams as the module describes them."""
    values = [torch.zeros(shape, device="cpu") for shape in zip(rows, counts, strict=True)]
    flat = [row for segment in values for row in segment]
    code, at = bytes(codes.numpy()), 0
    streams = stream_rows(rows, counts, owner, levels.tolist())
    for stream, (size, own) in enumerate(zip(sizes.tolist(), streams, strict=True)):
        try:
            decoded = decode_stream(code[at : at + size], own)
        except RuntimeError as error:
            raise RuntimeError(f"stream {stream} is corrupt: {error}") from None
        at += size
        for row, q in zip(own, decoded, strict=True):
            flat[row.place].copy_(scale[row.place] * torch.from_numpy(q).float())
    return values
