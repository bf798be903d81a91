"""What Compressor.compress costs for a whole model, and what its factorisation has of that.

The same compressor with torch.linalg.svd in the op's place shows what the op is worth to a caller.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from deltas import Pair
from torch import Tensor

from fedkd_fast import ops
from fedkd_fast.compress import Compressor
from fedkd_fast.feedback import SubspaceCache
from fedkd_fast.reference import Factors, Subspace, select_rank

CODECS = ("wf1", "wf0", "factors-fp32")
Factorise = Callable[..., list[Factors]]


def torch_svd_list(
    matrices: Sequence[Tensor],
    *,
    energy: float,
    earlier: Sequence[Subspace | None],
    budgets_bytes: Sequence[int | None],
) -> list[Factors]:
    found = []
    for matrix, budget in zip(matrices, budgets_bytes, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        shares = s.double().square()
        shares /= shares.sum()
        rank = kept = select_rank(s, energy)
        if budget is not None and 4 * kept * (sum(matrix.shape) + 1) >= budget:
            kept = 0
        left = u.mT[:kept].contiguous()
        captured = float(shares[:kept].sum())
        found.append(Factors(left, s[:kept], vh[:kept].contiguous(), rank, captured, shares))
    return found


class Clocked(ModuleType):
    """The ops, with a clock on the factorisation."""

    def __init__(self, factorise: Factorise):
        super().__init__("clocked_ops")
        vars(self).update(vars(ops))
        self._factorise, self.seconds = factorise, 0.0
        vars(self)["truncated_svd_list"] = self.clocked

    def clocked(self, *matrices: Any, **options: Any) -> list[Factors]:
        """Factorise, and add what that took."""
        began = time.thread_time()
        found = self._factorise(*matrices, **options)
        self.seconds += time.thread_time() - began
        return found


class Variant:
    """A compressor of one kind, and the messages it has taken."""

    def __init__(self, factorise: Factorise, cached: bool, codec: str, energy: float):
        self.factorise, self.cached, self.codec, self.energy = factorise, cached, codec, energy
        self.seconds: list[float] = []
        self.shares: list[float] = []
        self.frame_bytes = 0

    def send(self, before: dict[str, Tensor], update: dict[str, Tensor]) -> None:
        """Take the time of a message: the second one where a cache remembers the first."""
        backend = Clocked(self.factorise)
        cache = SubspaceCache() if self.cached else None
        compressor = Compressor(self.energy, self.codec, cache=cache)
        compressor._backend = backend
        if self.cached:
            compressor.compress(before)
        backend.seconds, began = 0.0, time.thread_time()
        frame = compressor.compress(update)
        took = time.thread_time() - began
        self.seconds.append(took)
        self.shares.append(backend.seconds / took)
        self.frame_bytes = len(frame)


def measure(pairs: list[Pair], energies: list[float], rounds: int) -> list[dict[str, Any]]:
    """Compress the model with every variant in turn, `rounds` times."""
    before = {pair.name: pair.previous for pair in pairs}
    update = {pair.name: pair.current for pair in pairs}
    dense = sum(4 * value.numel() for value in update.values())
    records = []
    for energy in energies:
        for codec in CODECS:
            variants = {
                "ours, cold": Variant(ops.truncated_svd_list, False, codec, energy),
                "ours, second message": Variant(ops.truncated_svd_list, True, codec, energy),
                "torch.linalg.svd": Variant(torch_svd_list, False, codec, energy),
            }
            for _ in range(rounds):
                for variant in variants.values():
                    variant.send(before, update)
            peer = variants["torch.linalg.svd"]
            for name, variant in variants.items():
                ratios = [a / b for a, b in zip(peer.seconds, variant.seconds, strict=True)]
                records.append(
                    {
                        "energy": energy,
                        "codec": codec,
                        "factorisation": name,
                        "ms": round(1e3 * min(variant.seconds), 1),
                        "share_of_factorisation": round(statistics.median(variant.shares), 3),
                        "torch.linalg.svd_over_this": round(statistics.median(ratios), 2),
                        "frame_bytes": variant.frame_bytes,
                        "dense_bytes": dense,
                    }
                )
    return records
