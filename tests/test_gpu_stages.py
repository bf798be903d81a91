"""The stages of `python -m bench.gpu`, with processes that only pretend."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_places import place

from bench.gpu import __main__ as command
from bench.gpu import plan, process, sanitizer, stages
from bench.gpu.process import Finished


def pretend(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Finished]
) -> list[list[str]]:
    """Answer instead of running; returns the list in which the commands gather."""
    commands: list[list[str]] = []

    def run(line: list[str], **_: Any) -> Finished:
        commands.append(line)
        return answer(line)

    monkeypatch.setattr(process, "run", run)
    return commands


def after(line: list[str], option: str) -> str:
    return line[line.index(option) + 1]


def planned(line: list[str]) -> list[plan.Job]:
    """The jobs that a worker is asked for."""
    only = after(line, "--only") if "--only" in line else None
    return plan.jobs(after(line, "--part"), only)


def write_measurements(line: list[str], die_at: plan.Job | None = None) -> Finished:
    """Act as a worker; `die_at` is a job at which it crashes."""
    with Path(after(line, "--out")).open("w") as out:
        for job in planned(line)[int(after(line, "--first")) :]:
            record = dict(job._asdict(), outcome="started")
            print(json.dumps(record), file=out)
            if job == die_at:
                out.write('{"half a li')
                return Finished(-11, "a kernel faulted\n")
            record.update(outcome="measured", ms=1.0, call_ms=2.0, repeats=3, deviation=0.0)
            print(json.dumps(record | {"moved_bytes": 10**6, "flops": None}), file=out)
    return Finished(0, "")


def test_a_crash_costs_one_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = plan.jobs("quick", "reconstruct")
    commands = pretend(monkeypatch, lambda line: write_measurements(line, die_at=jobs[4]))
    outcome, records = stages.bench(place(tmp_path), "quick", "reconstruct")
    assert [after(line, "--first") for line in commands] == ["0", "5"]
    assert [record["impl"] for record in records] == [job.impl for job in jobs]
    (broken,) = [record for record in records if record["outcome"] != "measured"]
    assert broken["error"] == "exit status -11: a kernel faulted"
    assert broken["impl"] == jobs[4].impl
    assert outcome["error"] == "1 measurements failed"
    assert (outcome["failed"], outcome["measured"]) == (1, len(jobs) - 1)


def test_a_worker_that_cannot_begin_is_one_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = pretend(monkeypatch, lambda line: Finished(1, "ImportError: no library"))
    outcome, records = stages.bench(place(tmp_path), "quick", None)
    assert len(commands) == 1
    assert outcome["outcome"] == stages.FAILED
    assert outcome["error"] == "exit status 1: ImportError: no library"
    assert {record["outcome"] for record in records} == {stages.NOT_REACHED}
    assert {record["error"] for record in records} == {"exit status 1: ImportError: no library"}


STUB = f"""
import sys, time
sys.path.insert(0, {str(stages.CHECKOUT)!r})
import torch
torch.compiler.reset()  # imports for seconds
from bench.gpu import cases, plan, timing, worker
shapes = plan.TABLE["reconstruct"].shapes
plan.JOB_S = 2.0
timing.measure = lambda call: timing.Timing(1.0, 2.0, 3)

def build(shape, dtype, device):
    def wait():
        time.sleep(HANGS if shape == shapes[0] else 0)
    calls = {{impl: wait if impl == SLEEPER else int for impl in plan.TABLE["reconstruct"].impls}}
    return cases.Prepared(calls, lambda impl, found: 0.0, 1)

cases.BUILDERS["reconstruct"] = build
sys.exit(worker.main([*sys.argv[1:], "--device", "cpu"]))
"""


def stub_worker(
    monkeypatch: pytest.MonkeyPatch, folder: Path, sleeper: str, takes_s: float
) -> None:
    """Let real workers measure calls that only sleep."""
    stub = folder / "stub.py"
    stub.write_text(STUB.replace("SLEEPER", repr(sleeper)).replace("HANGS", str(takes_s)))
    run = process.run

    def instead(line: list[str], **more: Any) -> Finished:
        return run([line[0], str(stub), *line[3:]], **more)

    monkeypatch.setattr(process, "run", instead)


@pytest.mark.parametrize(
    ("sleeper", "outcome"), [("torch.matmul", stages.TOO_SLOW), ("ours", stages.FAILED)]
)
def test_a_call_that_hangs_costs_one_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sleeper: str, outcome: str
) -> None:
    stub_worker(monkeypatch, tmp_path, sleeper, 600)
    monkeypatch.setattr(plan, "JOB_S", 2.0)
    found, records = stages.bench(place(tmp_path, seconds=120), "quick", "reconstruct")
    (late,) = [record for record in records if record["outcome"] != "measured"]
    assert (late["impl"], late["outcome"]) == (sleeper, outcome)
    assert late["error"] == "took longer than 2 s"
    assert len(records) == len(plan.jobs("quick", "reconstruct"))
    # That a rival is slow is no failure.
    assert found["outcome"] == (stages.FAILED if sleeper == "ours" else stages.PASSED)


def test_what_the_time_did_not_suffice_for_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(line: list[str]) -> Finished:
        jobs = planned(line)
        write_measurements(line, die_at=jobs[7])
        return Finished(None, "")

    commands = pretend(monkeypatch, answer)
    found, records = stages.bench(place(tmp_path), "quick", None)
    assert len(commands) == 1
    assert [record["outcome"] for record in records[:8]] == ["measured"] * 7 + ["not reached"]
    assert {record["outcome"] for record in records[8:]} == {"not reached"}
    assert found == {"outcome": "passed", "measured": 7, "not reached": len(records) - 7}
    over = place(tmp_path, seconds=-1)
    found, records = stages.bench(over, "late", None)
    assert found == {"outcome": "not reached", "not reached": len(plan.jobs("late"))}


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="good"/>
<testcase classname="tests.test_a" name="idle"><skipped message="one GPU"/></testcase>
{}
</testsuite></testsuites>"""
BAD = '<testcase classname="tests.test_a" name="bad"><failure message="off by 3"/></testcase>'


@pytest.mark.parametrize(("more", "outcome"), [("", stages.PASSED), (BAD, stages.FAILED)])
def test_tests_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: str, outcome: str
) -> None:
    def answer(line: list[str]) -> Finished:
        (option,) = [word for word in line if word.startswith("--junitxml=")]
        Path(option.partition("=")[2]).write_text(JUNIT.format(more))
        return Finished(int(bool(more)), "")

    commands = pretend(monkeypatch, answer)
    found = stages.tests(place(tmp_path), "unpack_factors")
    assert (found["passed"], found["skipped"], found["outcome"]) == (1, 1, outcome)
    assert found["failed"] == (1 if more else 0)
    assert found.get("failures", []) == (["tests.test_a::bad: off by 3"] if more else [])
    assert after(commands[0], "-k") == "test_pack_factors or unpack_factors"
    assert "tests/test_pack_factors.py" in commands[0] and stages.RULES in commands[0]
    assert "tests/test_distill_loss.py" not in commands[0]


@pytest.mark.parametrize("built", [True, False])
def test_training_is_tested_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool
) -> None:
    def answer(line: list[str]) -> Finished:
        (option,) = [word for word in line if word.startswith("--junitxml=")]
        Path(option.partition("=")[2]).write_text(JUNIT.format(""))
        return Finished(0, "")

    commands = pretend(monkeypatch, answer)
    there = place(tmp_path)
    (there.root / "fedkd_fast").mkdir(parents=True, exist_ok=True)
    if built:
        (there.root / "fedkd_fast" / "_C.cpython-312-x86_64-linux-gnu.so").touch()
    stages.tests(there, None)
    assert (stages.TRAINING in commands[0]) == built


def test_every_test_on_a_gpu_is_run() -> None:
    named = {name for row in plan.TABLE.values() for name in stages.test_files(row.stem)}
    named |= {Path(one).name for one in (stages.RULES, stages.TRAINING)}
    for path in (stages.CHECKOUT / "tests").glob("test_*.py"):
        runs_there = re.search(r"\bdevice: torch\.device|pytest\.mark\.cuda", path.read_text())
        assert not runs_there or path.name in named, path.name
        # The Python at hand there need not have it, and would lose the whole file.
        assert path.name not in named or "hypothesis" not in path.read_text(), path.name


# ---- the whole -----------------------------------------------------------------------------------

FACTS = {"gpu": "A card", "driver": "1", "torch": "2", "copy_gb_per_s": 1e3, "bf16_tflop_per_s": 9}


def act(line: list[str]) -> Finished:
    """A machine on which everything but one measurement goes well, and racecheck finds a race."""
    if "facts" in line:
        Path(after(line, "--out")).write_text(json.dumps(FACTS))
    elif "measure" in line:
        return write_measurements(line, die_at=plan.jobs("quick", "reconstruct")[1])
    elif "--tool" in line:
        found = 1 if "racecheck" in line else 0
        return Finished(99 * found, f"========= RACECHECK SUMMARY: {found} hazards displayed\n")
    else:
        (option,) = [word for word in line if word.startswith("--junitxml=")]
        Path(option.partition("=")[2]).write_text(JUNIT.format(""))
    return Finished(0, "")


@pytest.mark.parametrize("only", [None, "distill_loss"])
def test_one_command(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    only: str | None,
) -> None:
    monkeypatch.setattr(command, "no_gpu", lambda: None)
    monkeypatch.setattr(sanitizer, "find", lambda: "compute-sanitizer")
    commands = pretend(monkeypatch, act)
    library = stages.CHECKOUT / stages.LIBRARY
    argv = ["--out", str(tmp_path), "--library", str(library)]
    assert command.main(argv + (["--only", only] if only else [])) == 1
    order = ["facts", "pytest", "quick", "--tool", "late"]
    words = dict.fromkeys(word for line in commands for word in line)
    assert [word for word in words if word in order] == order
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"] == FACTS
    assert found["stages"]["memcheck"]["outcome"] == stages.PASSED
    raced = [only] if only else list(plan.TABLE)
    said = "; ".join(f"{op}: 1 hazards displayed" for op in raced)
    assert found["stages"]["racecheck"]["error"] == said
    assert {case["op"] for case in found["cases"]} == ({only} if only else set(plan.TABLE))
    expected = sum(len(plan.jobs(part, only)) for part in plan.PASSES)
    assert len(found["measurements"]) == expected
    lines = capsys.readouterr().out.splitlines()
    assert f"FAILED racecheck: {said}" in lines
    assert any("A card, driver 1" in line for line in lines)
    broken = [line for line in lines if line.startswith("FAILED reconstruct")]
    assert len(broken) == (0 if only else 1)
    assert all(path.name in ("gpu.json", "gpu.log") for path in tmp_path.iterdir())
