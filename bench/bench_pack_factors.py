"""Packing, unpacking and the fixed-order product, against floors and what one has today.

Nothing that packs fp32 rows is faster than reading them ("read": a sum), and nothing that unpacks
them is faster than writing them; "memcpy" also reads as many bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from measure import record_rate
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PACK, PRODUCT
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.codec.rate import HALF_STEP

Array: TypeAlias = npt.NDArray[Any]

SMALL = 2**16  # values; larger inputs are checked by a round trip instead of the specification
OURS = [f"ours-{bits}" for bits in (1, 2, 3, 4, 5, 6, 8, 12, 16)]
PLAIN = [f"{name}-{bits}" for name in ("numpy", "torch") for bits in (2, 4, 8)]
PEERS = ["bitsandbytes-8", "torchao-4"]  # other formats, of as many bits


def rows(rank: int, count: int) -> Tensor:
    return torch.randn(rank, count, generator=torch.Generator().manual_seed(0))


def half_step(bits: int) -> float:
    # Beyond the table's end a step halves with every bit.
    most = len(HALF_STEP) - 1
    return float(HALF_STEP[min(bits, most)]) * 0.5 ** max(0, bits - most)


def numpy_pack(array: Array, bits: int) -> Array:
    """Quantise and join 8 / bits codes in a byte, as one would without a kernel."""
    half = 2 ** (bits - 1)
    cells = np.clip(np.floor(array * np.float32(0.5 / half_step(bits))), -half, half - 1)
    codes = (cells + half).astype(np.uint8)
    packed: Array = codes[:, :: 8 // bits].copy()
    for place in range(1, 8 // bits):
        packed |= codes[:, place :: 8 // bits] << (bits * place)
    return packed


def numpy_unpack(packed: Array, bits: int) -> Array:
    mask, most = np.uint8(2**bits - 1), 2**bits - 1
    codes = np.stack([packed >> (bits * place) & mask for place in range(8 // bits)], axis=-1)
    levels = 2 * codes.reshape(len(packed), -1).astype(np.int32) - most
    values: Array = np.float32(half_step(bits)) * levels.astype(np.float32)
    return values


def torch_pack(values: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    cells = torch.floor(values * (0.5 / half_step(bits))).clamp_(-half, half - 1).add_(half)
    codes = cells.to(torch.uint8).view(len(values), -1, 8 // bits)
    packed = codes[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= codes[..., place] << (bits * place)
    return packed


def torch_unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed[..., None] >> shifts & (2**bits - 1)).view(len(packed), -1)
    return codes.float().mul_(2).sub_(2**bits - 1).mul_(half_step(bits))


def peer(impl: str, values: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Pack and unpack with a library that has a format of its own."""
    if importlib.util.find_spec(impl.partition("-")[0]) is None:
        pytest.skip("not installed")
    if impl == "bitsandbytes-8":
        blocks = importlib.import_module("bitsandbytes.functional")
        packed, state = blocks.quantize_blockwise(values)
        return (
            lambda: blocks.quantize_blockwise(values),
            lambda: blocks.dequantize_blockwise(packed, state),
        )
    to_nf4 = importlib.import_module("torchao.dtypes").to_nf4
    held = to_nf4(values)
    return lambda: to_nf4(values), lambda: held.get_original_weight()


@pytest.mark.parametrize("shape", PACK, ids=str)
@pytest.mark.parametrize(
    "impl",
    [*OURS, *PLAIN, *PEERS, "read", "memcpy"],
)
def test_pack(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int]) -> None:
    benchmark.group = f"pack {shape}"
    values = rows(*shape)
    name, _, width = impl.partition("-")
    bits = int(width or 8)
    scale = torch.full((shape[0],), half_step(bits))
    widths = torch.full((shape[0],), bits, dtype=torch.uint8)
    array, target, flat = values.numpy(), torch.empty_like(values), values.view(-1)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.pack_factors(values, scale, widths),
        "numpy": lambda: numpy_pack(array, bits),
        "torch": lambda: torch_pack(values, bits),
        "read": flat.sum,
        "memcpy": lambda: target.copy_(values),
    }
    codes = ops.pack_factors(values, scale, widths)
    if values.numel() <= SMALL:
        assert torch.equal(codes, reference.pack_factors(values, scale, widths))
    back = ops.unpack_factors(codes, scale, widths, shape[1])
    assert torch.equal(ops.pack_factors(back, scale, widths), codes)
    if name == "numpy":
        assert np.array_equal(numpy_pack(array, bits).ravel(), codes.numpy())
    if name == "torch":
        assert torch.equal(torch_pack(values, bits).ravel(), codes)
    benchmark(peer(impl, values)[0] if impl in PEERS else calls[name])
    record_rate(benchmark, "read_GBps", values.numel() * 4 / 1e9)


@pytest.mark.parametrize("shape", PACK, ids=str)
@pytest.mark.parametrize(
    "impl",
    [*OURS, *PLAIN, *PEERS, "memcpy"],
)
def test_unpack(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int]) -> None:
    benchmark.group = f"unpack {shape}"
    values = rows(*shape)
    name, _, width = impl.partition("-")
    bits = int(width or 8)
    scale = torch.full((shape[0],), half_step(bits))
    widths = torch.full((shape[0],), bits, dtype=torch.uint8)
    codes = ops.pack_factors(values, scale, widths)
    packed, target = codes.view(shape[0], -1), torch.empty_like(values)
    array = packed.numpy()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.unpack_factors(codes, scale, widths, shape[1]),
        "numpy": lambda: numpy_unpack(array, bits),
        "torch": lambda: torch_unpack(packed, bits),
        "memcpy": lambda: target.copy_(values),
    }
    back = ops.unpack_factors(codes, scale, widths, shape[1])
    if values.numel() <= SMALL:
        assert torch.equal(back, reference.unpack_factors(codes, scale, widths, shape[1]))
    if name == "numpy":
        assert np.array_equal(numpy_unpack(array, bits), back.numpy())
    if name == "torch":
        assert torch.equal(torch_unpack(packed, bits), back)
    benchmark(peer(impl, values)[1] if impl in PEERS else calls[name])
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
