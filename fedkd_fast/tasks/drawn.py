"""Shards of as many clients as one likes: drawn with replacement, made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from fedkd_fast._seeds import derived_seed
from fedkd_fast.tasks.partition import Indices


class Draws(NamedTuple):
    """What was drawn for n samples."""

    indices: Indices  # (n,) of what each is a copy of
    moves: npt.NDArray[np.float32]  # (m, n) within [-1, 1): how the copy differs from it


@dataclass(frozen=True, slots=True)
class DrawnShard:
    """The samples of one client, or of several put together; it holds no more than their numbers.

    Two clients differ in what they drew and in how it was moved, so that they may outnumber the
    samples that there are.
    """

    clients: tuple[int, ...]
    seed: int  # of all shards of a run
    size: int  # samples of each client

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.clients) * self.size

    def draw(self, samples: int, moves: int) -> Draws:
        """Draw, by seed and client alone: the same each time, whoever else is in the shard.

        Args:
            samples: how many there are to draw from.
            moves: how many numbers say what becomes of a sample.
        """
        found = [self._draw(client, samples, moves) for client in self.clients]
        indices, moved = zip(*found, strict=True)
        return Draws(np.concatenate(indices), np.concatenate(moved, axis=1))

    def _draw(self, client: int, samples: int, moves: int) -> Draws:
        generator = np.random.default_rng(derived_seed(self.seed, client))
        indices = generator.integers(samples, size=self.size)
        return Draws(indices, generator.uniform(-1, 1, (moves, self.size)).astype(np.float32))


class DrawnShards(Sequence[DrawnShard]):
    """The shards of all clients, each made when it is asked for.

    Args:
        clients: how many.
        seed: of all draws.
        size: samples of each client.
    """

    def __init__(self, clients: int, seed: int, size: int) -> None:
        self._clients, self._seed, self._size = range(clients), seed, size

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._clients)

    @overload
    def __getitem__(self, index: int) -> DrawnShard: ...

    @overload
    def __getitem__(self, index: slice) -> list[DrawnShard]: ...

    def __getitem__(self, index: int | slice) -> DrawnShard | list[DrawnShard]:
        """Return the shard of a client, or of several."""
        chosen = self._clients[index]
        if isinstance(chosen, int):
            return DrawnShard((chosen,), self._seed, self._size)
        return [DrawnShard((client,), self._seed, self._size) for client in chosen]


def put_together(shards: Iterable[DrawnShard]) -> DrawnShard:
    """Return one shard with the samples of several of one run, in their order."""
    parts = list(shards)
    clients = tuple(client for part in parts for client in part.clients)
    return DrawnShard(clients, parts[0].seed, parts[0].size)
