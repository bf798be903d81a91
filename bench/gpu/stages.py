"""The stages of a GPU run, each in processes of its own and with a time of its own.

A stage returns what it found as part of the result. It does not raise for what it ran, so that no
failure hides the stages behind it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu import plan
from bench.gpu.process import Finished, Place

CHECKOUT = Path(__file__).parents[2]
LIBRARY = Path("fedkd_fast") / "libfedkd_fast_ops.so"
RULES = "tests/test_cuda_rules.py"
# Whole runs on the device; they need the wire format, which a library alone does not have.
TRAINING = "tests/test_device.py"

BUILD_S, FACTS_S, TESTS_S = 200.0, 60.0, 130.0
# What no rival is waited for; the last pass has what time is left.
BENCH_S = {"quick": 150.0, "late": math.inf}
PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
# The time did not suffice for it; a rival took so long that it was ended. Neither is a failure.
NOT_REACHED, TOO_SLOW = "not reached", "too slow"
STARTED = "started"
WRONG_RESULT = "wrong result"
TEST_S = 60.0  # for one test; longer is a failure
LOST_CONTEXT = 33  # of a pytest that a kernel's fault ended; its own statuses are below 10
TEST_LOG = "FEDKD_FAST_TEST_LOG"  # names the file in which outcomes gather
_MOST_FAILURES = 40

Result = dict[str, Any]


def failed(error: str, **more: Any) -> Result:
    return {"outcome": FAILED, "error": error, **more}


def skipped(error: str) -> Result:
    return {"outcome": SKIPPED, "error": error}


# ---- the library ---------------------------------------------------------------------------------


def copy_with_library(library: Path, folder: Path) -> None:
    """Copy what the stages run into `folder`, with a library that was built elsewhere.

    The package takes its library from its own folder and nowhere else, so it gets a folder with
    that one in it; the checkout stays as it is.
    """
    native = shutil.ignore_patterns("*.so", "__pycache__", "out")
    for part in ("fedkd_fast", "bench", "tests"):
        shutil.copytree(CHECKOUT / part, folder / part, ignore=native)
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    shutil.copy(library, folder / LIBRARY)


def build(place: Place) -> Result:
    """Build the library in the checkout, with the torch at hand."""
    needed = ("setuptools", "pybind11", "cmake", "ninja")
    missing = [
        tool for tool in needed if not (importlib.util.find_spec(tool) or shutil.which(tool))
    ]
    if missing:
        return failed(f"not installed: {', '.join(missing)}; or give a built one with --library")
    done = place.python("setup.py", "--quiet", "build_ext", "--inplace", limit_s=BUILD_S)
    return {"outcome": FAILED, "error": done.problem} if done.problem else describe(place)


def describe(place: Place) -> Result:
    """Say which library the stages load."""
    digest = hashlib.sha256((place.root / LIBRARY).read_bytes()).hexdigest()
    return {"outcome": PASSED, "sha256": digest}


# ---- results of a worker -------------------------------------------------------------------------


def read_lines(path: Path) -> list[Result]:
    """Read lines of JSON; a process that was ended may leave half of one."""
    found: list[Result] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def facts(place: Place) -> tuple[Result, Result]:
    """Load the library and measure the card; returns the outcome, and card and software by name."""
    path = place.out / "facts.jsonl"
    path.unlink(missing_ok=True)
    done = place.python("-m", "bench.gpu.worker", "facts", "--out", str(path), limit_s=FACTS_S)
    lines = read_lines(path)
    path.unlink(missing_ok=True)
    if done.problem or not lines:
        return failed(done.problem or "no answer"), {}
    return {"outcome": PASSED}, lines[0]


def bench(place: Place, part: str, only: str | None) -> tuple[Result, list[Result]]:
    """Measure every case of a pass; returns the outcome, and one record for each of its jobs."""
    jobs = plan.jobs(part, only)
    path = place.out / f"{part}.jsonl"
    over = place.left_s() - BENCH_S[part]
    records: list[Result] = []
    problem = None
    while len(records) < len(jobs):
        path.unlink(missing_ok=True)
        arguments = ("--part", part, "--first", str(len(records)), "--out", str(path))
        done = place.python(
            *("-m", "bench.gpu.worker", "measure", *arguments),
            *(("--only", only) if only else ()),
            limit_s=max(0.0, place.left_s() - over),
            # Helper processes of torch.compile would outlive the group that is ended in time.
            TORCHINDUCTOR_COMPILE_THREADS="1",
        )
        lines = read_lines(path)
        records += [line for line in lines if line["outcome"] != STARTED]
        if lines and lines[-1]["outcome"] == STARTED:
            records.append(dict(lines[-1], **_unfinished(lines[-1]["impl"], done)))
        elif not lines or done.status == 0:
            # A process that could not begin would not begin a second time either.
            problem = done.problem if done.status is not None else None
            break
        if done.status is None:
            break
    path.unlink(missing_ok=True)
    for job in jobs[len(records) :]:
        missed = {"outcome": NOT_REACHED, "error": problem or "the time was over"}
        records.append(dict(job._asdict(), shape=list(job.shape), **missed))
    counts: dict[str, Any] = Counter(record["outcome"] for record in records)
    if problem or counts.get(FAILED):
        return failed(problem or f"{counts[FAILED]} measurements failed", **counts), records
    reached = any(record["outcome"] != NOT_REACHED for record in records)
    return {"outcome": PASSED if reached else NOT_REACHED, **counts}, records


def _unfinished(impl: str, done: Finished) -> Result:
    """Say what became of the job at which a worker ended."""
    if done.status is None:
        return {"outcome": NOT_REACHED, "error": "the time was over while it ran"}
    if not done.ended_itself:
        return failed(str(done.problem))
    late = f"took longer than {plan.JOB_S:.0f} s"
    return failed(late) if plan.is_ours(impl) else {"outcome": TOO_SLOW, "error": late}


# ---- pytest -------------------------------------------------------------------------------------


def test_files(stem: str) -> list[str]:
    """Name the test files of an op."""
    return sorted(path.name for path in (CHECKOUT / "tests").glob(f"test_{stem}*.py"))


def tests(place: Place, only: str | None) -> Result:
    """Run the tests marked `cuda` of every op, or of one."""
    if importlib.util.find_spec("pytest") is None:
        return failed("pytest is not installed")
    stems = dict.fromkeys(row.stem for op, row in plan.TABLE.items() if only in (None, op))
    chosen = [*(f"tests/{name}" for stem in stems for name in test_files(stem)), RULES]
    if only:
        # All of the stem's own files, and what the rules say of this op.
        chosen += ["-k", f"test_{plan.TABLE[only].stem} or {only}"]
    elif any((place.root / "fedkd_fast").glob("_C.*.so")):
        chosen.append(TRAINING)
    path = place.out / "tests.jsonl"
    path.unlink(missing_ok=True)
    over = place.left_s() - TESTS_S
    while True:
        done = place.python(
            *("-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"),
            *("-p", "bench.gpu.pytest_log"),
            # What one file imports and this Python lacks is that file's failure alone.
            "--continue-on-collection-errors",
            *chosen,
            limit_s=max(0.0, place.left_s() - over),
            **{TEST_LOG: str(path)},
        )
        found = read_tests(path)
        begun = [test for test, record in found.items() if record["outcome"] == STARTED]
        for test in begun:
            found[test] |= _broken_test(done)
        path.write_text("".join(json.dumps(record) + "\n" for record in found.values()))
        again = begun or done.status == LOST_CONTEXT
        left = any(record["outcome"] == NOT_REACHED for record in found.values())
        if done.status is None or not (again and left):
            break
    path.unlink()
    return _judge_tests(found, done)


def read_tests(path: Path) -> dict[str, Result]:
    """Read what came of each test: the last that was written of it, or its first failure."""
    found: dict[str, Result] = {}
    for record in read_lines(path):
        known = found.get(record["test"])
        if known is None or known["outcome"] != FAILED:
            found[record["test"]] = record
    return found


def _broken_test(done: Finished) -> Result:
    """Say what became of the test at which pytest ended."""
    if done.status is None:
        return {"outcome": NOT_REACHED}
    return failed(f"took longer than {TEST_S:.0f} s" if done.ended_itself else str(done.problem))


def _judge_tests(found: dict[str, Result], done: Finished) -> Result:
    counts: dict[str, Any] = Counter(record["outcome"] for record in found.values())
    names = [
        f"{test}: {record['error']}"
        for test, record in found.items()
        if record["outcome"] == FAILED
    ]
    if names:
        error = f"{len(names)} tests failed"
        return failed(error, **counts, failures=names[:_MOST_FAILURES])
    # Unlike a bench, a test that did not run leaves open whether the kernels are right.
    if missed := counts.get(NOT_REACHED):
        return failed(f"{done.problem}: {missed} tests not reached", **counts)
    if not counts.get(PASSED):
        return failed(done.problem or "no test ran", **counts)
    if done.problem:
        return failed(done.problem, **counts)
    return {"outcome": PASSED, **counts}
