"""Entropy-coded and half payloads on the wire: splits, builders, levels, and lies."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import (
    FLOATING,
    INFINITY,
    NAN,
    assert_invariants,
    assert_refused,
    coded_modes,
    encode_again,
    gaps,
    one,
    row_codes,
    rows_payload,
    shorts,
    varint,
)

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.wire import DEFAULT_MAX_BYTES, ZERO_ROW, Entry, Mode, WireError

FACTORS, DENSE, HYBRID, HALF = list(Mode)[Mode.CODED_FACTORS :]
BY_MODE = {entry.mode: entry for entry in coded_modes()[:4]}

# --- logarithms -----------------------------------------------------------------------------------


def half_log2(n: int) -> int:
    """The specification's algorithm, in integers of any size."""
    whole = n.bit_length() - 1
    mantissa = n >> (whole - 31) if whole > 31 else n << (31 - whole)
    digits = whole
    for _ in range(8):
        mantissa = mantissa * mantissa >> 31
        carry = mantissa >> 32
        mantissa >>= carry
        digits = 2 * digits + carry
    return (digits + 1) >> 1


@given(st.integers(1, 2**63 - 1) | st.integers(0, 62).map(lambda bit: 1 << bit))
def test_half_log2_is_the_specified_one(n: int) -> None:
    assert _C.half_log2(n) == half_log2(n)
    assert abs(_C.half_log2(n) - 128 * math.log2(n)) <= 0.5001


def test_half_log2_of_every_small_number() -> None:
    for n in range(1, 70_000):
        assert _C.half_log2(n) == half_log2(n)
        assert abs(_C.half_log2(n) - 128 * math.log2(n)) <= 0.5001
    assert [_C.half_log2(n) for n in (1, 2, 768, 2**62)] == [0, 128, 1227, 62 * 128]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _C.half_log2(0)


ROOTS = []
with localcontext() as context:
    context.prec = 60
    root = Decimal(2)
    for _ in range(8):
        root = root.sqrt()
        ROOTS.append(float(root))  # correctly rounded


def test_exp2_fixed_is_the_specified_product() -> None:
    for e in range(-(2**15), 2**15, 7):
        product = 1.0
        for bit, factor in enumerate(ROOTS):
            if e & (128 >> bit):
                product *= factor
        assert _C.exp2_fixed(e) == math.ldexp(product, e >> 8)
        assert _C.exp2_fixed(e) == pytest.approx(2.0 ** (e / 256), rel=1e-15)


# --- splits and builders --------------------------------------------------------------------------


def test_sections_of_coded_factors() -> None:
    step, top, sigmas, levels, stream = wire.coded_factors_parts(BY_MODE[FACTORS])
    assert (step, top, list(sigmas), bytes(stream)) == (-512, 40, [40, 33, 33], b"stream")
    # (16 sigma + 512 - 128 log2 n + 8) / 16, downwards; log2 4 = 2, 128 log2 5 = 297.2.
    assert list(levels) == [56, 49, 49, 53, 46, 46]


def test_sections_of_coded_dense() -> None:
    step, base, width, codes, levels, stream = wire.coded_dense_parts(BY_MODE[DENSE])
    assert (step, base, width, codes, bytes(stream)) == (-700, 33, 3, b"\1\0\7", b"stream")
    assert list(levels) == [33, ZERO_ROW, 9]


def test_sections_of_coded_hybrid() -> None:
    parts = wire.coded_hybrid_parts(BY_MODE[HYBRID])
    assert (parts.step, parts.top, list(parts.sigmas)) == (-512, 40, [40, 31])
    assert (parts.base, parts.width, parts.codes, bytes(parts.stream)) == (-5, 1, b"\1\0", b"s")
    assert len(parts.levels) == 2 * 2 + 2 and list(parts.levels[-2:]) == [-5, ZERO_ROW]
    p, q = 2, 6
    assert list(parts.levels[:4]) == [
        math.floor((16 * sigma + 512 - half_log2(n) + 8) / 16) for n in (p, q) for sigma in (40, 31)
    ]


def test_sections_of_halves() -> None:
    exponent, halves = wire.half_parts(BY_MODE[HALF])
    assert (exponent, struct.unpack("<4e", halves)) == (-20, (1.5, -2, 0, 65504))
    assert wire.half_payload(exponent, halves) == BY_MODE[HALF].payload


SPLITTERS: dict[Mode, Callable[[Entry], object]] = {
    FACTORS: wire.coded_factors_parts,
    DENSE: wire.coded_dense_parts,
    HYBRID: wire.coded_hybrid_parts,
    HALF: wire.half_parts,
}


@pytest.mark.parametrize("mode", SPLITTERS)
def test_sections_refuse_other_entries(mode: Mode) -> None:
    with pytest.raises(ValueError, match=f"must be {mode.name}, got <Mode.RAW: 1>"):
        SPLITTERS[mode](replace(BY_MODE[mode], mode=Mode.RAW))
    with pytest.raises(WireError, match="cut short|must take 10 bytes, got 1"):
        SPLITTERS[mode](replace(BY_MODE[mode], payload=b"x"))


SIGMAS = st.lists(st.integers(-60, 60), min_size=1, max_size=40).map(
    lambda numbers: sorted(numbers, reverse=True)
)
STREAMS = st.binary(max_size=9)
STEPS = st.integers(-1000, 1000)


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int, bytes]:
    width = draw(st.integers(0, 6))
    codes = st.integers(0, 2**width - 1) if width else st.just(1)
    return draw(st.integers(-8192, 335)), width, bytes(draw(st.lists(codes, min_size=1)))


@settings(deadline=None)
@given(STEPS, SIGMAS, STREAMS, st.sampled_from(FLOATING), st.booleans())
def test_coded_factors_come_back(
    step: int, sigmas: list[int], stream: bytes, dtype: str, as_array: bool
) -> None:
    payload = wire.coded_factors_payload(step, array("h", sigmas) if as_array else sigmas, stream)
    assert (
        payload
        == shorts(step, sigmas[0])
        + gaps(*(a - b for a, b in zip([sigmas[0], *sigmas], sigmas, strict=False)))
        + stream
    )
    entry = Entry("w", dtype, (50, 60), FACTORS, len(sigmas), payload)
    (decoded,) = assert_comes_back(entry)
    parts = wire.coded_factors_parts(decoded)
    assert (parts.step, list(parts.sigmas), bytes(parts.stream)) == (step, sigmas, stream)
    assert list(parts.levels) == [
        math.floor((16 * sigma - step - half_log2(n) + 8) / 16)
        for n in (50, 60)
        for sigma in sigmas
    ]


@settings(deadline=None)
@given(STEPS, rows(), STREAMS, st.integers(1, 4))
def test_coded_rows_come_back(
    step: int, found: tuple[int, int, bytes], stream: bytes, length: int
) -> None:
    base, width, codes = found
    payload = wire.coded_dense_payload(step, *found, stream)
    assert payload == (shorts(step, base) + bytes([width]) + row_codes(width, *codes) + stream)
    entry = Entry("w", "float32", (length * len(codes),), DENSE, len(codes), payload)
    (decoded,) = assert_comes_back(entry)
    parts = wire.coded_dense_parts(decoded)
    assert (parts.step, parts.base, parts.width, parts.codes) == (step, base, width, codes)
    assert bytes(parts.stream) == stream
    assert list(parts.levels) == [base - 4 * (c - 1) if c else ZERO_ROW for c in codes]


@settings(deadline=None)
@given(STEPS, SIGMAS, rows(), STREAMS)
def test_coded_hybrids_come_back(
    step: int, sigmas: list[int], found: tuple[int, int, bytes], stream: bytes
) -> None:
    payload = wire.coded_hybrid_payload(step, sigmas, *found, stream)
    height = 40 * len(found[2])
    entry = Entry("w", "float32", (height, 50), HYBRID, len(sigmas), payload)
    (decoded,) = assert_comes_back(entry)
    parts = wire.coded_hybrid_parts(decoded)
    assert (parts.step, list(parts.sigmas), bytes(parts.stream)) == (step, sigmas, stream)
    assert (parts.base, parts.width, parts.codes) == found
    factors = wire.coded_factors_payload(step, sigmas, b"")
    alone = wire.coded_factors_parts(replace(entry, mode=FACTORS, payload=factors))
    dense = wire.coded_dense_payload(step, *found, b"")
    below = wire.coded_dense_parts(replace(entry, mode=DENSE, rank=len(found[2]), payload=dense))
    assert parts.levels == alone.levels + below.levels


def assert_comes_back(entry: Entry) -> tuple[Entry, ...]:
    frame = wire.encode([entry])
    decoded = wire.decode(frame)
    assert decoded.entries == (entry,)
    assert frame[49] == 1  # entropy tables
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    return decoded.entries


def test_modes_without_streams_need_no_tables() -> None:
    for entry in coded_modes():
        rows = wire.rows_parts(entry).rows if entry.mode is Mode.ROWS else entry
        assert wire.encode([entry])[49] == (rows.mode in (FACTORS, DENSE, HYBRID))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: wire.coded_factors_payload(2**15, [0], b""), "step must fit 16 bits, got 32768"),
        (lambda: wire.coded_factors_payload(0, [2**15], b""), "sigmas must fit 16 bits"),
        (lambda: wire.coded_factors_payload(0, [], b""), "sigmas must not be empty"),
        (lambda: wire.coded_factors_payload(0, [3, 4], b""), "must not rise, got 4 at 1"),
        (lambda: wire.coded_dense_payload(0, -(2**15) - 1, 0, b"", b""), "base must fit 16 bits"),
        (lambda: wire.coded_dense_payload(0, 0, 7, b"", b""), r"must lie in \[0, 6\], got 7"),
        (lambda: wire.coded_dense_payload(0, 0, 2, b"\4", b""), "2 bits cannot say 4 at 0"),
        (lambda: wire.coded_dense_payload(0, 0, 0, b"\1\0", b""), "0 bits cannot say 0 at 1"),
        (lambda: wire.half_payload(-(2**15) - 1, b""), "exponent must fit 16 bits"),
    ],
)
def test_builders_refuse(build: Callable[[], bytes], match: str) -> None:
    with pytest.raises(WireError, match=match):
        build()


# --- lies with right checksums --------------------------------------------------------------------


def factors(
    payload: bytes | None = None,
    *,
    step: int = 0,
    top: int = 40,
    bits: bytes = gaps(0),
    rank: int = 1,
    shape: tuple[int, ...] = (4, 4),
    dtype: int = 0,
) -> bytes:
    honest = shorts(step, top) + bits + b"stream"
    payload = honest if payload is None else payload
    return one(payload, mode=FACTORS, rank=rank, shape=shape, dtype=dtype, tables=1)


def dense(
    payload: bytes | None = None,
    *,
    step: int = 0,
    base: int = 40,
    width: int = 1,
    codes: bytes = b"\1",
    rank: int = 2,
    shape: tuple[int, ...] = (4,),
    dtype: int = 0,
    stream: bytes = b"stream",
) -> bytes:
    honest = shorts(step, base) + bytes([width]) + codes + stream
    payload = honest if payload is None else payload
    return one(payload, mode=DENSE, rank=rank, shape=shape, dtype=dtype, tables=1)


def hybrid(tail: bytes, *, step: int = 0) -> bytes:
    payload = shorts(step, 40) + gaps(0) + tail
    return one(payload, mode=HYBRID, rank=1, shape=(4, 4), tables=1)


def half(payload: bytes, *, rank: int = 0, dtype: int = 0) -> bytes:
    return one(payload, mode=HALF, rank=rank, shape=(2,), dtype=dtype)


def halves(*values: float, exponent: int = 0) -> bytes:
    return struct.pack(f"<h{len(values)}e", exponent, *values)


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no tables": (
        lambda: one(shorts(0, 0) + gaps(0), mode=FACTORS, rank=1, shape=(4, 4)),
        "entropy tables exactly if an entry is entropy-coded",
    ),
    "no tables for rows": (
        lambda: one(
            rows_payload(8, 1, [0], shorts(0, 0) + b"\0"), mode=Mode.ROWS, rank=1, shape=(4, 4)
        ),
        "entropy tables exactly if an entry is entropy-coded",
    ),
    "tables for halves": (
        lambda: one(halves(1, 2), mode=HALF, shape=(2,), tables=1),
        "entropy tables exactly if an entry is entropy-coded",
    ),
    "factors of integers": (lambda: factors(dtype=6), "factors need a floating dtype, got int32"),
    "factors of a vector": (lambda: factors(shape=(16,)), "at least 2 dimensions, got 1"),
    "rank 0": (lambda: factors(rank=0), r"\[1, 4\], got 0"),
    "rank beyond full": (lambda: factors(rank=5), r"\[1, 4\], got 5"),
    "no step": (lambda: factors(b"\0"), "its step is cut short"),
    "no top": (lambda: factors(shorts(0) + b"\0"), "its sigmas are cut short"),
    "no gaps": (lambda: factors(shorts(0, 0)), "gap of sigma 0 of 1 is cut short"),
    "gaps cut": (
        lambda: factors(shorts(0, 0) + b"\1", rank=2),
        "gap of sigma 1 of 2 is cut short",
    ),
    "gaps of 2**30 sigmas": (
        lambda: factors(shorts(0, 0) + b"\xff" * 9, rank=2**30, shape=(2**30, 2**30)),
        "gap of sigma 72 of 1073741824 is cut short",
    ),
    "top too large": (lambda: factors(top=2017), r"top must lie in \[-2016, 2016\], got 2017"),
    "top too small": (lambda: factors(top=-2017, step=-32256), r"2016\], got -2017"),
    "first gap": (lambda: factors(bits=gaps(1)), "the first gap must be 0"),
    "gaps padded with ones": (lambda: factors(bits=b"\x81"), "after the last gap must be zero"),
    "sigma too small": (
        lambda: factors(top=-2015, step=-32000, bits=gaps(0, 2), rank=2),
        "sigmas must be at least -2016",
    ),
    "level too high": (
        lambda: factors(step=-32256, top=0, rank=1),
        "levels must be at most 335, got 2000",
    ),
    "level just too high": (
        lambda: factors(step=-256, top=336, shape=(1, 4)),
        "levels must be at most 335, got 352",
    ),
    "left scale too large": (
        lambda: factors(step=32000, top=1900),
        r"2\*\*\[-126, 126\], got 2\*\*\(33600/256\)",
    ),
    "later left scale too large": (
        lambda: factors(step=16128, top=0, bits=gaps(0, 1), rank=2),
        r"got 2\*\*\(32272/256\)",
    ),
    "left scale too small": (
        lambda: factors(step=-32200, top=-2000),
        r"scales must lie .* got 2\*\*\(-32400/256\)",
    ),
    "rows of integers": (lambda: dense(dtype=7), "coded rows need a floating dtype, got int64"),
    "no rows": (lambda: dense(rank=0), "must divide the 4 elements, got 0"),
    "rows that do not divide": (lambda: dense(rank=3), "must divide the 4 elements, got 3"),
    "rows of nothing": (lambda: dense(shape=(0,)), "must divide the 0 elements, got 2"),
    "no base": (lambda: dense(shorts(0) + b"\0"), "levels of its rows are cut short"),
    "no width": (lambda: dense(shorts(0, 0)), "levels of its rows are cut short"),
    "base too high": (lambda: dense(base=336), "levels must be at most 335, got 336"),
    "base too low": (lambda: dense(base=-8193), "base must be at least -8192, got -8193"),
    "step too large": (lambda: dense(step=32257), r"scales must lie .* got 2\*\*\(32257/256\)"),
    "step too small": (lambda: dense(step=-32257), r"got 2\*\*\(-32257/256\)"),
    "width 7": (lambda: dense(width=7), r"width of row codes must lie in \[0, 6\], got 7"),
    "row codes cut": (
        lambda: dense(codes=b"", stream=b"", rank=4),
        "codes of 4 rows are cut short",
    ),
    "row codes that wrap": (
        lambda: dense(width=6, rank=2**62 - 1, shape=(2**62 - 1,), dtype=2, stream=b""),
        "codes of 4611686018427387903 rows are cut short",
    ),
    "row codes padded with ones": (lambda: dense(codes=b"\5"), "after the last row code must be"),
    "hybrid without rows": (lambda: hybrid(b""), "number of rows is cut short or overlong"),
    "hybrid of overlong rows": (
        lambda: hybrid(b"\x81\0"),
        "number of rows is cut short or overlong",
    ),
    "hybrid rows that do not divide": (
        lambda: hybrid(varint(3) + shorts(0) + b"\0"),
        "must divide the 16 elements, got 3",
    ),
    "hybrid of 2**64 - 1 rows": (
        lambda: hybrid(varint(2**64 - 1) + shorts(0) + b"\0"),
        "must divide the 16 elements",
    ),
    "hybrid without base": (lambda: hybrid(b"\4"), "levels of its rows are cut short"),
    "halves with rank": (lambda: half(halves(1, 2), rank=1), "rank must be 0 here, got 1"),
    "halves of integers": (lambda: half(halves(1, 2), dtype=5), "floating dtype, got int16"),
    "halves short": (lambda: half(halves(1)), "payload must take 6 bytes, got 4"),
    "halves long": (lambda: half(halves(1, 2, 3)), "payload must take 6 bytes, got 8"),
    "halves without exponent": (lambda: half(b""), "payload must take 6 bytes, got 0"),
    "half infinite": (lambda: half(halves(1, -INFINITY)), "halves must be finite"),
    "half NaN": (lambda: half(halves(NAN, 1)), "halves must be finite"),
    "exponent 127": (lambda: half(halves(1, 2, exponent=127)), r"\[-126, 126\], got 127"),
    "exponent -127": (lambda: half(halves(1, 2, exponent=-127)), r"\[-126, 126\], got -127"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_right_checksums_are_refused(lie: str) -> None:
    assert_refused(*LIES[lie])


@pytest.mark.parametrize("mode", [FACTORS, DENSE, HYBRID, HALF])
def test_lies_about_rows_are_refused(mode: Mode) -> None:
    frame = one(rows_payload(mode, 1, [0], b"\0"), mode=Mode.ROWS, rank=1, shape=(4, 4), tables=1)
    with pytest.raises(WireError, match=r"entry 0 \(\"w\"\), its rows: "):
        wire.decode(frame)


def test_honest_frames_at_the_limits_are_accepted() -> None:
    for frame in (
        factors(),
        factors(top=2016, step=16128 + 12000),
        factors(top=-2016, step=-16128),
        factors(step=16128, top=0),
        factors(step=-256, top=319, shape=(1, 4)),  # level 335
        factors(bits=gaps(0, *[0] * 7), rank=8, shape=(8, 8)),
        dense(base=335),
        dense(base=-8192),
        dense(step=32256),
        dense(step=-32256),
        dense(codes=b"\3"),
        dense(width=0, codes=b""),
        dense(shorts(0, 0) + b"\0"),  # an empty stream
        hybrid(b"\4" + shorts(0) + b"\0"),
        half(halves(65504, -65504, exponent=126)),
        half(halves(0, -0.0, exponent=-126)),
    ):
        decoded = wire.decode(frame)
        assert_invariants(decoded, DEFAULT_MAX_BYTES)
        assert encode_again(decoded) == frame


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([FACTORS, DENSE, HYBRID, HALF]),
    st.binary(max_size=30),
    st.integers(0, 5),
    st.sampled_from([(2,), (2, 2), (3, 4), (1, 1)]),
)
def test_random_payloads_with_right_checksums(
    mode: Mode, payload: bytes, rank: int, shape: tuple[int, ...]
) -> None:
    frame = one(payload, mode=mode, rank=rank, shape=shape, tables=mode != HALF)
    try:
        decoded = wire.decode(frame)
    except WireError:
        return
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    SPLITTERS[mode](decoded.entries[0])
    assert encode_again(decoded) == frame
