"""Wire codec: frames of 2 MB, and its checksum against zlib's.

`extra_info` carries GB/s of the best round, beside those of a plain copy of the same bytes measured
in the same run: run with `--benchmark-json` to keep them.
"""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.wire import Entry, Mode

LAYERS = 12
ROWS, COLUMNS, RANK = 768, 768, 96
BITS = 4
CHECK_VALUE = b"123456789", 0xE3069283  # the published check value of CRC-32C
COPY_ROUNDS = 50

Kernel = Callable[[bytes], object]
CHECKSUMS: dict[str, Kernel] = {
    "crc32c": _C.crc32c,
    "crc32c-portable": lambda data: _C.crc32c(data, portable=True),
    "zlib.crc32": zlib.crc32,
}


def two_megabytes() -> list[Entry]:
    """A transformer's update: packed factors of twelve matrices, and raw vectors."""
    noise = random.Random(0)
    scale = struct.pack(f"<{RANK}f", *(1 / (k + 1) for k in range(RANK)))
    bits = bytes([BITS]) * RANK
    entries = []
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}.attention.output.dense"
        codes = noise.randbytes(RANK * (ROWS + COLUMNS) * BITS // 8)
        packed = scale + bits + bits + codes
        entries.append(
            Entry(f"{name}.weight", "float32", (ROWS, COLUMNS), Mode.PACKED_FACTORS, RANK, packed)
        )
        raw = noise.randbytes(4 * 25_000)
        entries.append(Entry(f"{name}.bias", "float32", (25_000,), Mode.RAW, 0, raw))
    return entries


ENTRIES = two_megabytes()
FRAME = wire.encode(ENTRIES)


def copy_speed(data: bytes) -> float:
    """Return the best GB/s of copying the bytes once."""
    target = bytearray(len(data))
    best = float("inf")
    for _ in range(COPY_ROUNDS):
        start = time.perf_counter()
        target[:] = data
        best = min(best, time.perf_counter() - start)
    return len(data) / best / 1e9


def note_speed(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info["frame_bytes"] = len(FRAME)
    benchmark.extra_info["copy_gb_per_s"] = copy_speed(FRAME)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gb_per_s"] = len(FRAME) / benchmark.stats.stats.min / 1e9


def test_encode(benchmark: BenchmarkFixture) -> None:
    assert list(wire.decode(wire.encode(ENTRIES)).entries) == ENTRIES
    benchmark(wire.encode, ENTRIES)
    note_speed(benchmark)


def test_decode(benchmark: BenchmarkFixture) -> None:
    assert list(wire.decode(FRAME).entries) == ENTRIES
    benchmark(wire.decode, FRAME)
    note_speed(benchmark)


@pytest.mark.parametrize("impl", CHECKSUMS)
def test_checksum(benchmark: BenchmarkFixture, impl: str) -> None:
    kernel = CHECKSUMS[impl]
    if impl == "zlib.crc32":  # another polynomial, the same work
        assert kernel(CHECK_VALUE[0]) == 0xCBF43926
    else:
        assert kernel(CHECK_VALUE[0]) == CHECK_VALUE[1]
        assert kernel(FRAME) == _C.crc32c(FRAME, portable=True)
    benchmark(kernel, FRAME)
    note_speed(benchmark)
