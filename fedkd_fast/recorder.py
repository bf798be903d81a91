"""What is kept of a run: a line for each client and round, the counts, the summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fedkd_fast import __version__
from fedkd_fast.config import TrainConfig
from fedkd_fast.costs import mentor_frame_bytes
from fedkd_fast.methods import Learner, Method
from fedkd_fast.records import ClientRow, RoundRecord
from fedkd_fast.scores import Scores
from fedkd_fast.server import Server
from fedkd_fast.tasks import Task
from fedkd_fast.trees import Tree
from fedkd_fast.writer import RunWriter

_ROLES = {"mentor": "mentors", "mentee": "mentees", "mean": "means"}


class Recorder:
    """Counts what rounds cost, and writes it down.

    Args:
        config: of the run.
        method: that it uses.
        clients: how many there are.
        writer: of the run folder, if there is one.
    """

    def __init__(
        self, config: TrainConfig, method: Method, clients: int, writer: RunWriter | None
    ) -> None:
        self._config, self._method, self._clients, self._writer = config, method, clients, writer
        self.rounds_done = 0
        self.bytes_up = self.bytes_down = 0
        self.messages = 0  # uploads, and what clients received at a time
        self.seconds_codec = 0.0

    def counts(self) -> Tree:
        """Return the counts, equal in equal runs."""
        return [self.rounds_done, self.bytes_up, self.bytes_down, self.messages]

    def load(self, counts: Tree, seconds_codec: float) -> None:
        """Go on from these counts."""
        self.rounds_done, self.bytes_up, self.bytes_down, self.messages = counts
        self.seconds_codec = seconds_codec

    def add(
        self,
        number: int,
        energy: float,
        rows: Sequence[ClientRow],
        server_row: ClientRow,
        server: Server | None,
        scores: Scores,
    ) -> RoundRecord:
        """Record a round, and return what it was like."""
        up, down = sum(row.bytes_up for row in rows), sum(row.bytes_down for row in rows)
        count = self._clients
        record = RoundRecord(
            round=number,
            rounds=self._config.rounds,
            energy=energy if self._lossy(server) else None,
            loss_mentor=mean([row.losses.mentor for row in rows]),
            loss_mentee=mean([row.losses.mentee for row in rows]),
            score_mentor=scores.mean("mentors"),
            score_mentee=scores.mean("mentees"),
            score_mean=scores.mean("means"),
            split=scores.split if scores.mentors or scores.mentees else None,
            bytes_up=up / count,
            bytes_down=down / count,
            seconds=sum(row.seconds for row in [*rows, server_row]),
            seconds_codec=sum(row.seconds_codec for row in [*rows, server_row]),
        )
        self.rounds_done = number
        self.bytes_up += up
        self.bytes_down += down
        self.messages += sum(row.messages for row in rows)
        self.seconds_codec += record.seconds_codec
        if self._writer is not None:
            self._write(self._writer, record, rows, server_row, server, scores)
        return record

    def _write(
        self,
        writer: RunWriter,
        record: RoundRecord,
        rows: Sequence[ClientRow],
        server_row: ClientRow,
        server: Server | None,
        scores: Scores,
    ) -> None:
        writer.add_events(record)
        head = {"round": record.round, "energy": record.energy}
        schemas = server.schemas() if server is not None else ([], [])
        mentors, mentees = scores.of("mentors"), scores.of("mentees")
        lines = []
        for row in rows:
            assert row.client is not None
            # Of thousands of clients only the first are scored.
            found = {
                "score_mentor": mentors[row.client] if row.client < len(mentors) else None,
                "score_mentee": mentees[row.client] if row.client < len(mentees) else None,
                "split": record.split,
            }
            lines.append(head | row.record(schemas[0]) | found)
        if server is not None:
            names = ("score_mentor", "score_mentee", "split", "loss_mentor", "loss_mentee")
            means = {name: getattr(record, name) for name in names}
            lines.append(head | server_row.record(schemas[1]) | means | {"bytes_up": 0})
        writer.append(lines)

    def codec(self) -> str | None:
        """Return what updates travel as; None for a codec that is the method's own."""
        if self._config.codec is None and self._method.packing is not None:
            return None
        return self._config.codec or self._method.codec

    def _lossy(self, server: Server | None) -> bool:
        """Say whether a share of energy decides what is sent, on either leg."""
        codecs = self.codec(), self._config.codec_down
        return server is not None and any(one not in (None, "raw") for one in codecs)

    def summary(
        self, task: Task, learner: Learner, scores: Scores, sizes: dict[str, int], seconds: float
    ) -> dict[str, Any]:
        """Return what a run came to: scores, bytes per client, time."""
        config, count = self._config, self._clients
        up, down = self.bytes_up / count, self.bytes_down / count
        # As many models as there were messages, also where some were several broadcasts, sent
        # together to catch up: there one model is the least.
        messages = self.messages or 2 * self.rounds_done * count
        fedavg = mentor_frame_bytes(task, learner) * messages / count
        names = ("method", "preset", "task", "seed", "clients", "energy_start", "energy_end")
        # What users would ask, or else the model that there is.
        there = {"mentor": learner.mentor is not None, "mentee": learner.mentee is not None}
        there["mean"] = all(there.values())
        role = next(one for one in (config.inference, "mentor", "mentee") if there[one])
        return {
            **{name: getattr(config, name) for name in names},
            "rounds": self.rounds_done,
            "codec": self.codec(),
            **{f"score_{role}": scores.mean(found) for role, found in _ROLES.items()},
            **{f"scores_{role}": scores.of(found) for role, found in _ROLES.items()},
            "metrics": {role: scores.table(found) for role, found in _ROLES.items()},
            "inference": role,
            "score": scores.mean(_ROLES[role]),
            "metric": task.metric,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_fedavg_mentor": fedavg,
            "saving": 1.0 - (up + down) / fedavg if self._method.exchanges else None,
            "seconds": seconds,
            "seconds_codec": self.seconds_codec,
            **sizes,
            "version": __version__,
        }


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
