"""The mean over the ranks of a torch process group, of updates that travel as frames.

Every rank encodes its update once; everybody gets all frames and averages them in the order of the
ranks. For updates of many local steps, as in DiLoCo (`outer_step`); for gradients there is `ddp`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fedkd_fast.aggregation import aggregate
from fedkd_fast.compress import Compressor
from fedkd_fast.feedback import EF21
from fedkd_fast.wire import DEFAULT_MAX_BYTES

# Before its frame each rank says how long it is, what it weighs, and whether it is one at all or
# the reason why there is none.
_HEAD = struct.Struct("<qd?")


class GroupMean(NamedTuple):
    """What `compressed_mean` found."""

    mean: dict[str, Tensor]  # on the devices of this rank's update
    frame_bytes: tuple[int, ...]  # of each rank
    sent_bytes: int  # handed to the group by this rank: heads, padding and all
    received_bytes: int  # of the other ranks


def compressed_mean(
    update: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    compressor: Compressor | None = None,
    energy: float | None = None,
    weight: float = 1.0,
) -> GroupMean:
    """Average an update over the ranks of a process group: ``Σ_i w_i·decode(frame_i) / Σ_i w_i``.

    All ranks call it together, with tensors of the same names, shapes and dtypes. Each encodes
    once; frames are all-gathered as bytes, padded to the longest. Ranks on machines of one type get
    the same bits; on others, products of factors may differ in the last ones.

    Args:
        update: tensors by name, on any device; in DiLoCo the parameters before local training less
            those after it.
        group: the default group where left out; with NCCL, frames pass through the current GPU.
        compressor: of this rank, kept from call to call where it has error feedback, which adds to
            each update what the frames before left out. A stateless one with energy 0.95 where left
            out. `EF21` is refused: receivers would have to keep estimates.
        energy: overrides what the compressor was asked for in this call.
        weight: of this rank, for instance its number of samples; finite and at least 0.

    Returns:
        The mean, the same on all ranks, and what it cost.

    Raises:
        ValueError: on all ranks together, if one of them had nothing to send (the message says
            which and why), or some rank found a frame damaged, of another schema, or no weight.
            The compressor is as it was before then.
    """
    compressor = Compressor(stateless=True) if compressor is None else compressor
    return mean_of(lambda: update, group, compressor, energy=energy, weight=weight)


def mean_of(
    make: Callable[[], Mapping[str, Tensor]],
    group: dist.ProcessGroup | None,
    compressor: Compressor,
    *,
    energy: float | None = None,
    weight: float = 1.0,
) -> GroupMean:
    """Average what `make` returns, as `compressed_mean`; where it raises, all ranks fail."""
    before = compressor.state_dict()
    update: Mapping[str, Tensor] = {}

    def encoded() -> Sent:
        nonlocal update
        update = make()
        if isinstance(compressor.feedback, EF21):
            raise ValueError("compressor must have no EF21: receivers keep no estimates here")
        return Sent(compressor.compress(update, energy=energy), _checked(weight))

    try:
        found, padded = gathered(encoded, group, "nothing is averaged, not all ranks have a frame")
        mean = _averaged(found, update, group)
    except Exception:
        compressor.load_state_dict(before)
        raise
    sizes = tuple(len(one.frame) for one in found)
    cost = _HEAD.size + padded
    return GroupMean(mean, sizes, cost, cost * (len(found) - 1))


class Sent(NamedTuple):
    """What a rank hands to all others."""

    frame: bytes | memoryview  # or why there is none
    weight: float
    failed: bool = False


def _checked(weight: float) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be finite and >= 0, got {weight}")
    return weight


def _device(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _all_gather(
    payload: bytes | memoryview, size: int, group: dist.ProcessGroup | None
) -> list[memoryview]:
    """Gather bytes of every rank, padded to a size that all know."""
    own = torch.zeros(size, dtype=torch.uint8, device="cpu")
    own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    own = own.to(_device(group))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.cpu().numpy().data for part in parts]


def gathered(
    make: Callable[[], Sent], group: dist.ProcessGroup | None, problem: str
) -> tuple[list[Sent], int]:
    """Return what all ranks made, and the length that it was padded to.

    Raises:
        ValueError: on all ranks, if `make` raised on one: the problem, and which rank says what.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process is a rank of")
    try:
        sent = make()
    # Whatever it is, the other ranks are waiting.
    except Exception as error:
        sent = Sent(f"{type(error).__name__}: {error}".encode(), 0.0, failed=True)
    head = _HEAD.pack(len(sent.frame), sent.weight, sent.failed)
    heads = [_HEAD.unpack(one) for one in _all_gather(head, _HEAD.size, group)]
    padded = max(length for length, _, _ in heads)
    parts = _all_gather(sent.frame, padded, group)
    found = [
        Sent(part[:length], weight, failed)
        for part, (length, weight, failed) in zip(parts, heads, strict=True)
    ]
    reasons = [
        f"rank {i}: {bytes(one.frame).decode()}" for i, one in enumerate(found) if one.failed
    ]
    if reasons:
        raise ValueError(f"{problem}: {'; '.join(reasons)}")
    return found, padded


def _averaged(
    found: list[Sent], update: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Average what all could read, or fail on all ranks."""
    frames = {f"rank {index}": one.frame for index, one in enumerate(found)}
    weights = [one.weight for one in found]
    reason, mean = "", {}
    try:
        # With a schema, no frame costs more than that, however large it is.
        most = max(DEFAULT_MAX_BYTES, sum(value.nbytes for value in update.values()))
        aggregated = aggregate(frames, weights, schema=update, max_bytes=most)
        reason = "; ".join(f"{name}: {why}" for name, why in aggregated.refused.items())
        mean = {name: aggregated[name].to(update[name].device) for name in update}
    # Whatever it is, want of memory for instance, the other ranks are waiting.
    except Exception as error:
        reason = str(error) or type(error).__name__
    verdicts = _all_gather(bytes([bool(reason)]), 1, group)
    refusing = [index for index, verdict in enumerate(verdicts) if verdict[0]]
    if refusing:
        raise ValueError(
            f"nothing is averaged, ranks {refusing} cannot use what was sent"
            + (f": {reason}" if reason else "")
        )
    return mean
