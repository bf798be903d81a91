"""One tensor <-> one wire entry: the modes, and the smallest one that meets the error.

Every lossy entry is decoded again from its own bytes before it is accepted, so the promised error
is that of the receiver. Modes and payloads are specified in `fedkd_fast.wire`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.rate import HALF_STEP, Allocation, allocate_bits
from fedkd_fast.reference import Factors
from fedkd_fast.rows import placed, split
from fedkd_fast.wire import Entry, Mode

# dtypes the wire carries; everything else is an error that names the tensor.
DTYPES: dict[torch.dtype, str] = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

# Vectors (biases, normalisation weights) are a per cent of a model and steer all of it: their share
# of lost energy is this much smaller than that of matrices, about two bits an entry.
VECTOR_SHARE = 1 / 16
# Where wf0 cuts the spectrum before it weighs columns against bits: at this share of the allowed
# error. Columns below are never worth one bit a side at the prices that meet the target.
TAIL_SHARE = 0.35
# Rows shorter than this share one scale with their neighbours: 5 bytes a row must stay small.
MIN_ROW = 128
# Payloads up to this many bytes are not worth the time: their line in the directory weighs as much.
WORTH_BYTES = 64
# A factor row costs one float32 scale and two widths, a dense row one scale and one width.
FACTOR_ROW_BYTES, DENSE_ROW_BYTES = 6, 5
# Half-steps outside this range leave float32's normal numbers; such tensors travel raw.
SMALLEST_SCALE, LARGEST_SCALE = 1e-36, 1e34
# The search stops when the achieved error lies in this part of the target.
FULL_USE = 0.95
ATTEMPTS = 6


def to_bytes(tensor: Tensor) -> bytes:
    """Return the elements in C order, little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(payload: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Copy a payload into a new flat tensor."""
    if not len(payload):
        return torch.empty(0, dtype=dtype)
    # A frame has no alignment; the copy also makes the result independent of the frame.
    return torch.frombuffer(bytearray(payload), dtype=dtype)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """View a tensor of two or more dimensions as P×Q: convolutions become [out, -1]."""
    return shape[0], math.prod(shape[1:])


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Tell whether two factors could be smaller than the tensor at all."""
    return len(shape) >= 2 and min(matrix_shape(shape)) >= 2


def raw_entry(name: str, tensor: Tensor) -> Entry:
    """Encode without loss; tensors whose bytes are all zero take no payload."""
    payload = to_bytes(tensor)
    zero = payload == bytes(len(payload))
    return Entry(
        name,
        DTYPES[tensor.dtype],
        tuple(tensor.shape),
        Mode.ZERO if zero else Mode.RAW,
        0,
        b"" if zero else payload,
    )


def factors_entry(name: str, dtype: str, shape: tuple[int, ...], factors: Factors) -> Entry:
    """Encode float32 factors, the paper's payload."""
    parts = (factors.sigma, factors.left, factors.right)
    payload = b"".join(to_bytes(part) for part in parts)
    return Entry(name, dtype, shape, Mode.FACTORS, factors.rank, payload)


def _quantise(
    rows: Tensor, bits: np.ndarray[Any, Any], backend: ModuleType
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows at their best Gaussian step; return scales, widths and codes."""
    widths = torch.from_numpy(bits)
    rms = rows.double().square().mean(1).sqrt()
    scale = (rms * torch.from_numpy(HALF_STEP[bits])).float()
    return scale, widths, backend.pack_factors(rows, scale, widths)


def _levels(codes: Tensor, widths: Tensor, count: int, backend: ModuleType) -> Tensor:
    ones = torch.ones(widths.numel(), dtype=torch.float32)
    levels: Tensor = backend.unpack_factors(codes, ones, widths, count)
    return levels


def _gain(levels: Tensor, rows: Tensor) -> Tensor:
    """Return the least-squares factor of each row: ``<levels, rows> / |levels|²``."""
    exact = levels.double()
    return (exact * rows.double()).sum(1) / exact.square().sum(1)


def _packed_factors(
    template: Entry, factors: Factors, allocation: Allocation, backend: ModuleType
) -> Entry | None:
    bits_left, bits_right = allocation.bits
    kept = np.flatnonzero(bits_left)
    if not len(kept):
        return None
    index = torch.from_numpy(kept)
    left, right = factors.left[index], factors.right[index]
    _, widths_left, codes_left = _quantise(left, bits_left[kept], backend)
    _, widths_right, codes_right = _quantise(right, bits_right[kept], backend)
    # Only the product of the two scales matters: it is refitted to the levels that are sent.
    scale = factors.sigma[index].double()
    scale *= _gain(_levels(codes_left, widths_left, left.shape[1], backend), left)
    scale *= _gain(_levels(codes_right, widths_right, right.shape[1], backend), right)
    parts = (scale.float(), widths_left, widths_right, codes_left, codes_right)
    payload = b"".join(to_bytes(part) for part in parts)
    return Entry(
        template.name, template.dtype, template.shape, Mode.PACKED_FACTORS, len(kept), payload
    )


def _packed_dense(
    template: Entry, rows: Tensor, allocation: Allocation, backend: ModuleType
) -> Entry:
    (bits,) = allocation.bits
    scale, widths, codes = _quantise(rows, bits, backend)
    payload = to_bytes(scale) + to_bytes(widths) + to_bytes(codes)
    return Entry(
        template.name, template.dtype, template.shape, Mode.PACKED_DENSE, rows.shape[0], payload
    )


def decode_entry(entry: Entry, backend: ModuleType) -> Tensor:
    """Decode any entry but an alias into a tensor of its shape and dtype."""
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.mode is Mode.ZERO:
        return torch.zeros(entry.shape, dtype=dtype)
    if entry.mode is Mode.RAW:
        return from_bytes(entry.payload, dtype).reshape(entry.shape)
    if entry.mode is Mode.ROWS:
        ids, sent = split(entry)
        return placed(decode_entry(sent, backend), ids, entry.shape)
    if entry.mode is Mode.PACKED_DENSE:
        dense = wire.packed_dense_parts(entry)
        values: Tensor = backend.unpack_factors(
            from_bytes(dense.codes, torch.uint8),
            from_bytes(dense.scale, torch.float32),
            from_bytes(dense.bits, torch.uint8),
            math.prod(entry.shape) // entry.rank,
        )
        return values.reshape(entry.shape).to(dtype)
    rows, cols = matrix_shape(entry.shape)
    if entry.mode is Mode.FACTORS:
        factors = wire.factors_parts(entry)
        sigma = from_bytes(factors.sigma, torch.float32)
        left = from_bytes(factors.left, torch.float32).reshape(entry.rank, rows) * sigma[:, None]
        right = from_bytes(factors.right, torch.float32).reshape(entry.rank, cols)
    else:
        packed = wire.packed_factors_parts(entry)
        scale = from_bytes(packed.scale, torch.float32)
        bits_left, bits_right = (
            from_bytes(part, torch.uint8) for part in (packed.bits_left, packed.bits_right)
        )
        left_codes = from_bytes(packed.codes_left, torch.uint8)
        left = backend.unpack_factors(left_codes, scale, bits_left, rows)
        right = _levels(from_bytes(packed.codes_right, torch.uint8), bits_right, cols, backend)
    product: Tensor = backend.reconstruct(left, right)
    return product.reshape(entry.shape).to(dtype)


def _squared_error(entry: Entry, exact: Tensor, backend: ModuleType) -> float:
    return float((decode_entry(entry, backend).double() - exact.double()).square().sum())


def _search(
    expected: Callable[[float], Allocation | None],
    build: Callable[[Allocation], Entry | None],
    exact: Tensor,
    target: float,
    backend: ModuleType,
) -> Entry | None:
    """Find the smallest entry whose decoded error is at most `target`.

    The allocation knows Gaussian rows; real ones are off by a factor that changes slowly, so a few
    corrections of the aim bring the measured error just below the target.
    """
    best, aim = None, target
    # Small tensors have few allocations: the aim may have to move on for another one to come up.
    errors: dict[bytes, float] = {}
    for _ in range(ATTEMPTS):
        allocation = expected(aim)
        if allocation is None:
            break
        widths = b"".join(bits.tobytes() for bits in allocation.bits)
        if widths not in errors:
            entry = build(allocation)
            if entry is None:
                break
            errors[widths] = _squared_error(entry, exact, backend)
            smaller = best is None or len(entry.payload) < len(best.payload)
            if errors[widths] <= target and smaller:
                best = entry
        error = errors[widths]
        if FULL_USE * target <= error <= target:
            break
        if error == 0.0:
            aim *= 2.0
            continue
        aim *= min(2.0, 0.985 * target / error)
    return best


def _dense_rows(shape: tuple[int, ...]) -> int:
    """Choose how many rows share the scales: the first dimension, unless its rows are short."""
    count = math.prod(shape)
    if len(shape) < 2:
        return 1
    rows = shape[0]
    merged = -(-MIN_ROW * rows // count)
    # A few steps suffice unless the number of rows is nearly prime.
    return next((rows // m for m in range(merged, 8 * merged + 1) if rows % m == 0), 1)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a floating tensor holds neither NaN, which extremes propagate, nor Inf."""
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax())


def representable(exact: Tensor) -> bool:
    """Tell whether the factors of a tensor stay clear of float32's limits."""
    largest = max(abs(float(extreme)) for extreme in exact.aminmax())
    return SMALLEST_SCALE * 2**20 < largest < LARGEST_SCALE


def may_lose(shape: tuple[int, ...], energy: float) -> float:
    """Return the share of its squared norm that a tensor of this shape may lose."""
    return (1.0 - energy) * (1.0 if is_matrix(shape) else VECTOR_SHARE)


def encode_lossy(
    template: Entry, exact: Tensor, allowed: float, factors: Factors | None, backend: ModuleType
) -> Entry:
    """Encode so that the decoded entry loses at most the share `allowed` of the squared norm.

    ``|x - decoded|² ≤ allowed·|x|²``, truncation and quantisation together, with the smallest of
    packed factors, packed rows and raw bytes.

    Args:
        template: the raw entry, which also is what is returned when nothing smaller fits.
        exact: the tensor, float32 or float64, not all zero, and `representable`.
        allowed: share to lose, in (0, 1).
        factors: the leading ones of the tensor as a matrix, or None for dense modes alone.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
    """
    if len(template.payload) <= WORTH_BYTES:
        return template
    total = float(exact.double().square().sum())
    target = allowed * total

    def candidates() -> Iterator[tuple[int, Callable[[], Entry | None]]]:
        rows = exact.reshape(_dense_rows(template.shape), -1).float()
        row_energies = rows.double().square().sum(1).numpy()

        def dense(aim: float) -> Allocation | None:
            return allocate_bits(row_energies, (rows.shape[1],), 0, aim)

        expected = dense(target)
        if expected is not None:
            yield (
                expected.payload_bytes + DENSE_ROW_BYTES * rows.shape[0],
                lambda: _search(
                    dense,
                    lambda allocation: _packed_dense(template, rows, allocation, backend),
                    *(exact, target, backend),
                ),
            )
        if factors is None:
            return
        energies = factors.sigma.double().square().numpy()
        tail = max(0.0, total - float(energies.sum()))

        def factored(aim: float) -> Allocation | None:
            sides = matrix_shape(template.shape)
            return allocate_bits(energies, sides, FACTOR_ROW_BYTES, aim - tail)

        expected = factored(target)
        if expected is not None:
            yield (
                expected.payload_bytes,
                lambda: _search(
                    factored,
                    lambda allocation: _packed_factors(template, factors, allocation, backend),
                    *(exact, target, backend),
                ),
            )

    best = template
    for expected_bytes, build in sorted(candidates(), key=lambda candidate: candidate[0]):
        if expected_bytes >= len(best.payload):
            break
        entry = build()
        if entry is not None and len(entry.payload) < len(best.payload):
            best = entry
    return best
