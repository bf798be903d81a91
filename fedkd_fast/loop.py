"""The rounds of a run: who takes part, what arrives and counts, what is kept for a crash."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from fedkd_fast import __version__
from fedkd_fast._errors import DiskError, QuorumError, Stopped, spoken
from fedkd_fast._seeds import derived_seed
from fedkd_fast.assembly import Shards, client_maker, make_server, participants
from fedkd_fast.checkpoint import Store
from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.costs import model_sizes
from fedkd_fast.delivery import Delivery
from fedkd_fast.evaluation import Evaluation, Models
from fedkd_fast.faults import InjectedFault
from fedkd_fast.journal import Journal
from fedkd_fast.methods import Losses, get_method
from fedkd_fast.pool import ClientPool, Peer, Pool
from fedkd_fast.privacy import fresh_generator, poisson_participants
from fedkd_fast.recorder import Recorder
from fedkd_fast.records import ClientRecord, ClientRow, OpenRound, RoundRecord, environment
from fedkd_fast.replies import Replies
from fedkd_fast.scores import Scores
from fedkd_fast.server import Server
from fedkd_fast.spectra import spectra
from fedkd_fast.tasks import Task
from fedkd_fast.trees import Tree
from fedkd_fast.writer import RunWriter

Progress = Callable[["RoundRecord | ClientRecord"], None]
# Finds clients in other processes, and says what is known of their data and how they are scored.
# It is given a client with models as all clients begin with, and the server.
Connect = Callable[[Client, "Server | None", Journal], tuple[Pool, Shards, Evaluation]]
# Keys of the store, beside the pool's.
_SERVER, _ROUND = "server", "round"
_COINS = 1  # use of the seed of differential privacy beside the noise
_GIGABYTE = 1e9


class Loop:
    """One run.

    Args:
        config: of the run.
        task: the data and models.
        writer: of the run folder, if there is one.
        progress: called after each client and after each round.
        stop: asked after each client; True ends the run there.
        connect: finds the clients where they are not in this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        writer: RunWriter | None,
        progress: Progress | None,
        stop: Callable[[], bool] | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.config, self.task, self.writer = config, task, writer
        self._progress, self._stop = progress, stop
        self.method = get_method(config.method)
        self._store: Store | None = None
        if writer is not None and (config.checkpoint_every or writer.resumes):
            # What lies there is of the run that `writer` goes on with.
            self._store = Store(writer.checkpoint_folder)
        self.journal = Journal(None if writer is None else writer.journal)
        if connect is None:
            make, self.shards = client_maker(config, task, self.method)
            limit = config.memory_gb * _GIGABYTE
            self.pool: Pool = ClientPool(make, len(self.shards), self._store, limit)
            self.server = make_server(config, self.pool.look(0), self.method)
            self.evaluation = Evaluation(config, task, self.pool)
        else:
            make, _ = client_maker(config, task, self.method, [()] * config.clients)
            first = make(0)  # without data
            self.server = make_server(config, first, self.method)
            self.pool, self.shards, self.evaluation = connect(first, self.server, self.journal)
        self.sizes = model_sizes(task, self.pool.look(0).learner)
        self.recorder = Recorder(config, self.method, len(self.pool), writer)
        self.delivery = Delivery(config, len(self.pool), self.journal, remote=connect is not None)
        # Who takes part is part of what differential privacy rests on, and as secret as the noise.
        self._coins: np.random.Generator | None = None
        if config.dp_clip is not None and self.server is not None:
            self.server.epsilon(config.rounds)  # what it needs must not be missing in the end
            own = config.dp_seed
            self._coins = fresh_generator(None if own is None else derived_seed(own, _COINS))
        self._final: Models = ([], [])
        self._started = time.perf_counter()
        self._earlier = 0.0  # seconds of processes before this one
        self._pending: OpenRound | None = None

    def close(self) -> None:
        """Remove temporary files."""
        self.pool.close()

    @property
    def _seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    def run(self) -> tuple[dict[str, Any], list[nn.Module], list[nn.Module]]:
        """Train all rounds; return summary, mentors and mentees.

        Raises:
            Stopped: `stop` asked for it.
            QuorumError: too few replies of a round counted.
            DiskError: something of the run cannot be written; `intact` says what is left.
        """
        self._begin()
        scores, last = Scores(self.task.metric, "none"), False
        while not last:
            scores, last = self._round(self.recorder.rounds_done + 1)
            every = self.config.checkpoint_every
            if not last and every and self.recorder.rounds_done % every == 0:
                self._save()
        mentors, mentees = self._final
        learner = self.pool.look(0).learner
        summary = self.recorder.summary(self.task, learner, scores, self.sizes, self._seconds)
        summary["faults"] = self.journal.faults()
        if self.server is not None and self.config.dp_clip is not None:
            spent = self.server.epsilon(self.recorder.rounds_done)
            summary["epsilon"] = spent if math.isfinite(spent) else None
            summary["delta"] = self.config.dp_delta
        self.journal.add("finish", round=self.recorder.rounds_done, seconds=self._seconds)
        return summary, mentors, mentees

    def _begin(self) -> None:
        """Write down what this run is, or go on with it."""
        facts = {**self.task.describe(), **self.sizes, **self.shards.facts(self.task)}
        if self._store is not None and self._store.facts:
            assert self.writer is not None
            self.writer.check_data(self.shards, facts)
            self._load(self._store)
            done, inside = self.recorder.rounds_done, self._pending is not None
            place = {"round": done, "inside": inside}
            self.journal.add("resume", **place, version=__version__, environment=environment())
        elif self.writer is not None:
            config = dataclasses.asdict(self.config) | {"version": __version__}
            self.writer.start({**config, "environment": environment(), "task_facts": facts})
            self.writer.write_partition(self.shards)
            self.journal.add("start", version=__version__, environment=environment())

    def _round(self, number: int) -> tuple[Scores, bool]:
        """Train one round; say how its models score, and whether it was the last."""
        config, started = self.config, time.perf_counter()
        energy = config.energy(number)
        current = self._pending or self._open(number)
        self._pending = None
        for together in self.pool.together(current.asked[len(current.rows) :]):
            turns = [self._call(index) for index in together]
            self.pool.start(together, number, energy, config.lr_share(number))
            for row, before in turns:
                self._turn(current, row, before, energy)
                if self._stop is not None and self._stop():
                    self._halt(current)
        rows, server_row = current.rows, ClientRow(None)
        self._check_quorum(current)
        if self.server is not None:
            self._exchange(self.server, current, server_row, energy)
        accepted = sum(row.refused is None for row in rows)
        rows += self._witness()
        scores, last = self.evaluation.after(number)
        if last:
            rows += self._bring_up_to_date(current.asked)
            scores, self._final = self.evaluation.final()
        record = self.recorder.add(number, energy, rows, server_row, self.server, scores)
        self.journal.add(
            "round",
            round=number,
            asked=len(current.asked),
            accepted=accepted,
            bytes_up=sum(row.bytes_up for row in rows),
            bytes_down=sum(row.bytes_down for row in rows),
            seconds=time.perf_counter() - started,
            digest=None if self.server is None else self.server.digest().hex(),
        )
        self.pool.settle()
        if self._progress is not None:
            self._progress(record)
        return scores, last

    def _open(self, number: int, state: Tree | None = None) -> OpenRound:
        """Begin a round, or go on with it."""
        asked = self._participants(number) if state is None else state["asked"]
        norm = self.server.norm if self.server is not None else lambda frame: 0.0
        current = OpenRound(number, asked, [], Replies(number, asked, norm))
        if state is not None:
            current.load(state)
        else:
            self.delivery.late(current.replies)
        return current

    def _participants(self, number: int) -> list[int]:
        if self._coins is None:
            return participants(self.config, len(self.pool), number)
        return poisson_participants(len(self.pool), self.config.participation, self._coins)

    def _call(self, index: int) -> tuple[ClientRow, Tree]:
        """Let a client come, as up to date as the server; return how it was before."""
        row = ClientRow(index)
        before = None if self.config.quorum == 1.0 else self.pool.before(index)
        self._catch_up(self.pool.take(index), row)
        return row, before

    def _turn(self, current: OpenRound, row: ClientRow, before: Tree, energy: float) -> None:
        """Let one client train and reply; what goes wrong with it is its own affair."""
        number, index, config = current.number, row.client, self.config
        assert index is not None
        client = self.pool.take(index)
        try:
            with row.timed():
                row.losses = client.train(number, config.lr_share(number))
            row.add(*client.elsewhere)
            if self.server is not None:
                with row.timed(codec=True):
                    row.frame = client.upload(energy, factor=self.delivery.factor(index))
                self.delivery.send(client, row, current.replies, self.server)
        except DiskError:
            raise
        except Exception as error:
            if config.quorum == 1.0:
                raise
            self.pool.undo(index, before)
            row.losses, row.frame = Losses(None, None), b""
            row.refused, row.gone = spoken(error), True
            self.journal.add("failed", round=number, client=index, reason=row.refused)
            row.error = None if isinstance(error, InjectedFault) else error
        current.rows.append(row)
        if self._progress is not None:
            place = number, config.rounds, index, len(current.rows), len(current.asked)
            self._progress(ClientRecord(*place, *row.losses, row.seconds))

    def _check_quorum(self, current: OpenRound) -> None:
        """Refuse what does not fit the others, and the round if too little is left."""
        limit = self.config.norm_limit
        if limit is not None and self._coins is None:
            for refused in current.replies.refuse_large(limit):
                self.delivery.note(current.number, refused)
                row = next(row for row in current.rows if row.client == refused.client)
                row.refused = refused.detail
        failed = [row for row in current.rows if row.refused is not None]
        accepted, asked = len(current.asked) - len(failed), len(current.asked)
        needed = min(self.config.needed(asked), asked)
        if accepted >= needed:
            return
        self.journal.add("quorum", round=current.number, accepted=accepted, needed=needed)
        first = next((row.error for row in failed if row.error is not None), None)
        if accepted == 0 and first is not None and all(row.error for row in failed):
            # All clients fail: that is no matter of clients.
            raise first
        reasons = [f"client {row.client}: {row.refused}" for row in failed]
        raise QuorumError(current.number, accepted, needed, asked, reasons) from first

    def _exchange(
        self, server: Server, current: OpenRound, server_row: ClientRow, energy: float
    ) -> None:
        """Turn the replies that count into the broadcast, and give it to all who are there."""
        number, config, replies = current.number, self.config, current.replies.frames
        frames = {i: replies[i] for i in current.asked if i in replies}
        weights = None
        if config.weighting == "samples":
            weights = [float(self.shards.size(index)) for index in frames]
        with server_row.timed(codec=True):
            server_row.frame = server.step(frames, energy, weights)
        for client_index, detail in server.left_out.items():
            self.journal.add("left-out", round=number, client=client_index, detail=detail)
        server_row.bytes_down = len(server_row.frame)
        if config.spectra:
            server_row.spectra = spectra(server.mean)
        for row in current.rows:
            assert row.client is not None
            if row.gone:
                continue
            client = self.pool.take(row.client)
            if row.lost:
                client.lost(row.frame)
            elif row.refused is not None:
                client.refused()
            self._receive(client, row, [server_row.frame])
            if config.refresh_steps:
                self._refresh(number, client, row)

    def _refresh(self, number: int, client: Peer, row: ClientRow) -> None:
        """Let a mentor learn from the fresh mentee; where that fails, it goes on without."""
        before = None if self.config.quorum == 1.0 else self.pool.before(client.index)
        try:
            with row.timed():
                client.refresh(self.config.lr_share(number))
        except Exception as error:
            if self.config.quorum == 1.0:
                raise
            self.pool.undo(client.index, before)
            self.journal.add("failed", round=number, client=client.index, reason=spoken(error))

    def _catch_up(self, client: Peer, row: ClientRow) -> None:
        """Bring a client that missed rounds to the server's version."""
        if self.server is not None and client.version < self.server.version:
            client.absent(self.server.version - client.version)
            self._receive(client, row, self.server.catch_up(client.version))

    def _receive(self, client: Peer, row: ClientRow, frames: Sequence[bytes]) -> None:
        """Hand a client what the server sends, and hold its copy against the server's."""
        assert self.server is not None
        received = self.delivery.broadcast(client.index, self.server.version, row, frames)
        with row.timed(codec=True):
            client.apply(*received)
        self.evaluation.current = client.index
        client.require(self.server.digest(), self.server.version)

    def _witness(self) -> list[ClientRow]:
        """See that a client that can be scored has the server's version, also where nobody came."""
        index = self.evaluation.current
        if self.server is None or self.pool.version(index) == self.server.version:
            return []
        row = ClientRow(index)
        self._catch_up(self.pool.take(index), row)
        return [row]

    def _bring_up_to_date(self, asked: Sequence[int]) -> list[ClientRow]:
        """Give the final model to those who do not have it; return a row of each.

        Those whose models nobody looks at are counted, and not made for it.
        """
        rows: list[ClientRow] = []
        if self.server is None:
            there = set(asked)
            return [ClientRow(index) for index in range(len(self.pool)) if index not in there]
        for index in range(len(self.pool)):
            row, version = ClientRow(index), self.pool.version(index)
            if version == self.server.version:
                continue
            if index in self.evaluation.clients:
                self._catch_up(self.pool.take(index), row)
            else:
                row.bytes_down = self.delivery.broadcast_bytes(self.server.catch_up(version))
                row.messages = 1
            rows.append(row)
        return rows

    def _halt(self, current: OpenRound) -> None:
        """End within a round; what its clients did is kept where there are checkpoints."""
        self.journal.add("stop", round=current.number, clients=len(current.rows))
        self._save(current)
        kept = "" if self._store is None else "; what was trained is kept"
        raise Stopped(f"stopped in round {current.number} of {self.config.rounds}{kept}")

    def _save(self, pending: OpenRound | None = None) -> None:
        """Make a checkpoint.

        Raises:
            OSError: it cannot be written; the one before is intact.
        """
        if self._store is None:
            return
        assert self.writer is not None
        store, started, done = self._store, time.perf_counter(), self.recorder.rounds_done
        try:
            self.pool.write_changed()
            if self.server is not None:
                store.write(_SERVER, self.server.state())
            under_way = {
                "coins": self._coins and json.dumps(self._coins.bit_generator.state),
                "pending": pending and pending.state(),
                "late": self.delivery.state(),
            }
            store.write(_ROUND, under_way)
            facts = {
                "counts": self.recorder.counts(),
                "evaluation": self.evaluation.state(),
                "versions": sorted(self.pool.versions().items()),
            }
            clock = {
                "seconds": self._seconds,
                "seconds_codec": self.recorder.seconds_codec,
                "metrics": self.writer.metrics_bytes(),
                "events": dict(self.journal.counts),
            }
            found = store.commit(facts, clock)
        except OSError as error:
            raise OSError(
                f"the checkpoint after round {done} cannot be written: {error.strerror or error}; "
                f"{self.intact()}"
            ) from error
        spent = time.perf_counter() - started
        self.journal.add("checkpoint", round=done, sha256=found, seconds=spent)

    def intact(self) -> str:
        """Say where a run whose disk is full will go on."""
        return "there is no checkpoint yet" if self._store is None else self._store.intact()

    def _load(self, store: Store) -> None:
        """Go on where the checkpoint was made."""
        assert self.writer is not None
        facts = store.facts
        self.recorder.load(facts["counts"], facts["seconds_codec"])
        self.evaluation.load(facts["evaluation"])
        self._earlier = facts["seconds"]
        self.pool.load_versions(facts["versions"])
        self.journal.counts.update(facts["events"])
        self.writer.cut_metrics(facts["metrics"])
        if self.server is not None:
            self.server.load(store.read(_SERVER))
        under_way = store.read(_ROUND)
        self.delivery.load(under_way["late"])
        if self._coins is not None:
            self._coins.bit_generator.state = json.loads(under_way["coins"])
        if under_way["pending"] is not None:
            number = self.recorder.rounds_done + 1
            self._pending = self._open(number, under_way["pending"])
