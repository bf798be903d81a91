"""`python -m bench.gpu` as far as it goes without a GPU: arguments, processes, results, checks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import cases, once, plan, process, result, stages, worker
from bench.gpu.process import Finished, Place
from bench.gpu.timing import Timing

CPU = torch.device("cpu")
SMALL = {
    "pack_factors": (4, 64),
    "unpack_factors": (4, 64),
    "reconstruct": (7, 33, 20),
    "rans_encode": (4, 64),
    "rans_decode": (4, 64),
    "truncated_svd": (2, 24, 40),
    "truncated_svd_list": (2, 24, 40, 1, 40, 24),
    "distill_loss": (8, 50),
    "layer_mse": (2, 3, 2, 10, 10),
    "projected_mse": (3, 5, 12, 8),
}


def place(root: Path, seconds: float = 60) -> Place:
    return Place(root, root, time.monotonic() + seconds)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_without_a_gpu_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "no CUDA device" in captured.err and "nothing was run" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "softmax"], "invalid choice: 'softmax'"),
        (["--library", "no/such.so"], "no/such.so is not a file"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(argv)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# ---- processes -----------------------------------------------------------------------------------


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; print('began', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    done = place(tmp_path).python("-c", program, limit_s=2)
    assert done == Finished(None, "began\n")
    assert done.problem == "ran out of time"
    assert "began" in (tmp_path / "gpu.log").read_text()


def test_no_process_begins_after_the_end(tmp_path: Path) -> None:
    assert place(tmp_path, seconds=-1).python("-c", "print(1)", limit_s=9) == Finished(None, "")


def test_the_code_of_the_place_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    (tmp_path / "found.py").write_text("print('ours')")
    done = place(tmp_path).python(
        "-c", "import os, found; print(os.environ['PYTHONPATH'].split(':')[1])", limit_s=60
    )
    assert done == Finished(0, "ours\nelsewhere\n")


def test_the_last_line_says_what_went_wrong(tmp_path: Path) -> None:
    done = place(tmp_path).python("-c", "print(1); raise SystemExit('the reason')", limit_s=60)
    assert done.problem == "exit status 1: the reason"


# ---- a library that was built elsewhere ----------------------------------------------------------


def test_ops_need_no_other_native_module() -> None:
    program = "import sys; sys.modules['fedkd_fast._C'] = None; import fedkd_fast.ops"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_command_begins_without_a_library() -> None:
    # It has yet to build one, or to put the given one beside a copy of the package.
    program = "import sys; sys.modules['fedkd_fast.ops'] = None; import bench.gpu.__main__"
    subprocess.run([sys.executable, "-c", program], cwd=stages.CHECKOUT, check=True)


def test_a_library_is_used_from_a_copy(tmp_path: Path) -> None:
    library = stages.CHECKOUT / stages.LIBRARY
    stages.copy_with_library(library, tmp_path)
    assert [path.name for path in (tmp_path / "fedkd_fast").glob("*.so")] == [library.name]
    program = "from fedkd_fast import ops; from bench.gpu import worker; print(ops.__file__)"
    done = place(tmp_path).python("-c", program, limit_s=120)
    assert done == Finished(0, f"{tmp_path / 'fedkd_fast' / 'ops' / '__init__.py'}\n")
    assert stages.describe(place(tmp_path))["outcome"] == stages.PASSED


# ---- single measurements -------------------------------------------------------------------------


def clock(call: Callable[[], object]) -> Timing:
    call()
    return Timing(2.0, 3.0, 5)


def small_jobs(op: str) -> list[plan.Job]:
    first = plan.TABLE[op].shapes[0]
    jobs = [job for job in plan.jobs(op) if job.shape == first and job.impl != plan.COMPILED]
    return [job._replace(shape=SMALL[op]) for job in jobs]


def outcomes(records: Iterator[worker.Record]) -> list[worker.Record]:
    return [record for record in records if record["outcome"] != "started"]


@pytest.mark.parametrize("op", plan.TABLE)
def test_every_implementation_passes_its_check(op: str) -> None:
    jobs = small_jobs(op)
    records = outcomes(worker.measure_jobs(jobs, CPU, clock))
    assert [(record["impl"], record["outcome"]) for record in records] == [
        (job.impl, "measured") for job in jobs
    ]
    assert all(record["ms"] == 2.0 and record["moved_bytes"] > 0 for record in records)


@pytest.mark.parametrize("op", plan.TABLE)
def test_a_wrong_result_is_not_timed(op: str) -> None:
    prepared = cases.prepare(op, SMALL[op], plan.TABLE[op].dtypes[0], CPU)
    assert list(prepared.calls) == list(plan.TABLE[op].impls)
    found = prepared.calls["ours"]()
    parts = found if isinstance(found, tuple) else (found,)
    prepared.check("ours", found)
    # One entry in the middle: an error that a sum over everything would hide.
    target = parts[0].detach()
    target[tuple(size // 2 for size in target.shape)] += 100
    with pytest.raises(AssertionError):
        prepared.check("ours", found)


def test_a_case_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = small_jobs("reconstruct")

    def build(*_: Any) -> cases.Prepared:
        def fault() -> None:
            raise RuntimeError("CUDA error: an illegal address\nlong advice")

        def check(impl: str, found: Any) -> float:
            assert found == 1, "not 1"
            return 0.0

        return cases.Prepared({"ours": fault, "torch.matmul": lambda: 2, "copy": int}, check, 1)

    monkeypatch.setitem(cases.BUILDERS, "reconstruct", build)
    records = outcomes(worker.measure_jobs(jobs, CPU, clock))
    assert [(record["outcome"], record.get("error")) for record in records] == [
        ("failed", "RuntimeError: CUDA error: an illegal address"),
        ("failed", "wrong result: not 1"),
        ("measured", None),
    ]


def test_every_op_runs_under_the_sanitizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert once.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == [
        word for op in plan.TABLE for word in (f"{op}:", "ran")
    ]
    assert list(once.RUNS) == list(plan.TABLE)


# ---- stages, with processes that only pretend ----------------------------------------------------


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


def write_measurements(line: list[str], die_at: int | None = None) -> Finished:
    """Act as a worker; `die_at` names a job at which it crashes."""
    op, first = after(line, "--op"), int(after(line, "--first"))
    with Path(after(line, "--out")).open("w") as out:
        for number, job in list(enumerate(plan.jobs(op)))[first:]:
            record = dict(job._asdict(), outcome="started")
            print(json.dumps(record), file=out)
            if number == die_at:
                out.write('{"half a li')
                return Finished(-11, "a kernel faulted\n")
            record.update(outcome="measured", ms=1.0, call_ms=2.0, repeats=3, deviation=0.0)
            print(json.dumps(record | {"moved_bytes": 10**6, "flops": None}), file=out)
    return Finished(0, "")


def test_a_crash_costs_one_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = pretend(monkeypatch, lambda line: write_measurements(line, die_at=4))
    records = stages.bench(place(tmp_path), "reconstruct")
    assert [after(line, "--first") for line in commands] == ["0", "5"]
    assert len(records) == len(plan.jobs("reconstruct"))
    (broken,) = [record for record in records if record["outcome"] != "measured"]
    assert broken["error"] == "exit status -11: a kernel faulted"
    assert broken["impl"] == plan.jobs("reconstruct")[4].impl


def test_a_worker_that_cannot_begin_fails_every_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = pretend(monkeypatch, lambda line: Finished(1, "ImportError: no library"))
    records = stages.bench(place(tmp_path), "reconstruct")
    assert len(commands) == 1
    assert {record["error"] for record in records} == {"exit status 1: ImportError: no library"}


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


@pytest.mark.parametrize(
    ("done", "outcome", "said"),
    [
        (Finished(0, "========= ERROR SUMMARY: 0 errors\n"), "passed", "0 errors"),
        (Finished(99, "========= ERROR SUMMARY: 3 errors\n"), "failed", "3 errors"),
        (
            Finished(0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"),
            *("failed", "1 hazard displayed (0 errors, 1 warning)"),
        ),
        (
            Finished(1, "RuntimeError: no\n========= ERROR SUMMARY: 0 errors\n"),
            *("failed", "exit status 1: RuntimeError: no"),
        ),
        (Finished(0, "ran\n"), "failed", "compute-sanitizer gave no summary"),
        (Finished(None, ""), "failed", "ran out of time"),
    ],
)
def test_sanitizers_are_read(done: Finished, outcome: str, said: str) -> None:
    found = stages.read_sanitizer(done)
    assert found["outcome"] == outcome and said in (found.get("error"), found.get("summary"))


def test_a_missing_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stages.shutil, "which", lambda *_, **__: None)
    found = stages.sanitize(place(tmp_path), "memcheck", None)
    assert found["outcome"] == stages.SKIPPED and "not found" in found["error"]


# ---- the whole -----------------------------------------------------------------------------------


def measured(impl: str, ms: float, **more: Any) -> result.Record:
    record = {"op": "reconstruct", "shape": [2, 3, 4], "dtype": "float32", "impl": impl}
    times = {"ms": ms, "call_ms": 2 * ms, "repeats": 9, "deviation": 0.0, "outcome": "measured"}
    return {**record, **times, "moved_bytes": 4 * 10**6, "flops": 8 * 10**9, **more}


def test_ratios_and_rates() -> None:
    records = [measured("ours", 2.0), measured("copy", 1.0), measured("torch.matmul", 5.0)]
    other = measured("copy", 9.0, shape=[1, 1, 1])
    (case,) = result.assemble([*records, other], copy_gb_per_s=8.0)
    assert case["gb_per_s"] == pytest.approx(2.0)
    assert case["bandwidth_share"] == pytest.approx(0.25)
    assert case["tflop_per_s"] == pytest.approx(4.0)
    assert {name: peer["ratio"] for name, peer in case["peers"].items()} == {
        "copy": 0.5,
        "torch.matmul": 2.5,
    }


def test_what_failed_stays_in_the_result() -> None:
    broken = {"outcome": "failed", "error": "wrong result: off"}
    (case,) = result.assemble([measured("ours", 2.0), measured("copy", 1.0) | broken], None)
    assert case["bandwidth_share"] is None
    assert case["peers"]["copy"] == broken
    (case,) = result.assemble([measured("ours", 2.0) | broken, measured("copy", 1.0)], 8.0)
    assert case["error"] == "wrong result: off" and case["peers"]["copy"]["ratio"] is None
    assert result.rows([case])[0][-1] == "wrong result: off"


FACTS = {"gpu": "A card", "driver": "1", "torch": "2", "copy_gb_per_s": 1e3, "bf16_tflop_per_s": 9}


def act(line: list[str]) -> Finished:
    """A machine on which everything but one measurement goes well, and racecheck finds a race."""
    if "facts" in line:
        Path(after(line, "--out")).write_text(json.dumps(FACTS))
    elif "measure" in line:
        return write_measurements(line, die_at=1 if "reconstruct" in line else None)
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
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "compute-sanitizer")
    pretend(monkeypatch, act)
    library = stages.CHECKOUT / stages.LIBRARY
    argv = ["--out", str(tmp_path), "--library", str(library)]
    assert command.main(argv + (["--only", only] if only else [])) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"] == FACTS
    assert found["stages"]["memcheck"]["outcome"] == stages.PASSED
    assert found["stages"]["racecheck"]["error"] == "1 hazards displayed"
    assert {case["op"] for case in found["cases"]} == ({only} if only else set(plan.TABLE))
    expected = sum(len(plan.jobs(op)) for op in plan.TABLE if only in (None, op))
    assert len(found["measurements"]) == expected
    lines = capsys.readouterr().out.splitlines()
    assert any("racecheck: 1 hazards displayed" in line for line in lines)
    assert any("A card, driver 1" in line for line in lines)
    broken = [line for line in lines if line.startswith("FAILED reconstruct")]
    assert len(broken) == (0 if only else 1)
    assert all(path.name in ("gpu.json", "gpu.log") for path in tmp_path.iterdir())
