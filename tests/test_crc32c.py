"""The checksum of the frames: published vectors, and one value on every path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedkd_fast._C as _C

# Around the block sizes of the vector path: 8, 3 * 256 and 3 * 4096 bytes.
LENGTHS = [*range(70), 255, 256, 767, 768, 769, 775, 1536, 12287, 12288, 12289, 40_001]


def crc32c_by_bits(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def noise(size: int) -> bytes:
    return bytes(i * i % 251 for i in range(size))


@pytest.mark.parametrize(
    ("data", "want"),
    # The published vectors: RFC 3720 B.4, and the usual check value.
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
@pytest.mark.parametrize("portable", [False, True])
def test_crc32c_of_published_vectors(data: bytes, want: int, portable: bool) -> None:
    assert _C.crc32c(data, portable=portable) == want
    assert crc32c_by_bits(data) == want


def test_crc32c_is_the_same_by_instruction_and_by_tables() -> None:
    data = noise(max(LENGTHS) + 8)
    for size in LENGTHS:
        for start in (0, 1, 3, 7):
            part = memoryview(data)[start : start + size]
            assert _C.crc32c(part) == _C.crc32c(part, portable=True)
    assert _C.crc32c(data) == crc32c_by_bits(data)


@given(st.binary(max_size=2000), st.binary(max_size=2000), st.booleans())
def test_crc32c_continues(first: bytes, second: bytes, portable: bool) -> None:
    head = _C.crc32c(first, portable=portable)
    assert _C.crc32c(second, head, portable=portable) == _C.crc32c(first + second)
