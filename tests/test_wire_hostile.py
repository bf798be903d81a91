"""The wire codec on what strangers send: damage, and lies with right checksums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_frames import (
    INFINITY,
    NAN,
    Line,
    all_modes,
    assert_invariants,
    assert_refused,
    coded_modes,
    floats,
    hash_of,
    one,
    record,
    reseal,
    rows_in_all_modes,
    seal,
    varint,
)

from fedkd_fast import wire
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base, Entry, Mode, WireError

ENTRIES = [*all_modes(), *rows_in_all_modes(), *coded_modes()]
FRAME = wire.encode(ENTRIES, codec="wf1", base=Base(7, 8, bytes(range(16))))
BARE = wire.encode(ENTRIES, schema=False)
ZERO, RAW, ALIAS, FACTORS, PACKED, DENSE = list(Mode)[:6]


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [FRAME, BARE], ids=["with schema", "bare"])
def test_every_truncation_is_refused(frame: bytes) -> None:
    for size in range(len(frame)):
        with pytest.raises(WireError, match="truncated"):
            wire.decode(frame[:size], schema=ENTRIES)


@pytest.mark.parametrize("frame", [FRAME, BARE], ids=["with schema", "bare"])
def test_every_bit_flip_is_refused(frame: bytes) -> None:
    for position in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(WireError):
            wire.decode(damaged, schema=ENTRIES)


def test_trailing_bytes_are_refused() -> None:
    said = len(FRAME)
    with pytest.raises(
        WireError, match=f"trailing bytes: header says {said} bytes, got {said + 1}"
    ):
        wire.decode(FRAME + b"\0")
    with pytest.raises(WireError, match="trailing bytes"):
        wire.decode(FRAME + FRAME)


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data)
    with pytest.raises(WireError):
        wire.decode(b"FKD1\x01\x00" + data)


# --- lies with right checksums --------------------------------------------------------------------

PAIR = record(b"a", shape=(2,), size=8)  # an honest first entry; its payload is floats(1, 2)
VECTOR = floats(1, 2)
BIG = 2**63
MODE = bytes([RAW, 0, 0])  # the second half of a line whose first is written field by field


def empty(**lies: Any) -> Callable[[], bytes]:
    """A frame without entries that is honest but for what is given."""
    return lambda: seal(**lies)


def pair(*more: Line, **lies: Any) -> Callable[[], bytes]:
    return lambda: seal([PAIR, *more], VECTOR, **lies)


def line(schema: bytes, entry: bytes = MODE) -> Callable[[], bytes]:
    return lambda: seal([Line(schema, entry)])


UPGRADE = "upgrade fedkd_fast"
HEADER_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "magic": (lambda: reseal(b"FKD2" + FRAME[4:]), "must start with FKD1"),
    "newer major": (
        empty(version=(2, 0)),
        r"frame version 2\.0 is newer than this reader \(1\.0\): upgrade fedkd_fast",
    ),
    "newer minor": (empty(version=(1, 1)), r"version 1\.1 is newer"),
    "major zero": (empty(version=(0, 9)), r"version 0\.9 was never written"),
    "flags": (empty(flags=8), f"unknown flags 8: {UPGRADE}"),
    "high flag": (empty(flags=0x8004), "unknown flags 32772"),
    "codec": (empty(codec=4), f"unknown codec 4: {UPGRADE}"),
    "newer tables": (empty(tables=2), f"needs entropy tables 2, .*{UPGRADE}"),
    "tables without need": (empty(tables=1), "entropy tables exactly if an entry is"),
    "run unannounced": (empty(run=1, flags=4), "run and round must be zero"),
    "round unannounced": (empty(round_=1), "run and round must be zero"),
    "reserved": (empty(reserved=bytes(5) + b"x"), "reserved bytes"),
    "frame longer": (pair(frame_bytes=BIG), "truncated: header says 9223372036854775808 bytes"),
    "frame shorter": (pair(frame_bytes=64), "trailing bytes"),
    "digest beyond frame": (empty(flags=5), "directory of 0 bytes must fit the 64 bytes"),
    "directory beyond frame": (pair(directory_bytes=2**64 - 1), "must fit the 81 bytes"),
    "directory over digest": (
        lambda: seal([PAIR], VECTOR, digest=bytes(16), directory_bytes=18),
        "directory of 18 bytes must fit the 97 bytes",
    ),
    "boundary moved": (
        pair(directory_bytes=12),
        "schema hash must be that",
    ),
    "entry count huge": (pair(count=2**32 - 1), "entry count must be at most 65536"),
    "entry count for 65537 records": (
        lambda: seal(tail=bytes(7 * 65537), count=65537),
        "entry count must be at most 65536",
    ),
    "entry count for one more": (pair(count=2), "fit the directory of 9 bytes, got 2"),
    "entry count for one more without schema": (
        lambda: seal([PAIR], VECTOR, embedded=False, count=2),
        "fit the directory of 3 bytes, got 2",
    ),
    "entry missing": (
        pair(count=0, schema_hash=hash_of([])),
        "directory of 9 bytes is more than 0 entries can take",
    ),
    "bytes behind": (pair(tail=b"\0"), "directory has 1 bytes after its last entry"),
    "payload of nobody": (
        lambda: seal([PAIR], VECTOR + b"x"),
        "1 bytes that belong to no entry",
    ),
    "hash of another schema": (pair(schema_hash=1), "schema hash must be that of the schema in"),
}

DIRECTORY_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "unknown dtype": (lambda: one(dtype=10), "unknown dtype code 10"),
    "unknown mode": (lambda: one(mode=11), "unknown mode 11"),
    "seventeen dims": (lambda: one(mode=ZERO, shape=(1,) * 17), "ndim of entry 0"),
    "overlong prefix": (line(b"\x80\0\1w\0\0"), "name prefix of entry 0"),
    "overlong name size": (line(b"\0\x81\0w\0\0"), "name suffix of entry 0"),
    "overlong ndim": (line(b"\0\1w\0\x80\0"), "ndim of entry 0"),
    "overlong dim": (line(b"\0\1w\0\1\x80\0"), "shape of entry 0"),
    "overlong rank": (line(b"\0\1w\0\0", b"\1\x80\0\0"), "rank of entry 0"),
    "overlong size": (line(b"\0\1w\0\0", b"\1\0\x80\0"), "payload length of entry 0"),
    "varint of 65 bits": (line(b"\0\1w\0\1" + b"\xff" * 9 + b"\2"), "shape of entry 0"),
    "varint without end": (line(b"\0\1w\0\1" + b"\xff" * 12, b""), "shape of entry 0"),
    "dtype missing": (line(b"\0\6wwwwww", b""), "dtype of entry 0"),
    "mode missing": (
        lambda: seal([Line(b"\0\1w\0\2\1\1", b"")]),
        "mode of entry 0 is cut short",
    ),
    "name beyond directory": (line(b"\0\x40w\0\0"), "name suffix of entry 0"),
    "name of 2**64 - 1": (line(b"\0" + varint(2**64 - 1) + b"w\0\0"), "name suffix of entry 0"),
    "prefix of nothing": (lambda: one(prefix=1), "name prefix of entry 0"),
    "prefix too short": (
        pair(record(b"ab", mode=ZERO)),
        "name prefix of entry 1 must be as long as it can be",
    ),
    "prefix too long": (pair(record(b"b", prefix=2, mode=ZERO)), "name prefix of entry 1"),
    "empty name": (lambda: one(name=b"", mode=ZERO), "name must have 1 to 1024 bytes, got 0"),
    "long name": (lambda: one(name=b"w" * 1025, mode=ZERO), "name suffix of entry 0"),
    "grown name": (
        lambda: seal([record(b"w" * 1024, mode=ZERO), record(b"w", prefix=1024, mode=ZERO)]),
        "name suffix of entry 1",
    ),
    "name twice": (pair(record(b"", prefix=1, mode=ZERO)), 'name "a" must be unique'),
    "name twice, apart": (
        pair(record(b"b", mode=ZERO), record(b"a", mode=ZERO)),
        'name "a" must be unique',
    ),
    "payload beyond frame": (
        lambda: one(VECTOR, shape=(3,), size=12),
        "payload of entry 0 must lie in the frame: it takes 12 bytes of 8 left",
    ),
    "payload of 2**64 - 1": (lambda: one(VECTOR, size=2**64 - 1), "must lie in the frame"),
    "payload of two": (
        pair(record(b"b", shape=(2,), size=8)),
        "payload of entry 1 must lie in the frame: it takes 8 bytes of 0 left",
    ),
    "2**63 elements": (lambda: one(mode=ZERO, dtype=8, shape=(BIG,)), r"less than 2\*\*63 bytes"),
    "2**64 - 1 elements": (lambda: one(mode=ZERO, dtype=8, shape=(2**64 - 1,)), "less than"),
    "numel wraps to 0": (lambda: one(mode=ZERO, shape=(2**32, 2**32)), "less than"),
    "numel wraps to 1": (
        lambda: one(bytes(4), shape=(3, 0xAAAAAAAAAAAAAAAB)),
        r"less than 2\*\*63 bytes",
    ),
    "itemsize wraps": (lambda: one(mode=ZERO, dtype=1, shape=(2**60,)), r"less than 2\*\*63 bytes"),
    "overflow behind a zero": (lambda: one(shape=(2**62, 2**62, 0)), r"less than 2\*\*63 bytes"),
}


PADDED = "bits after the last code of a row must be zero"


def packed(payload: bytes, rank: int = 1, shape: tuple[int, ...] = (2, 3)) -> bytes:
    return one(payload, mode=PACKED, rank=rank, shape=shape)


def dense(payload: bytes, rank: int = 2, shape: tuple[int, ...] = (4,)) -> bytes:
    return one(payload, mode=DENSE, rank=rank, shape=shape)


def alias(rank: int, **fields: object) -> bytes:
    """An honest vector, an alias of it, and the alias under test."""
    good = record(b"b", mode=ALIAS, shape=(2,), rank=0)
    bad = record(**{"name": b"c", "mode": ALIAS, "shape": (2,), "rank": rank} | fields)  # type: ignore[arg-type]
    return seal([PAIR, good, bad], VECTOR + bytes(8 * ("size" in fields)))


# overlong forms, surrogates, beyond U+10FFFF, cut short, control characters
BAD_NAMES = (
    b"\xff \x80 \xc0\x80 \xe0\x80\x80 \xf0\x80\x80\x80 \xed\xa0\x80 \xf4\x90\x80\x80".split()
)
BAD_NAMES += b"\xc3 \xe2\x82 a\0 \x1b[2J \x7f \xc2\x9b".split(b" ")

PAYLOAD_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    **{
        f"name {name!r}": (
            lambda name=name: one(name=name, mode=ZERO),  # type: ignore[misc]
            "name must be utf-8 without control characters",
        )
        for name in BAD_NAMES
    },
    "raw too short": (lambda: one(VECTOR, shape=(3,)), "payload must take 12 bytes, got 8"),
    "raw too long": (lambda: one(VECTOR, shape=()), "payload must take 4 bytes, got 8"),
    "raw with rank": (lambda: one(VECTOR, shape=(2,), rank=1), "rank must be 0 here, got 1"),
    "bool of 2": (lambda: one(b"\0\1\2", dtype=9, shape=(3,)), "a bool must be 0 or 1"),
    "zero with payload": (lambda: one(VECTOR, mode=ZERO, shape=(2,)), "must take 0 bytes, got 8"),
    "zero with rank": (lambda: one(mode=ZERO, rank=1), "rank must be 0 here, got 1"),
    "alias of itself": (lambda: alias(2), "must name an earlier entry, got entry 2"),
    "alias of a later one": (lambda: alias(3), "must name an earlier entry, got entry 3"),
    "alias of nowhere": (lambda: alias(2**64 - 1), "must name an earlier entry"),
    "alias of an alias": (lambda: alias(1), "must not name another alias, got entry 1"),
    "alias of another shape": (lambda: alias(0, shape=(2, 1)), "the shape and dtype of entry 0"),
    "alias of another dtype": (lambda: alias(0, dtype=6), "the shape and dtype of entry 0"),
    "alias with payload": (lambda: alias(0, size=8), "payload must take 0 bytes, got 8"),
    "first entry an alias": (lambda: one(mode=ALIAS), "must name an earlier entry, got entry 0"),
    "factors of integers": (
        lambda: one(floats(1, 1, 1, 1), mode=FACTORS, dtype=6, rank=1, shape=(1, 1)),
        "factors need a floating dtype, got int32",
    ),
    "factors of a vector": (lambda: one(mode=FACTORS, rank=1, shape=(9,)), "at least 2 dimensions"),
    "factors of rank 0": (lambda: packed(b"", rank=0), r"\[1, min\(P, Q\)\] = \[1, 2\], got 0"),
    "factors of full rank + 1": (lambda: packed(b"", rank=3), r"\[1, 2\], got 3"),
    "factors of rank 2**64 - 1": (lambda: packed(b"", rank=2**64 - 1), r"\[1, 2\], got"),
    "factors of nothing": (lambda: packed(b"", shape=(0, 5)), r"\[1, 0\], got 1"),
    "factors without columns": (lambda: packed(b"", shape=(5, 0)), r"\[1, 0\], got 1"),
    "factors short": (
        lambda: one(VECTOR, mode=FACTORS, rank=1, shape=(1, 1)),
        "payload must take 12 bytes, got 8",
    ),
    "factors of 2**63 bytes": (
        lambda: one(mode=FACTORS, rank=2**30, shape=(2**30, 2**30)),
        "payload must take .* bytes, got 0",
    ),
    "factors whose size wraps": (
        lambda: one(mode=FACTORS, dtype=2, rank=2**31 - 1, shape=(2**31 - 1, 2**31 - 1)),
        r"its factors take more than 2\*\*64 bytes",
    ),
    "factors with NaN": (
        lambda: one(floats(1, 1, NAN), mode=FACTORS, rank=1, shape=(1, 1)),
        "factors must be finite",
    ),
    "factors with infinity": (
        lambda: one(floats(-INFINITY, 1, 1), mode=FACTORS, rank=1, shape=(1, 1)),
        "factors must be finite",
    ),
    "scales cut": (lambda: packed(floats(1)), "too short for the scales of rank 1"),
    "scale NaN": (lambda: packed(floats(NAN) + b"\1\1ab"), "scale must be finite"),
    "scale infinite": (lambda: packed(floats(INFINITY) + b"\1\1ab"), "scale must be finite"),
    "no bits": (lambda: packed(floats(1) + b"\0\1b"), r"bits must lie in \[1, 16\], got 0"),
    "seventeen bits": (lambda: packed(floats(1) + b"\1\x11\1bc"), r"in \[1, 16\], got 17"),
    "codes short": (lambda: packed(floats(1) + b"\1\1\1"), "more than the 7 bytes of its payload"),
    "codes long": (lambda: packed(floats(1) + b"\1\1\1\1c"), "payload must take 8 bytes, got 9"),
    "codes that wrap": (
        lambda: packed(floats(1) + b"\x10\x10ab", shape=(2**59, 1)),
        "more than the 8 bytes of its payload",
    ),
    "left codes padded with a one": (lambda: packed(floats(1) + b"\1\1\7\7"), PADDED),
    "right codes padded with a one": (lambda: packed(floats(1) + b"\1\1\3\x0f"), PADDED),
    "codes padded with the last bit": (lambda: packed(floats(1) + b"\1\1\x83\7"), PADDED),
    "rows do not divide": (lambda: dense(b"", rank=3), "must divide the 4 elements, got 3"),
    "no rows": (lambda: dense(b"", rank=0), "must divide the 4 elements, got 0"),
    "rows of nothing": (lambda: dense(b"", rank=1, shape=(0,)), "must divide the 0 elements"),
    "rows of integers": (
        lambda: one(floats(1) + b"\1a", mode=DENSE, dtype=4, rank=1, shape=(1,)),
        "packed rows need a floating dtype, got int8",
    ),
    "row scale infinite": (lambda: dense(floats(1, INFINITY) + bytes(2)), "scale must be finite"),
    "row bits 17": (lambda: dense(floats(1, 1) + b"\0\x11abcde"), r"in \[0, 16\], got 17"),
    "rows short": (lambda: dense(floats(1, 1) + b"\0\1"), "more than the 10 bytes of its payload"),
    "rows long": (lambda: dense(floats(1, 1) + b"\0\1\1b"), "payload must take 11 bytes, got 12"),
    "row padded with a one": (lambda: dense(floats(1, 1) + b"\0\1\7"), PADDED),
    "row padded before another": (lambda: dense(floats(1, 1) + b"\3\4\x7f\xff"), PADDED),
    "rows beyond payload": (lambda: dense(b"", 2**40, (2**40,)), "too short for the scales"),
}

LIES = HEADER_LIES | DIRECTORY_LIES | PAYLOAD_LIES


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_right_checksums_are_refused(lie: str) -> None:
    assert_refused(*LIES[lie])


def test_honest_frames_of_the_same_builders_are_accepted() -> None:
    for frame in (
        seal([PAIR], VECTOR),
        seal([PAIR], VECTOR, codec=3, digest=bytes(16), run=1, round_=1),
        alias(0),
        packed(floats(1) + b"\1\1\3\7"),
        dense(floats(1, 1) + b"\0\1\3"),
        one(name=b"w" * 1024, mode=ZERO, shape=(1,) * 16),
        one(mode=ZERO, dtype=8, shape=(BIG - 1,)),
        one(shape=(0, 2**40)),
    ):
        assert_invariants(wire.decode(frame, max_bytes=2**63 - 1), 2**63 - 1)


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [ZERO, RAW, ALIAS])
def test_max_bytes_bounds_the_decoded_tensors(mode: Mode) -> None:
    entries = [Entry("a", "float32", (100,), RAW, 0, bytes(400))]
    if mode != RAW:
        entries.append(Entry("b", "float32", (100,), mode))
    frame, claimed = wire.encode(entries), 400 * len(entries)
    assert len(wire.decode(frame, max_bytes=claimed).entries) == len(entries)
    with pytest.raises(WireError, match=f"at most max_bytes = {claimed - 1} bytes"):
        wire.decode(frame, max_bytes=claimed - 1)


def test_sum_of_claims_does_not_wrap() -> None:
    claims = [record(b"abcde"[i : i + 1], mode=ZERO, dtype=8, shape=(2**62,)) for i in range(5)]
    with pytest.raises(WireError, match=r"entry 1 \(\"b\"\) goes beyond it"):
        wire.decode(seal(claims), max_bytes=2**63 - 1)


def test_default_bound_stops_a_small_frame_with_a_huge_claim() -> None:
    frame = one(mode=ZERO, shape=(2**40,))
    assert len(frame) < 100
    with pytest.raises(WireError, match=f"max_bytes = {DEFAULT_MAX_BYTES}"):
        wire.decode(frame)
