"""What all codecs share: tensors as bytes, raw entries, what may be lost of a tensor.

The lossy codecs are `wf0` and `wf1`; `decode` is the inverse of all. Modes and payloads are
specified in `docs/wire-format.md`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd_fast.reference import Factors
from fedkd_fast.wire import Entry, Mode

# dtypes the wire carries; everything else is an error that names the tensor.
DTYPES: dict[torch.dtype, str] = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}
ITEMSIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

# Vectors (biases, normalisation weights) are a per cent of a model and steer all of it: their share
# of lost energy is this much smaller than that of matrices, about two bits an entry.
VECTOR_SHARE = 1 / 16
# Rows shorter than this share one scale with their neighbours: 5 bytes a row must stay small.
MIN_ROW = 128
_FIRST = 4096  # bytes
# Half-steps outside this range leave float32's normal numbers; such tensors travel raw.
SMALLEST_SCALE, LARGEST_SCALE = 1e-36, 1e34


def byte_view(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of the elements in C order, little-endian, where they lie if they can."""
    # One element, or none, is contiguous to torch whatever its stride, which bytes cannot have.
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return found


def to_bytes(tensor: Tensor) -> bytes:
    """Return the elements in C order, little-endian."""
    return byte_view(tensor).tobytes()


def from_bytes(payload: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Copy a payload into a new flat tensor."""
    if not len(payload):
        return torch.empty(0, dtype=dtype, device="cpu")
    # A frame has no alignment; the copy also makes the result independent of the frame.
    return torch.frombuffer(bytearray(payload), dtype=dtype)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """View a tensor of two or more dimensions as P×Q: convolutions become [out, -1]."""
    return shape[0], math.prod(shape[1:])


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Tell whether two factors could be smaller than the tensor at all."""
    return len(shape) >= 2 and min(matrix_shape(shape)) >= 2


def raw_entry(name: str, tensor: Tensor, *, copy: bool = True) -> Entry:
    """Encode without loss; tensors whose bytes are all zero take no payload.

    Without `copy` the payload is the memory of the tensor, which must stay as it is.
    """
    elements = byte_view(tensor)
    # Mostly the first ones tell.
    zero = not elements[:_FIRST].any() and not elements.any()
    mode, payload = (
        (Mode.ZERO, b"")
        if zero
        else (Mode.RAW, elements.tobytes() if copy else elements.data.toreadonly())
    )
    return Entry(name, DTYPES[tensor.dtype], tuple(tensor.shape), mode, 0, payload)


def factors_entry(name: str, dtype: str, shape: tuple[int, ...], factors: Factors) -> Entry:
    """Encode float32 factors, the paper's payload."""
    parts = (factors.sigma, factors.left, factors.right)
    payload = b"".join(to_bytes(part) for part in parts)
    return Entry(name, dtype, shape, Mode.FACTORS, factors.rank, payload)


def dense_rows(shape: tuple[int, ...]) -> int:
    """Choose how many rows share the scales: the first dimension, unless its rows are short."""
    count = math.prod(shape)
    if len(shape) < 2:
        return 1
    rows = shape[0]
    merged = -(-MIN_ROW * rows // count)
    # A few steps suffice unless the number of rows is nearly prime.
    return next((rows // m for m in range(merged, 8 * merged + 1) if rows % m == 0), 1)


def is_number(value: object) -> bool:
    """Tell whether a value is one number, also of torch or numpy; text is none."""
    text = isinstance(value, (str, bytes, bytearray))
    return not text and hasattr(value, "__float__") and math.prod(getattr(value, "shape", ())) == 1


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a floating tensor holds neither NaN, which extremes propagate, nor Inf."""
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax())


def representable(largest: float) -> bool:
    """Tell whether factors stay clear of float32's limits, from a tensor's largest absolute value.

    Those of a tensor of zeros do not.
    """
    return SMALLEST_SCALE * 2**20 < largest < LARGEST_SCALE


def may_lose(shape: tuple[int, ...], energy: float) -> float:
    """Return the share of its squared norm that a tensor of this shape may lose."""
    return (1.0 - energy) * (1.0 if is_matrix(shape) else VECTOR_SHARE)
