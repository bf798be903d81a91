"""From clients in other processes to a run: who they are, and what they must have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedkd_fast import __version__
from fedkd_fast.assembly import Shards
from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.envelopes import SealedCarrier
from fedkd_fast.evaluation import Evaluation
from fedkd_fast.journal import Journal
from fedkd_fast.loop import Connect
from fedkd_fast.methods import get_method
from fedkd_fast.remote import Carrier, RemotePool
from fedkd_fast.remote_scores import RemoteEvaluation
from fedkd_fast.server import Server
from fedkd_fast.tasks import Task

_MOST_SAMPLES = 2**53  # up to there, weights of replies are exact


class RemoteShards(Shards):
    """What the server knows of the clients' data: how many samples each has."""

    def __init__(self, sizes: Sequence[int | None], sample: bytes) -> None:
        super().__init__([None] * len(sizes))
        self._sizes, self._sample = sizes, sample

    def size(self, index: int) -> int:
        """Return the samples of a client, as it says."""
        size = self._sizes[index]
        if size is None:
            raise TypeError(f"client {index} does not tell how many samples it has")
        return size

    def sample(self, task: Task, index: int = 0) -> bytes:
        """Return the digest of the first client's first batch, as it says."""
        return self._sample

    def facts(self, task: Task) -> dict[str, Any]:
        """Return what is known of the clients' data; what the server has does not count."""
        return {name: fact for name, fact in super().facts(task).items() if name != "content"}


def connect(config: TrainConfig, task: Task, carrier: Carrier, wait_s: float) -> Connect:
    """Return what finds the clients of a run that are in other processes, for `trainer.train`.

    Scores and bytes are those of the same run within one process, as long as machine type, torch
    and threads are the same: the same code does the same things in the same order to each client.

    Args:
        config: of the run.
        task: the models; its data are not used.
        carrier: brings orders to clients; with ``encrypt`` an `envelopes.SealedCarrier`.
        wait_s: how long clients are waited for whose final models are to be scored.

    Raises:
        ValueError: options that need clients in this process; by the function that is returned,
            clients that began with other models or versions.
    """
    for name, least, why in (
        ("checkpoint_every", 0, "the server makes no checkpoints of clients elsewhere"),
        ("retries", 0, "the network sends again what was damaged"),
        ("faults", 0.0, "faults on purpose need clients in one process"),
        ("attackers", 0.0, "attacks on purpose need clients in one process"),
    ):
        if getattr(config, name) != least:
            raise ValueError(f"{name} must be {least}, got {getattr(config, name)!r}: {why}")
    if config.encrypt != isinstance(carrier, SealedCarrier):
        raise ValueError(
            f"encrypt must be {not config.encrypt} with a carrier that "
            f"{'does not seal' if config.encrypt else 'seals'}, got {config.encrypt}: with keys "
            "of `fedkd-fast keygen`, `envelopes.SealedCarrier` seals for any carrier"
        )
    if get_method(config.method).pools_data:
        raise ValueError(
            f"method must be one that leaves data with the clients, got {config.method!r}"
        )

    def found(
        first: Client, server: Server | None, journal: Journal
    ) -> tuple[RemotePool, Shards, Evaluation]:
        hellos = carrier.gather(config.clients)
        digest = first.digest().hex()
        for index, hello in sorted(hellos.items()):
            _check_hello(index, hello, config, digest)
        sizes = [hellos[index].get("samples") for index in range(config.clients)]
        shards = RemoteShards(sizes, bytes.fromhex(hellos[0]["sample"]))
        if config.weighting == "samples" and shards.sizes() is None:
            raise ValueError("weighting by samples needs clients that tell how many they have")
        pool = RemotePool(first.learner, config.clients, server is not None, carrier, journal)
        return pool, shards, RemoteEvaluation(config, task, pool, first, server, wait_s)

    return found


def _check_hello(index: int, hello: Mapping[str, Any], config: TrainConfig, digest: str) -> None:
    """Refuse a client that cannot take part."""
    if hello.get("sealed"):
        raise ValueError(f"client {index} takes sealed orders only, the server does not seal")
    for name, wanted, why in (
        ("version", __version__, "server and clients need the same fedkd_fast"),
        ("clients", config.clients, "its data are dealt to another number of clients"),
        ("digest", digest, "its models begin otherwise: same options, models and torch?"),
    ):
        if hello.get(name) != wanted:
            raise ValueError(
                f"client {index} has {name} {hello.get(name)!r}, the server {wanted!r}: {why}"
            )
    sample = hello.get("sample")
    if not (isinstance(sample, str) and re.fullmatch("(?:[0-9a-f]{2})*", sample)):
        raise ValueError(f"client {index} says its first batch is {str(sample)[:80]!r}")
    samples = hello.get("samples")
    # By samples, a round in which only clients without any answer would have no mean.
    least = int(config.weighting == "samples")
    known = isinstance(samples, int) and not isinstance(samples, bool)
    if not (samples is None or (known and least <= samples < _MOST_SAMPLES)):
        raise ValueError(
            f"client {index} must have {least} to {_MOST_SAMPLES - 1} samples, says "
            f"{str(samples)[:80]}"
        )
