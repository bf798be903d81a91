"""Rows of matrices on the wire: round trips, golden bytes, and what strangers send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import (
    INFINITY,
    assert_invariants,
    assert_refused,
    encode_again,
    floats,
    record,
    rows_in_all_modes,
    rows_payload,
    seal,
    varint,
)

from fedkd_fast import wire
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Entry, Mode, WireError

ZERO, RAW, ALIAS, FACTORS, PACKED, DENSE, ROWS = list(Mode)[:7]
VECTOR = floats(1, 2)


def test_inspect_tells_how_rows_travel() -> None:
    lines = wire.inspect(wire.encode(rows_in_all_modes()))
    assert [(i.mode, i.rank) for i in lines] == [(Mode.ROWS, n) for n in (1, 2, 3, 2)]
    modes = [Mode.RAW, Mode.FACTORS, Mode.PACKED_FACTORS, Mode.PACKED_DENSE]
    assert [i.numbers for i in lines] == list(zip(modes, (0, 1, 1, 2), strict=True))
    assert [i.dense_bytes for i in lines] == [1200, 36, 180, 6400]


@pytest.mark.parametrize("entry", rows_in_all_modes(), ids=lambda e: e.name)
def test_rows_join_and_split(entry: Entry) -> None:
    gaps, rows = wire.rows_parts(entry)
    assert rows.shape == (entry.rank, *entry.shape[1:])
    assert wire.rows_entry(entry.shape, bytes(gaps), rows) == entry


@pytest.mark.parametrize("rank", [0, 127, 128, 2**14, 2**63 - 1])
def test_rows_of_any_rank_join_and_split(rank: int) -> None:
    rows = Entry("w", "float32", (1, 3), Mode.PACKED_DENSE, rank, b"payload")
    entry = wire.rows_entry((9, 3), b"\4", rows)
    assert bytes(entry.payload) == bytes([5]) + varint(rank) + b"\1\4payload"
    assert wire.rows_parts(entry) == (b"\4", rows)


def test_rows_refuse_other_entries() -> None:
    entry = rows_in_all_modes()[0]
    with pytest.raises(ValueError, match="must be ROWS, got <Mode.RAW: 1>"):
        wire.rows_parts(replace(entry, mode=Mode.RAW))
    with pytest.raises(WireError, match="must have 2 dimensions"):
        wire.rows_parts(replace(entry, shape=(5,)))
    for payload in (b"", b"\1\x80", bytes([Mode.ROWS, 0, 0])):
        with pytest.raises(WireError, match="must begin with mode, rank and ids"):
            wire.rows_parts(replace(entry, payload=payload))


# --- lies with right checksums --------------------------------------------------------------------


def rows(
    payload: bytes = VECTOR,
    gaps: bytes = b"\1",
    *,
    mode: int = RAW,
    rank: int = 0,
    count: int = 1,
    shape: tuple[int, ...] = (4, 2),
    id_bytes: int | None = None,
    dtype: int = 0,
) -> bytes:
    """Row 1 of a matrix of four, unless told otherwise."""
    size = varint(len(gaps) if id_bytes is None else id_bytes)
    return rows_of(bytes([mode]) + varint(rank) + size + gaps + payload, count, shape, dtype)


def rows_of(
    payload: bytes, count: int = 1, shape: tuple[int, ...] = (4, 2), dtype: int = 0
) -> bytes:
    line = record(mode=ROWS, rank=count, shape=shape, size=len(payload), dtype=dtype)
    return seal([line], payload)


NO_HEAD = "mode, rank or ids of its rows are cut short or overlong"
ROW_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "some rows of a vector": (lambda: rows(shape=(4,)), "rows need at least 2 dimensions"),
    "some rows of no height": (lambda: rows(shape=(0, 2)), "rows need .* and an element"),
    "some rows of no width": (lambda: rows(shape=(4, 0)), "rows need .* and an element"),
    "no row": (lambda: rows(b"", b"", count=0), r"rows must lie in \[1, P - 1\] = \[1, 3\], got 0"),
    "every row": (lambda: rows(floats(*[1] * 8), bytes(4), count=4), r"\[1, 3\], got 4"),
    "the only row": (lambda: rows(gaps=b"\0", shape=(1, 2)), r"\[1, 0\], got 1"),
    "2**64 - 1 rows": (lambda: rows(count=2**64 - 1), r"\[1, 3\], got 18446744073709551615"),
    "rows without payload": (lambda: rows_of(b""), NO_HEAD),
    "rows without rank": (lambda: rows_of(bytes([RAW])), NO_HEAD),
    "rows without ids": (lambda: rows_of(bytes([RAW, 0])), NO_HEAD),
    "rows of overlong rank": (lambda: rows_of(bytes([RAW, 0x80, 0, 1, 1]) + VECTOR), NO_HEAD),
    "ids of overlong size": (lambda: rows_of(bytes([RAW, 0, 0x81, 0, 1]) + VECTOR), NO_HEAD),
    "ids beyond payload": (lambda: rows(id_bytes=10), NO_HEAD),
    "ids of 2**64 - 1 bytes": (lambda: rows(id_bytes=2**64 - 1), NO_HEAD),
    "id missing": (lambda: rows(gaps=b"\1", count=2), "id of row 1 of 2 is cut short or overlong"),
    "ids for 2**40 rows": (
        lambda: rows(count=2**40, shape=(2**50, 2)),
        "id of row 1 of 1099511627776 is cut short",
    ),
    "id cut": (lambda: rows(gaps=b"\x81"), "id of row 0 of 1 is cut short or overlong"),
    "id overlong": (lambda: rows(gaps=b"\x81\0"), "id of row 0 of 1 is cut short or overlong"),
    "id of 65 bits": (lambda: rows(gaps=b"\xff" * 9 + b"\2"), "id of row 0 of 1 is cut short"),
    "id too many": (lambda: rows(gaps=b"\0\0"), "1 bytes follow the last row id"),
    "id of P": (lambda: rows(gaps=b"\4"), "ids must be below P = 4, row 0 of 1 goes beyond it"),
    "id after the last": (
        lambda: rows(floats(*[1] * 4), b"\3\0", count=2),
        "ids must be below P = 4, row 1 of 2 goes beyond it",
    ),
    "id that wraps": (
        lambda: rows(floats(*[1] * 4), b"\1" + varint(2**64 - 2), count=2),
        "ids must be below P = 4, row 1 of 2 goes beyond it",
    ),
    "rows in rows": (
        lambda: rows(rows_payload(RAW, 0, [0], VECTOR), b"\0\0", mode=ROWS, count=2),
        "rows must have a payload of their own, got mode 6",
    ),
    "rows of zeros": (lambda: rows(b"", mode=ZERO), "payload of their own, got mode 0"),
    "rows of an alias": (lambda: rows(b"", mode=ALIAS), "payload of their own, got mode 2"),
    "rows of unknown mode": (lambda: rows(mode=11), "its rows: unknown mode 11"),
    "rows short": (lambda: rows(VECTOR[:-1]), "its rows: payload must take 8 bytes, got 7"),
    "rows long": (lambda: rows(VECTOR + b"x"), "its rows: payload must take 8 bytes, got 9"),
    "rows with rank": (lambda: rows(rank=1), "its rows: rank must be 0 here, got 1"),
    "rows of bools of 2": (lambda: rows(b"\1\2", dtype=9), "its rows: a bool must be 0 or 1"),
    "row factors of rank 2": (
        lambda: rows(mode=FACTORS, rank=2),
        r"its rows: rank must lie in .* = \[1, 1\], got 2",
    ),
    "row factors short": (
        lambda: rows(mode=FACTORS, rank=1),
        "its rows: payload must take 16 bytes, got 8",
    ),
    "row factors of the whole height": (
        lambda: rows(floats(*[1] * 7), mode=FACTORS, rank=1),
        "its rows: payload must take 16 bytes, got 28",
    ),
    "row factors infinite": (
        lambda: rows(floats(1, 1, 1, INFINITY), mode=FACTORS, rank=1),
        "its rows: factors must be finite",
    ),
    "row factors of integers": (
        lambda: rows(floats(1, 1, 1, 1), mode=FACTORS, rank=1, dtype=6),
        "its rows: factors need a floating dtype, got int32",
    ),
    "row codes short": (
        lambda: rows(floats(1) + b"\1\1\1", mode=PACKED, rank=1),
        "its rows: its codes take more than the 7 bytes",
    ),
    "row codes padded with a one": (
        lambda: rows(floats(1) + b"\1\1\2\1", mode=PACKED, rank=1),
        "its rows: bits after the last code of a row must be zero",
    ),
    "row scales beyond payload": (
        lambda: rows(b"", b"\0" * 64, mode=DENSE, rank=64, count=64, shape=(99, 2)),
        "its rows: payload of 0 bytes is too short for the scales of rank 64",
    ),
    "row scales that divide the whole alone": (
        lambda: rows(VECTOR, mode=DENSE, rank=4),
        "its rows: the number of rows must divide the 2 elements, got 4",
    ),
}


@pytest.mark.parametrize("lie", ROW_LIES)
def test_lies_with_right_checksums_are_refused(lie: str) -> None:
    assert_refused(*ROW_LIES[lie])


def test_honest_frames_of_the_same_builders_are_accepted() -> None:
    for frame in (rows(), rows(gaps=varint(2**40), shape=(2**41, 2))):
        assert_invariants(wire.decode(frame, max_bytes=2**63 - 1), 2**63 - 1)


def test_max_bytes_bounds_the_rows_that_are_left_out() -> None:
    frame = wire.encode(
        [Entry("w", "uint8", (2**40, 2), ROWS, 1, rows_payload(RAW, 0, [2**40 - 1], b"ab"))]
    )
    assert len(frame) < 100
    assert len(wire.decode(frame, max_bytes=2**41).entries) == 1
    with pytest.raises(WireError, match=f"at most max_bytes = {2**41 - 1} bytes"):
        wire.decode(frame, max_bytes=2**41 - 1)
    with pytest.raises(WireError, match=f"max_bytes = {DEFAULT_MAX_BYTES}"):
        wire.decode(frame)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 9), st.integers(0, 9))
def test_random_rows_with_right_checksums(payload: bytes, count: int, height: int) -> None:
    frame = rows_of(payload, count, (height, 2))
    try:
        decoded = wire.decode(frame)
    except WireError:
        return
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    assert encode_again(decoded) == frame
