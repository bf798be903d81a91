"""What a frame is made of, and what is told of one."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from fedkd_fast.wire._native import _C

WireError = _C.WireError
"""ValueError for anything wrong with the bytes of a frame or with an entry to be encoded."""

DTYPES: tuple[str, ...] = _C.dtypes
"""Names of the tensor dtypes that a frame can carry; position = code on the wire."""

DEFAULT_MAX_BYTES = 2**32
"""What `decode` lets the tensors of a frame claim, in bytes: far above any mentee."""

CODECS: tuple[str, ...] = _C.codecs
"""What a writer can have been asked for; position = code on the wire. Readers need not know."""

_MAX_RUN, _MAX_ROUND, _DIGEST_BYTES = 2**64 - 1, 2**32 - 1, 16

# name, dtype, shape, mode, rank, payload_bytes, dense_bytes
Record = tuple[str, str, tuple[int, ...], int, int, int, int]
# codec, (run, round), digest, schema embedded, needs tables, frame_bytes, schema_hash,
# directory_bytes, crc of the body
HeaderFacts = tuple[int, tuple[int, int] | None, bytes | None, bool, bool, int, int, int, int]
# The first four of them, which a writer decides.
Facts = tuple[int, tuple[int, int] | None, bytes | None, bool]


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


FACTORED = frozenset({Mode.FACTORS, Mode.PACKED_FACTORS, Mode.CODED_FACTORS, Mode.CODED_HYBRID})
"""Modes whose rank is that of two factors."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a frame.

    With P = shape[0] and Q = numel / P, the payload of a matrix of rank K is, in float32 and C
    order, `sigma (K,) | left (K, P) | right (K, Q)` in mode FACTORS; the modes PACKED_* hold codes
    of 1 to 16 bits instead, see `packed_factors_parts` and `packed_dense_parts`, and the modes
    CODED_* entropy-coded streams, see `coded_factors_parts`, `coded_dense_parts` and
    `coded_hybrid_parts`. In mode ROWS most rows are zero and the others travel in one of the other
    modes, see `rows_parts`; mode HALF is `half_parts`.
    """

    name: str  # 1 to 1024 bytes of utf-8 without control characters, unique in the frame
    dtype: str  # one of DTYPES
    shape: tuple[int, ...]  # at most 16 dimensions
    mode: Mode
    # K of factors, rows of PACKED_DENSE and CODED_DENSE, rows sent by ROWS, index of the entry that
    # an ALIAS equals
    rank: int = 0
    payload: bytes | memoryview = b""


class Described(Protocol):
    """What a schema is made of: `TensorSpec`, `Entry`, `EntryInfo`, or one's own."""

    @property
    def name(self) -> str:
        """As in `Entry`."""

    @property
    def dtype(self) -> str:
        """One of DTYPES."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""


class TensorSpec(NamedTuple):
    """One tensor of a schema."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Base:
    """What the tensors of a frame are relative to.

    Raises:
        WireError: a run without a round or the other way round, or one that does not fit; a digest
            of another size.
        TypeError: a run or round that is no integer, or a digest that is no bytes.
    """

    run: int | None = None  # names a training run, below 2**64
    round: int | None = None  # of that run, below 2**32
    digest: bytes | None = None  # 16 bytes that name the parameters themselves

    def __post_init__(self) -> None:
        if (self.run is None) != (self.round is None):
            raise WireError("base must have both run and round or neither")
        for what, value, most in (("run", self.run, _MAX_RUN), ("round", self.round, _MAX_ROUND)):
            if value is None:
                continue
            if not 0 <= integer(value, f"{what} of the base") <= most:
                raise WireError(f"{what} of the base must lie in [0, {most}], got {value}")
        if self.digest is None:
            return
        if not isinstance(self.digest, (bytes, bytearray, memoryview)):
            raise TypeError(f"digest of the base must be bytes, got {self.digest!r}")
        if len(self.digest) != _DIGEST_BYTES:
            raise WireError(f"digest of the base must have 16 bytes, got {len(self.digest)}")


class Header(NamedTuple):
    """What a frame says before its payloads."""

    codec: str  # what its writer was asked for, one of CODECS; "wf1" for "dense"
    base: Base | None
    schema_embedded: bool
    schema_hash: int  # of the names, dtypes and shapes of its tensors, in their order
    frame_bytes: int


@dataclass(frozen=True)
class Frame:
    """What `decode` found."""

    entries: tuple[Entry, ...]
    base: Base | None
    codec: str
    schema_embedded: bool
    schema_hash: int
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


def integer(value: Any, what: str) -> int:
    """Return an integer as one of Python's, or say what it must be."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, got {value!r}") from None


def schema_hash(schema: Iterable[Described]) -> int:
    """Return the number that names the tensors of a schema.

    Raises:
        WireError: a name, dtype or shape that no frame can have.
    """
    return _C.schema_hash(schema_fields(schema))


def schema_fields(schema: Iterable[Described]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the tensors of a schema as _C takes them."""
    return [(one.name, one.dtype, tuple(one.shape)) for one in schema]


def facts_of(codec: str, base: Base | None, schema: bool) -> Facts:
    """Return what a writer decides of the header.

    Raises:
        ValueError: an unknown codec.
    """
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
    code = CODECS.index(codec)
    if base is None:
        return code, None, None, schema
    version = None
    if base.run is not None and base.round is not None:
        version = base.run, base.round
    return code, version, base.digest, schema


def header_of(facts: HeaderFacts) -> Header:
    """Return what _C read from a header."""
    code, version, digest, embedded, _, frame_bytes, hash_, _, _ = facts
    base = None
    if version is not None or digest is not None:
        run, round_ = version or (None, None)
        base = Base(run, round_, digest)
    return Header(CODECS[code], base, embedded, hash_, frame_bytes)


def entry_fields(
    entry: Entry,
) -> tuple[str, str, tuple[int, ...], int, int, bytes | memoryview]:
    """Return an entry as _C takes it."""
    e = entry
    return e.name, e.dtype, tuple(e.shape), int(e.mode), e.rank, e.payload


def info_of(record: Record, rows: Entry | None) -> EntryInfo:
    """Return the line of an entry, `rows` being those of mode ROWS."""
    name, dtype, shape, mode, rank, size, dense = record
    inner = (rows.mode, rows.rank) if rows else (None, 0)
    return EntryInfo(name, shape, dtype, Mode(mode), rank, size, dense, *inner)
