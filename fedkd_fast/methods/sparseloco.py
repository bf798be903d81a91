"""SparseLoCo (Sarfi et al. 2025, arXiv:2508.15706): the largest entries of each chunk, in two bits.

What a message leaves out decays and is added to the next, in the place of an outer momentum::

    m ← 0.95·m + Δ;  send Δ̂ = Q(TopK(m));  m ← m - Δ̂

A tensor is cut into chunks of 4,096 entries in C order, where the paper cuts matrices into tiles of
64×64; of each, the share ``top_share`` of its entries, at least one, is sent. Q keeps the sign of
an entry and whether its magnitude lies above the chunk's mean of those sent, one bit each; both
sides of that mean have a level of their own, the mean magnitude there, in bfloat16.

Bytes of a chunk with k entries sent: ``(12 + 2)·k/8 + 4``. The place of an entry costs 12 bits,
six times its value. The 4,096-choose-k sets of places differ by ``4096·H(k/4096)`` bits at most, H
the binary entropy: 7.0 bits an entry at 2 %, so coding them could take a third off the whole. In
the paper every worker adds up what the others sent; a star has a second leg instead, which is
compressed like the first one, with a memory of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkd_fast.methods.base import Method
from fedkd_fast.methods.fedavg import FEDAVG
from fedkd_fast.methods.packing import State, pack_bits, packed_bytes, unpack_bits
from fedkd_fast.trees import Tree

CHUNK, INDEX_BITS, VALUE_BITS = 4096, 12, 2
DECAY = 0.95


class ChunkedTop:
    """The largest entries of each chunk.

    Of a tensor ``name``, ``name/places`` are places within chunks, 12 bits each, in descending
    order of magnitude; ``name/values`` signs and levels, 2 bits each; both chunk after chunk.
    ``name/levels``, (chunks, 2) bfloat16, are the lower and the upper level of each chunk.

    Args:
        share: of the entries; more: more bytes, finer.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def _count(self, size: int) -> int:
        """Return how many entries of a chunk are sent."""
        return max(1, round(self._share * size)) if size else 0

    def _kept(self, value: Tensor) -> Tensor:
        """Return how many entries of each chunk are sent, (chunks,) int64."""
        whole, rest = divmod(value.numel(), CHUNK)
        counts = [self._count(CHUNK)] * whole + [self._count(rest)] * min(rest, 1)
        return torch.tensor(counts, dtype=torch.int64, device="cpu")

    def layout(self, like: State) -> dict[str, Tensor]:
        """Return empty places, values and levels of these tensors."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            kept = self._kept(value)
            for part, bits in (("places", INDEX_BITS), ("values", VALUE_BITS)):
                size = packed_bytes(int(kept.sum()), bits)
                found[f"{name}/{part}"] = torch.zeros(size, dtype=torch.uint8, device="cpu")
            found[f"{name}/levels"] = torch.zeros(len(kept), 2, dtype=torch.bfloat16, device="cpu")
        return found

    def pack(self, update: State) -> dict[str, Tensor]:
        """Choose and quantise."""
        found: dict[str, Tensor] = {}
        for name, value in update.items():
            parts = [_largest(rows, self._count(rows.shape[1])) for rows in _chunks(value)]
            places, values, levels = (torch.cat(one) for one in zip(*parts, strict=True))
            found[f"{name}/places"] = pack_bits(places, INDEX_BITS)
            found[f"{name}/values"] = pack_bits(values, VALUE_BITS)
            found[f"{name}/levels"] = levels
        return found

    def unpack(self, packed: State, like: State) -> dict[str, Tensor]:
        """Put levels with their signs where they belong; all other entries are zero."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            kept = self._kept(value)
            count = int(kept.sum())
            chunk = torch.arange(len(kept), device="cpu").repeat_interleave(kept)  # of each entry
            places = unpack_bits(packed[f"{name}/places"], INDEX_BITS, count) + CHUNK * chunk
            if count and int(places.max()) >= value.numel():
                raise ValueError(f"places of {name!r} must lie within its {value.numel()} entries")
            codes = unpack_bits(packed[f"{name}/values"], VALUE_BITS, count)
            magnitudes = packed[f"{name}/levels"].float()[chunk, codes >> 1]
            update = torch.zeros(value.numel(), device="cpu")
            update[places] = torch.where(codes & 1 == 1, -magnitudes, magnitudes)
            found[name] = update.reshape(value.shape).to(value.dtype)
        return found

    def state(self) -> Tree:
        """Return nothing: what a message leaves out is kept by the leg."""
        return None

    def load(self, state: Tree) -> None:
        """Keep nothing."""


def _chunks(value: Tensor) -> list[Tensor]:
    """Return the whole chunks, (N, 4096), and what is left, (1, rest), or (0, 0)."""
    flat = value.float().flatten()
    rest = len(flat) % CHUNK
    whole, last = flat.split_with_sizes([len(flat) - rest, rest])
    return [whole.view(-1, CHUNK), last.view(min(rest, 1), rest)]


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return places and codes of the largest entries of each row, and the row's levels."""
    places = rows.abs().topk(count).indices  # (N, count)
    sent = rows.gather(1, places)
    sizes = sent.abs()
    high = sizes > sizes.mean(1, keepdim=True)
    codes = (sent < 0).int() + 2 * high.int()
    means = [(sizes * one).sum(1) / one.sum(1).clamp(min=1) for one in (~high, high)]
    return places.flatten(), codes.flatten(), torch.stack(means, 1).to(torch.bfloat16)


def _packing(config: Any, seed: int) -> ChunkedTop:
    return ChunkedTop(config.top_share)


SPARSELOCO = Method(
    "sparseloco",
    FEDAVG.make_learner,
    exchanges=True,
    packing=_packing,
    feedback="both",
    feedback_decay=DECAY,
)
