"""Runs that differ in nothing but the seed, taken together: means and spreads over seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedkd_fast.report.runs import ROLES, RunFolder

# What may differ between the seeds of one thing.
_APART = {"seed", "out", "overwrite", "tensorboard", "environment", "version", "task_facts"}
_SEED_SUFFIX = re.compile(r"-s\d+$")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, one for each seed, and what they are called."""

    label: str
    runs: tuple[RunFolder, ...]

    @property
    def first(self) -> RunFolder:
        """The run that stands for all where one must."""
        return self.runs[0]

    @property
    def has_traffic(self) -> bool:
        """Whether anything was sent."""
        return self.first.has_traffic

    def values(self, value: Callable[[RunFolder], float | None]) -> list[float]:
        """What the runs say, those that say something."""
        return [found for run in self.runs if (found := value(run)) is not None]

    def numbers(self, key: str) -> list[float]:
        """A number of the summaries."""
        return self.values(lambda run: run.number(key))

    def mean(self, key: str) -> float | None:
        """Mean of a number of the summaries, None where no run has it."""
        found = self.numbers(key)
        return statistics.fmean(found) if found else None

    @property
    def score(self) -> float | None:
        """The score a user gets, mean over the runs."""
        found = self.values(lambda run: run.score)
        return statistics.fmean(found) if found else None

    def metrics(self) -> dict[str, dict[str, list[float]]]:
        """Values of all metrics on the test data by role and metric, one a run."""
        found: dict[str, dict[str, list[float]]] = {}
        for run in self.runs:
            for role, table in run.metrics().items():
                for name, value in table.items():
                    found.setdefault(role, {}).setdefault(name, []).append(value)
        return {role: found[role] for role in ROLES if role in found}

    def curve(self, value: Callable[[RunFolder], dict[int, float]]) -> Band:
        """Mean, least and largest value by round, over the runs that have one."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for at, one in value(run).items():
                found.setdefault(at, []).append(one)
        rounds = sorted(found)
        return Band(
            rounds,
            [statistics.fmean(found[at]) for at in rounds],
            [min(found[at]) for at in rounds],
            [max(found[at]) for at in rounds],
        )


@dataclass(frozen=True)
class Band:
    """A curve over rounds with its spread over seeds."""

    rounds: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (n - 1), None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def group_runs(runs: Sequence[RunFolder]) -> list[Group]:
    """Take runs together that differ in the seed alone, in the order of their first ones.

    Runs that tell of other data are no seeds of one thing, unless they were given one name.

    Labels are the shortest that tell a task's groups apart: name or method, then the folder's name
    without the seed, then its path.
    """
    found: list[tuple[object, list[RunFolder]]] = []
    for run in runs:
        key = (run.task, run.metric, _identity(run))
        fitting = (same for other, same in found if other == key and _joins(run, same))
        same = next(fitting, None)
        if same is None:
            found.append((key, [run]))
        else:
            same.append(run)
    groups = [tuple(same) for _, same in found]
    return [
        Group(label, same)
        for label, same in zip(_labels([same[0] for same in groups]), groups, strict=True)
    ]


def _identity(run: RunFolder) -> str:
    if run.name is not None:
        return run.name
    config = {key: value for key, value in run.config.items() if key not in _APART}
    return f"{run.method} {json.dumps(config, sort_keys=True)}"


def _joins(run: RunFolder, same: Sequence[RunFolder]) -> bool:
    # The same run twice is no spread over seeds.
    if any(run.summary.get("seed") == other.summary.get("seed") for other in same):
        return False
    contents = [found for one in (run, *same) if (found := _content(one)) is not None]
    return all(found == contents[0] for found in contents)


def _content(run: RunFolder) -> object:
    """Digests of the data; None where a run does not tell, or its name says what it belongs to."""
    facts = run.config.get("task_facts")
    return facts.get("content") if isinstance(facts, dict) and run.name is None else None


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    labels = [run.name or run.method for run in runs]
    details: tuple[Callable[[RunFolder], str], ...] = (
        lambda run: _SEED_SUFFIX.sub("", run.path.name),
        lambda run: str(run.path),
    )
    for detail in details:
        seen = Counter((run.task, label) for run, label in zip(runs, labels, strict=True))
        labels = [
            f"{run.name or run.method}, {detail(run)}" if seen[run.task, label] > 1 else label
            for run, label in zip(runs, labels, strict=True)
        ]
    return labels


def featured(groups: Sequence[Group]) -> Group:
    """The group of the headline: the first of FedKD, else the one with the best score."""
    for group in groups:
        if group.first.method == "fedkd":
            return group
    return max(groups, key=lambda group: -math.inf if group.score is None else group.score)
