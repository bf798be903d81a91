"""Run folders, read again to evaluate and predict; `writer` writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedkd_fast._files import read_json_object
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.models import load_model
from fedkd_fast.scores import evaluate, test_sets
from fedkd_fast.tasks import TASKS, PredictingTask, Task, build_task
from fedkd_fast.tasks.content import changed_splits

_log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
PARTITION, JOURNAL, EVENTS = "partition.json", "journal.jsonl", "events"
# Models of clients lie in numbered folders; of a mentee that is the same everywhere there is one.
MENTEE, MENTEES, MENTORS = "mentee", "mentees", "mentors"


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, read back."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    task: Task
    mentees: tuple[nn.Module, ...]  # one a client, a single one where all are the same, or none
    mentors: tuple[nn.Module, ...]  # likewise

    @property
    def mentee(self) -> nn.Module | None:
        """The mentee, that of the first client where they differ."""
        return self.mentees[0] if self.mentees else None


def load_run(folder: str | Path, task: Task | None = None) -> LoadedRun:
    """Read a run folder.

    Args:
        folder: what `train` wrote.
        task: the task, if it is not a built-in one.

    Raises:
        ValueError: no finished run lies there, or its task is not built in and not given.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    config, summary = (_read_json(folder / name) for name in (CONFIG, SUMMARY))
    if task is None:
        task = _task_of(folder, config)
    if (folder / MENTEE).is_dir():
        mentees = [load_model(folder / MENTEE, task.build_mentee)]
    else:
        mentees = _load_models(folder / MENTEES, task.build_mentee)
    mentors = _load_models(folder / MENTORS, task.build_mentor)
    if not mentees and not mentors:
        raise ValueError(f"{folder} holds no models: {MENTEE} or {MENTORS} is wanted")
    return LoadedRun(config, summary, task, tuple(mentees), tuple(mentors))


def _load_models(folder: Path, build: Callable[[int], nn.Module]) -> list[nn.Module]:
    folders = _numbered(folder)
    return [load_model(path, partial(build, client)) for client, path in enumerate(folders)]


def _numbered(folder: Path) -> list[Path]:
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else ()
    wanted = [str(client) for client in range(len(found))]
    if set(found) != set(wanted):
        raise ValueError(
            f"{folder} must hold folders numbered from 0, one a client, got "
            f"{', '.join(sorted(found))}"
        )
    return [folder / name for name in wanted]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no folder of a finished run: it holds no {path.name}")
    return read_json_object(path)


def _task_of(folder: Path, config: Mapping[str, Any]) -> Task:
    name = config.get("task")
    if name not in TASKS:
        raise ValueError(
            f"{folder} is a run of task {name!r}, which is not built in: pass task= to the "
            "functions of fedkd_fast.runs"
        )
    known = {key: config[key] for key in TrainConfig.__dataclass_fields__ if key in config}
    if known.get("mentor") is not None:
        # The trained models carry all that is needed; the pretrained ones may be gone by now.
        models = [*_numbered(folder / MENTORS), folder / MENTEE, *_numbered(folder / MENTEES)]
        found = next((path for path in models if path.is_dir()), None)
        if found is None:
            raise ValueError(f"{folder} holds no models: {MENTEE} or {MENTORS} is wanted")
        known["mentor"] = str(found)
        known["mentee"] = None
    try:
        options = task_options(TrainConfig(**known))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return build_task(str(name), options)


def evaluate_run(folder: str | Path, task: Task | None = None) -> dict[str, Any]:
    """Score the models of a run again on its task's test data.

    Args:
        folder: what `train` wrote.
        task: the task, if it is not a built-in one.

    Returns:
        ``task``, ``metric``, ``score_mentor`` (mean), ``scores_mentor`` (one a saved mentor),
        ``score_mentee``, ``score_mean`` (of both models together, if that was the inference) and
        ``metrics``, means of all metrics by role; None where there is no such model.

    Raises:
        ValueError: no finished run lies there, or its data cannot be read.
    """
    run = load_run(folder, task)
    for role, there in (("mentor", len(run.mentors)), ("mentee", len(run.mentees))):
        told = run.summary.get(f"scores_{role}")
        # A single one is that of all.
        if isinstance(told, list) and 1 < there < len(told):
            raise ValueError(
                f"{folder} must hold a {role} for each of the {len(told)} scores in {SUMMARY}, "
                f"got {there}"
            )
    facts = run.config.get("task_facts")
    began = facts.get("content") if isinstance(facts, dict) else None
    if "test" in changed_splits(began, getattr(run.task, "content", None)):
        _log.warning("%s: the test data are not those that the run was scored on", folder)
    models = max(len(run.mentors), len(run.mentees))
    clients = test_sets(run.task, run.config.get("clients", models), models)
    # Models of the first clients alone were scored and saved.
    clients = min(clients, run.config.get("scored_clients", clients))
    # What is asked together is asked twice as long, so only where that is what counts.
    together = run.config.get("inference") == "mean"
    scores = evaluate(run.task, "test", run.mentors, run.mentees, clients, together=together)
    return {
        "task": run.task.name,
        "metric": run.task.metric,
        "score_mentor": scores.mean("mentors"),
        "scores_mentor": scores.of("mentors"),
        "score_mentee": scores.mean("mentees"),
        "score_mean": scores.mean("means"),
        "metrics": {
            role: scores.table(found)
            for role, found in (("mentor", "mentors"), ("mentee", "mentees"), ("mean", "means"))
        },
    }


def predict_run(
    folder: str | Path,
    data: str | None = None,
    *,
    client: int | None = None,
    task: Task | None = None,
) -> Iterator[dict[str, Any]]:
    """Label samples with a model of a run.

    Args:
        folder: what `train` wrote.
        data: file of samples, as the task's ``predict`` reads it; None takes the test data.
        client: use the mentor of this client, or its mentee where the method has no mentors; None
            takes the mentee, that of the first client where they differ, or the first mentor where
            there is none.
        task: the task, if it is not a built-in one.

    Returns:
        An iterator over one record a sample.

    Raises:
        ValueError: no finished run, no such client, or data that cannot be read.
        TypeError: the task has no prediction.
    """
    run = load_run(folder, task)
    if not isinstance(run.task, PredictingTask):
        raise TypeError(f"task {run.task.name!r} cannot predict")
    models = run.mentors or run.mentees
    if client is not None and not 0 <= client < len(models):
        raise ValueError(f"client must lie in 0..{len(models) - 1}, got {client}")
    model = run.mentee if client is None else models[client]
    return run.task.predict(model or models[0], data, client=client or 0)
