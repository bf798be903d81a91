"""Runs that were killed, stopped or failed, and go on as if nothing had happened."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import warm
from outcomes import after, bare, journal, outcome, stopped
from tiny_task import TinyTask, tiny_task
from torch import nn

from fedkd_fast.methods import METHODS
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.runs import load_run
from fedkd_fast.trainer import QuorumError, Stopped, resume_run, train

CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "sampled": {"method": "fedkd", "participation": 0.5, "clients": 5, "feedback": "both"},
    "half an epoch": {"method": "fedkd", "local_epochs": 0.5, "feedback": "up"},
    "refresh": {"method": "fedkd", "refresh_steps": 2, "warmup_steps": 3},
    "sampled scaffold": {"method": "scaffold", "participation": 0.5, "clients": 5},
    "server adam": {"method": "fedavg", "server_optimizer": "adam", "server_lr": 0.1},
    "faults": {"method": "fedkd", "faults": 0.4, "clients": 6, "quorum": 0.1, "feedback": "both"},
    "layered": {"method": "fedkd", "layered": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Within a round, after its last client, and after the last checkpoint."""
    fields = {"rounds": 4, **CASES[name]}
    method, layered = fields.pop("method"), fields.pop("layered", False)

    def task() -> TinyTask:
        return TinyTask(layered=True) if layered else tiny_task(method)

    train(task(), method, out=tmp_path / "whole", **fields)
    wanted = outcome(tmp_path / "whole")
    for turns in (1, 4, 6):
        out = tmp_path / f"stopped-{turns}"
        try:
            run = train(task(), method, out=out, stop=after(turns), **fields)
        except Stopped:
            assert not out.exists()
            run = resume_run(out, task=task())
        else:
            assert run.folder == out  # fewer turns than that in all
        assert outcome(out) == wanted
        assert not (tmp_path / f".stopped-{turns}.partial").exists()


def test_many_stops(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rounds": 3, "feedback": "both", "participation": 0.7, "clients": 4}
    train(TinyTask(), "fedkd", out=tmp_path / "whole", **fields)
    out, stops = tmp_path / "run", 0
    while not out.exists():
        try:
            train(TinyTask(), "fedkd", out=out, stop=after(1), resume=True, **fields)
        except Stopped:
            stops += 1
    assert stops == 3 * 3
    assert outcome(out) == outcome(tmp_path / "whole")
    events = [line["event"] for line in journal(out)]
    assert events.count("stop") == stops and events.count("resume") == stops
    assert events[0] == "start" and events[-1] == "finish"


@pytest.mark.parametrize("method", ["fedkd", "scaffold", "powersgd"])
def test_clients_in_files_give_the_same_bits(method: str, tmp_path: Path) -> None:
    """One client in memory at a time, with and without a run folder."""
    fields: dict[str, Any] = {"rounds": 3, "feedback": "both", "participation": 0.7, "clients": 5}
    train(TinyTask(), method, out=tmp_path / "all", **fields)
    train(TinyTask(), method, out=tmp_path / "one", memory_gb=1e-9, **fields)
    wanted = outcome(tmp_path / "all")
    assert outcome(tmp_path / "one") == wanted
    run = train(TinyTask(), method, memory_gb=1e-9, **fields)
    assert bare(dict(run.summary)) == wanted["summary"]


class Failing(TinyTask):
    """Fails, or is interrupted, when models are evaluated for the second time."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.evaluated = error, 0

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        self.evaluated += 1
        if self.evaluated == 2:
            raise self.error("stop")
        return super().evaluate(model, split=split, client=client)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_failed_goes_on_from_its_last_round(
    error: type[BaseException], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"clients": 1, "rounds": 3}
    train(TinyTask(), "local", out=tmp_path / "whole", **fields)
    out = tmp_path / "run"
    with pytest.raises(error, match="stop"):
        train(Failing(error), "local", out=out, **fields)
    assert not out.exists()
    resume_run(out, task=TinyTask())
    assert outcome(out) == outcome(tmp_path / "whole")


def test_an_unfinished_run_is_not_lost_by_mistake(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    with pytest.raises(ValueError, match="out has an unfinished run in .*: resume goes on with it"):
        train(TinyTask(), "fedkd", rounds=3, out=out)
    again = "to begin anew, remove .*/.run.partial$"
    with pytest.raises(ValueError, match=f"rounds must be what .* began with, 3, got 5; {again}"):
        train(TinyTask(), "fedkd", rounds=5, out=out, resume=True)
    with pytest.raises(ValueError, match="seed must be what the unfinished run began with, 0, "):
        resume_run(out, task=TinyTask(), seed=1)
    with pytest.raises(ValueError, match="method must be what the unfinished run began with"):
        train(TinyTask(), "fedavg", rounds=3, out=out, resume=True)
    # How much memory there is may be what ended it.
    train(TinyTask(), "fedkd", rounds=3, out=tmp_path / "whole")
    shutil.copytree(tmp_path / ".run.partial", tmp_path / ".less.partial")
    less = tmp_path / "less"
    train(TinyTask(), "fedkd", rounds=3, out=less, resume=True, memory_gb=1e-9)
    assert outcome(less)["models"] == outcome(tmp_path / "whole")["models"]
    train(TinyTask(), "fedkd", rounds=2, out=out, overwrite=True)
    assert load_run(out, TinyTask()).summary["rounds"] == 2
    with pytest.raises(ValueError, match="out must have an unfinished run.*has a finished run"):
        resume_run(out)
    with pytest.raises(ValueError, match="out must have an unfinished run.*has no run"):
        resume_run(tmp_path / "nowhere")


def test_what_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    train(TinyTask(), "fedkd", rounds=3, out=tmp_path / "whole")
    stopped(tmp_path / "run")
    changes: dict[str, Any] = {"quorum": 0.1, "retries": 5, "memory_gb": 1e-9}
    resume_run(tmp_path / "run", task=TinyTask(), checkpoint_every=0, **changes)
    found, wanted = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert found.pop("checkpoints") == {1: wanted.pop("checkpoints")[1]}
    assert found == wanted


def test_data_that_changed_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path / "run")
    with pytest.raises(ValueError, match="data are not those that the run began with"):
        resume_run(tmp_path / "run", task=TinyTask(63))


def test_an_older_run_is_whole_until_the_resumed_one_is(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(TinyTask(), "fedavg-mentee", out=out)
    (out / "notes.txt").write_text("mine")
    stopped(out, overwrite=True)
    assert load_run(out, TinyTask()).summary["method"] == "fedavg-mentee"
    resume_run(out, task=TinyTask())
    assert load_run(out, TinyTask()).summary["method"] == "fedkd"
    assert (out / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def look(record: RoundRecord | ClientRecord) -> None:
        with pytest.raises(ValueError, match="out is being written by another process"):
            train(TinyTask(), "local", out=out, overwrite=True)

    train(TinyTask(), "local", rounds=1, out=out, progress=look)
    assert load_run(out, TinyTask()).summary["rounds"] == 1


@pytest.mark.parametrize("what", ["flip", "cut", "manifest", "metrics"])
def test_a_damaged_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    partial = tmp_path / ".run.partial"
    (path,) = (partial / "checkpoint").glob("server.*.safetensors")
    if what == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif what == "cut":
        os.truncate(path, 100)
    elif what == "manifest":
        path.unlink()
    else:
        os.truncate(partial / "run" / "metrics.jsonl", 10)
    with pytest.raises(ValueError, match="is damaged"):
        resume_run(out, task=TinyTask())


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    (tmp_path / ".run.partial" / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: it names no task or method"):
        resume_run(out)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; only the message differs."""
    out = tmp_path / "run"
    train(TinyTask(layered=True), "fedkd", rounds=3, out=tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(record: RoundRecord | ClientRecord) -> None:
        if isinstance(record, ClientRecord) and record.round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, limits[1]))

    try:
        with pytest.raises(OSError, match="checkpoint after round 2 cannot be written.*round 1 is"):
            train(TinyTask(layered=True), "fedkd", rounds=3, out=out, progress=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resume_run(out, task=TinyTask(layered=True))
    assert outcome(out) == outcome(tmp_path / "whole")


def test_no_checkpoints_where_none_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"stopped in round 2 of 3$"):
        train(TinyTask(), "fedkd", rounds=3, out=tmp_path / "run", stop=after(4),
              checkpoint_every=0)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


DIGITS = ("--rounds", "3", "--clients", "4", "--participation", "0.75", "--feedback", "both",
          "--eval-every", "3", "--local-steps", "4", "--threads", "1", "--faults", "0.2",
          "--quorum", "0.1", "--encrypt")  # fmt: skip


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fedkd_fast", *map(str, arguments)]


def killed(out: Path, seconds: float) -> bool:
    """Start a run, kill it so many seconds after its first sign, and say whether it was cut."""
    process = warm.start("train", *DIGITS, "--quiet", "--out", out)
    config = out.parent / f".{out.name}.partial" / "run" / "config.json"
    while process.is_alive() and not config.exists():
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_and_resume(tmp_path: Path, kills: int, seed: int) -> int:
    """Kill runs at random points, and hold each that goes on against one that was left alone."""
    # In a process with a hash seed of its own, which those that are forked have in common.
    subprocess.run(command("train", *DIGITS, "--quiet", "--out", tmp_path / "whole"), check=True)
    wanted = outcome(tmp_path / "whole")
    warm.run("info")
    began = time.perf_counter()
    warm.run("train", *DIGITS, "--quiet", "--out", tmp_path / "again")
    length = time.perf_counter() - began
    assert outcome(tmp_path / "again") == wanted
    generator, cut = np.random.default_rng(seed), 0
    for number in range(kills):
        out = tmp_path / f"killed-{number}"
        if killed(out, float(generator.uniform(0.0, 0.6 * length))):
            cut += 1
            if not out.exists():  # else it was killed when all was done
                warm.run("train", "--resume", "--quiet", "--out", out)
        found = outcome(out)
        # Killed between a checkpoint and the line about it, a run has no such line.
        assert found["checkpoints"].items() <= wanted["checkpoints"].items()
        assert found | {"checkpoints": wanted["checkpoints"]} == wanted, number
    return cut


def test_killed_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, 3, seed=1) >= 1


@pytest.mark.slow
def test_twenty_killed_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, 20, seed=2) >= 10


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_after_the_running_client(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*DIGITS, "--quiet", "--out", out]
    process = subprocess.Popen(command("train", *options), stderr=subprocess.PIPE, text=True)
    path = tmp_path / ".run.partial" / "run" / "journal.jsonl"
    while not (path.exists() and '"round"' in path.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "stopping after the running client" in errors
    assert "fedkd-fast: stopped in round" in errors and "what was trained is kept" in errors
    subprocess.run(command("train", "--resume", "--quiet", "--out", out), check=True)
    assert [line["event"] for line in journal(out)].count("stop") == 1


def test_too_few_replies_end_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--clients", "2", "--rounds", "2", "--local-steps", "1", "--faults", "1", "--quiet"]
    found = subprocess.run(
        command("train", *options, "--out", out), capture_output=True, text=True, check=False
    )
    assert found.returncode == 3
    assert re.match(r"fedkd-fast: error: round \d has 0 of 2 replies, quorum asks", found.stderr)
    with pytest.raises(
        QuorumError, match=r"round \d has 0 of 2 replies, quorum asks for 1: client"
    ):
        train("digits", clients=2, rounds=2, local_steps=1, faults=1.0, threads=1)


def test_other_data_of_the_same_size_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path / "run")
    with pytest.raises(ValueError, match="data are not those that the run began with: the first"):
        resume_run(tmp_path / "run", task=TinyTask(seed=7))


class Known(TinyTask):
    """Tells what its data are."""

    content: ClassVar[dict[str, str]] = {"train": "a", "test": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": "a", "test": "c"}, "began with: test data changed"),
        ({"train": "c", "test": "b", "dev": "d"}, "began with: dev and train data changed"),
        ({"train": "a", "test": "b"}, None),
    ],
)
def test_scored_data_that_changed_are_refused(
    content: dict[str, str], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        train(Known(), "fedkd", rounds=3, out=tmp_path / "run", stop=after(4))
    monkeypatch.setattr(Known, "content", content)
    if message is None:
        resume_run(tmp_path / "run", task=Known())
    else:
        with pytest.raises(ValueError, match=message):
            resume_run(tmp_path / "run", task=Known())


def test_a_run_that_does_not_tell_of_its_data_goes_on(tmp_path: Path) -> None:
    """As those of older versions."""
    stopped(tmp_path / "run")
    assert resume_run(tmp_path / "run", task=Known()).summary["rounds"] == 3


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    stopped(tmp_path / "runs" / "one")
    assert (tmp_path / "disk" / ".one.partial").is_dir()
    resume_run(tmp_path / "runs" / "one", task=TinyTask())
    assert (tmp_path / "disk" / "one" / "summary.json").is_file()
