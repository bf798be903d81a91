"""Frames in files, with one payload in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from fedkd_fast.wire._entries import (
    DEFAULT_MAX_BYTES,
    Base,
    Described,
    Entry,
    EntryInfo,
    Header,
    Mode,
    Record,
    WireError,
    entry_fields,
    facts_of,
    header_of,
    info_of,
    schema_fields,
)
from fedkd_fast.wire._frame import DIGEST_BYTES, HEADER_BYTES, check_max_bytes
from fedkd_fast.wire._native import _C
from fedkd_fast.wire._parts import rows_parts

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

_PIECE = 2**20
# Mode, rank and length of the ids of a ROWS payload take at most this.
_ROWS_HEAD = 21
_CODED = (Mode.CODED_FACTORS, Mode.CODED_DENSE, Mode.CODED_HYBRID)


class FrameWriter:
    """Write a frame into a file, tensor by tensor; the bytes are those of `encode`.

    The frame begins where the file stands and is the last thing in it. Until `close`, or the end of
    a `with` block without an exception, the file holds no frame that a reader would take.

    Args:
        file: open for writing bytes, seekable; it stays open.
        codec: as in `encode`.
        base: as in `encode`.
        schema: as in `encode`.

    Raises:
        ValueError: an unknown codec, or a file open for appending.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        codec: str = "raw",
        base: Base | None = None,
        schema: bool = True,
    ) -> None:
        if "a" in str(getattr(file, "mode", "")):
            # What is written there lands at the end, and the header comes last.
            raise ValueError(f"file must not be open for appending, got mode {file.mode!r}")
        self._file = file
        self._facts = facts_of(codec, base, schema)
        self._start = file.tell()
        self._records: list[tuple[str, str, tuple[int, ...], int, int, int]] = []
        self._coded = False
        self._crc = 0
        self._open = True
        _write(file, bytes(HEADER_BYTES))
        if base is not None and base.digest is not None:
            self._append(base.digest)

    def add(self, entry: Entry) -> None:
        """Check an entry and write its payload.

        What an entry has to do with the others, a name of its own and the entry that an ALIAS
        names, is checked by `close`.

        Raises:
            WireError: the entry breaks the format; nothing is written then.
            TypeError: a field has the wrong type, or the payload is not contiguous.
            ValueError: the writer is closed.
        """
        self._require_open()
        fields = entry_fields(entry)
        coded = _C.check_payload(fields, len(self._records))
        self._append(entry.payload)
        self._coded |= coded
        self._records.append((*fields[:5], memoryview(entry.payload).nbytes))

    def close(self) -> None:
        """Write directory and header; the file then stands behind the frame.

        Raises:
            WireError: the entries do not make a frame together.
        """
        if not self._open:
            return
        header, directory = _C.finish(self._records, self._facts, self._coded, self._crc)
        self._open = False
        _write(self._file, directory)
        self._file.truncate()
        end = self._file.tell()
        self._file.seek(self._start)
        _write(self._file, header)
        self._file.seek(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._open = False

    def _append(self, data: Buffer) -> None:
        self._crc = _C.crc32c(data, self._crc)
        _write(self._file, data)

    def _require_open(self) -> None:
        if not self._open:
            raise ValueError("this FrameWriter is closed")


def file_header(file: BinaryIO) -> Header:
    """Check the first bytes of a frame in a file alone, and say what they say.

    The frame begins where the file stands, and ends with it; the file is left where it stood.

    Raises:
        WireError: the bytes are no frame of this version, or the header is damaged.
    """
    start = file.tell()
    # A file may stand beyond its end.
    size = max(file.seek(0, 2) - start, 0)
    file.seek(start)
    front = file.read(min(size, HEADER_BYTES + DIGEST_BYTES))
    file.seek(start)
    return header_of(_C.read_header(front, size))


class FrameReader:
    """Read a frame from a file, tensor by tensor.

    The frame begins where the file stands and ends with it. Making a reader goes through the file
    once, in small pieces, and checks all but the payloads; `read` checks those. A file that changes
    in between is still read by the rules, but its checksum was that of the bytes before.

    Args:
        file: open for reading bytes, seekable; it stays open and is moved about.
        schema: as in `decode`.
        max_bytes: as in `decode`.

    Raises:
        WireError: the bytes are no frame of this version, are damaged, claim too much, or have
            another schema.
        ValueError: `max_bytes` lies outside [0, 2**63).
    """

    header: Header
    entries: tuple[EntryInfo, ...]

    def __init__(
        self,
        file: BinaryIO,
        *,
        schema: Iterable[Described] | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        check_max_bytes(max_bytes)
        wanted = None if schema is None else schema_fields(schema)
        self._file = file
        self._start = file.tell()
        size = max(file.seek(0, 2) - self._start, 0)
        front = self._bytes(0, min(size, HEADER_BYTES + DIGEST_BYTES))
        facts = _C.read_header(front, size)
        self.header = header_of(facts)
        *_, needs_tables, _, _, directory_bytes, body_crc = facts
        if self._checksum(size) != body_crc:
            raise WireError("checksum of the body does not match: the frame is corrupted")
        directory = self._bytes(size - directory_bytes, directory_bytes)
        records = _C.read_directory(front, size, directory, wanted, max_bytes)
        base = self.header.base
        first = HEADER_BYTES + (DIGEST_BYTES if base and base.digest else 0)
        self._offsets = list(accumulate((record[5] for record in records), initial=first))
        self.entries = tuple(self._info(index, record) for index, record in enumerate(records))
        if needs_tables != any(info.numbers[0] in _CODED for info in self.entries):
            raise WireError(
                "frame must name its entropy tables exactly if an entry is entropy-coded"
            )

    def read(self, index: int) -> Entry:
        """Load the entry at `index`, which is also its place in `entries`.

        Raises:
            WireError: its payload breaks the format, or the file was cut short.
            IndexError: no such entry.
        """
        info = self.entries[index]
        index %= len(self.entries)
        payload = self._bytes(self._offsets[index], info.payload_bytes)
        entry = Entry(info.name, info.dtype, info.shape, info.mode, info.rank, payload)
        _C.check_payload(entry_fields(entry), index)
        return entry

    def _info(self, index: int, record: Record) -> EntryInfo:
        name, dtype, shape, mode, rank, size, _ = record
        rows = None
        if mode == Mode.ROWS:
            head = self._bytes(self._offsets[index], min(size, _ROWS_HEAD))
            rows = rows_parts(Entry(name, dtype, shape, Mode.ROWS, rank, head)).rows
        return info_of(record, rows)

    def _bytes(self, at: int, size: int) -> bytes:
        self._file.seek(self._start + at)
        data = self._file.read(size)
        if len(data) != size:
            raise WireError("frame is truncated: its file was cut short")
        return data

    def _checksum(self, size: int) -> int:
        crc = 0
        for at in range(HEADER_BYTES, size, _PIECE):
            crc = _C.crc32c(self._bytes(at, min(_PIECE, size - at)), crc)
        return crc


def _write(file: BinaryIO, data: Buffer) -> None:
    """Write all of the bytes, also into a file without a buffer, which may take a part of them."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else view[:0]
    while len(view):
        view = view[file.write(view) :]
