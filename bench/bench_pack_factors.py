"""Packing, unpacking and the fixed-order product, against numpy, torch and a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from measure import record_rate
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PACK, PRODUCT
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.codec.rate import HALF_STEP

SMALL = 2**16  # values; larger inputs are checked by a round trip instead of the specification


def rows(rank: int, count: int) -> Tensor:
    return torch.randn(rank, count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", PACK, ids=str)
@pytest.mark.parametrize(
    "impl", ["ours-1", "ours-2", "ours-4", "ours-8", "numpy-4", "torch-8", "copy"]
)
def test_pack(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int]) -> None:
    benchmark.group = f"pack {shape}"
    values = rows(*shape)
    name, _, width = impl.partition("-")
    bits = int(width or 8)
    scale = torch.full((shape[0],), float(HALF_STEP[bits]))
    widths = torch.full((shape[0],), bits, dtype=torch.uint8)
    array, target = values.numpy(), torch.empty_like(values)

    def numpy_4() -> object:
        codes = np.clip(np.floor(array * np.float32(0.5 / HALF_STEP[4])), -8, 7).astype(np.int8) + 8
        return (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.pack_factors(values, scale, widths),
        "numpy": numpy_4,
        "torch": lambda: (
            torch.floor(values * (0.5 / HALF_STEP[8])).clamp_(-128, 127).to(torch.int8)
        ),
        "copy": lambda: target.copy_(values),
    }
    codes = ops.pack_factors(values, scale, widths)
    if values.numel() <= SMALL:
        assert torch.equal(codes, reference.pack_factors(values, scale, widths))
    back = ops.unpack_factors(codes, scale, widths, shape[1])
    assert torch.equal(ops.pack_factors(back, scale, widths), codes)
    if name == "numpy":
        assert np.array_equal(np.asarray(numpy_4()).ravel(), codes.numpy())
    benchmark(calls[name])
    record_rate(benchmark, "read_GBps", values.numel() * 4 / 1e9)


@pytest.mark.parametrize("shape", PACK, ids=str)
@pytest.mark.parametrize("impl", ["ours-1", "ours-2", "ours-4", "ours-8", "torch-8", "copy"])
def test_unpack(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int]) -> None:
    benchmark.group = f"unpack {shape}"
    values = rows(*shape)
    name, _, width = impl.partition("-")
    bits = int(width or 8)
    scale = torch.full((shape[0],), float(HALF_STEP[bits]))
    widths = torch.full((shape[0],), bits, dtype=torch.uint8)
    codes = ops.pack_factors(values, scale, widths)
    target, signed = torch.empty_like(values), torch.zeros(shape, dtype=torch.int8)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.unpack_factors(codes, scale, widths, shape[1]),
        "torch": lambda: signed.float().mul_(scale[:, None]),
        "copy": lambda: target.copy_(values),
    }
    if values.numel() <= SMALL:
        expected = reference.unpack_factors(codes, scale, widths, shape[1])
        assert torch.equal(ops.unpack_factors(codes, scale, widths, shape[1]), expected)
    benchmark(calls[name])
    record_rate(benchmark, "write_GBps", values.numel() * 4 / 1e9)


@pytest.mark.parametrize("shape", PRODUCT, ids=str)
@pytest.mark.parametrize("impl", ["ours", "torch.matmul"])
def test_reconstruct(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int, int]) -> None:
    benchmark.group = f"reconstruct {shape}"
    rank, height, width = shape
    left, right = rows(rank, height), rows(rank, width)
    assert torch.equal(ops.reconstruct(left, right), reference.reconstruct(left, right))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.reconstruct(left, right),
        "torch.matmul": lambda: left.T @ right,  # fast, but other bits on other machines
    }
    benchmark(calls[impl])
    record_rate(benchmark, "GFLOPS", 2 * rank * height * width / 1e9)
