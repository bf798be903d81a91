"""Frames written by hand: a second, slow encoder that also writes what the real one refuses."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.wire import DTYPES, Entry, Frame, Mode, WireError, rows_parts

HEADER_BYTES = 64
ITEMSIZE = dict(zip(DTYPES, (4, 8, 2, 2, 1, 2, 4, 8, 1, 1), strict=True))
FLOATING = ("float32", "float64", "float16", "bfloat16")
NAN, INFINITY = float("nan"), float("inf")


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class Line(NamedTuple):
    """What the directory says of one entry, in its two sections."""

    schema: bytes
    entry: bytes


def record(
    name: bytes = b"w",
    *,
    prefix: int = 0,
    dtype: int = 0,
    mode: int = Mode.RAW,
    shape: tuple[int, ...] = (),
    rank: int = 0,
    size: int = 0,
) -> Line:
    """One entry of the directory; `name` is what follows the shared prefix."""
    head = varint(prefix) + varint(len(name)) + name + bytes([dtype])
    dims = b"".join(map(varint, shape))
    return Line(head + varint(len(shape)) + dims, bytes([mode]) + varint(rank) + varint(size))


def hash_of(lines: Sequence[Line]) -> int:
    section = b"".join(line.schema for line in lines)
    return int.from_bytes(hashlib.sha256(section).digest()[:8], "little")


def seal(
    lines: Sequence[Line] = (),
    payload: bytes = b"",
    *,
    embedded: bool = True,
    tail: bytes = b"",
    count: int | None = None,
    version: tuple[int, int] = (1, 0),
    digest: bytes = b"",
    run: int | None = None,
    round_: int = 0,
    flags: int | None = None,
    codec: int = 0,
    tables: int = 0,
    reserved: bytes = bytes(6),
    schema_hash: int | None = None,
    frame_bytes: int | None = None,
    directory_bytes: int | None = None,
) -> bytes:
    """Put a header with right checksums before payload and directory, which `tail` follows."""
    directory = b"".join(line.schema for line in lines) if embedded else b""
    directory += b"".join(line.entry for line in lines) + tail
    honest = HEADER_BYTES + len(digest) + len(payload) + len(directory)
    said = bool(digest) | 2 * (run is not None) | 4 * embedded
    header = struct.pack(
        "<4sBBHQQQIIQBB6s",
        b"FKD1",
        *version,
        said if flags is None else flags,
        honest if frame_bytes is None else frame_bytes,
        hash_of(lines) if schema_hash is None else schema_hash,
        run or 0,
        round_,
        len(lines) if count is None else count,
        len(directory) if directory_bytes is None else directory_bytes,
        codec,
        tables,
        reserved,
    )
    return reseal(header + bytes(8) + digest + payload + directory)


def reseal(frame: bytes) -> bytes:
    """Mend the checksums of a frame whose bytes were changed."""
    body = _C.crc32c(frame[HEADER_BYTES:])
    header = frame[:56] + struct.pack("<I", body)
    return header + struct.pack("<I", _C.crc32c(header)) + frame[HEADER_BYTES:]


def mend_hash(frame: bytes) -> bytes:
    """Name the schema that stands in a changed frame, as far as one can be read."""
    count = int.from_bytes(frame[36:40], "little")
    directory = frame[len(frame) - int.from_bytes(frame[40:48], "little") :]
    at = 0

    def number() -> int:
        nonlocal at
        start = at
        while directory[at] >= 0x80:
            at += 1
        at += 1
        return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(directory[start:at]))

    try:
        for _ in range(count):
            number()
            at += number() + 1
            for _ in range(number()):
                number()
    except IndexError:
        return frame
    digest = hashlib.sha256(directory[:at]).digest()
    return frame[:16] + digest[:8] + frame[24:]


def one(payload: bytes = b"", *, tables: int = 0, **fields: object) -> bytes:
    """A frame of one entry whose payload length is honest unless `size` is given."""
    line = record(**{"size": len(payload)} | fields)  # type: ignore[arg-type]
    return seal([line], payload, tables=tables)


def code_bytes(length: int, bits: bytes) -> int:
    return sum(math.ceil(length * width / 8) for width in bits)


def behind_codes(data: bytes, length: int, bits: bytes) -> bytes:
    """Return what follows rows of codes, and require that what is left of their bytes is zero."""
    for width in bits:
        size = code_bytes(length, bytes([width]))
        assert int.from_bytes(data[:size], "little") >> length * width == 0
        data = data[size:]
    return data


def rows_payload(mode: int, rank: int, gaps: list[int], payload: bytes) -> bytes:
    """Rows of a matrix, each after so many rows that are left out."""
    ids = b"".join(map(varint, gaps))
    return bytes([mode]) + varint(rank) + varint(len(ids)) + ids + payload


def all_modes() -> list[Entry]:
    """Small entries of modes 0 to 5."""
    return [
        Entry("encoder.layer.0.weight", "float32", (2, 3), Mode.RAW, 0, floats(1, 2, 3, 4, 5, 6)),
        Entry("encoder.layer.0.bias", "float32", (300,), Mode.ZERO),
        Entry("encoder.layer.1.weight", "float32", (2, 3), Mode.ALIAS, 0),
        Entry("pooler.weight", "bfloat16", (2, 2, 1), Mode.FACTORS, 1, floats(0.5, 1, 2, 3, 4)),
        Entry(
            "décodeur",
            "float16",
            (3, 5),
            Mode.PACKED_FACTORS,
            2,
            # scale | bits left | bits right | codes left 2 + 1 | codes right 3 + 1
            floats(0.25, -2) + bytes([4, 1, 4, 1]) + bytes(range(7)),
        ),
        Entry(
            "emb",
            "float64",
            (3, 4),
            Mode.PACKED_DENSE,
            3,
            floats(1, 0, 3) + bytes([16, 0, 3]) + bytes(range(10)),
        ),
        Entry("mask", "bool", (2,), Mode.RAW, 0, b"\x00\x01"),
        Entry("empty", "int64", (0, 7), Mode.RAW),
        Entry("step", "int64", (), Mode.RAW, 0, struct.pack("<q", -7)),
    ]


def rows_in_all_modes() -> list[Entry]:
    """Rows of matrices in modes without entropy coding."""
    factors = floats(0.5, 1, 2, 3, 4)
    packed = floats(0.25) + bytes([4, 1]) + bytes(3)
    dense = floats(1, 0) + bytes([16, 0]) + bytes(range(4))
    return [
        Entry("emb.raw", "int16", (300, 2), Mode.ROWS, 1, rows_payload(1, 0, [299], b"abcd")),
        Entry("emb.u", "float16", (9, 2), Mode.ROWS, 2, rows_payload(3, 1, [0, 7], factors)),
        Entry("emb.w", "float32", (9, 1, 5), Mode.ROWS, 3, rows_payload(4, 1, [2, 0, 0], packed)),
        Entry("emb.x", "float64", (400, 2), Mode.ROWS, 2, rows_payload(5, 2, [128, 200], dense)),
    ]


def gaps(*numbers: int) -> bytes:
    """Unary numbers, lowest bit first, padded to bytes with zeros."""
    bits = "".join("0" * number + "1" for number in numbers)
    return bits_of(bits)


def bits_of(bits: str) -> bytes:
    padded = bits + "0" * (-len(bits) % 8)
    return bytes(int(padded[at : at + 8][::-1], 2) for at in range(0, len(padded), 8))


def row_codes(width: int, *codes: int) -> bytes:
    return bits_of("".join(f"{code:0{width}b}"[::-1] for code in codes)) if width else b""


def shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}h", *values)


def coded_modes() -> list[Entry]:
    """A small entry of each of the modes 7 to 10, alone and as rows, with streams of nonsense."""
    factors = shorts(-512, 40) + gaps(0, 7, 0) + b"stream"
    dense = shorts(-700, 33) + bytes([3]) + row_codes(3, 1, 0, 7) + b"stream"
    hybrid = (
        shorts(-512, 40) + gaps(0, 9) + b"\2" + shorts(-5) + bytes([1]) + row_codes(1, 1, 0) + b"s"
    )
    half = shorts(-20) + struct.pack("<4e", 1.5, -2, 0, 65504)
    return [
        Entry("coded.factors", "float32", (4, 5), Mode.CODED_FACTORS, 3, factors),
        Entry("coded.dense", "bfloat16", (6,), Mode.CODED_DENSE, 3, dense),
        Entry("coded.hybrid", "float64", (2, 2, 3), Mode.CODED_HYBRID, 2, hybrid),
        Entry("half", "float16", (2, 2), Mode.HALF, 0, half),
        Entry("rows.f", "float32", (9, 5), Mode.ROWS, 4, rows_payload(7, 3, [0] * 4, factors)),
        Entry("rows.d", "float32", (9, 2), Mode.ROWS, 3, rows_payload(8, 3, [1] * 3, dense)),
        Entry("rows.h", "float32", (9, 3), Mode.ROWS, 2, rows_payload(9, 2, [0, 2], hybrid)),
        Entry("rows.half", "float32", (5, 2), Mode.ROWS, 2, rows_payload(10, 0, [0, 1], half)),
    ]


def encode_again(frame: Frame) -> bytes:
    """Encode what was decoded; the bytes have to be the same."""
    return wire.encode(
        frame.entries, codec=frame.codec, base=frame.base, schema=frame.schema_embedded
    )


def assert_refused(build: Callable[[], bytes], match: str) -> None:
    """Check that a frame is refused for what is wrong with it, not for its size."""
    with pytest.raises(WireError, match=match):
        wire.decode(build(), max_bytes=2**63 - 1)


def assert_invariants(frame: Frame, max_bytes: int) -> None:
    """Check what a decoder promises of any frame that it accepts."""
    total = 0
    for index, entry in enumerate(frame.entries):
        total += math.prod(entry.shape) * ITEMSIZE[entry.dtype]
        if entry.mode == Mode.ALIAS:
            target = frame.entries[entry.rank]
            assert entry.rank < index and target.mode != Mode.ALIAS and not entry.payload
            assert (target.dtype, target.shape) == (entry.dtype, entry.shape)
        elif entry.mode == Mode.ROWS:
            gaps, rows = rows_parts(entry)
            left_out = [int(text, 2) for text in varint_digits(bytes(gaps))]
            assert len(left_out) == entry.rank < entry.shape[0]
            assert sum(left_out) + entry.rank <= entry.shape[0]
            assert rows.mode not in (Mode.ZERO, Mode.ALIAS, Mode.ROWS)
            assert_payload(rows)
        else:
            assert_payload(entry)
    assert total <= max_bytes
    assert len({entry.name for entry in frame.entries}) == len(frame.entries)


def varint_digits(data: bytes) -> list[str]:
    """Split varints into their binary digits, and require that none has a shorter form."""
    numbers, digits = [], ""
    for byte in data:
        digits = f"{byte & 0x7F:07b}" + digits
        if byte < 0x80:
            assert len(digits) == 7 or byte > 0
            numbers.append(digits)
            digits = ""
    assert not digits
    return numbers


def assert_payload(entry: Entry) -> None:
    payload, rank = bytes(entry.payload), entry.rank
    numel = math.prod(entry.shape)
    scales = 0
    if entry.mode in (Mode.FACTORS, Mode.PACKED_FACTORS, Mode.CODED_FACTORS, Mode.CODED_HYBRID):
        p, q = entry.shape[0], math.prod(entry.shape[1:])
        assert 1 <= rank <= min(p, q)
    if entry.mode == Mode.RAW:
        assert (rank, len(payload)) == (0, numel * ITEMSIZE[entry.dtype])
        assert entry.dtype != "bool" or set(payload) <= {0, 1}
    elif entry.mode == Mode.ZERO:
        assert (rank, payload) == (0, b"")
    elif entry.mode == Mode.FACTORS:
        assert len(payload) == 4 * rank * (1 + p + q)
        scales = len(payload) // 4
    elif entry.mode == Mode.PACKED_FACTORS:
        left, right = payload[4 * rank : 5 * rank], payload[5 * rank : 6 * rank]
        assert all(1 <= width <= 16 for width in left + right)
        assert len(payload) == 6 * rank + code_bytes(p, left) + code_bytes(q, right)
        assert not behind_codes(behind_codes(payload[6 * rank :], p, left), q, right)
        scales = rank
    elif entry.mode == Mode.HALF:
        assert rank == 0 and entry.dtype in FLOATING
        exponent, *halves = struct.unpack(f"<h{numel}e", payload)
        assert abs(exponent) <= 126 and all(map(math.isfinite, halves))
    elif entry.mode in (Mode.CODED_FACTORS, Mode.CODED_DENSE, Mode.CODED_HYBRID):
        assert entry.dtype in FLOATING
        assert_coded(entry)
    else:
        assert entry.mode == Mode.PACKED_DENSE
        bits = payload[4 * rank : 5 * rank]
        assert rank >= 1 and numel > 0 and numel % rank == 0
        assert all(0 <= width <= 16 for width in bits)
        assert len(payload) == 5 * rank + code_bytes(numel // rank, bits)
        assert not behind_codes(payload[5 * rank :], numel // rank, bits)
        scales = rank
    if scales:
        assert entry.dtype in FLOATING
        assert all(map(math.isfinite, struct.unpack_from(f"<{scales}f", payload)))


def assert_coded(entry: Entry) -> None:
    """Read a payload of mode 7, 8 or 9 once more, bit by bit."""
    (step,) = struct.unpack_from("<h", entry.payload)
    rest = bytes(entry.payload[2:])
    rows = entry.rank
    if entry.mode != Mode.CODED_DENSE:
        (sigma,) = struct.unpack_from("<h", rest)
        assert abs(sigma) <= 2016
        assert min(entry.shape[0], math.prod(entry.shape[1:])) >= entry.rank >= 1
        sides = entry.shape[0], math.prod(entry.shape[1:])
        assert all(math.floor((16 * sigma - step - _C.half_log2(n) + 8) / 16) <= 335 for n in sides)
        bits = "".join(f"{byte:08b}"[::-1] for byte in rest[2:])
        assert bits[0] == "1"
        at = found = 0
        while found < entry.rank:
            found, sigma = (found + 1, sigma) if bits[at] == "1" else (found, sigma - 1)
            assert sigma >= -2016 and abs(2 * step - 16 * sigma) <= 126 * 256
            at += 1
        end = -(-at // 8)
        assert "1" not in bits[at : 8 * end]
        rest = rest[2 + end :]
    if entry.mode == Mode.CODED_HYBRID:
        digits = next(i for i, byte in enumerate(rest) if byte < 0x80) + 1
        (text,) = varint_digits(rest[:digits])
        rows, rest = int(text, 2), rest[digits:]
    if entry.mode != Mode.CODED_FACTORS:
        assert math.prod(entry.shape) % rows == 0 and math.prod(entry.shape) > 0
        base, width = struct.unpack_from("<hB", rest)
        assert abs(step) <= 126 * 256 and -8192 <= base <= 335 and width <= 6
        size = math.ceil(rows * width / 8)
        assert len(rest) >= 3 + size
        assert int.from_bytes(rest[3 : 3 + size], "little") >> rows * width == 0
