"""The federated loop in one process: rounds, evaluation, and a count of every byte that travels."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
from fedkd_fast._device import require_device
from fedkd_fast.adapters import merge_adapter
from fedkd_fast.assembly import make_clients, make_server, participants, shard_sizes
from fedkd_fast.client import Client
from fedkd_fast.config import PRESETS, task_options
from fedkd_fast.config import TrainConfig as TrainConfig
from fedkd_fast.costs import mentor_frame_bytes, model_sizes
from fedkd_fast.methods import get_method
from fedkd_fast.records import ClientRecord, ClientRow, RoundRecord, environment
from fedkd_fast.runs import RunWriter
from fedkd_fast.scores import Scores, evaluate, test_sets
from fedkd_fast.spectra import spectra
from fedkd_fast.tasks import Task, build_task, task_defaults

Progress = Callable[["RoundRecord | ClientRecord"], None]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: TrainConfig
    summary: Mapping[str, Any]
    mentors: tuple[nn.Module, ...]  # one a client; a single one where all are the same
    mentee: nn.Module | None  # that of the first client, where each has a head of its own
    folder: Path | None = field(default=None)  # None if nothing was written


def train(
    task: str | Task = "digits",
    method: str = "fedkd",
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Run:
    """Train by a method on a task, all clients in this process, one after the other.

    What is not given follows ``preset`` or else what the task suggests for the method, then
    `Task.defaults`, then `TrainConfig`. Clients and server exchange bytes alone, and all byte
    counts are lengths of what was sent.

    Args:
        task: "digits", "text", "adr", "ner", "mind", or an object that implements `Task`.
        method: one of `fedkd_fast.methods.METHODS`.
        progress: called after each client and after each round.
        fields: further fields of `TrainConfig`.

    Returns:
        The trained models and the summary; with ``out``, they also lie in that folder.

    Raises:
        ValueError: an argument out of its range, data that cannot be read, an ``out`` that exists;
            before anything is trained or written. Later: training diverged.
        TypeError: an argument of a wrong type or name.
        OSError: ``out`` cannot be written.
    """
    config = configure(task, method, fields)
    require_device(config.device)
    writer = None
    if config.out is not None:
        writer = RunWriter(config.out, overwrite=config.overwrite, tensorboard=config.tensorboard)
    with _threads(config.threads):
        chosen = build_task(task, task_options(config)) if isinstance(task, str) else task
        # The data may decide more: a task that was made knows them.
        config = configure(chosen, method, fields)
        try:
            return _Loop(config, chosen, writer, progress).run()
        finally:
            if writer is not None:
                writer.close()


def configure(task: str | Task, method: str, fields: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run, as `train` says.

    Raises:
        ValueError: a value out of its range.
        TypeError: a value of a wrong type, or an unknown name.
    """
    preset = fields.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    # A preset stands for the recipe of FedKD; other methods keep their own.
    pure = PRESETS[preset] if preset is not None and method == "fedkd" else None
    special = method if pure is None else None
    if isinstance(task, str):
        name, defaults = task, task_defaults(task, special)
    else:
        name, defaults = task.name, task.defaults(special)
    defaults = {**defaults, **(pure or {})}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted((set(fields) | set(defaults)) - known)
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no field of TrainConfig")
    # Paths as text, which the configuration is written as.
    plain = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in fields.items()
    }
    if "distillation" in plain:
        plain["distillation"] = {**defaults.get("distillation", {}), **plain["distillation"]}
    return TrainConfig(**{**defaults, **plain, "task": name, "method": method})


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
        self, config: TrainConfig, task: Task, writer: RunWriter | None, progress: Progress | None
    ) -> None:
        self.config, self.task, self.writer, self.progress = config, task, writer, progress
        self.method = get_method(config.method)
        self.clients = make_clients(config, task, self.method)
        self.server = make_server(config, self.clients[0], self.method)
        # Models of clients differ in what is the client's own.
        self._apart = bool(getattr(task, "private", ()))
        self._best: tuple[float, int] = (float("-inf"), 0)
        self.rounds_done = 0
        self.bytes_up = self.bytes_down = 0
        self.messages = 0  # uploads, and what clients received at a time
        self.seconds_codec = 0.0

    def run(self) -> Run:
        """Train all rounds, evaluate and write."""
        started = time.perf_counter()
        sizes = model_sizes(self.task, self.clients[0].learner)
        if self.writer is not None:
            facts = {**self.task.describe(), **sizes, "shard_sizes": shard_sizes(self.clients)}
            config = dataclasses.asdict(self.config) | {"version": __version__}
            self.writer.start({**config, "environment": environment(), "task_facts": facts})
            self.writer.write_partition([client.shard for client in self.clients])
        scores = Scores(self.task.metric, "test")
        for number in range(1, self.config.rounds + 1):
            scores, last = self._round(number)
            if last:
                break
        summary = self._summary(scores, sizes, time.perf_counter() - started)
        mentors, mentees = self._models(self.clients[0])
        if self.writer is not None:
            self.writer.finish(self.task, mentors, mentees, summary)
        folder = self.writer.folder if self.writer is not None else None
        mentee = mentees[0] if mentees else None
        return Run(self.config, summary, tuple(mentors), mentee, folder)

    def _round(self, number: int) -> tuple[Scores, bool]:
        """Train one round; say how its models score, and whether it was the last."""
        config, energy = self.config, self.config.energy(number)
        chosen = [self.clients[i] for i in participants(config, len(self.clients), number)]
        rows = [ClientRow(client.index) for client in chosen]
        for done, (client, row) in enumerate(zip(chosen, rows, strict=True), 1):
            self._catch_up(client, row)
            with row.timed():
                row.losses = client.train(number, config.lr_share(number))
            if self.server is not None:
                with row.timed(codec=True):
                    row.frame = client.upload(energy)
                self.messages += 1
            if self.progress is not None:
                place = number, config.rounds, client.index, done, len(chosen)
                self.progress(ClientRecord(*place, *row.losses, row.seconds))
        server_row = ClientRow(None)
        if self.server is not None:
            weights = None
            if config.weighting == "samples":
                weights = [float(len(client.shard)) for client in chosen]
            with server_row.timed(codec=True):
                frames = [row.frame for row in rows]
                server_row.frame = self.server.step(frames, energy, weights)
            server_row.bytes_down = len(server_row.frame)
            if config.spectra:
                server_row.spectra = spectra(self.server.mean)
            for client, row in zip(chosen, rows, strict=True):
                self._receive(client, row, [server_row.frame])
            self._check_copies(chosen, number)
            for client, row in zip(chosen, rows, strict=True):
                with row.timed():
                    client.refresh(config.lr_share(number))
        scores, last = self._evaluate(number, chosen[0])
        if last:
            # Who did not take part also wants the final model.
            others = [client for client in self.clients if client not in chosen]
            rows += [ClientRow(client.index) for client in others]
            for client, row in zip(others, rows[len(chosen) :], strict=True):
                self._catch_up(client, row)
            self._check_copies(others, number)
            # From here on the models stand alone, as they are saved.
            for model in itertools.chain(*self._models(self.clients[0])):
                merge_adapter(model)
            scores = self._score("test", self.clients[0])
        self.rounds_done = number
        self._record(number, energy, rows, server_row, scores)
        return scores, last

    def _catch_up(self, client: Client, row: ClientRow) -> None:
        """Bring a client that missed rounds to the server's version."""
        if self.server is not None and client.version < self.server.version:
            client.absent(self.server.version - client.version)
            self._receive(client, row, self.server.catch_up(client.version))

    def _receive(self, client: Client, row: ClientRow, frames: Sequence[bytes]) -> None:
        assert self.server is not None
        row.bytes_down += sum(map(len, frames))
        self.messages += 1
        with row.timed(codec=True):
            client.apply(*frames)
        client.version = self.server.version

    def _check_copies(self, clients: Sequence[Client], number: int) -> None:
        """Hold clients' copies of the shared model against the server's, bit for bit."""
        if self.server is None:
            return
        wanted = self.server.digest()
        for client in clients:
            if client.digest() != wanted:
                raise RuntimeError(
                    f"client {client.index} holds other shared parameters than the server after "
                    f"round {number}"
                )

    def _models(self, current: Client) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the distinct mentors and mentees; of shared ones, those of a current client."""
        learners = [client.learner for client in self.clients]
        first = current.learner
        shares_mentor = first.shared is not None and first.shared is first.mentor
        alone = [first] if not self._apart else learners
        mentors = [one.mentor for one in (alone if shares_mentor else learners)]
        mentees = [one.mentee for one in alone]
        return (
            [model for model in mentors if model is not None],
            [model for model in mentees if model is not None],
        )

    def _evaluate(self, number: int, current: Client) -> tuple[Scores, bool]:
        """Score models as far as this round asks for it, and decide whether it is the last."""
        config, final = self.config, number == self.config.rounds
        if final or (number % config.eval_every and config.patience is None):
            return Scores(self.task.metric, "none"), final
        if not getattr(self.task, "has_dev", False):
            return self._score("test", current), False
        scores = self._score("dev", current)
        if config.patience is None:
            return scores, False
        value = scores.mean(f"{config.inference}s")
        if value is None:  # no such model, or both together, who are not asked on dev
            value = _mean([scores.mean("mentors"), scores.mean("mentees")])
        if value is not None and value > self._best[0]:
            self._best = value, number
        return scores, number - self._best[1] >= config.patience

    def _score(self, split: str, current: Client) -> Scores:
        mentors, mentees = self._models(current)
        together = split == "test" and self.config.inference == "mean"
        clients = test_sets(self.task, self.config.clients, len(self.clients))
        return evaluate(self.task, split, mentors, mentees, clients, together=together)

    def _record(
        self,
        number: int,
        energy: float,
        rows: Sequence[ClientRow],
        server_row: ClientRow,
        scores: Scores,
    ) -> None:
        up, down = sum(len(row.frame) for row in rows), sum(row.bytes_down for row in rows)
        count = len(self.clients)
        record = RoundRecord(
            round=number,
            rounds=self.config.rounds,
            energy=energy if self._lossy() else None,
            loss_mentor=_mean([row.losses.mentor for row in rows]),
            loss_mentee=_mean([row.losses.mentee for row in rows]),
            score_mentor=scores.mean("mentors"),
            score_mentee=scores.mean("mentees"),
            score_mean=scores.mean("means"),
            split=scores.split if scores.mentors or scores.mentees else None,
            bytes_up=up / count,
            bytes_down=down / count,
            seconds=sum(row.seconds for row in [*rows, server_row]),
            seconds_codec=sum(row.seconds_codec for row in [*rows, server_row]),
        )
        self.bytes_up += up
        self.bytes_down += down
        self.seconds_codec += record.seconds_codec
        if self.writer is not None:
            self._write(record, rows, server_row, scores)
        if self.progress is not None:
            self.progress(record)

    def _write(
        self,
        record: RoundRecord,
        rows: Sequence[ClientRow],
        server_row: ClientRow,
        scores: Scores,
    ) -> None:
        assert self.writer is not None
        self.writer.add_events(record)
        head = {"round": record.round, "energy": record.energy}
        schemas = self.server.schemas() if self.server is not None else ([], [])
        mentors, mentees = scores.of("mentors"), scores.of("mentees")
        for row in rows:
            assert row.client is not None
            found = {
                "score_mentor": mentors[row.client] if mentors else None,
                "score_mentee": mentees[row.client] if mentees else None,
                "split": record.split,
            }
            self.writer.append(head | row.record(schemas[0]) | found)
        if self.server is not None:
            names = ("score_mentor", "score_mentee", "split", "loss_mentor", "loss_mentee")
            means = {name: getattr(record, name) for name in names}
            self.writer.append(head | server_row.record(schemas[1]) | means | {"bytes_up": 0})

    def _lossy(self) -> bool:
        """Say whether a share of energy decides what is sent, on either leg."""
        codecs = self._codec(), self.config.codec_down
        return self.server is not None and any(one not in (None, "raw") for one in codecs)

    def _codec(self) -> str | None:
        """Return what updates travel as; None for a codec that is the method's own."""
        if self.config.codec is None and self.method.packing is not None:
            return None
        return self.config.codec or self.method.codec

    def _summary(self, scores: Scores, sizes: Mapping[str, int], seconds: float) -> dict[str, Any]:
        config, count = self.config, len(self.clients)
        up, down = self.bytes_up / count, self.bytes_down / count
        # A whole mentor each time, also to those who catch up: there one model is the least.
        messages = self.messages or 2 * self.rounds_done * count
        fedavg = mentor_frame_bytes(self.task, self.clients[0].learner) * messages / count
        names = ("method", "preset", "task", "seed", "clients", "energy_start", "energy_end")
        roles = {"mentor": "mentors", "mentee": "mentees", "mean": "means"}
        # What users would ask, or else the model that there is.
        wanted = (config.inference, "mentor", "mentee")
        role = next(one for one in wanted if scores.of(roles[one]))
        return {
            **{name: getattr(config, name) for name in names},
            "rounds": self.rounds_done,
            "codec": self._codec(),
            **{f"score_{role}": scores.mean(found) for role, found in roles.items()},
            **{f"scores_{role}": scores.of(found) for role, found in roles.items()},
            "metrics": {role: scores.table(found) for role, found in roles.items()},
            "inference": role,
            "score": scores.mean(roles[role]),
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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
