"""Run folders whose process is killed while it writes and places them: the next one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from snapshots import Snapshots
from test_resume import outcome
from tiny_task import TinyTask

import fedkd_fast.writer as writer
from fedkd_fast.runs import load_run
from fedkd_fast.trainer import Stopped, resume_run, train
from fedkd_fast.writer import RunWriter, partial_folder, unfinished_config

FIELDS: dict[str, Any] = {"clients": 2, "rounds": 2, "scored_clients": 1}


def method_of(out: Path) -> str | None:
    """Return the method of the finished run in a folder, if one is there."""
    try:
        return str(load_run(out, TinyTask()).summary["method"])
    except (ValueError, OSError):
        return None


def killed(folder: Path, copies: Path, **fields: Any) -> list[tuple[Path, str]]:
    """Train, and return copies of the folder at each moment from the first model saved to the end.

    The copies are of what differs from the one before.
    """
    copies.mkdir()
    shots = Snapshots(folder, copies)
    finish = RunWriter.finish

    def watched(self: RunWriter, *arguments: Any) -> None:
        with shots.taking():
            finish(self, *arguments)
            self.close()

    save = shots.half(writer.save_model, lambda model, place: place / "model.safetensors")
    with (
        mock.patch.object(RunWriter, "finish", watched),
        mock.patch.object(writer, "save_model", save),
    ):
        train(TinyTask(), "fedkd", out=folder / "run", **FIELDS, **fields)
    found, last = [], None
    for copy, moment, _ in shots.taken:
        content = {path.relative_to(copy): path.is_file() and path.stat().st_size
                   for path in copy.rglob("*")}  # fmt: skip
        if content != last:
            found.append((copy, moment))
        last = content
    return found


@pytest.mark.parametrize("older", [False, True])
def test_a_kill_at_any_moment_of_the_end(older: bool, tmp_path: Path) -> None:
    """Either the run is finished, or it can go on, and comes to the same; an older one is whole."""
    train(TinyTask(), "fedkd", out=tmp_path / "whole", **FIELDS)
    wanted, folder = outcome(tmp_path / "whole"), tmp_path / "live"
    folder.mkdir()
    if older:
        train(TinyTask(), "fedavg", out=folder / "run", **FIELDS)
        (folder / "run" / "notes.txt").write_text("mine")
    moments = killed(folder, tmp_path / "copies", overwrite=older)
    assert len(moments) > 15 and outcome(folder / "run") == wanted
    states = []
    for copy, moment in moments:
        out = copy / "run"
        method, complete = method_of(out), (partial_folder(out) / "run" / "summary.json").exists()
        states.append((method, complete))
        if method != "fedkd":
            assert resume_run(out, task=TinyTask()).summary["method"] == "fedkd", moment
        else:
            with pytest.raises(ValueError, match="has a finished run"):
                resume_run(out, task=TinyTask())
        assert outcome(out) == wanted, moment
        assert older == (out / "notes.txt").exists()
        # What is left beside a finished run is in nobody's way, also where that is moved away.
        shutil.move(out, copy / "elsewhere")
        run = RunWriter(out)
        run.open()
        run.close()
        assert {path.name for path in copy.iterdir()} == {"elsewhere"}, moment
    # First the older run, or none, until the new one is complete; then, for as long as names are
    # exchanged, neither; then the new one.
    before = "fedavg" if older else None
    order = [(before, False), (before, True), (None, True), ("fedkd", False)]
    assert [order.index(one) for one in states] == sorted(map(order.index, states))
    assert states[0] == order[0] and states[-1] == order[-1]


def stop_after(clients: int) -> Any:
    seen = [0]

    def stop() -> bool:
        seen[0] += 1
        return seen[0] == clients

    return stop


def test_a_failure_while_models_are_saved(tmp_path: Path) -> None:
    """The disk is full, and then it is not."""
    train(TinyTask(), "fedkd", out=tmp_path / "whole", **FIELDS)
    out, save = tmp_path / "run", writer.save_model
    for count in (1, 2):
        calls = [0]

        def full(*arguments: Any, calls: Any = calls, count: int = count) -> None:
            save(*arguments)
            calls[0] += 1
            if calls[0] == count:
                raise OSError(28, "No space left on device")

        with mock.patch.object(writer, "save_model", full), pytest.raises(OSError, match="No sp"):
            train(TinyTask(), "fedkd", out=out, resume=True, **FIELDS)
        assert not out.exists()
    resume_run(out, task=TinyTask())
    assert outcome(out) == outcome(tmp_path / "whole")


def test_files_that_were_not_finished_are_not_published(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(TinyTask(), "fedkd", out=out, stop=stop_after(3), **FIELDS)
    (partial_folder(out) / "run" / ".config.json.77.part").write_text("{")
    resume_run(out, task=TinyTask())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_without_a_run_is_no_run(tmp_path: Path) -> None:
    """What removing it left, when it was killed: nobody has to ask for it to be overwritten."""
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(TinyTask(), "fedkd", out=out, stop=stop_after(3), **FIELDS)
    shutil.rmtree(partial_folder(out) / "run")
    assert unfinished_config(out) is None
    train(TinyTask(), "fedkd", out=out, **FIELDS)
    assert not partial_folder(out).exists()


def test_errors_while_runs_are_exchanged(tmp_path: Path) -> None:
    """Each rename in turn fails: the older run is as it was, and the new one can take its place."""
    train(TinyTask(), "fedkd", out=tmp_path / "whole", **FIELDS)
    wanted, rename, place = outcome(tmp_path / "whole"), os.rename, 0
    while True:
        place += 1
        out, calls = tmp_path / str(place) / "run", [0]
        shutil.copytree(tmp_path / "whole", out)
        summary = json.loads((out / "summary.json").read_text())
        (out / "summary.json").write_text(json.dumps({**summary, "method": "older"}))

        def fail(*arguments: Any, calls: Any = calls, place: int = place) -> None:
            calls[0] += 1
            if calls[0] == place:
                raise PermissionError(13, "Permission denied", str(arguments[0]))
            rename(*arguments)

        with mock.patch.object(os, "rename", fail), contextlib.suppress(PermissionError):
            train(TinyTask(), "fedkd", out=out, overwrite=True, **FIELDS)
        if calls[0] < place:
            break
        assert method_of(out) == "older"
        resume_run(out, task=TinyTask())
        assert outcome(out) == wanted
    assert place > 10
