"""Entropy coding of quantised rows, against numpy's quantiser, a general compressor and a copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from measure import record_rate
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import RANS
from torch import Tensor

from fedkd_fast import ops, reference

SMALL = 2**19  # values; larger inputs are checked by a round trip instead of the specification
# Standard deviations of 1.7, 3.7 and 14 steps; with the last, two bits of six travel raw.
LEVELS = [12, 30, 60]


def message(shape: tuple[int, int], level: int) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    levels = torch.full(shape[:1], level, dtype=torch.int16)
    return [values], 2 ** (levels / 16), levels, [0]


def encoded(shape: tuple[int, int], level: int) -> tuple[Tensor, Tensor]:
    """Encode, and check both ways."""
    values, multiplier, levels, owner = message(shape, level)
    codes, sizes = ops.rans_encode(values, multiplier, levels, owner)
    if values[0].numel() <= SMALL:
        wanted, _ = reference.rans_encode(values, multiplier, levels, owner)
        assert torch.equal(codes, wanted)
    (back,) = ops.rans_decode(codes, sizes, 1 / multiplier, levels, shape[:1], shape[1:], owner)
    assert torch.equal(back, (values[0] * multiplier[:, None]).round() * (1 / multiplier)[:, None])
    return codes, sizes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", RANS, ids=str)
@pytest.mark.parametrize("impl", ["ours", "numpy", "zstd-1", "copy"])
def test_encode(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int], level: int) -> None:
    benchmark.group = f"rans encode {shape} level {level}"
    values, multiplier, levels, owner = message(shape, level)
    codes, _ = encoded(shape, level)
    array, target = values[0].numpy(), torch.empty_like(values[0])
    factor = np.float32(multiplier[0])

    def quantised() -> np.ndarray:
        return np.rint(array * factor).astype(np.int8)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.rans_encode(values, multiplier, levels, owner),
        "numpy": quantised,  # without coding
        "copy": lambda: target.copy_(values[0]),
    }
    size = len(codes)
    if impl == "zstd-1":
        compressor = pytest.importorskip("zstandard").ZstdCompressor(level=1)
        calls[impl] = lambda: compressor.compress(quantised().tobytes())
        size = len(compressor.compress(quantised().tobytes()))
    benchmark(calls[impl])
    record_rate(benchmark, "Gsymbols", values[0].numel() / 1e9)
    if impl in ("ours", "zstd-1"):
        benchmark.extra_info["bits"] = 8 * size / values[0].numel()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", RANS, ids=str)
@pytest.mark.parametrize("impl", ["ours", "zstd-1", "copy"])
def test_decode(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int], level: int) -> None:
    benchmark.group = f"rans decode {shape} level {level}"
    values, multiplier, levels, owner = message(shape, level)
    codes, sizes = encoded(shape, level)
    scale, target = 1 / multiplier, torch.empty_like(values[0])
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.rans_decode(codes, sizes, scale, levels, shape[:1], shape[1:], owner),
        "copy": lambda: target.copy_(values[0]),
    }
    if impl == "zstd-1":
        zstandard = pytest.importorskip("zstandard")
        integers = (values[0] * multiplier[0]).round().to(torch.int8).numpy()
        packed = zstandard.ZstdCompressor(level=1).compress(integers.tobytes())
        step = np.float32(scale[0])

        def decompressed() -> np.ndarray:
            found = zstandard.ZstdDecompressor().decompress(packed)
            return np.frombuffer(found, np.int8).astype(np.float32) * step

        assert np.array_equal(decompressed(), integers.ravel() * step)
        calls[impl] = decompressed
    benchmark(calls[impl])
    record_rate(benchmark, "Gsymbols", values[0].numel() / 1e9)
