"""Codecs that others ship: called, never written again. Where a package is missing, its rows are.

    pip install zstandard bitsandbytes torchao pysz zfpy openfl

suffices; openfl, bitsandbytes and torchao work with `--no-deps` too, openfl with dynaconf.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rate_case import SCALE_BYTES, Case, Coded, Peer, by_step
from rate_dense import uniform
from torch import Tensor

# ---- zstd ----------------------------------------------------------------------------------------


def zstd(case: Case, allowed: float, level: int) -> Coded | None:
    """Compress the integers of dense ECSQ, a byte each unless one needs two."""
    import zstandard

    found = uniform(case, allowed)
    if found is None:
        return None
    small = bool(found.codes.abs().max() < 128)
    codes = found.codes.numpy().astype(np.int8 if small else np.int16)
    compressed = zstandard.ZstdCompressor(level=level).compress(codes.tobytes())
    return Coded(len(compressed) + 2 * SCALE_BYTES, found.decoded)


# ---- codecs of scientific data -------------------------------------------------------------------


def sz3(case: Case, allowed: float) -> Coded | None:
    """Code with SZ3 (Liang et al. 2023), by the smallest of its predictors."""
    from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode

    data = case.matrix.numpy()

    def call(step: float, algorithm: int) -> tuple[Any, Tensor]:
        config = szConfig()
        config.errorBoundMode, config.absErrorBound = szErrorBoundMode.ABS, step / 2
        config.cmprAlgo = algorithm
        compressed, _ = sz.compress(data, config)
        decoded, _ = sz.decompress(compressed, np.float32, data.shape)
        return compressed, torch.from_numpy(decoded)

    # Without a predictor it does best on updates, which are noise to it; with one, on smooth data.
    algorithms = [szAlgorithm.NOPRED, szAlgorithm.LORENZO_REG, szAlgorithm.INTERP_LORENZO]
    if "sz3" not in case.shared:
        bound = (12 * allowed * case.total / data.size) ** 0.5
        sizes = [call(bound, algorithm)[0].nbytes for algorithm in algorithms]
        case.shared["sz3"] = algorithms[sizes.index(min(sizes))]

    def attempt(step: float) -> tuple[Tensor, Callable[[], Coded]]:
        compressed, decoded = call(step, case.shared["sz3"])
        return decoded, lambda: Coded(compressed.nbytes, decoded)

    return by_step(case, allowed, attempt)


def zfp(case: Case, allowed: float) -> Coded | None:
    """Code with zfp (Lindstrom 2014) at a tolerance."""
    import zfpy

    data = case.matrix.numpy()

    def attempt(step: float) -> tuple[Tensor, Callable[[], Coded]]:
        # It rounds tolerances down to powers of two: the data are scaled instead.
        scale = np.float32(1 / step)
        compressed = zfpy.compress_numpy(data * scale, tolerance=1.0)
        decoded = torch.from_numpy(zfpy.decompress_numpy(compressed) / scale)
        return decoded, lambda: Coded(len(compressed) + SCALE_BYTES, decoded)

    return by_step(case, allowed, attempt)


# ---- EDEN ----------------------------------------------------------------------------------------

EDEN_SEED, SEED_BYTES = 7, 4
EDEN_PADDING = 0.01  # of the elements, instead of 10 %: more vectors, fewer bytes
# Each attempt rotates everything there and back.
EDEN_ATTEMPTS, AIM_EDEN, EDEN_CLOSE_ENOUGH = 6, 0.999, 0.985
# Of a Gaussian's square, by bits: Lloyd-Max.
EDEN_LOSES = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.5e-4, 1.7e-4, 4.4e-5)


def eden_rows(rows: Tensor, bits: int) -> tuple[float, Tensor]:
    """Return bytes and rows that are decoded, at the scale that loses least."""
    from openfl.pipelines.eden_pipeline import Eden

    if not len(rows):
        return 0.0, rows
    eden = Eden(nbits=bits)
    eden.max_padding_overhead = EDEN_PADDING
    # It rotates a whole vector in place of its caller's.
    codes, scales, sides, total = eden.compress(rows.clone(), EDEN_SEED)
    metadata = {0: float(EDEN_SEED), 1: float(total)}
    for index, (scale, side) in enumerate(zip(scales, sides, strict=True)):
        metadata |= {2 + 2 * index: scale, 3 + 2 * index: float(side)}
    decoded = torch.from_numpy(eden.decompress(codes, metadata)).view_as(rows)
    # The package's scale is unbiased; the one of least squares travels in its place.
    decoded *= float((decoded * rows).sum() / decoded.square().sum())
    return codes.nbytes + SCALE_BYTES * len(scales), decoded


def eden(case: Case, allowed: float) -> Coded | None:
    """Rotate and round by Lloyd-Max (Vargaftik et al. 2022), some rows to one bit more."""
    bits = next((b for b, lost in enumerate(EDEN_LOSES[:-1]) if EDEN_LOSES[b + 1] < allowed), None)
    if bits is None:
        return None
    fine, coarse = EDEN_LOSES[bits + 1], EDEN_LOSES[bits]
    energies = case.matrix.double().square().sum(1)
    held = energies.cumsum(0) / case.total
    aim, best = AIM_EDEN * allowed, None
    for _ in range(EDEN_ATTEMPTS):
        # The first rows take fewer bits, as many rows as the target lets.
        few = int((coarse * held + fine * (1 - held) <= aim).sum())
        parts = [(case.matrix[:few], bits), (case.matrix[few:], bits + 1)]
        found = [eden_rows(rows, b) if b else (0.0, torch.zeros_like(rows)) for rows, b in parts]
        coded = Coded(
            sum(size for size, _ in found) + SEED_BYTES, torch.cat([part for _, part in found])
        )
        share = case.share(coded.decoded)
        if share <= allowed and (best is None or coded.size < best.size):
            best = coded
        if EDEN_CLOSE_ENOUGH * allowed <= share <= allowed:
            break
        # Short vectors are padded and rotate to other than Gaussians.
        aim *= AIM_EDEN * allowed / share
    return best


# ---- blocks with a scale each --------------------------------------------------------------------

BLOCK = 64
BNB_BLOCK8 = 256


def bnb_int8(case: Case) -> Coded:
    from bitsandbytes import functional

    codes, state = functional.quantize_blockwise(case.matrix, blocksize=BNB_BLOCK8)
    decoded = functional.dequantize_blockwise(codes, state)
    return Coded(codes.nbytes + state.absmax.nbytes, decoded.view_as(case.matrix))


def bnb_nf4(case: Case) -> Coded:
    from bitsandbytes import functional

    # As one row: its CPU kernel decodes blocks that span two rows with wrong scales.
    row = case.matrix.view(1, -1)
    codes, state = functional.quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
    decoded = functional.dequantize_4bit(codes, state)
    return Coded(codes.nbytes + state.absmax.nbytes, decoded.view_as(case.matrix))


def torchao_int(case: Case, bits: int) -> Coded:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    low, high, block = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (1, BLOCK)
    # Its blocks must divide a row.
    flat = torch.nn.functional.pad(case.matrix.flatten(), (0, -case.matrix.numel() % BLOCK))
    rows = flat.view(-1, BLOCK)
    scale, zero = choose_qparams_affine(
        rows, MappingType.SYMMETRIC, block, torch.int8, low, high, scale_dtype=torch.float32
    )
    codes = quantize_affine(rows, block, scale, zero, torch.int8, low, high)
    decoded = dequantize_affine(codes, block, scale, zero, torch.int8, low, high)
    size = -(-bits * codes.numel() // 8) + scale.nbytes
    return Coded(size, decoded.flatten()[: case.matrix.numel()].view_as(case.matrix))


PACKAGE_CODECS = {
    "EDEN (openfl)": Peer(eden, ("openfl", "dynaconf")),
    "SZ3 (pysz)": Peer(sz3, ("pysz",)),
    "zfp (zfpy)": Peer(zfp, ("zfpy",)),
    **{
        f"dense ECSQ, zstd level {level}": Peer(partial(zstd, level=level), ("zstandard",))
        for level in (3, 19)
    },
}
PACKAGE_POINTS = {
    "int8, 256 a block (bitsandbytes)": Peer(bnb_int8, ("bitsandbytes",)),
    "nf4, 64 a block (bitsandbytes)": Peer(bnb_nf4, ("bitsandbytes",)),
    **{
        f"int{bits}, 64 a block (torchao)": Peer(partial(torchao_int, bits=bits), ("torchao",))
        for bits in (8, 4)
    },
}
