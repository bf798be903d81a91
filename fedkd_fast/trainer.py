"""Training: a configuration, a task and a folder become a run; all clients in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkd_fast import __version__
from fedkd_fast._device import require_device
from fedkd_fast._errors import DiskError
from fedkd_fast._errors import QuorumError as QuorumError
from fedkd_fast._errors import Stopped as Stopped
from fedkd_fast._files import absolute
from fedkd_fast.config import PRESETS, check_preset, task_options
from fedkd_fast.config import TrainConfig as TrainConfig
from fedkd_fast.loop import Connect, Loop
from fedkd_fast.loop import Progress as Progress
from fedkd_fast.methods import get_method
from fedkd_fast.runs import load_run
from fedkd_fast.tasks import Task, build_task, task_defaults
from fedkd_fast.writer import RunWriter, partial_folder, unfinished_config

# What a run that goes on may have otherwise than it began: who is waited for, and what is kept.
_FREE = {
    *("out", "overwrite", "tensorboard", "checkpoint_every", "memory_gb"),
    *("quorum", "client_timeout", "retries"),
}
_PATHS = ("data", "mentor", "mentee")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: TrainConfig
    summary: Mapping[str, Any]
    mentors: tuple[nn.Module, ...]  # one a client that is scored; a single one where all are equal
    mentee: nn.Module | None  # that of the first client, where each has a head of its own
    folder: Path | None = field(default=None)  # None if nothing was written


def train(
    task: str | Task = "digits",
    method: str = "fedkd",
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    resume: bool = False,
    connect: Connect | None = None,
    **fields: Any,
) -> Run:
    """Train by a method on a task, all clients in this process, one after the other.

    What is not given follows ``preset`` or else what the task suggests for the method, then
    `Task.defaults`, then `TrainConfig`. Clients and server exchange bytes alone, and all byte
    counts are lengths of what was sent. With ``out``, there is a checkpoint after each round: a run
    that was killed goes on from there with the same bits as if nothing had happened, as long as
    machine type, torch and threads are the same.

    Args:
        task: "digits", "text", "adr", "ner", "mind", or an object that implements `Task`.
        method: one of `fedkd_fast.methods.METHODS`.
        progress: called after each client and after each round.
        stop: asked after each client; True ends the run there, with a checkpoint.
        resume: go on with the run that an earlier process left unfinished in ``out``; where there
            is none, begin.
        connect: finds the clients where they are in other processes; see `connect.connect`.
        fields: further fields of `TrainConfig`.

    Returns:
        The trained models and the summary; with ``out``, they also lie in that folder.

    Raises:
        ValueError: an argument out of its range, data that cannot be read, an ``out`` that exists,
            other options than the unfinished run has; before anything is trained or written. Later:
            training diverged at all clients.
        TypeError: an argument of a wrong type or name.
        OSError: ``out`` cannot be written. The last checkpoint is intact.
        QuorumError: too few replies of a round count. The last checkpoint is intact.
        Stopped: ``stop`` said so.
    """
    config = configure(task, method, fields)
    require_device(config.device)
    writer = None
    if config.out is not None:
        writer = RunWriter(
            config.out, overwrite=config.overwrite, tensorboard=config.tensorboard, resume=resume
        )
    with contextlib.ExitStack() as ending, _threads(config.threads):
        if writer is not None:
            ending.callback(writer.close)
            writer.open()
            if not writer.resumes:
                # So that what is killed from here on can be begun again by its folder alone.
                writer.start(dataclasses.asdict(config))
            elif not writer.complete:
                _check_version(writer.folder)
        chosen = build_task(task, task_options(config)) if isinstance(task, str) else task
        # The data may decide more: a task that was made knows them.
        config = configure(chosen, method, fields)
        if writer is not None and writer.resumes:
            _check_same(config)
            if writer.complete:
                writer.publish()
                return _finished(config, chosen, writer.folder)
        loop = Loop(config, chosen, writer, progress, stop, connect)
        ending.callback(loop.close)
        try:
            summary, mentors, mentees = loop.run()
            if writer is not None:
                writer.finish(chosen, mentors, mentees, summary)
        except DiskError as error:
            raise OSError(f"the run cannot go on: {error}; {loop.intact()}") from error
        folder = writer.folder if writer is not None else None
        mentee = mentees[0] if mentees else None
        return Run(config, summary, tuple(mentors), mentee, folder)


def resume_run(
    out: str | Path,
    *,
    task: Task | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    **changes: Any,
) -> Run:
    """Go on with the run that an earlier process left unfinished in a folder.

    Args:
        out: the folder that it was to be written to.
        task: the task, if it is not a built-in one.
        progress: as in `train`.
        stop: as in `train`.
        changes: fields of `TrainConfig` that are to be others from now on: ``quorum``,
            ``client_timeout``, ``retries``, ``checkpoint_every``, ``memory_gb``.

    Raises:
        ValueError: there is no such run, its data changed, or another field is to be another.
        QuorumError, Stopped, OSError: as `train`.
    """
    folder = Path(out)
    found = unfinished_config(folder)
    if found is None:
        what = "a finished run" if folder.exists() else "no run"
        raise ValueError(f"out must have an unfinished run to go on with: {folder} has {what}")
    if not {"task", "method"} <= found.keys():
        raise ValueError(f"the configuration in {folder} is damaged: it names no task or method")
    names = {one.name for one in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in found.items() if name in names}
    name, method = fields.pop("task"), fields.pop("method")
    fields.update(changes, out=str(folder))
    name, method = fields.pop("task", name), fields.pop("method", method)
    return train(task or name, method, progress=progress, stop=stop, resume=True, **fields)


def _check_same(config: TrainConfig) -> None:
    """Hold a configuration against the one that the unfinished run began with."""
    assert config.out is not None
    found = unfinished_config(Path(config.out)) or {}
    for name, value in dataclasses.asdict(config).items():
        wanted = absolute(value) if name in _PATHS and value is not None else value
        began = found.get(name, getattr(TrainConfig(), name))
        if name not in _FREE and began != wanted:
            raise ValueError(
                f"{name} must be what the unfinished run began with, {began!r}, got {wanted!r}; "
                f"to begin anew, remove {partial_folder(Path(config.out))}"
            )


def _check_version(folder: Path) -> None:
    """Refuse to go on with what another minor version began: its rounds may have other bits."""
    began = str((unfinished_config(folder) or {}).get("version"))
    if began.split(".")[:2] != __version__.split(".")[:2]:
        raise ValueError(
            f"the unfinished run in {folder} was begun by fedkd_fast {began}, this is "
            f"{__version__}: go on with {began}, or begin anew with overwrite"
        )


def _finished(config: TrainConfig, task: Task, folder: Path) -> Run:
    """Return a run that an earlier process had all but put into its place."""
    run = load_run(folder, task)
    return Run(config, run.summary, run.mentors, run.mentee, folder)


def configure(task: str | Task, method: str, fields: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run, as `train` says.

    Raises:
        ValueError: a value out of its range.
        TypeError: a value of a wrong type, or an unknown name.
    """
    preset = fields.get("preset")
    check_preset(preset)
    if not isinstance(method, str):
        raise TypeError(f"method must be text, got {method!r}")
    # A preset stands for the recipe of FedKD; other methods keep their own.
    pure = PRESETS[preset] if preset is not None and method == "fedkd" else None
    special = method if pure is None else None
    if isinstance(task, str):
        name, defaults = task, task_defaults(task, special)
    elif isinstance(task, type):
        raise TypeError(f"task must be an object, got the class {task.__name__}: {task.__name__}()")
    elif not hasattr(task, "name"):
        raise TypeError(f"task must be a name or an object that implements Task, got {task!r}")
    else:
        name, defaults = task.name, task.defaults(special)
    defaults = {**defaults, **(pure or {})}
    general = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    unknown = sorted((set(fields) | set(defaults)) - set(general))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no field of TrainConfig")
    if get_method(method).exchanges and fields.get("dp_clip") is None:
        for option in ("dp_noise", "dp_delta", "dp_seed"):
            if fields.get(option, general[option]) != general[option]:
                raise ValueError(
                    f"{option} needs dp_clip, the bound on each update that noise hides, got "
                    f"{option} {fields[option]!r} and dp_clip None"
                )
    # Paths as text, which the configuration is written as.
    plain = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in fields.items()
    }
    if isinstance(plain.get("distillation"), Mapping):
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
