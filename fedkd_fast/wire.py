"""Named tensors as bytes: the frame that clients and servers exchange.

A frame is a 64-byte header, a directory and the payloads; `csrc/wire/frame.h` specifies every byte.
This module knows neither torch nor numpy: an entry's payload is bytes, and what its codes mean is
the business of `compress`. Nothing here unpickles or evaluates anything. The payloads of a decoded
frame are views into it, without alignment, so a reader that needs aligned numbers copies them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

try:
    import fedkd_fast._C as _C
except ModuleNotFoundError as error:
    if error.name != "fedkd_fast._C":
        raise
    raise ImportError(
        "fedkd_fast._C is not built: run `pip install -e . --no-build-isolation` in the checkout",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from typing_extensions import Buffer

WireError = _C.WireError
"""ValueError for anything wrong with the bytes of a frame or with an entry to be encoded."""

DTYPES: tuple[str, ...] = _C.dtypes
"""Names of the tensor dtypes that a frame can carry; position = code on the wire."""

DEFAULT_MAX_BYTES = 2**32
"""What `decode` lets the tensors of a frame claim, in bytes: far above any mentee."""

_ANY_SIZE = 2**63 - 1
_FLOAT_BYTES = 4

# name, dtype, shape, mode, rank, offset in the frame, payload_bytes, dense_bytes
_Record = tuple[str, str, tuple[int, ...], int, int, int, int, int]


class Mode(IntEnum):
    """How an entry's payload stands for its tensor."""

    ZERO = 0
    RAW = 1
    ALIAS = 2
    FACTORS = 3
    PACKED_FACTORS = 4
    PACKED_DENSE = 5
    ROWS = 6
    CODED_FACTORS = 7
    CODED_DENSE = 8
    CODED_HYBRID = 9
    HALF = 10


_ROW_MODES = {
    int(mode): mode for mode in (Mode.RAW, Mode.FACTORS, Mode.PACKED_FACTORS, Mode.PACKED_DENSE)
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a frame.

    With P = shape[0] and Q = numel / P, the payload of a matrix of rank K is, in float32 and C
    order, `sigma (K,) | left (K, P) | right (K, Q)` in mode FACTORS; the modes PACKED_* hold codes
    of 1 to 16 bits instead, see `packed_factors_parts` and `packed_dense_parts`. In mode ROWS most
    rows are zero and the others travel in one of these modes or RAW, see `rows_parts`.
    """

    name: str  # 1 to 1024 bytes of utf-8 without control characters, unique in the frame
    dtype: str  # one of DTYPES
    shape: tuple[int, ...]  # at most 16 dimensions
    mode: Mode
    # K of factors, rows of PACKED_DENSE, rows sent by ROWS, index of the entry that an ALIAS equals
    rank: int = 0
    payload: bytes | memoryview = b""


@dataclass(frozen=True)
class Frame:
    """What `decode` found."""

    entries: tuple[Entry, ...]
    base_digest: bytes | None  # 16 bytes that name the parameters an update was formed against
    frame_bytes: int  # length of the frame


class EntryInfo(NamedTuple):
    """One line of `inspect`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mode: Mode
    rank: int
    payload_bytes: int  # in the frame, without the entry's line in the directory
    dense_bytes: int  # numel * itemsize, what the tensor takes once decoded
    rows_mode: Mode | None = None  # of mode ROWS: how those rows travel,
    rows_rank: int = 0  # and at which rank

    @property
    def numbers(self) -> tuple[Mode, int]:
        """Mode and rank of the numbers that travel: those of the rows in mode ROWS."""
        if self.rows_mode is None:
            return self.mode, self.rank
        return self.rows_mode, self.rows_rank


class FactorsParts(NamedTuple):
    """Sections of a FACTORS payload, each little-endian float32 in C order."""

    sigma: memoryview  # (K,)
    left: memoryview  # (K, P)
    right: memoryview  # (K, Q)


class PackedFactorsParts(NamedTuple):
    """Sections of a PACKED_FACTORS payload."""

    scale: memoryview  # (K,) little-endian float32
    bits_left: memoryview  # (K,) uint8
    bits_right: memoryview  # (K,) uint8
    codes_left: memoryview  # component k takes ceil(P * bits_left[k] / 8) bytes
    codes_right: memoryview  # component k takes ceil(Q * bits_right[k] / 8) bytes


class PackedDenseParts(NamedTuple):
    """Sections of a PACKED_DENSE payload of R = rank rows."""

    scale: memoryview  # (R,) little-endian float32
    bits: memoryview  # (R,) uint8, 0 for a row of zeros
    codes: memoryview  # row r takes ceil((numel / R) * bits[r] / 8) bytes


class RowsParts(NamedTuple):
    """Sections of a ROWS payload."""

    gaps: memoryview  # for each row that is sent, a varint: how many rows are left out before it
    rows: Entry  # these rows as an entry of shape (rank, *shape[1:])


def encode(entries: Sequence[Entry], *, base_digest: bytes | None = None) -> bytes:
    """Write the entries, in their order, as one frame.

    The same entries give the same bytes on every machine; `decode` gives them back.

    Args:
        entries: the tensors; payloads are copied.
        base_digest: 16 bytes that name the parameters the entries are relative to.

    Returns:
        The frame.

    Raises:
        WireError: an entry breaks the format; the message names the entry and the rule.
        TypeError: a field has the wrong type, or a payload is not contiguous.
    """
    return _C.encode(
        [(e.name, e.dtype, tuple(e.shape), int(e.mode), e.rank, e.payload) for e in entries],
        base_digest,
    )


def decode(frame: Buffer, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Frame:
    """Check a frame completely and split it into its entries.

    Args:
        frame: a contiguous bytes-like object. The payloads are read-only views into it, so it must
            not be changed while they are in use.
        max_bytes: bound on the tensors of the frame once decoded, in bytes; a frame of a few bytes
            may claim any shape.

    Returns:
        The entries, all of whose lengths, ranks, bit counts and scales obey the format.

    Raises:
        WireError: the bytes are no frame of this version, are damaged, or claim too much.
        TypeError: `frame` is not a contiguous bytes-like object.
        ValueError: `max_bytes` lies outside [0, 2**63).
    """
    base_digest, records, data = _read(frame, max_bytes)
    entries = tuple(
        Entry(name, dtype, shape, Mode(mode), rank, data[offset : offset + size])
        for name, dtype, shape, mode, rank, offset, size, _ in records
    )
    return Frame(entries, base_digest, len(data))


def inspect(frame: Buffer) -> list[EntryInfo]:
    """List what a frame holds; allocates no tensor and therefore needs no bound.

    Args:
        frame: a contiguous bytes-like object.

    Returns:
        One line per entry, in the order of the frame.

    Raises:
        WireError: the bytes are no frame of this version, or are damaged.
        TypeError: `frame` is not a contiguous bytes-like object.
    """
    _, records, data = _read(frame, _ANY_SIZE)
    infos = []
    for name, dtype, shape, code, rank, offset, size, dense in records:
        mode, rows = Mode(code), None
        if mode is Mode.ROWS:
            entry = Entry(name, dtype, shape, mode, rank, data[offset : offset + size])
            rows = rows_parts(entry).rows
        inner = (rows.mode, rows.rank) if rows else (None, 0)
        infos.append(EntryInfo(name, shape, dtype, mode, rank, size, dense, *inner))
    return infos


def factors_parts(entry: Entry) -> FactorsParts:
    """Split the payload of a FACTORS entry.

    Args:
        entry: an entry of mode FACTORS.

    Returns:
        Views of sigma, left and right.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape and rank say.
    """
    rows, columns = _matrix(entry, Mode.FACTORS)
    sizes = [_FLOAT_BYTES * entry.rank * n for n in (1, rows, columns)]
    return FactorsParts(*_split(entry, sizes))


def packed_factors_parts(entry: Entry) -> PackedFactorsParts:
    """Split the payload of a PACKED_FACTORS entry.

    Args:
        entry: an entry of mode PACKED_FACTORS.

    Returns:
        Views of scales, bit counts and codes.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape, rank and bit counts say.
    """
    rows, columns = _matrix(entry, Mode.PACKED_FACTORS)
    rank = entry.rank
    bits = memoryview(entry.payload)[_FLOAT_BYTES * rank :]
    codes_left = _code_bytes(rows, bits[:rank])
    codes_right = _code_bytes(columns, bits[rank : 2 * rank])
    return PackedFactorsParts(
        *_split(entry, [_FLOAT_BYTES * rank, rank, rank, codes_left, codes_right])
    )


def packed_dense_parts(entry: Entry) -> PackedDenseParts:
    """Split the payload of a PACKED_DENSE entry.

    Args:
        entry: an entry of mode PACKED_DENSE.

    Returns:
        Views of scales, bit counts and codes.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape, rank and bit counts say, or the rank
            does not divide the number of elements.
    """
    _require_mode(entry, Mode.PACKED_DENSE)
    rows, numel = entry.rank, math.prod(entry.shape)
    if rows < 1 or numel % rows != 0:
        raise WireError(f"rank of {entry.name!r} must divide its {numel} elements, got {rows}")
    bits = memoryview(entry.payload)[_FLOAT_BYTES * rows : (_FLOAT_BYTES + 1) * rows]
    codes = _code_bytes(numel // rows, bits)
    return PackedDenseParts(*_split(entry, [_FLOAT_BYTES * rows, rows, codes]))


def rows_entry(shape: tuple[int, ...], gaps: bytes, rows: Entry) -> Entry:
    """Make the ROWS entry of a tensor of this shape; the inverse of `rows_parts`.

    Args:
        shape: of the whole tensor, at least two dimensions.
        gaps: as in `RowsParts`.
        rows: the rows that are sent, in mode RAW, FACTORS, PACKED_FACTORS or PACKED_DENSE.
    """
    head = bytes([rows.mode]) + _varint(rows.rank) + _varint(len(gaps))
    payload = b"".join((head, gaps, rows.payload))
    return Entry(rows.name, rows.dtype, shape, Mode.ROWS, rows.shape[0], payload)


def rows_parts(entry: Entry) -> RowsParts:
    """Split the payload of a ROWS entry.

    Args:
        entry: an entry of mode ROWS.

    Returns:
        A view of the gaps, and the entry of the rows, whose payload is a view.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload ends before its rows begin, or they have no mode of their own.
    """
    _matrix(entry, Mode.ROWS)
    payload = memoryview(entry.payload)
    try:
        mode = _ROW_MODES[payload[0]]
        rank, at = _read_varint(payload, 1)
        size, at = _read_varint(payload, at)
    except (IndexError, KeyError):
        raise WireError(f"payload of {entry.name!r} must begin with mode, rank and ids") from None
    gaps, rest = payload[at : at + size], payload[at + size :]
    shape = (entry.rank, *entry.shape[1:])
    return RowsParts(gaps, Entry(entry.name, entry.dtype, shape, mode, rank, rest))


def _varint(value: int) -> bytes:
    low = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(digit | 0x80 for digit in low[:-1]), low[-1]])


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _read(frame: Buffer, max_bytes: int) -> tuple[bytes | None, list[_Record], memoryview]:
    """Return the base digest, the records, and the frame as a view of read-only bytes."""
    if not 0 <= max_bytes <= _ANY_SIZE:
        raise ValueError(f"max_bytes must lie in [0, 2**63), got {max_bytes}")
    view = memoryview(frame)
    base_digest, records = _C.decode(view, max_bytes)
    return base_digest, records, view.cast("B").toreadonly()


def _require_mode(entry: Entry, mode: Mode) -> None:
    if entry.mode != mode:
        raise ValueError(f"mode of {entry.name!r} must be {mode.name}, got {entry.mode!r}")


def _matrix(entry: Entry, mode: Mode) -> tuple[int, int]:
    """Return P and Q of an entry that must have this mode."""
    _require_mode(entry, mode)
    if len(entry.shape) < 2:
        raise WireError(f"shape of {entry.name!r} must have 2 dimensions, got {entry.shape}")
    return entry.shape[0], math.prod(entry.shape[1:])


def _code_bytes(length: int, bits: Iterable[int]) -> int:
    """Return the bytes of rows of `length` codes, each row rounded up to whole bytes."""
    return sum((length * width + 7) // 8 for width in bits)


def _split(entry: Entry, sizes: list[int]) -> list[memoryview]:
    payload = memoryview(entry.payload)
    if len(payload) != sum(sizes):
        raise WireError(
            f"payload of {entry.name!r} must take {sum(sizes)} bytes, got {len(payload)}"
        )
    parts = []
    for size in sizes:
        parts.append(payload[:size])
        payload = payload[size:]
    return parts
