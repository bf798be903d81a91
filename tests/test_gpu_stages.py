"""The stages of `python -m bench.gpu`, with processes that only pretend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_places import place, pretend

from bench.gpu import __main__ as command
from bench.gpu import plan, process, sanitizer, stages
from bench.gpu.process import Finished


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
        time.sleep(600 if shape == shapes[0] else 0)
    calls = {{"ours": wait, "torch.matmul": wait, "copy": int}}
    return cases.Prepared(calls, lambda impl, found: 0.0, 1)

cases.BUILDERS["reconstruct"] = build
sys.exit(worker.main([*sys.argv[1:], "--device", "cpu"]))
"""


def test_a_call_that_hangs_costs_one_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    run = process.run
    monkeypatch.setattr(
        process, "run", lambda line, **more: run([line[0], str(stub), *line[3:]], **more)
    )
    monkeypatch.setattr(plan, "JOB_S", 2.0)
    found, records = stages.bench(place(tmp_path, seconds=120), "quick", "reconstruct")
    late = [record for record in records if record["outcome"] != "measured"]
    assert [(record["impl"], record["outcome"]) for record in late] == [
        ("ours", stages.FAILED),
        ("torch.matmul", stages.TOO_SLOW),  # no failure
    ]
    assert {record["error"] for record in late} == {"took longer than 2 s"}
    assert len(records) == len(plan.jobs("quick", "reconstruct"))
    assert found["error"] == "1 measurements failed"


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


# ---- the whole -----------------------------------------------------------------------------------

FACTS = {"gpu": "A card", "driver": "1", "torch": "2", "copy_gb_per_s": 1e3, "bf16_tflop_per_s": 9}


def act(line: list[str], tmp: Path) -> Finished:
    """A machine on which everything but one measurement goes well, and racecheck finds a race."""
    if "facts" in line:
        Path(after(line, "--out")).write_text(json.dumps(FACTS))
    elif "measure" in line:
        return write_measurements(line, die_at=plan.jobs("quick", "reconstruct")[1])
    elif "--tool" in line:
        found = 1 if "racecheck" in line else 0
        return Finished(99 * found, f"========= RACECHECK SUMMARY: {found} hazards displayed\n")
    else:
        passed = {"test": "a test", "outcome": "passed", "error": None}
        (tmp / "tests.jsonl").write_text(json.dumps(passed))
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
    commands = pretend(monkeypatch, lambda line: act(line, tmp_path))
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
