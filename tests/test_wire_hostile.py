"""The wire codec on what strangers send: damage, lies with right checksums, and noise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import (
    HEADER_BYTES,
    INFINITY,
    NAN,
    all_modes,
    assert_invariants,
    assert_refused,
    floats,
    one,
    record,
    reseal,
    rows_in_all_modes,
    seal,
    varint,
)

from fedkd_fast import wire
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Entry, Mode, WireError

ENTRIES = [*all_modes(), *rows_in_all_modes()]
FRAME = wire.encode(ENTRIES, base_digest=bytes(range(16)))
ZERO, RAW, ALIAS, FACTORS, PACKED, DENSE, ROWS = Mode

FUZZ_FRAMES = 100_000
FUZZ_MAX_BYTES = 4096  # small, so that the bound is hit as well


# --- damage ---------------------------------------------------------------------------------------


def test_every_truncation_is_refused() -> None:
    for size in range(len(FRAME)):
        with pytest.raises(WireError, match="truncated"):
            wire.decode(FRAME[:size])


def test_every_bit_flip_is_refused() -> None:
    for position in range(8 * len(FRAME)):
        damaged = bytearray(FRAME)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(WireError):
            wire.decode(damaged)


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
TAIL = bytes([0, RAW])  # dtype and mode of a record written field by field

HEADER_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "magic": (lambda: reseal(b"FKD2" + FRAME[4:]), "must start with FKD1"),
    "newer major": (
        lambda: seal(b"", count=0, version=(2, 0)),
        r"frame version 2\.0 is newer than this reader \(1\.1\): upgrade fedkd_fast",
    ),
    "newer minor": (lambda: seal(b"", count=0, version=(1, 2)), r"version 1\.2 is newer"),
    "minor too high": (
        lambda: seal(PAIR, VECTOR, version=(1, 1)),
        "minor version must be 0, the lowest with the frame's modes, got 1",
    ),
    "major zero": (lambda: seal(b"", count=0, version=(0, 9)), r"version 0\.9 was never written"),
    "flags": (lambda: seal(b"", count=0, flags=2), "unknown flags 2"),
    "high flag": (lambda: seal(b"", count=0, flags=0x8001), "unknown flags 32769"),
    "digest unannounced": (
        lambda: seal(b"", count=0, digest=bytes(15) + b"x"),
        "base digest must be zero",
    ),
    "reserved": (lambda: seal(b"", count=0, reserved=bytes(7) + b"x"), "reserved bytes"),
    "frame longer": (
        lambda: seal(PAIR, VECTOR, frame_bytes=BIG),
        "truncated: header says 9223372036854775808 bytes",
    ),
    "frame shorter": (lambda: seal(PAIR, VECTOR, frame_bytes=64), "trailing bytes"),
    "directory longer": (lambda: seal(PAIR, VECTOR, directory_bytes=2**32 - 1), "must add up"),
    "payload longer": (lambda: seal(PAIR, VECTOR, payload_bytes=9), "must add up"),
    "payload wraps": (
        lambda: seal(PAIR, VECTOR, payload_bytes=2**64 - 64, directory_bytes=len(PAIR) + 8),
        "must add up",
    ),
    "boundary moved": (
        lambda: seal(PAIR, VECTOR, directory_bytes=len(PAIR) + 1, payload_bytes=7),
        "payload of entry 0 must lie in the frame",
    ),
    "entry count huge": (
        lambda: seal(PAIR, VECTOR, count=2**32 - 1),
        "entry count must be at most 65536",
    ),
    "entry count for 65537 records": (
        lambda: seal(bytes(7 * 65537), count=65537),
        "entry count must be at most 65536",
    ),
    "entry missing": (lambda: seal(PAIR + b"\0", VECTOR, count=0), "directory has 10 bytes after"),
    "entry too many": (
        lambda: seal(PAIR + b"\0\x09" + bytes(5), VECTOR, count=2),
        "suffix of entry 1",
    ),
    "payload of nobody": (lambda: seal(PAIR, VECTOR + b"x"), "1 bytes that belong to no entry"),
}

DIRECTORY_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "unknown dtype": (lambda: one(dtype=10), "unknown dtype code 10"),
    "unknown mode": (lambda: one(mode=7), "unknown mode 7"),
    "seventeen dims": (lambda: one(mode=ZERO, shape=(1,) * 17), "ndim of entry 0"),
    "overlong name size": (lambda: seal(b"\0\x81\0w" + TAIL + bytes(3)), "name suffix of entry 0"),
    "overlong prefix": (lambda: seal(b"\x80\0\1w" + TAIL + bytes(3)), "name prefix of entry 0"),
    "overlong ndim": (lambda: seal(b"\0\1w" + TAIL + b"\x80\0\0\0"), "ndim of entry 0"),
    "overlong dim": (lambda: seal(b"\0\1w" + TAIL + b"\1\x80\0\0\0"), "shape of entry 0"),
    "overlong rank": (lambda: seal(b"\0\1w" + TAIL + b"\0\x80\0\0"), "rank of entry 0"),
    "overlong size": (lambda: seal(b"\0\1w" + TAIL + b"\0\0\x80\0"), "payload length of entry 0"),
    "varint of 65 bits": (
        lambda: seal(b"\0\1w" + TAIL + b"\1" + b"\xff" * 9 + b"\2\0\0"),
        "shape of entry 0",
    ),
    "varint without end": (
        lambda: seal(b"\0\1w" + TAIL + b"\1" + b"\xff" * 12),
        "shape of entry 0",
    ),
    "name beyond directory": (lambda: seal(b"\0\x40w" + TAIL + bytes(3)), "name suffix of entry 0"),
    "name of 2**64 - 1": (
        lambda: seal(b"\0" + varint(2**64 - 1) + b"w" + TAIL + bytes(3)),
        "name suffix of entry 0",
    ),
    "prefix of nothing": (lambda: one(prefix=1), "name prefix of entry 0"),
    "prefix too short": (
        lambda: seal(PAIR + record(b"ab", mode=ZERO), VECTOR, count=2),
        "name prefix of entry 1 must be as long as it can be",
    ),
    "prefix too long": (
        lambda: seal(PAIR + record(b"b", prefix=2, mode=ZERO), VECTOR, count=2),
        "name prefix of entry 1",
    ),
    "empty name": (lambda: one(name=b"", mode=ZERO), "name must have 1 to 1024 bytes, got 0"),
    "long name": (lambda: one(name=b"w" * 1025, mode=ZERO), "name suffix of entry 0"),
    "grown name": (
        lambda: seal(
            record(b"w" * 1024, mode=ZERO) + record(b"w", prefix=1024, mode=ZERO), count=2
        ),
        "name suffix of entry 1",
    ),
    "name twice": (
        lambda: seal(PAIR + record(b"", prefix=1, mode=ZERO), VECTOR, count=2),
        'name "a" must be unique',
    ),
    "name twice, apart": (
        lambda: seal(PAIR + record(b"b", mode=ZERO) + record(b"a", mode=ZERO), VECTOR, count=3),
        'name "a" must be unique',
    ),
    "payload beyond frame": (
        lambda: one(VECTOR, shape=(3,), size=12),
        "payload of entry 0 must lie in the frame: it takes 12 bytes of 8 left",
    ),
    "payload of 2**64 - 1": (lambda: one(VECTOR, size=2**64 - 1), "must lie in the frame"),
    "payload of two": (
        lambda: seal(PAIR + record(b"b", shape=(2,), size=8), VECTOR, count=2),
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


def packed(payload: bytes, rank: int = 1, shape: tuple[int, ...] = (2, 3)) -> bytes:
    return one(payload, mode=PACKED, rank=rank, shape=shape)


def dense(payload: bytes, rank: int = 2, shape: tuple[int, ...] = (4,)) -> bytes:
    return one(payload, mode=DENSE, rank=rank, shape=shape)


def alias(rank: int, **fields: object) -> bytes:
    """An honest vector, an alias of it, and the alias under test."""
    good = record(b"b", mode=ALIAS, shape=(2,), rank=0)
    bad = record(**{"name": b"c", "mode": ALIAS, "shape": (2,), "rank": rank} | fields)  # type: ignore[arg-type]
    return seal(PAIR + good + bad, VECTOR + bytes(8 * ("size" in fields)), count=3)


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
    "factors whose size wraps": (
        lambda: one(mode=FACTORS, rank=2**30, shape=(2**30, 2**30)),
        "payload must take .* bytes, got 0",
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
    "seventeen bits": (lambda: packed(floats(1) + b"\1\x11abc"), r"in \[1, 16\], got 17"),
    "codes short": (lambda: packed(floats(1) + b"\1\1a"), "more than the 7 bytes of its payload"),
    "codes long": (lambda: packed(floats(1) + b"\1\1abc"), "payload must take 8 bytes, got 9"),
    "codes that wrap": (
        lambda: packed(floats(1) + b"\x10\x10ab", shape=(2**59, 1)),
        "more than the 8 bytes of its payload",
    ),
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
    "rows long": (lambda: dense(floats(1, 1) + b"\0\1ab"), "payload must take 11 bytes, got 12"),
    "rows beyond payload": (lambda: dense(b"", 2**40, (2**40,)), "too short for the scales"),
}

LIES = HEADER_LIES | DIRECTORY_LIES | PAYLOAD_LIES


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_right_checksums_are_refused(lie: str) -> None:
    assert_refused(*LIES[lie])


def test_honest_frames_of_the_same_builders_are_accepted() -> None:
    for frame in (
        seal(PAIR, VECTOR),
        alias(0),
        packed(floats(1) + b"\1\1ab"),
        dense(floats(1, 1) + b"\0\1a"),
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
    claims = [record(bytes([97 + i]), mode=ZERO, dtype=8, shape=(2**62,)) for i in range(5)]
    with pytest.raises(WireError, match=r"entry 1 \(\"b\"\) goes beyond it"):
        wire.decode(seal(b"".join(claims), count=5), max_bytes=2**63 - 1)


def test_default_bound_stops_a_small_frame_with_a_huge_claim() -> None:
    frame = one(mode=ZERO, shape=(2**40,))
    assert len(frame) < 100
    with pytest.raises(WireError, match=f"max_bytes = {DEFAULT_MAX_BYTES}"):
        wire.decode(frame)


# --- fuzz with mended checksums -------------------------------------------------------------------


def mutate(frame: bytes, dice: random.Random) -> bytes:
    """Change a few bytes anywhere but in the magic and the version, keeping the frame's length."""
    data = bytearray(frame)
    for _ in range(dice.randint(1, 3)):
        at = dice.choice((dice.randrange(6, len(data)), dice.randrange(HEADER_BYTES, len(data))))
        kind = dice.randrange(4)
        if kind == 0:
            data[at] = dice.choice((0, 1, 2, 3, 4, 5, 6, 16, 127, 128, 255))
        elif kind == 1:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 2:
            data[at] = (data[at] + dice.choice((1, 255))) % 256
        else:
            other = dice.randrange(HEADER_BYTES, len(data))
            data[at], data[other] = data[other], data[at]
    return reseal(bytes(data))


def test_fuzz_with_mended_checksums() -> None:
    dice = random.Random(20261122)
    seeds = [FRAME, *(wire.encode([e]) for e in ENTRIES if e.mode != ALIAS)]
    accepted = 0
    for _ in range(FUZZ_FRAMES):
        frame = mutate(dice.choice(seeds), dice)
        try:
            decoded = wire.decode(frame, max_bytes=FUZZ_MAX_BYTES)
        except WireError:
            continue
        accepted += 1
        assert_invariants(decoded, FUZZ_MAX_BYTES)
        assert wire.encode(decoded.entries, base_digest=decoded.base_digest) == frame
    assert 0 < accepted < FUZZ_FRAMES  # both sides of the decoder were reached


@settings(deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 8), st.integers(0, 1))
def test_random_directories_with_right_checksums(
    directory: bytes, payload: bytes, n: int, minor: int
) -> None:
    frame = seal(directory, payload, count=n, version=(1, minor))
    try:
        decoded = wire.decode(frame)
    except WireError:
        return
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    assert wire.encode(decoded.entries) == frame
