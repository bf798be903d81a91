"""Weighted means of frames, with one decoded frame in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedkd_fast.compress import Compressor, Shaped, check_same_tensors, decode_frame
from fedkd_fast.wire import DEFAULT_MAX_BYTES


class Aggregate(dict[str, Tensor]):
    """The mean by tensor name, and the base that it is a difference to, if the frames had one."""

    def __init__(self, tensors: Mapping[str, Tensor], base_digest: bytes | None) -> None:
        super().__init__(tensors)
        self.base_digest = base_digest

    def recompress(self, compressor: Compressor, *, energy: float | None = None) -> bytes:
        """Encode the mean for the broadcast; receivers decode it against the base of the frames."""
        return compressor.compress(self, energy=energy, base_digest=self.base_digest)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(
            f"weights must have one entry per frame: {count} frames, got {len(weights)}"
        )
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights must be finite and >= 0, got {weight} at {index}")
    total = math.fsum(weights)
    if total <= 0:
        raise ValueError("weights must not all be zero")
    return [weight / total for weight in weights]


def aggregate(
    frames: Iterable[bytes | bytearray | memoryview],
    weights: Sequence[float] | None = None,
    schema: Mapping[str, Shaped] | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> Aggregate:
    """Average frames: ``Σ_i w_i · decode(frame_i) / Σ_i w_i``, FedAvg; FedKD has equal weights.

    Args:
        frames: at least one; all with the same tensors and the same base.
        weights: one finite number >= 0 per frame, for instance sample counts; None means equal.
        schema: expected tensors, as in `decompress`; None takes those of the first frame.
        max_bytes: bound on each decoded frame.
        backend: as in `Compressor`.

    Returns:
        The mean, in each tensor's dtype: sums run in float64, integers are rounded to the nearest,
        booleans are true from one half on. Tensors that are tied in the first frame stay tied.

    Raises:
        WireError: anything wrong with the bytes of a frame.
        ValueError: no frames, wrong weights, or frames that do not match each other or the schema;
            names the frame.
    """
    frames = list(frames)
    if not frames:
        raise ValueError("frames must hold at least one frame, got none")
    sums: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    digest: bytes | None = None
    for index, (frame, weight) in enumerate(
        zip(frames, _weights(weights, len(frames)), strict=True)
    ):
        tensors, frame_digest = decode_frame(frame, max_bytes=max_bytes, backend=backend)
        if index == 0:
            first, digest = tensors, frame_digest
            check_same_tensors(tensors, schema if schema is not None else tensors, "schema")
        elif frame_digest != digest:
            raise ValueError(f"frame {index} was made against another base than frame 0")
        else:
            check_same_tensors(tensors, first, f"frame {index} compared with frame 0")
        for name, tensor in tensors.items():
            part = tensor.double() * weight
            sums[name] = sums[name].add_(part) if name in sums else part
    shared: dict[int, Tensor] = {}
    for name, tensor in first.items():
        if id(tensor) not in shared:
            shared[id(tensor)] = _cast(sums[name], tensor.dtype)
    return Aggregate({name: shared[id(tensor)] for name, tensor in first.items()}, digest)


def _cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return mean >= 0.5
    return mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)
