"""Runs that end before their time: with which error, what it says, and what goes on from there."""

from __future__ import annotations

import contextlib
import json
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from outcomes import after, journal, outcome, stopped
from tiny_task import TinyTask

import fedkd_fast.loop as loop
import fedkd_fast.trainer as trainer
import fedkd_fast.writer as writer
from fedkd_fast import __version__
from fedkd_fast.checkpoint import MANIFEST
from fedkd_fast.models import save_model
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.trainer import Stopped, resume_run, train


@contextlib.contextmanager
def small_files(size: int) -> Iterator[Callable[[], None]]:
    """Yield what lets files grow no longer than that from its call on, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("what", ["client", "journal", "metrics"])
def test_a_full_disk_is_no_failure_of_a_client(what: str, tmp_path: Path) -> None:
    """Where a client makes room for another one, within its turn, and when the round is over."""
    out = tmp_path / "run"
    # Room for the journal and the metrics of some rounds, or else for no line of them.
    size = 4096 if what == "client" else 1
    fields: dict[str, Any] = {"rounds": 3, "clients": 4, "faults": 0.5, "quorum": 0.1}
    fields["memory_gb"] = 1e-9 if what == "client" else 1.0
    train(TinyTask(), "fedkd", out=tmp_path / "whole", **fields)
    with small_files(size) as limit:

        def look(record: RoundRecord | ClientRecord) -> None:
            within = isinstance(record, ClientRecord) and what != "metrics"
            last = isinstance(record, ClientRecord) and record.done == record.clients
            if record.round == 2 and (within or last):
                limit()

        with pytest.raises(
            OSError, match="the run cannot go on: .*File too large: .*run"
        ) as caught:
            train(TinyTask(), "fedkd", out=out, progress=look, **fields)
    folder = tmp_path / ".run.partial" / "checkpoint"
    assert str(caught.value).endswith(f"; the checkpoint after round 1 is intact in {folder}")
    failed = [line for line in journal(tmp_path / ".run.partial" / "run") if "client" in line]
    assert all("File too large" not in str(line) for line in failed)
    resume_run(out, task=TinyTask())
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_full_disk_without_checkpoints_is_named(tmp_path: Path) -> None:
    with (
        small_files(4096) as limit,
        pytest.raises(OSError, match="the run cannot go on: .*there is no checkpoint yet"),
    ):
        limit()
        train(TinyTask(), "fedkd", memory_gb=1e-9)


def test_a_full_disk_at_the_end_costs_one_round(tmp_path: Path) -> None:
    """The models do not fit: what was trained until the last round is kept."""
    out, wanted = tmp_path / "run", tmp_path / "whole"
    train(TinyTask(), "fedkd", rounds=3, out=wanted)

    def save(model: Any, folder: Path) -> None:
        with small_files(64) as limit:
            limit()
            save_model(model, folder)

    what = "the run cannot go on: .*File too large: .*mentors.*; the checkpoint after round 2 is"
    with mock.patch.object(writer, "save_model", save), pytest.raises(OSError, match=what):
        train(TinyTask(), "fedkd", rounds=3, out=out)
    assert not out.exists()
    resume_run(out, task=TinyTask())
    assert outcome(out) == outcome(wanted)


class Broken(TinyTask):
    """Its data cannot be read from some call on."""

    def __init__(self, error: Exception, good: int) -> None:
        super().__init__()
        self.error, self.good = error, good

    def batches(self, shard: Any, seed: int) -> Any:
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().batches(shard, seed)


class OwnError(LookupError):
    """An error that this version of Python does not know."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TypeError("no such batch"), TypeError),
        (PermissionError(13, "Permission denied", "x.csv"), OSError),
        (KeyError("column"), KeyError),
        (OwnError("where is it?"), LookupError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), ValueError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_error_of_all_clients_is_the_same_after_a_stop(
    error: Exception, kind: type[Exception], tmp_path: Path
) -> None:
    """What all of them fail with ends the run, also where some failed in an earlier process."""
    good = 1 + 3  # a look at the data before the first round, and that
    with pytest.raises(type(error)):
        train(Broken(error, good), "fedkd", rounds=2)
    with pytest.raises(Stopped):
        train(Broken(error, good), "fedkd", rounds=2, out=tmp_path / "run", stop=after(5))
    with pytest.raises(kind, match=re.escape(str(error))):
        resume_run(tmp_path / "run", task=Broken(error, 1))


@pytest.mark.parametrize("began", ["0.0.9", "1.1.0", "x", None])
def test_another_version_of_the_package_is_refused(began: str | None, tmp_path: Path) -> None:
    stopped(tmp_path / "run")
    path = tmp_path / ".run.partial" / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "version": began}))
    with pytest.raises(ValueError, match=f"begun by fedkd_fast {began}, this is {__version__}"):
        resume_run(tmp_path / "run", task=TinyTask())


def test_a_later_patch_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "run")
    later = ".".join([*__version__.split(".")[:2], "77"])
    for module in (trainer, loop):
        monkeypatch.setattr(module, "__version__", later)
    resume_run(tmp_path / "run", task=TinyTask())
    versions = [line["version"] for line in journal(tmp_path / "run") if "version" in line]
    assert versions == [__version__, later]


@pytest.mark.parametrize("key", ["facts", "files", "counts", "versions", "events", "seconds"])
@pytest.mark.parametrize("value", [None, "x", 3, [], {}])
def test_a_manifest_that_was_changed_is_damaged(key: str, value: Any, tmp_path: Path) -> None:
    """Whatever is missing or of another type."""
    stopped(tmp_path / "run")
    path = tmp_path / ".run.partial" / "checkpoint" / MANIFEST
    manifest = json.loads(path.read_text())
    place = manifest if key in manifest else manifest["facts"]
    if value is None:
        del place[key]
    else:
        place[key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        resume_run(tmp_path / "run", task=TinyTask())
