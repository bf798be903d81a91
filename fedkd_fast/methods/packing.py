"""Codecs of the baselines: an update becomes a few plain tensors, which travel as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.trees import Tree

State: TypeAlias = Mapping[str, Tensor]


class Packing(Protocol):
    """A codec that is none of `Compressor`'s; one instance for one sender, it may keep state.

    What `pack` returns is sent without loss in a frame that names nothing, so names, shapes and
    dtypes of it must follow from those of the update alone. `unpack` uses no state of the sender.
    """

    def layout(self, like: State) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes of what `pack` returns."""

    def pack(self, update: State) -> dict[str, Tensor]:
        """Turn an update into what is sent."""

    def unpack(self, packed: State, like: State) -> dict[str, Tensor]:
        """Turn what was sent into an update with the shapes and dtypes of ``like``."""

    def state(self) -> Tree:
        """Return what is kept between messages, for `load` of another instance."""

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of so many numbers of so many bits, without gaps."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Write numbers one after the other without gaps, the lowest bit first.

    Args:
        values: integers within [0, 2^bits), flattened in C order.
        bits: of each number, 1 to 16.

    Returns:
        (⌈N·bits/8⌉,) uint8; the last byte is filled up with zeros.
    """
    numbers = values.numpy().reshape(-1).astype(np.uint8 if bits <= 8 else np.uint16)
    single = (numbers[:, None] >> np.arange(bits, dtype=numbers.dtype)) & 1  # (N, bits)
    return torch.from_numpy(np.packbits(single.astype(np.uint8), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first numbers of what `pack_bits` wrote, (count,) int32."""
    single = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    weights: Any = 1 << np.arange(bits, dtype=np.int32)
    return torch.from_numpy(single.reshape(count, bits) @ weights)
