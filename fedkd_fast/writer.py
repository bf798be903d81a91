"""Writing run folders: safe from crashes, and nothing in their place before they are whole.

While training, the run lies in a hidden folder beside its place, ``.NAME.partial``: ``run/`` is
what will take its place, ``metrics.jsonl`` in it grows round by round, ``checkpoint/`` is what a
killed run goes on with. A folder in its place is of a finished run, and an older run that it
replaces is whole until then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from torch import nn

from fedkd_fast._errors import own_file
from fedkd_fast._files import absolute, read_json_object, replacing, sync
from fedkd_fast.assembly import Shards
from fedkd_fast.checkpoint import MANIFEST
from fedkd_fast.events import Events, require_tensorboard
from fedkd_fast.models import save_model
from fedkd_fast.records import RoundRecord
from fedkd_fast.runs import (
    CONFIG,
    EVENTS,
    JOURNAL,
    MENTEE,
    MENTEES,
    MENTORS,
    METRICS,
    PARTITION,
    SUMMARY,
)
from fedkd_fast.tasks import PredictingTask, Task
from fedkd_fast.tasks.content import changed_splits
from fedkd_fast.trees import system_error

# All that may lie in a run folder. What makes a run a finished one leaves first and comes last.
_CONTENT = (
    *(SUMMARY, METRICS, CONFIG, PARTITION, JOURNAL, "report.html"),
    *(EVENTS, MENTEE, MENTEES, MENTORS),
)


def partial_folder(folder: Path) -> Path:
    """Return where a run lies until it is finished."""
    folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.partial"


def unfinished_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of a run that was not finished, None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    part = partial_folder(folder) / "run"
    # A run that was killed while it took its place may have its configuration there already.
    places = (part, folder) if (part / SUMMARY).is_file() else (part,)
    path = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
    return None if path is None else read_json_object(path)


class RunWriter:
    """Writes one run folder.

    Args:
        folder: where to; it is not touched before `finish`.
        overwrite: replace a run folder that exists, and an unfinished one.
        tensorboard: write events for TensorBoard, too.
        resume: go on with what an earlier process left unfinished, if it did.

    Raises:
        ValueError: ``folder`` exists and must be kept, or is no run folder; an unfinished run is
            there and neither to be resumed nor to be overwritten, or another process writes it.
        ImportError: tensorboard is wanted and not installed.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        tensorboard: bool = False,
        resume: bool = False,
    ) -> None:
        # What a link points to is what is replaced.
        self.folder = Path(os.path.realpath(folder))
        self._overwrite, self._tensorboard, self._resume = overwrite, tensorboard, resume
        self._partial = partial_folder(self.folder)
        self._part = self._partial / "run"
        self._made: list[Path] = []  # folders that were made for it, the outermost first
        self._lock: IO[str] | None = None
        self._events: Events | None = None
        if tensorboard:
            require_tensorboard()
        self._check_place()
        self.resumes = resume and self._can_go_on
        if self._can_go_on and not (resume or overwrite):
            raise ValueError(
                f"out has an unfinished run in {self._partial}: resume goes on with it, overwrite "
                "begins anew"
            )

    def _check_place(self) -> None:
        if self.folder.exists():
            if not self._overwrite:
                raise ValueError(f"out must not exist without overwrite, got {self.folder}")
            entries = _names(self.folder)
            # While it is replaced, a run lies in both places.
            if entries and CONFIG not in entries and not self.complete:
                raise ValueError(
                    f"out must be a run folder or empty to be overwritten, got {self.folder}"
                )
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"out cannot be made: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"out cannot be written: no permission for {existing}")

    @property
    def _can_go_on(self) -> bool:
        # The configuration is there first, and a checkpoint with the first round.
        begun = (self._part / CONFIG).is_file() and (self.checkpoint_folder / MANIFEST).is_file()
        return self.complete or begun

    @property
    def complete(self) -> bool:
        """Whether all of the run is written, and it has only to take its place."""
        return (self._part / SUMMARY).is_file()

    @property
    def checkpoint_folder(self) -> Path:
        """Where states lie between rounds."""
        return self._partial / "checkpoint"

    @property
    def journal(self) -> Path:
        """The log of what happens."""
        return self._part / JOURNAL

    def open(self) -> None:
        """Make the hidden folder, or take the one of an unfinished run over.

        Raises:
            ValueError: another process writes it.
            OSError: it cannot be made.
        """
        missing = [path for path in self._partial.parents if not path.exists()]
        self._partial.mkdir(parents=True, exist_ok=True)
        self._made = missing[::-1]
        self._lock = (self._partial / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise ValueError(f"out is being written by another process: {self._partial}") from error
        # Another process may have finished or begun it until the lock was ours.
        self._check_place()
        self.resumes = self._resume and self._can_go_on
        sync(self._partial.parent)
        if not self.resumes:
            for path in self._partial.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._part.mkdir()
        for stray in self._part.glob(".*.part"):  # what `replacing` may leave
            stray.unlink()

    def start(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, its paths as absolute ones; again, with more in it."""
        paths = {name: config.get(name) for name in ("data", "mentor", "mentee")}
        resolved = {name: absolute(path) for name, path in paths.items() if path is not None}
        _write_json(self._part / CONFIG, {**config, **resolved})

    def write_partition(self, shards: Shards) -> None:
        """Write which samples each client has, where shards are arrays of indices."""
        text = _partition(shards)
        if text is not None:
            (self._part / PARTITION).write_text(text, encoding="utf-8")

    def check_data(self, shards: Shards, facts: Mapping[str, Any]) -> None:
        """Hold data, those that models are scored on too, against what the run began with.

        Args:
            shards: of which each client must have the samples that it had.
            facts: as `start` was given them: digests of the first batch and of each split.

        Raises:
            ValueError: they are others: the data changed.
        """
        found, sample = read_json_object(self._part / CONFIG).get("task_facts"), facts["sample"]
        began = found if isinstance(found, dict) else {}
        changed = changed_splits(began.get("content"), facts.get("content"))
        if changed:
            raise ValueError(
                f"data are not those that the run began with: {' and '.join(changed)} data changed"
            )
        if began.get("sample", sample) != sample:
            raise ValueError(
                f"data are not those that the run began with: the first batch is {sample}, it was "
                f"{began['sample']}"
            )
        path, text = self._part / PARTITION, _partition(shards)
        if text is not None and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise ValueError(f"data are not those that the run began with: {path} lists others")

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to the metrics; they are on their way to the disk when this returns.

        Raises:
            DiskError: they cannot be written.
        """
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        path = self._part / METRICS
        with own_file(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def metrics_bytes(self) -> int:
        """Return how much there is of the metrics, all of it on the disk."""
        path = self._part / METRICS
        path.touch()
        sync(path)
        return path.stat().st_size

    def cut_metrics(self, size: int) -> None:
        """Remove what was written after a checkpoint.

        Raises:
            ValueError: there is less than that.
        """
        path = self._part / METRICS
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise ValueError(f"{path} is damaged: it has {found} bytes, the checkpoint {size}")
        os.truncate(path, size)

    def add_events(self, record: RoundRecord) -> None:
        """Add a round to the events, if they are wanted."""
        if self._tensorboard and self._events is None:
            # What an earlier process wrote of this round and later ones is not to be shown.
            self._events = Events(self._part / EVENTS, record.round)
        if self._events is not None:
            self._events.add(record)

    def finish(
        self,
        task: Task,
        mentors: Sequence[nn.Module],
        mentees: Sequence[nn.Module],
        summary: Mapping[str, Any],
    ) -> None:
        """Write models and summary, and put the run into its place.

        Raises:
            DiskError: they cannot be written; what a checkpoint needs is still there.
        """
        for name in (MENTORS, MENTEE, MENTEES):
            # What a process was killed in the middle of.
            shutil.rmtree(self._part / name, ignore_errors=True)
        models = [(self._part / MENTORS / str(n), model) for n, model in enumerate(mentors)]
        if len(mentees) == 1:
            models.append((self._part / MENTEE, mentees[0]))
        else:
            models += [(self._part / MENTEES / str(n), model) for n, model in enumerate(mentees)]
        with own_file(self._part):
            for folder, model in models:
                try:
                    save_model(model, folder)
                except SafetensorError as error:
                    raise system_error(error, folder) from error
                if isinstance(task, PredictingTask):
                    task.save_assets(folder)
            self._close_events()
            (self._part / METRICS).touch()
            _write_json(self._part / SUMMARY, summary)
        self.publish()

    def publish(self) -> None:
        """Put a complete run into its place."""
        # Nothing needs it any more, and beside a finished run it would look like another one.
        shutil.rmtree(self.checkpoint_folder, ignore_errors=True)
        if self._overwrite and self.folder.exists():
            self._replace()
        else:
            os.rename(self._part, self.folder)

    def _replace(self) -> None:
        """Exchange an older run for this one; other files in its folder stay.

        May be done again where a process was killed in the middle of it.
        """
        old, cleared = self._partial / "old", self._partial / "cleared"
        old.mkdir(exist_ok=True)
        with contextlib.ExitStack() as undo:

            def move(source: Path, target: Path, name: str) -> None:
                if (source / name).exists():
                    os.rename(source / name, target / name)
                    undo.callback(os.rename, target / name, source / name)

            if not cleared.exists():
                for name in _CONTENT:
                    move(self.folder, old, name)
                cleared.touch()
                undo.callback(cleared.unlink)
            for name in reversed(_CONTENT):
                move(self._part, self.folder, name)
            undo.pop_all()

    def close(self) -> None:
        """Remove the hidden folder, but for a run that can go on."""
        self._close_events()
        if self._lock is None:
            return
        if not self._can_go_on:
            shutil.rmtree(self._partial, ignore_errors=True)
            for path in reversed(self._made):
                with contextlib.suppress(OSError):
                    path.rmdir()  # fails where something lies in it
        self._lock.close()
        self._lock = None

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}")
    return {entry.name for entry in folder.iterdir()}


def _partition(shards: Shards) -> str | None:
    if not all(hasattr(shards[index], "tolist") for index in range(len(shards))):
        return None
    lines = ",\n".join(json.dumps(shards[index].tolist()) for index in range(len(shards)))
    return f"[{lines}]\n"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path, durable=True) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
