"""Scores of a run's models: private mentors, the shared mentee, and what both say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedkd_fast.models import MeanOfModels
from fedkd_fast.tasks import Task

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Scores:
    """Metrics of all models on one split; empty lists where there is no such model."""

    metric: str
    split: str
    mentors: Sequence[Metrics] = ()  # one a client
    mentees: Sequence[Metrics] = ()  # one a client
    means: Sequence[Metrics] = ()  # of the averaged probabilities of both, one a client

    def of(self, role: str) -> list[float]:
        """Return the metric that counts, by client: of mentors, mentees or means."""
        return [found[self.metric] for found in getattr(self, role)]

    def mean(self, role: str) -> float | None:
        """Return its mean over clients."""
        values = self.of(role)
        # Exact: equal scores of all clients have themselves as mean.
        return statistics.mean(values) if values else None

    def table(self, role: str) -> dict[str, float]:
        """Return the mean over clients of every metric that all of them give."""
        found: Sequence[Metrics] = getattr(self, role)
        names = [name for name in found[0] if all(name in one for one in found)] if found else []
        return {name: statistics.mean(one[name] for one in found) for name in names}


def test_sets(task: Task, clients: int, models: int) -> int:
    """Return how many scores a run has: one a client, or one a model of those that share a test.

    Args:
        task: has the data.
        clients: how many the data were shared out to.
        models: how many trained; one where all data were put together.
    """
    return clients if getattr(task, "own_tests", False) else models


def evaluate(
    task: Task,
    split: str,
    mentors: Sequence[nn.Module],
    mentees: Sequence[nn.Module],
    clients: int,
    *,
    together: bool,
) -> Scores:
    """Score models on a split.

    Args:
        task: has the data.
        split: "test" or "dev".
        mentors: one a client, or one for all, or none.
        mentees: likewise.
        clients: how many there are.
        together: also score the mean of each client's two models.

    Raises:
        ValueError: a score is NaN or infinite, which no model can be better or worse than, or
            there is none by the name of the task's metric; names it. Or there are several models,
            but not one a client.
    """
    own = bool(getattr(task, "own_tests", False))

    def score(role: str, models: Sequence[nn.Module]) -> list[Metrics]:
        if not models:
            return []
        if len(models) not in (1, clients):
            raise ValueError(
                f"there must be one {role} or {clients}, one a client, got {len(models)}"
            )
        count = clients if own else len(models)
        chosen = models if len(models) > 1 else [*models] * count
        found = [
            task.evaluate(model, split=split, client=client) for client, model in enumerate(chosen)
        ]
        for client, metrics in enumerate(found):
            if task.metric not in metrics:
                raise ValueError(
                    f"task.evaluate must give {task.metric!r}, the task's metric, got "
                    f"{', '.join(map(repr, metrics)) or 'nothing'}"
                )
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise ValueError(
                        f"scores of task {task.name} must be finite, got {name} {value} of the "
                        f"{role} of client {client} on {split} data"
                    )
        # One model on one test set: every client has its score.
        return found * clients if len(found) == 1 else found

    means: list[nn.Module] = []
    if together and mentors and mentees:
        paired = [*mentees] * len(mentors) if len(mentees) == 1 else mentees
        means = [MeanOfModels([one, two]) for one, two in zip(mentors, paired, strict=True)]
    models = score("mentor", mentors), score("mentee", mentees), score("mean", means)
    return Scores(task.metric, split, *models)
