"""Frames in files: the bytes of encode(), the rules of decode(), one payload in memory."""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from golden_frames import GOLDEN
from wire_frames import (
    all_modes,
    coded_modes,
    floats,
    one,
    record,
    reseal,
    rows_in_all_modes,
    rows_payload,
    seal,
    shorts,
)

from fedkd_fast import wire
from fedkd_fast.wire import Base, Entry, FrameReader, FrameWriter, Mode, WireError

ENTRIES = [*all_modes(), *rows_in_all_modes(), *coded_modes()]
BASE = Base(7, 8, bytes(range(16)))
FRAME = wire.encode(ENTRIES, codec="wf1", base=BASE)
MIB = 2**20


def written(entries: list[Entry], **how: Any) -> bytes:
    file = io.BytesIO()
    with FrameWriter(file, **how) as writer:
        for entry in entries:
            writer.add(entry)
    return file.getvalue()


@pytest.mark.parametrize("name", GOLDEN)
def test_writer_writes_the_golden_frames(name: str) -> None:
    assert written(GOLDEN[name].entries, **GOLDEN[name].how) == GOLDEN[name].encode()


def test_writer_writes_coded_entries() -> None:
    assert written(ENTRIES, codec="wf1", base=BASE) == FRAME


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("base", [None, Base(7, 8), BASE])
def test_reader_reads_what_decode_reads(base: Base | None, embedded: bool) -> None:
    frame = wire.encode(ENTRIES, codec="wf1", base=base, schema=embedded)
    file = io.BytesIO(frame)
    header = wire.file_header(file)
    reader = FrameReader(file, schema=ENTRIES)
    assert reader.header == wire.header(frame) == header
    assert list(reader.entries) == wire.inspect(frame, ENTRIES)
    order = [*range(len(ENTRIES))][::-1]
    assert [reader.read(index) for index in order] == ENTRIES[::-1]
    assert reader.read(-1) == ENTRIES[-1]
    with pytest.raises(IndexError):
        reader.read(len(ENTRIES))


def test_frames_may_stand_behind_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    with path.open("r+b", buffering=0) as file:
        file.seek(5)
        with FrameWriter(file, codec="wf1", base=BASE) as writer:
            for entry in ENTRIES:
                writer.add(entry)
        assert file.tell() == 5 + len(FRAME)
        writer.close()  # a second time changes nothing
    assert path.read_bytes() == b"xxxxx" + FRAME  # what stood behind is gone
    with path.open("rb") as file:
        file.seek(5)
        reader = FrameReader(file)
        assert [reader.read(index) for index in range(len(ENTRIES))] == ENTRIES


def test_payloads_of_any_buffer_are_written() -> None:
    words = memoryview(floats(1, 2, 3, 4)).cast("f", (2, 2))
    entry = Entry("w", "float32", (2, 2), Mode.RAW, 0, words)
    empty = Entry("e", "float32", (0,), Mode.RAW, 0, memoryview(b"")[:0])
    assert written([entry, empty]) == wire.encode([entry, empty])


class Dribble(io.BytesIO):
    """A file that takes seven bytes at a time, as one without a buffer may."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:7])


def test_files_that_take_a_part_get_the_rest() -> None:
    file = Dribble()
    with FrameWriter(file, codec="wf1", base=BASE) as writer:
        for entry in ENTRIES:
            writer.add(entry)
    assert file.getvalue() == FRAME


# --- what the writer refuses ----------------------------------------------------------------------

OK = Entry("w", "float32", (2,), Mode.RAW, 0, floats(1, 2))


def test_writer_refuses_entries_and_goes_on() -> None:
    file = io.BytesIO()
    with FrameWriter(file) as writer:
        with pytest.raises(WireError, match=r"entry 0 \(\"w\"\): payload must take 8 bytes, got 4"):
            writer.add(replace(OK, payload=floats(1)))
        with pytest.raises(WireError, match='unknown dtype "complex64"'):
            writer.add(replace(OK, dtype="complex64"))
        with pytest.raises(TypeError, match="must be a contiguous bytes-like object"):
            writer.add(replace(OK, payload="text"))  # type: ignore[arg-type]
        with pytest.raises(WireError, match="entry 0.*: payload must take 0 bytes, got 8"):
            writer.add(replace(OK, mode=Mode.ALIAS))
        writer.add(OK)
    assert file.getvalue() == wire.encode([OK])


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([OK, OK], 'name "w" must be unique'),
        ([Entry("w", "float32", (2,), Mode.ALIAS)], "must name an earlier entry, got entry 0"),
        ([OK, Entry("v", "float32", (3,), Mode.ALIAS)], "the shape and dtype of entry 0"),
    ],
)
def test_writer_refuses_entries_that_do_not_go_together(entries: list[Entry], match: str) -> None:
    file = io.BytesIO()
    with pytest.raises(WireError, match=match), FrameWriter(file) as writer:
        for entry in entries:
            writer.add(entry)
    with pytest.raises(WireError, match="must start with FKD1"):
        FrameReader(file_at_start(file))


def test_an_exception_leaves_no_frame() -> None:
    file = io.BytesIO()
    with pytest.raises(KeyError), FrameWriter(file) as writer:
        writer.add(OK)
        raise KeyError
    with pytest.raises(WireError, match="must start with FKD1"):
        FrameReader(file_at_start(file))
    with pytest.raises(ValueError, match="this FrameWriter is closed"):
        writer.add(OK)
    writer.close()
    assert not file.getvalue().startswith(b"FKD1")


def test_writer_refuses_an_unknown_codec() -> None:
    with pytest.raises(ValueError, match="codec must be one of .*, got 'zip'"):
        FrameWriter(io.BytesIO(), codec="zip")


def file_at_start(file: io.BytesIO) -> io.BytesIO:
    file.seek(0)
    return file


# --- what the reader refuses ----------------------------------------------------------------------


def refused(frame: bytes, **how: Any) -> str:
    with pytest.raises(WireError) as caught:
        FrameReader(io.BytesIO(frame), **how)
    return str(caught.value)


def test_reader_refuses_damage_in_the_words_of_decode() -> None:
    for frame in (
        *(FRAME[:size] for size in range(0, len(FRAME), 13)),
        *(FRAME[:at] + bytes([FRAME[at] ^ 1]) + FRAME[at + 1 :] for at in range(0, len(FRAME), 7)),
        FRAME + b"\0",
        seal(version=(1, 1)),
        seal(flags=8),
        seal([record(mode=Mode.ZERO, rank=0, size=1)]),
        seal([record(mode=11)]),
        seal([record(mode=Mode.ZERO, shape=(2**40,))]),
        seal(digest=bytes(16), directory_bytes=2**63),
        seal(flags=5),
        seal(tables=1),
        one(shorts(0, 0) + b"\0", mode=Mode.CODED_DENSE, rank=1, shape=(2,)),
        one(rows_payload(8, 1, [0], shorts(0, 0) + b"\0"), mode=Mode.ROWS, rank=1, shape=(4, 4)),
        wire.encode(ENTRIES, schema=False),
    ):
        with pytest.raises(WireError) as caught:
            wire.decode(frame)
        assert refused(frame) == str(caught.value)
    for size in (0, 5, 63):
        with pytest.raises(WireError, match="truncated"):
            wire.file_header(io.BytesIO(FRAME[:size]))


def test_reader_checks_schema_and_bound() -> None:
    assert "schema= does not match" in refused(FRAME, schema=ENTRIES[1:])
    dense = sum(info.dense_bytes for info in wire.inspect(FRAME))
    assert f"at most max_bytes = {dense - 1}" in refused(FRAME, max_bytes=dense - 1)
    assert FrameReader(io.BytesIO(FRAME), max_bytes=dense).entries
    with pytest.raises(ValueError, match="max_bytes must lie in"):
        FrameReader(io.BytesIO(FRAME), max_bytes=-1)
    wrong: list[Any] = ["1", None, 1e9]
    for bound in wrong:
        with pytest.raises(TypeError, match=f"max_bytes must be an int, got {bound!r}"):
            FrameReader(io.BytesIO(FRAME), max_bytes=bound)
        with pytest.raises(TypeError, match=f"max_bytes must be an int, got {bound!r}"):
            wire.decode(FRAME, max_bytes=bound)


def test_a_file_that_stands_beyond_its_end_is_truncated() -> None:
    for read in (wire.file_header, FrameReader):
        file = io.BytesIO(FRAME)
        file.seek(len(FRAME) + 10)
        with pytest.raises(WireError, match="truncated: its header takes 64 bytes, got 0"):
            read(file)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (one(b"\2", dtype=9, shape=(1,)), "a bool must be 0 or 1"),
        (one(floats(1), shape=(2,)), "payload must take 8 bytes, got 4"),
        (one(b"x", mode=Mode.ALIAS), "must name an earlier entry"),
        (one(b"", mode=Mode.ROWS, rank=1, shape=(4, 4)), "must begin with mode, rank and ids"),
        (one(b"\1\0\1\0", mode=Mode.ROWS, rank=1, shape=(4, 4)), "its rows: payload must take"),
    ],
)
def test_reader_checks_payloads(frame: bytes, match: str) -> None:
    def read_all() -> None:
        reader = FrameReader(io.BytesIO(frame))
        for index in range(len(reader.entries)):
            reader.read(index)

    with pytest.raises(WireError, match=match):
        read_all()
    with pytest.raises(WireError):
        wire.decode(frame)


@pytest.mark.parametrize("size", [0, 70, 79])
def test_a_file_that_shrinks_is_refused(size: int) -> None:
    file = io.BytesIO(wire.encode([OK, replace(OK, name="last")]))  # payloads end at 80
    reader = FrameReader(file)
    file.truncate(size)
    with pytest.raises(WireError, match="truncated: its file was cut short"):
        reader.read(1)


def test_a_directory_is_not_larger_than_its_entries_can_be() -> None:
    # Otherwise a reader would load any file as one.
    frame = one(bytes(MIB), dtype=8, shape=(MIB,))
    long = reseal(frame[:40] + (MIB + 9).to_bytes(8, "little") + frame[48:])
    assert "directory of 1048585 bytes is more than 1 entries can take" in refused(long)


# --- memory ---------------------------------------------------------------------------------------


def test_memory_stays_at_one_payload(tmp_path: Path) -> None:
    path = tmp_path / "large.fkd"
    count, size = 12, 4 * MIB

    def write(file: BinaryIO) -> None:
        with FrameWriter(file) as writer:
            for index in range(count):
                payload = bytes([index]) * size
                writer.add(Entry(f"layer.{index}", "uint8", (size,), Mode.RAW, 0, payload))

    def read(file: BinaryIO) -> None:
        reader = FrameReader(file)
        for index in range(count):
            assert reader.read(index).payload[-1:] == bytes([index])

    for work, mode in ((write, "wb"), (read, "rb")):
        tracemalloc.start()
        with path.open(mode) as file:
            work(file)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2.5 * size  # one, and the next one before the last is gone
    assert path.stat().st_size > count * size
