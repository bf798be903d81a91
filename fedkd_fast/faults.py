"""Faults and attacks on purpose, by seed: what a run is worth when clients and networks misbehave.

A share of the replies goes wrong in one of these ways, drawn anew for each client and round:

``fail``
    the client is gone after it trained, and comes back as it was before the round.
``late``
    the reply arrives in the next round.
``duplicate``
    it arrives twice.
``corrupt``
    bytes of it are changed, or its end is missing.
``not-finite``
    the update holds NaN.

Attackers are a share of the clients, the same in all rounds: they send ``attack_factor`` times
their update, for instance -10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast._seeds import derived_seed
from fedkd_fast.codec.common import DTYPES, to_bytes
from fedkd_fast.tensors import digest_of

KINDS = ("fail", "late", "duplicate", "corrupt", "not-finite")
# Uses of the run's seed, beside those that `assembly` lists.
_FAULTS, _ATTACKERS = 1_000_101, 1_000_102


class InjectedFault(RuntimeError):
    """A client fails because it was asked to."""


class Faults:
    """What goes wrong, and where.

    Args:
        share: of the replies, in [0, 1].
        attackers: share of the clients, in [0, 1).
        factor: of the attackers' updates.
        clients: how many there are.
        seed: of the run.
    """

    def __init__(
        self, share: float, attackers: float, factor: float, clients: int, seed: int
    ) -> None:
        self._share, self._factor, self._seed = share, factor, seed
        generator = np.random.default_rng(derived_seed(seed, _ATTACKERS))
        count = round(attackers * clients)
        self.attackers = frozenset(generator.choice(clients, count, replace=False).tolist())

    def kind(self, client: int, number: int) -> str | None:
        """Return what goes wrong with the reply of a client in a round, if anything does."""
        generator = self._generator(client, number, 0)
        if generator.random() >= self._share:
            return None
        return KINDS[int(generator.integers(len(KINDS)))]

    def factor(self, client: int) -> float:
        """Return what a client multiplies its update with."""
        return self._factor if client in self.attackers else 1.0

    def corrupt(self, message: bytes, client: int, number: int, attempt: int) -> bytes:
        """Change bytes of a message, or cut it; each attempt to send it goes wrong on its own."""
        generator = self._generator(client, number, 1 + attempt)
        if generator.random() < 0.5:
            return message[: int(generator.integers(len(message)))]
        damaged = bytearray(message)
        for place in generator.integers(len(message), size=3).tolist():
            damaged[place] ^= int(generator.integers(1, 256))
        return bytes(damaged)

    def _generator(self, client: int, number: int, use: int) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self._seed, _FAULTS, client, number, use))


def not_finite_frame(schema: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bytes:
    """Return a frame whose checksums are right and whose floating numbers are all NaN.

    Args:
        schema: the tensors that frames of such updates hold.
        base: the parameters that it is a difference to.
    """
    entries = []
    for name, value in schema.items():
        spoilt = torch.full_like(value, math.nan) if value.is_floating_point() else value
        kind, shape = DTYPES[value.dtype], tuple(value.shape)
        entries.append(wire.Entry(name, kind, shape, wire.Mode.RAW, 0, to_bytes(spoilt)))
    return wire.encode(entries, codec="raw", base=wire.Base(digest=digest_of(base)), schema=False)
