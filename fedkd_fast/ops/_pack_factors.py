"""`pack_factors`, `unpack_factors` and `reconstruct`: quantised factors to bytes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd_fast.ops import _library


def pack_factors(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Quantise each row with its own step and width, and pack the codes without gaps.

    ``code = clamp(floor(value · 0.5 / scale) + 2^(b-1), 0, 2^b - 1)``; a row's codes form a
    little-endian bit stream, lowest bit first, that starts on a byte boundary.

    Args:
        values: (K, n) float32, finite.
        scale: (K,) float32, half of the row's quantisation step, at least 2^-125 where bits > 0.
        bits: (K,) uint8 in 0..16; a row of 0 bits takes no bytes and decodes to zeros. With values
            on a GPU, scale and bits may stay on the CPU: then nothing waits, and a CUDA graph can
            hold the call.

    Returns:
        Codes, uint8, of ``Σ_k ceil(n · bits[k] / 8)`` bytes; the same bytes on every machine.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a scale or width out of range.
    """
    codes: Tensor = _library.native.pack_factors(values.detach(), scale, bits)
    return codes


def unpack_factors(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    """Turn codes back into values, ``scale · (2 · code - (2^b - 1))``: the inverse of packing.

    Args:
        codes: uint8 of exactly ``Σ_k ceil(count · bits[k] / 8)`` bytes.
        scale: (K,) float32, half of the row's quantisation step.
        bits: (K,) uint8 in 0..16; scale and bits may stay on the CPU, as in `pack_factors`.
        count: values in a row, n; at most 2^48 in all rows.

    Returns:
        (K, n) float32; the same bits on every machine.

    Raises:
        RuntimeError: a wrong shape, dtype, device or length, or a count out of range.
    """
    values: Tensor = _library.native.unpack_factors(codes, scale.detach(), bits, count)
    return values


def reconstruct(left: Tensor, right: Tensor) -> Tensor:
    """Multiply component-major factors in the fixed order of the wire format.

    ``out[i, j] = Σ_k left[k, i] · right[k, j]`` in float32, one fused multiply-add per term, k
    ascending from zero. Unlike a GEMM, the result has the same bits on every machine and for any
    thread count.

    Args:
        left: (K, P) float32.
        right: (K, Q) float32.

    Returns:
        (P, Q) float32; zeros for K = 0.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    product: Tensor = _library.native.reconstruct(left.detach(), right.detach())
    return product


@torch.library.register_fake("fedkd_fast::pack_factors")
def _pack_factors_fake(values: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    return values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("fedkd_fast::unpack_factors")
def _unpack_factors_fake(codes: Tensor, scale: Tensor, bits: Tensor, count: int) -> Tensor:
    return codes.new_empty(bits.shape[0], count, dtype=torch.float32)


@torch.library.register_fake("fedkd_fast::reconstruct")
def _reconstruct_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])
