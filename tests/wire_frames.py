"""Frames written by hand: a second, slow encoder that also writes what the real one refuses."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

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


def record(
    name: bytes = b"w",
    *,
    prefix: int = 0,
    dtype: int = 0,
    mode: int = Mode.RAW,
    shape: tuple[int, ...] = (),
    rank: int = 0,
    size: int = 0,
) -> bytes:
    """One line of the directory; `name` is what follows the shared prefix."""
    dims = b"".join(varint(n) for n in shape)
    head = varint(prefix) + varint(len(name)) + name + bytes([dtype, mode])
    return head + varint(len(shape)) + dims + varint(rank) + varint(size)


def seal(
    directory: bytes,
    payload: bytes = b"",
    *,
    count: int = 1,
    version: tuple[int, int] = (1, 0),
    flags: int = 0,
    digest: bytes = bytes(16),
    reserved: bytes = bytes(8),
    frame_bytes: int | None = None,
    directory_bytes: int | None = None,
    payload_bytes: int | None = None,
) -> bytes:
    """Put a header with right checksums before a directory and a payload."""
    honest = HEADER_BYTES + len(directory) + len(payload)
    header = struct.pack(
        "<4sBBHQIIQ16s8s",
        b"FKD1",
        *version,
        flags,
        honest if frame_bytes is None else frame_bytes,
        count,
        len(directory) if directory_bytes is None else directory_bytes,
        len(payload) if payload_bytes is None else payload_bytes,
        digest,
        reserved,
    )
    return reseal(header + bytes(8) + directory + payload)


def reseal(frame: bytes) -> bytes:
    """Mend the checksums of a frame whose bytes were changed."""
    body = _C.crc32c(frame[HEADER_BYTES:])
    header = frame[:56] + struct.pack("<I", body)
    return header + struct.pack("<I", _C.crc32c(header)) + frame[HEADER_BYTES:]


def one(payload: bytes = b"", **fields: object) -> bytes:
    """A frame of one entry whose payload length is honest unless `size` is given."""
    return seal(record(**{"size": len(payload)} | fields), payload)  # type: ignore[arg-type]


def code_bytes(length: int, bits: bytes) -> int:
    return sum(math.ceil(length * width / 8) for width in bits)


def rows_payload(mode: int, rank: int, gaps: list[int], payload: bytes) -> bytes:
    """Rows of a matrix, each after so many rows that are left out."""
    ids = b"".join(map(varint, gaps))
    return bytes([mode]) + varint(rank) + varint(len(ids)) + ids + payload


def all_modes() -> list[Entry]:
    """A small entry of each mode of version 1.0; together they are its golden frame."""
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
    """Rows of matrices in each of their modes, which is what version 1.1 added."""
    factors = floats(0.5, 1, 2, 3, 4)
    packed = floats(0.25) + bytes([4, 1]) + bytes(3)
    dense = floats(1, 0) + bytes([16, 0]) + bytes(range(4))
    return [
        Entry("emb.raw", "int16", (300, 2), Mode.ROWS, 1, rows_payload(1, 0, [299], b"abcd")),
        Entry("emb.u", "float16", (9, 2), Mode.ROWS, 2, rows_payload(3, 1, [0, 7], factors)),
        Entry("emb.w", "float32", (9, 1, 5), Mode.ROWS, 3, rows_payload(4, 1, [2, 0, 0], packed)),
        Entry("emb.x", "float64", (400, 2), Mode.ROWS, 2, rows_payload(5, 2, [128, 200], dense)),
    ]


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
    if entry.mode in (Mode.FACTORS, Mode.PACKED_FACTORS):
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
        scales = rank
    else:
        assert entry.mode == Mode.PACKED_DENSE
        bits = payload[4 * rank : 5 * rank]
        assert rank >= 1 and numel > 0 and numel % rank == 0
        assert all(0 <= width <= 16 for width in bits)
        assert len(payload) == 5 * rank + code_bytes(numel // rank, bits)
        scales = rank
    if scales:
        assert entry.dtype in FLOATING
        assert all(map(math.isfinite, struct.unpack_from(f"<{scales}f", payload)))
