"""Frames in memory: entries to bytes and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fedkd_fast.wire._entries import (
    DEFAULT_MAX_BYTES,
    Base,
    Described,
    Entry,
    EntryInfo,
    Frame,
    Header,
    Mode,
    Record,
    entry_fields,
    facts_of,
    header_of,
    info_of,
    integer,
    schema_fields,
)
from fedkd_fast.wire._native import _C
from fedkd_fast.wire._parts import rows_parts

if TYPE_CHECKING:
    from typing_extensions import Buffer

ANY_SIZE = 2**63 - 1
HEADER_BYTES, DIGEST_BYTES = 64, 16


def encode(
    entries: Sequence[Entry],
    *,
    codec: str = "raw",
    base: Base | None = None,
    schema: bool = True,
) -> bytes:
    """Write the entries, in their order, as one frame.

    The same arguments give the same bytes on every machine; `decode` gives the entries back.

    Args:
        entries: the tensors; payloads are copied.
        codec: what the caller was asked for, one of CODECS; readers are told and need not know.
        base: what the entries are relative to.
        schema: write names, dtypes and shapes into the frame; otherwise only their hash, and
            receivers have to know them.

    Returns:
        The frame.

    Raises:
        WireError: an entry breaks the format; the message names the entry and the rule.
        ValueError: an unknown codec.
        TypeError: a field has the wrong type, or a payload is not contiguous.
    """
    return _C.encode([entry_fields(entry) for entry in entries], facts_of(codec, base, schema))


def decode(
    frame: Buffer,
    *,
    schema: Iterable[Described] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Frame:
    """Check a frame completely and split it into its entries.

    Args:
        frame: a contiguous bytes-like object. The payloads are read-only views into it, so it must
            not be changed while they are in use.
        schema: the tensors that the frame must have, in their order; needed where the frame carries
            no schema of its own.
        max_bytes: bound on the tensors of the frame once decoded, in bytes; a frame of a few bytes
            may claim any shape.

    Returns:
        The entries, all of whose lengths, ranks, bit counts and scales obey the format. Only the
        streams of the modes CODED_* are left to their own decoder, which takes any bytes.

    Raises:
        WireError: the bytes are no frame of this version, are damaged, claim too much, or have
            another schema.
        TypeError: `frame` is not a contiguous bytes-like object.
        ValueError: `max_bytes` lies outside [0, 2**63).
    """
    found, records, payloads = _read(frame, schema, max_bytes)
    entries = tuple(
        Entry(name, dtype, shape, Mode(mode), rank, payload)
        for (name, dtype, shape, mode, rank, _, _), payload in zip(records, payloads, strict=True)
    )
    return Frame(entries, found.base, found.codec, *found[2:])


def header(frame: Buffer) -> Header:
    """Check the first bytes of a frame alone, and say what they say.

    Raises:
        WireError: the bytes are no frame of this version, or the header is damaged.
        TypeError: `frame` is not a contiguous bytes-like object.
    """
    view = memoryview(frame)
    return header_of(_C.read_header(view, view.nbytes))


def inspect(frame: Buffer, schema: Iterable[Described] | None = None) -> list[EntryInfo]:
    """List what a frame holds; allocates no tensor and therefore needs no bound.

    Args:
        frame: a contiguous bytes-like object.
        schema: as in `decode`.

    Returns:
        One line per entry, in the order of the frame.

    Raises:
        WireError: the bytes are no frame of this version, are damaged, or have another schema.
        TypeError: `frame` is not a contiguous bytes-like object.
    """
    _, records, payloads = _read(frame, schema, ANY_SIZE)
    infos = []
    for record, payload in zip(records, payloads, strict=True):
        name, dtype, shape, mode, rank, _, _ = record
        rows = None
        if mode == Mode.ROWS:
            rows = rows_parts(Entry(name, dtype, shape, Mode.ROWS, rank, payload)).rows
        infos.append(info_of(record, rows))
    return infos


def check_max_bytes(max_bytes: int) -> None:
    """Refuse a bound that is none."""
    if not 0 <= integer(max_bytes, "max_bytes") <= ANY_SIZE:
        raise ValueError(f"max_bytes must lie in [0, 2**63), got {max_bytes}")


def _read(
    frame: Buffer, schema: Iterable[Described] | None, max_bytes: int
) -> tuple[Header, list[Record], list[memoryview]]:
    """Return the header, the records, and their payloads as read-only views of the frame."""
    check_max_bytes(max_bytes)
    view = memoryview(frame)
    wanted = None if schema is None else schema_fields(schema)
    facts, records = _C.decode(view, wanted, max_bytes)
    found = header_of(facts)
    data = view.cast("B").toreadonly()
    at = HEADER_BYTES + (DIGEST_BYTES if found.base and found.base.digest else 0)
    payloads = []
    for *_, size, _ in records:
        payloads.append(data[at : at + size])
        at += size
    return found, records, payloads
