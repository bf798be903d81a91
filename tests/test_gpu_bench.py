"""`python -m bench.gpu` as far as it goes without a GPU: arguments, processes, results, checks."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_places import place

from bench import peers
from bench.gpu import __main__ as command
from bench.gpu import cases, once, plan, result, stages, timing, worker
from bench.gpu.process import Finished
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
    jobs = [job for part in plan.PASSES for job in plan.jobs(part, op)]
    jobs = [job for job in jobs if job.shape == first and job.impl != plan.COMPILED]
    return [job._replace(shape=SMALL[op]) for job in sorted(jobs, key=lambda job: job[:3])]


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


@pytest.mark.parametrize("op", ["truncated_svd", "truncated_svd_list"])
def test_matrices_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    updates, devices = peers.updates, []

    def recorded(*arguments: Any) -> torch.Tensor:
        *sizes, chosen = arguments
        devices.append(chosen)
        assert updates(*sizes, torch.device("meta")).is_meta
        return updates(*sizes, chosen)

    monkeypatch.setattr(peers, "updates", recorded)
    cases.prepare(op, SMALL[op], "float32", CPU)
    assert devices and set(devices) == {CPU}


def test_a_slow_rival_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SLOW_S", 0.05)
    impls = ["ours", "torch.matmul", "copy", plan.COMPILED]
    made: list[str] = []

    def build(*_: Any) -> cases.Prepared:
        def call(impl: str) -> None:
            made.append(impl)
            time.sleep(0.0 if impl == "copy" else 0.06)

        calls = {impl: functools.partial(call, impl) for impl in impls}
        return cases.Prepared(calls, lambda impl, found: 0.0, 1)

    monkeypatch.setitem(cases.BUILDERS, "reconstruct", build)
    jobs = [plan.Job("reconstruct", (2, 3, 4), "float32", impl) for impl in impls]
    records = outcomes(worker.measure_jobs(jobs, CPU, clock))
    # A compiler's time is not its code's, and ours is always measured warm.
    assert [made.count(impl) for impl in impls] == [2, 1, 2, 2]
    assert [record["repeats"] for record in records] == [5, 1, 5, 5]
    assert records[1]["ms"] == records[1]["call_ms"] >= 60


@pytest.mark.parametrize(("takes_s", "calls"), [(0.6, 1), (0.3, 11)])
def test_a_long_call_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, calls: int
) -> None:
    made: list[int] = []

    def seconds(call: Callable[[], object], repeats: int) -> float:
        made.extend([1] * repeats)
        return takes_s

    def events(call: Callable[[], object], repeats: int, _: object) -> list[float]:
        made.extend([1] * repeats)
        return [1e3 * takes_s]

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "events", events)
    monkeypatch.setattr(torch.cuda, "current_device", int)
    properties = SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **_: empty(size))
    times = timing.measure(lambda: made.append(1))
    assert times.ms == times.call_ms == 1e3 * takes_s
    assert len(made) == calls


def test_the_important_comes_first() -> None:
    quick, late = (plan.jobs(part) for part in plan.PASSES)
    assert list(dict.fromkeys(job.op for job in quick)) == list(plan.TABLE)
    assert list(plan.TABLE)[:3] == ["distill_loss", "layer_mse", "projected_mse"]
    assert not {job.impl for job in quick} & set(plan.LATE)
    assert {job.impl for job in late} == set(plan.LATE)
    # The first turn has a case of every op, each with its largest shape.
    assert late[0][:2] == ("distill_loss", plan.TABLE["distill_loss"].shapes[-1])
    turn = list(dict.fromkeys(job[:3] for job in late))[: len({job.op for job in late})]
    assert len({op for op, *_ in turn}) == len(turn)
    every = {
        (op, shape, dtype, impl)
        for op, row in plan.TABLE.items()
        for shape in row.shapes
        for dtype in row.dtypes
        for impl in row.impls
    }
    assert set(quick) | set(late) == every and len(quick) + len(late) == len(every)
    for op in plan.TABLE:
        assert plan.jobs("quick", op) == [job for job in quick if job.op == op]


def test_every_op_runs_under_the_sanitizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert once.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == [
        word for op in plan.TABLE for word in (f"{op}:", "ran")
    ]
    assert list(once.RUNS) == list(plan.TABLE)


# ---- the result ----------------------------------------------------------------------------------


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


def found(*records: result.Record, **stages: result.Record) -> result.Record:
    return {"stages": stages, "measurements": list(records), "machine": {}}


def test_what_was_not_reached_fails_nothing() -> None:
    missed = measured("ours", 1.0) | {"outcome": stages.NOT_REACHED, "error": "the time was over"}
    slow = measured("gesvdj", 1.0) | {"outcome": stages.TOO_SLOW, "error": "longer than 40 s"}
    quick = {"outcome": stages.PASSED, "measured": 5, "too slow": 1, "not reached": 7}
    whole = found(missed, slow, quick=quick)
    assert result.failures(whole) == []
    said = ["quick", "passed", "5", "measured,", "1", "too", "slow,", "7", "not", "reached"]
    assert result.summary(whole)[0].split() == said
    (case,) = result.assemble([missed, slow], 8.0)
    assert case["outcome"] == "not reached" and case["peers"]["gesvdj"]["outcome"] == "too slow"


def test_many_failures_hide_no_wrong_result() -> None:
    broken = {"outcome": stages.FAILED, "error": "exit status -6"}
    wrong = {"outcome": stages.FAILED, "error": f"{stages.WRONG_RESULT}: off by 3"}
    records = [measured("ours", 1.0) | broken] * 50 + [measured("ours-op", 1.0) | wrong]
    tests = {"outcome": stages.FAILED, "error": "40 tests failed", "failures": ["a test"] * 40}
    lines = result.summary(found(*records, tests=tests))
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 21 and failed[-1] == "FAILED 72 more, see gpu.json"
    assert failed[:2] == [
        "FAILED tests: 40 tests failed",
        "FAILED reconstruct 2×3×4 float32 ours-op: wrong result: off by 3",
    ]
