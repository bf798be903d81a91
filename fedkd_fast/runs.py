"""Run folders: written while training, read again to evaluate and predict.

While training, the run lies in a hidden temporary folder beside its place: ``metrics.jsonl`` grows
there line by line. Its place is taken when all is written, so a folder of that name is of a
finished run, and an older run that it replaces is whole until then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedkd_fast._files import read_json_object
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.events import Events, require_tensorboard
from fedkd_fast.models import load_model, save_model
from fedkd_fast.records import RoundRecord
from fedkd_fast.scores import evaluate, test_sets
from fedkd_fast.tasks import TASKS, PredictingTask, Task, build_task

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
PARTITION, EVENTS = "partition.json", "events"
# Models of clients lie in numbered folders; of a mentee that is the same everywhere there is one.
MENTEE, MENTEES, MENTORS = "mentee", "mentees", "mentors"
# All that may lie in a run folder. What makes a run a finished one leaves first and comes last.
_CONTENT = (SUMMARY, METRICS, CONFIG, PARTITION, "report.html", EVENTS, MENTEE, MENTEES, MENTORS)


class RunWriter:
    """Writes one run folder.

    Args:
        folder: where to; it is not touched before `finish`.
        overwrite: replace a run folder that exists.
        tensorboard: write events for TensorBoard, too.

    Raises:
        ValueError: ``folder`` exists and must be kept, or is no run folder.
        ImportError: tensorboard is wanted and not installed.
        OSError: it cannot be written.
    """

    def __init__(
        self, folder: str | Path, *, overwrite: bool = False, tensorboard: bool = False
    ) -> None:
        self.folder, self._overwrite, self._tensorboard = Path(folder), overwrite, tensorboard
        if tensorboard:
            require_tensorboard()
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
        # On the file system of the place, so that a rename suffices.
        self._parent = existing
        self._temporary: Path | None = None
        self._events: Events | None = None

    @property
    def _part(self) -> Path:
        """The run until it is finished."""
        assert self._temporary is not None, "start comes first"
        return self._temporary / "run"

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the temporary folder and write the configuration, its paths as absolute ones."""
        prefix = f".{self.folder.name}.partial-"
        self._temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=self._parent))
        self._part.mkdir()
        paths = {name: config.get(name) for name in ("data", "mentor", "mentee")}
        resolved = {name: absolute(path) for name, path in paths.items() if path is not None}
        _write_json(self._part / CONFIG, {**config, **resolved})
        (self._part / METRICS).touch()
        if self._tensorboard:
            self._events = Events(self._part / EVENTS)

    def write_partition(self, shards: Sequence[Any]) -> None:
        """Write which samples each client has, where shards are arrays of indices."""
        lists = [shard.tolist() for shard in shards if hasattr(shard, "tolist")]
        if len(lists) == len(shards):
            text = ",\n".join(json.dumps(one) for one in lists)
            (self._part / PARTITION).write_text(f"[{text}]\n", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics; it is on its way to the disk when this returns."""
        with (self._part / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def add_events(self, record: RoundRecord) -> None:
        """Add a round to the events, if there are any."""
        if self._events is not None:
            self._events.add(record)

    def finish(
        self,
        task: Task,
        mentors: Sequence[nn.Module],
        mentees: Sequence[nn.Module],
        summary: Mapping[str, Any],
    ) -> None:
        """Write models and summary, and put the run into its place."""
        models = [(self._part / MENTORS / str(n), model) for n, model in enumerate(mentors)]
        if len(mentees) == 1:
            models.append((self._part / MENTEE, mentees[0]))
        else:
            models += [(self._part / MENTEES / str(n), model) for n, model in enumerate(mentees)]
        for folder, model in models:
            save_model(model, folder)
            if isinstance(task, PredictingTask):
                task.save_assets(folder)
        _write_json(self._part / SUMMARY, summary)
        self._close_events()
        if self._overwrite and self.folder.exists():
            self._replace()
        else:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self._part, self.folder)

    def _replace(self) -> None:
        """Exchange an older run for this one; other files in its folder stay."""
        old = self._part.with_name("old")
        old.mkdir()
        moves = [(self.folder, old, name) for name in _CONTENT]
        moves += [(self._part, self.folder, name) for name in reversed(_CONTENT)]
        with contextlib.ExitStack() as undo:
            for source, target, name in moves:
                if (source / name).exists():
                    os.rename(source / name, target / name)
                    undo.callback(os.rename, target / name, source / name)
            undo.pop_all()

    def close(self) -> None:
        """Remove the temporary folder, with all that is not finished by now."""
        self._close_events()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def absolute(path: str) -> str:
    """Return a path, or several joined by commas, as absolute ones; names of others stay."""
    if os.path.exists(path):
        return os.path.abspath(path)
    first, comma, rest = path.partition(",")
    return absolute(first.strip()) + comma + absolute(rest.strip()) if comma else path


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}")
    return list(folder.iterdir())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
        raise ValueError(f"{folder} is a run of task {name!r}, which is not built in: pass task=")
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
    models = max(len(run.mentors), len(run.mentees))
    clients = test_sets(run.task, run.config.get("clients", models), models)
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
