"""The federated loop in one process: rounds, evaluation, and a count of every byte that travels."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkd_fast import __version__
from fedkd_fast._seeds import derived_seed
from fedkd_fast.client import Client
from fedkd_fast.compress import Compressor
from fedkd_fast.config import TrainConfig as TrainConfig
from fedkd_fast.config import task_options
from fedkd_fast.methods import LocalSettings, Method, get_method
from fedkd_fast.models import parameter_count, trainable_parameters
from fedkd_fast.records import ClientRow, RoundRecord
from fedkd_fast.runs import RunWriter
from fedkd_fast.server import Server
from fedkd_fast.tasks import Task, build_task, task_defaults
from fedkd_fast.wire import Base

# Uses of the run's seed apart from the clients' own, which start at 0: keys of `derived_seed`.
_SHARDS, _PRIVATE = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: TrainConfig
    summary: Mapping[str, Any]
    mentors: tuple[nn.Module, ...]  # one a client; a single one where all are the same
    mentee: nn.Module | None
    folder: Path | None = field(default=None)  # None if nothing was written


def train(
    task: str | Task = "digits",
    method: str = "fedkd",
    *,
    progress: Callable[[RoundRecord], None] | None = None,
    **fields: Any,
) -> Run:
    """Train by a method on a task, all clients in this process, one after the other.

    What is not given follows `Task.defaults`, then `TrainConfig`. Clients and server exchange bytes
    alone, and all byte counts are lengths of what was sent.

    Args:
        task: "digits", "text", or an object that implements `Task`.
        method: "fedkd", "local", "central", "fedavg" or "fedavg-mentee".
        progress: called after each round.
        fields: further fields of `TrainConfig`.

    Returns:
        The trained models and the summary; with ``out``, they also lie in that folder.

    Raises:
        ValueError: an argument out of its range, data that cannot be read, an ``out`` that exists;
            before anything is trained or written. Later: training diverged.
        TypeError: an argument of a wrong type or name.
        OSError: ``out`` cannot be written.
    """
    name = task if isinstance(task, str) else task.name
    defaults = task_defaults(task) if isinstance(task, str) else task.defaults()
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted((set(fields) | set(defaults)) - known)
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no field of TrainConfig")
    # Paths as text, which the configuration is written as.
    plain = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in fields.items()
    }
    config = TrainConfig(**{**defaults, **plain, "task": name, "method": method})
    writer = RunWriter(config.out, overwrite=config.overwrite) if config.out is not None else None
    with _threads(config.threads):
        chosen = build_task(task, task_options(config)) if isinstance(task, str) else task
        try:
            return _Loop(config, chosen, writer, progress).run()
        finally:
            if writer is not None:
                writer.close()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loop:
    """One run: the clients, the server, and the counts."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        writer: RunWriter | None,
        progress: Callable[[RoundRecord], None] | None,
    ) -> None:
        self.config, self.task, self.writer, self.progress = config, task, writer, progress
        self.method = get_method(config.method)
        self.clients = _make_clients(config, task, self.method)
        self.server = _make_server(config, self.clients[0], self.method)
        self.bytes_up = self.bytes_down = 0
        self.seconds_codec = 0.0

    def run(self) -> Run:
        """Train all rounds, evaluate and write."""
        started = time.perf_counter()
        sizes = self._sizes()
        if self.writer is not None:
            facts = {**self.task.describe(), **sizes}
            config = dataclasses.asdict(self.config)
            self.writer.start({**config, "version": __version__, "task_facts": facts})
        scores: _Scores | None = None
        for number in range(1, self.config.rounds + 1):
            scores = self._round(number)
        assert scores is not None  # rounds >= 1, and the last one is evaluated
        summary = self._summary(scores, sizes, time.perf_counter() - started)
        mentors, mentee = self._models()
        if self.writer is not None:
            self.writer.finish(self.task, mentors, mentee, summary)
        folder = self.writer.folder if self.writer is not None else None
        return Run(self.config, summary, mentors, mentee, folder)

    def _round(self, number: int) -> _Scores | None:
        config, energy = self.config, self.config.energy(number)
        rows: list[ClientRow] = []
        for client in self.clients:
            row = ClientRow(client.index)
            with row.timed():
                row.losses = client.train(number, config.lr_share(number))
            if self.server is not None:
                with row.timed(codec=True):
                    row.frame = client.upload(energy)
            rows.append(row)
        server_row = ClientRow(None)
        if self.server is not None:
            with server_row.timed(codec=True):
                server_row.frame = self.server.step([row.frame for row in rows], energy)
            for client, row in zip(self.clients, rows, strict=True):
                with row.timed(codec=True):
                    client.apply(server_row.frame)
            self._check_copies(number)
        scores = None
        if number % config.eval_every == 0 or number == config.rounds:
            scores = self._evaluate()
        self._record(number, energy, rows, server_row, scores)
        return scores

    def _check_copies(self, number: int) -> None:
        """Hold every client's copy of the shared model against the server's, bit for bit."""
        assert self.server is not None
        wanted = self.server.digest()
        for client in self.clients:
            if client.digest() != wanted:
                raise RuntimeError(
                    f"client {client.index} holds other shared parameters than the server after "
                    f"round {number}"
                )

    def _models(self) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
        """Return the distinct mentors and the mentee."""
        first = self.clients[0].learner
        mentors = [client.learner.mentor for client in self.clients]
        if first.shared is not None and first.shared is first.mentor:
            mentors = mentors[:1]
        return tuple(model for model in mentors if model is not None), first.mentee

    def _evaluate(self) -> _Scores:
        mentors, mentee = self._models()
        found = [self.task.evaluate(model) for model in mentors]
        if len(found) == 1:
            # The shared mentor is one model: every client has its score.
            found *= len(self.clients)
        return _Scores(found, self.task.evaluate(mentee) if mentee is not None else None)

    def _record(
        self,
        number: int,
        energy: float,
        rows: Sequence[ClientRow],
        server_row: ClientRow,
        scores: _Scores | None,
    ) -> None:
        count, bytes_down = len(rows), len(server_row.frame)
        scores = scores or _Scores([], None)
        record = RoundRecord(
            round=number,
            rounds=self.config.rounds,
            energy=energy,
            loss_mentor=_mean([row.losses.mentor for row in rows]),
            loss_mentee=_mean([row.losses.mentee for row in rows]),
            score_mentor=_mean(scores.mentors),
            score_mentee=scores.mentee,
            bytes_up=sum(len(row.frame) for row in rows) / count,
            bytes_down=bytes_down,
            seconds=sum(row.seconds for row in [*rows, server_row]),
            seconds_codec=sum(row.seconds_codec for row in [*rows, server_row]),
        )
        self.bytes_up += sum(len(row.frame) for row in rows)
        self.bytes_down += bytes_down * count
        self.seconds_codec += record.seconds_codec
        if self.writer is not None:
            lossy = self.server is not None and not self.method.lossless
            head = {"round": number, "energy": energy if lossy else None}
            schema = self.server.schema if self.server is not None else []
            for index, row in enumerate(rows):
                mentor = scores.mentors[index] if scores.mentors else None
                self.writer.append(head | row.record(mentor, scores.mentee, bytes_down, schema))
            if self.server is not None:
                means = server_row.record(record.score_mentor, scores.mentee, bytes_down, schema)
                losses = {"loss_mentor": record.loss_mentor, "loss_mentee": record.loss_mentee}
                self.writer.append(head | means | losses | {"bytes_up": 0})
        if self.progress is not None:
            self.progress(record)

    def _sizes(self) -> dict[str, int]:
        """Count parameters of models and of what is shared; models that do not train count too."""
        learner = self.clients[0].learner
        mentor = learner.mentor or self.task.build_mentor()
        mentee = learner.mentee or self.task.build_mentee()
        shared = trainable_parameters(learner.shared) if learner.shared is not None else {}
        return {
            "parameters_mentor": parameter_count(mentor),
            "parameters_mentee": parameter_count(mentee),
            "parameters_shared": sum(value.numel() for value in shared.values()),
        }

    def _mentor_frame(self) -> int:
        """Return the bytes of a lossless frame of a mentor's update, what fedavg sends each way."""
        mentor = self.clients[0].learner.mentor or self.task.build_mentor()
        # Not of the weights themselves: biases that start at zero would cost nothing.
        update = {name: torch.ones_like(p) for name, p in trainable_parameters(mentor).items()}
        # What a frame says of its base is counted in both.
        base = Base(digest=bytes(16))
        return len(Compressor(codec="raw", schema=False).compress(update, relative_to=base))

    def _summary(self, scores: _Scores, sizes: Mapping[str, int], seconds: float) -> dict[str, Any]:
        config, count = self.config, len(self.clients)
        up, down = self.bytes_up / count, self.bytes_down / count
        fedavg = 2 * config.rounds * self._mentor_frame()
        names = (
            "method",
            "task",
            "seed",
            "rounds",
            "clients",
            "energy_start",
            "energy_end",
            "codec",
        )
        return {
            **{name: getattr(config, name) for name in names},
            "score_mentor": _mean(scores.mentors),
            "score_mentee": scores.mentee,
            "scores_mentor": scores.mentors,
            "metric": self.task.metric,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_fedavg_mentor": fedavg,
            "saving": 1.0 - (up + down) / fedavg if self.server is not None else None,
            "seconds": seconds,
            "seconds_codec": self.seconds_codec,
            **sizes,
            "version": __version__,
        }


@dataclass(frozen=True)
class _Scores:
    mentors: list[float]  # one a client
    mentee: float | None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _make_clients(config: TrainConfig, task: Task, method: Method) -> list[Client]:
    shards = task.shards(config.clients, derived_seed(config.seed, _SHARDS))
    if method.pools_data:
        shards = [task.merge(shards)]
    clients = []
    for index, shard in enumerate(shards):
        settings = LocalSettings(
            lr_mentor=config.lr_mentor,
            lr_mentee=config.lr_mentee,
            weight_decay=config.weight_decay,
            hidden=config.hidden,
            attention=config.attention,
            seed=derived_seed(config.seed, _PRIVATE, index),
        )
        client = Client(
            index,
            method.make_learner(task, settings),
            task,
            shard,
            _make_compressor(config, method),
            seed=config.seed,
            local_epochs=config.local_epochs,
        )
        clients.append(client)
    return clients


def _make_compressor(config: TrainConfig, method: Method) -> Compressor:
    # Everyone has the shared model: its names and shapes need not travel.
    if method.lossless:
        return Compressor(codec="raw", schema=False)
    return Compressor(codec=config.codec, feedback=config.feedback, schema=False)


def _make_server(config: TrainConfig, client: Client, method: Method) -> Server | None:
    shared = client.learner.shared
    if shared is None:
        return None
    parameters = {name: p.detach().clone() for name, p in trainable_parameters(shared).items()}
    return Server(parameters, _make_compressor(config, method))
