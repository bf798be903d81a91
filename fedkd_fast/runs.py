"""Run folders: written while training, read again to evaluate and predict.

``config.json`` is written first, ``metrics.jsonl`` grows line by line, models follow the last
round, and ``summary.json`` comes last: a folder without it is of a run that did not finish.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedkd_fast._files import replacing
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.models import load_model, save_model
from fedkd_fast.tasks import TASKS, PredictingTask, Task, build_task

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
MENTEE, MENTORS = "mentee", "mentors"
_REPORT = "report.html"


class RunWriter:
    """Writes one run folder.

    Args:
        folder: where to; it is not touched before `start`.
        overwrite: replace a run folder that exists.

    Raises:
        ValueError: ``folder`` exists and must be kept, or is no run folder.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            if not overwrite:
                raise ValueError(f"out must not exist without overwrite, got {self.folder}")
            entries = {entry.name for entry in _entries(self.folder)}
            if entries and CONFIG not in entries:
                raise ValueError(
                    f"out must be a run folder or empty to be overwritten, got {self.folder}"
                )
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"out cannot be made: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"out cannot be written: no permission for {existing}")

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the folder, without what an older run left there, and write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The summary goes first: from here on the old run is not finished any more.
        for name in (SUMMARY, METRICS, CONFIG, _REPORT):
            (self.folder / name).unlink(missing_ok=True)
        for name in (MENTEE, MENTORS):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        _write_json(self.folder / CONFIG, config)
        (self.folder / METRICS).touch()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics; it is on its way to the disk when this returns."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def finish(
        self,
        task: Task,
        mentors: Sequence[nn.Module],
        mentee: nn.Module | None,
        summary: Mapping[str, Any],
    ) -> None:
        """Write the models, then the summary."""
        folders = [self.folder / MENTORS / str(index) for index in range(len(mentors))]
        models = [*zip(folders, mentors, strict=True)]
        if mentee is not None:
            models.append((self.folder / MENTEE, mentee))
        for folder, model in models:
            save_model(model, folder)
            if isinstance(task, PredictingTask):
                task.save_assets(folder)
        _write_json(self.folder / SUMMARY, summary)


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}")
    return list(folder.iterdir())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, read back."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    task: Task
    mentee: nn.Module | None
    mentors: tuple[nn.Module, ...]  # one a client; a single one where all are the same


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
    mentee = None
    if (folder / MENTEE).is_dir():
        mentee = load_model(folder / MENTEE, task.build_mentee)
    mentors = [load_model(path, task.build_mentor) for path in _mentor_folders(folder)]
    return LoadedRun(config, summary, task, mentee, tuple(mentors))


def _mentor_folders(folder: Path) -> list[Path]:
    mentors = folder / MENTORS
    found = [path for path in mentors.iterdir() if path.is_dir()] if mentors.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no folder of a finished run: it holds no {path.name}")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return content


def _task_of(folder: Path, config: Mapping[str, Any]) -> Task:
    name = config.get("task")
    if name not in TASKS:
        raise ValueError(f"{folder} is a run of task {name!r}, which is not built in: pass task=")
    known = {key: config[key] for key in TrainConfig.__dataclass_fields__ if key in config}
    if known.get("mentor") is not None:
        # The trained models carry all that is needed; the pretrained ones may be gone by now.
        known["mentor"] = str(next(iter([*_mentor_folders(folder), folder / MENTEE])))
    return build_task(str(name), task_options(TrainConfig(**known)))


def evaluate_run(folder: str | Path, task: Task | None = None) -> dict[str, Any]:
    """Score the models of a run again on its task's test data.

    Args:
        folder: what `train` wrote.
        task: the task, if it is not a built-in one.

    Returns:
        ``task``, ``metric``, ``score_mentor`` (mean), ``scores_mentor`` (one a saved mentor) and
        ``score_mentee``; None where there is no such model.

    Raises:
        ValueError: no finished run lies there, or its data cannot be read.
    """
    run = load_run(folder, task)
    scores = [run.task.evaluate(mentor) for mentor in run.mentors]
    return {
        "task": run.task.name,
        "metric": run.task.metric,
        "score_mentor": statistics.mean(scores) if scores else None,
        "scores_mentor": scores,
        "score_mentee": run.task.evaluate(run.mentee) if run.mentee is not None else None,
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
        client: use the mentor of this client; None takes the mentee, or the first mentor where
            the method has no mentee.
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
    if client is not None and not 0 <= client < len(run.mentors):
        raise ValueError(f"client must lie in 0..{len(run.mentors) - 1}, got {client}")
    model = run.mentee if client is None else run.mentors[client]
    return run.task.predict(model if model is not None else run.mentors[0], data)
