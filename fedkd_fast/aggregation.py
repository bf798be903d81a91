"""Weighted means of frames, with one decoded frame beside the sums in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedkd_fast.compress import Compressor
from fedkd_fast.decompress import decode_frame
from fedkd_fast.tensors import Shaped
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base

Frame: TypeAlias = bytes | bytearray | memoryview


class Aggregate(dict[str, Tensor]):
    """The mean by tensor name, and the base that it is a difference to, if the frames had one."""

    def __init__(self, tensors: Mapping[str, Tensor], relative_to: Base | None) -> None:
        super().__init__(tensors)
        self.relative_to = relative_to

    def recompress(self, compressor: Compressor, *, energy: float | None = None) -> bytes:
        """Encode the mean for the broadcast; receivers decode it against the base of the frames."""
        return compressor.compress(self, energy=energy, relative_to=self.relative_to)


# Sums run in float64, which holds integers up to here.
_EXACT_INTEGERS = 2**53


def _check_weights(weights: Sequence[float]) -> list[float]:
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights must be finite and >= 0, got {weight} at {index}")
    largest = max(weights, default=0.0)
    if largest <= 0:
        raise ValueError("weights must not all be zero")
    return [weight / largest for weight in weights]


def _frame_weights(
    frames: Iterable[Frame], weights: Sequence[float] | None
) -> Iterator[tuple[Frame, float]]:
    """Pair frames with weights, without holding more than one frame."""
    if weights is None:
        yield from ((frame, 1.0) for frame in frames)
        return
    scaled, count = _check_weights(weights), 0
    for count, frame in enumerate(frames, 1):
        if count <= len(scaled):
            yield frame, scaled[count - 1]
    if count != len(scaled):
        raise ValueError(
            f"weights must have one entry per frame: {count} frames, got {len(scaled)}"
        )


def aggregate(
    frames: Iterable[Frame],
    weights: Sequence[float] | None = None,
    schema: Mapping[str, Shaped] | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> Aggregate:
    """Average frames: ``Σ_i w_i · decode(frame_i) / Σ_i w_i``, FedAvg; FedKD has equal weights.

    Args:
        frames: at least one, also from a generator; all with the same tensors and the same base.
        weights: one finite number >= 0 per frame, for instance sample counts; None means equal.
        schema: expected tensors, as in `decompress`; None takes those of the first frame. With a
            schema, no frame can cost more than what it describes.
        max_bytes: bound on each decoded frame.
        backend: as in `Compressor`.

    Returns:
        The mean, in each tensor's dtype: sums run in float64, integers are rounded to the nearest,
        booleans are true from one half on. Tensors that are tied in every frame stay tied.

    Raises:
        WireError: anything wrong with the bytes of a frame.
        ValueError: no frames, wrong weights, frames that do not match each other or the schema, or
            integers beyond 2^53; names the frame.
    """
    sums: dict[str, Tensor] = {}
    wanted, what = schema, "schema"
    ties: dict[str, str] = {}
    relative_to: Base | None = None
    total = 0.0
    for index, (frame, weight) in enumerate(_frame_weights(frames, weights)):
        tensors, made_against = decode_frame(
            frame, wanted, schema_name=what, max_bytes=max_bytes, backend=backend
        )
        owners: dict[int, str] = {}
        tied = {name: owners.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        if index == 0:
            relative_to, ties = made_against, tied
            wanted = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
        elif made_against != relative_to:
            raise ValueError(f"frame {index} was made against another base than frame 0")
        # One sender's ties must not overwrite what the others sent.
        ties = {name: owner for name, owner in ties.items() if tied[name] == owner}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int64 and not _exact(tensor):
                raise ValueError(f"frame {index}: {name!r} holds integers beyond 2^53")
            part = tensor.double() * weight
            sums[name] = sums[name].add_(part) if name in sums else part
        total += weight
        what = f"frame {index + 1} compared with frame 0"
    if wanted is None or not total:
        raise ValueError("frames must hold at least one frame, got none")
    means = {name: _cast(sums[name].div_(total), wanted[name].dtype) for name in sums}
    return Aggregate({name: means[ties.get(name, name)] for name in means}, relative_to)


def _exact(integers: Tensor) -> bool:
    return bool(((integers <= _EXACT_INTEGERS) & (integers >= -_EXACT_INTEGERS)).all())


def _cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return mean >= 0.5
    return mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)
