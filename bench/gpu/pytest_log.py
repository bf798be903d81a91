"""A plugin of pytest that writes every outcome at once, for tests that may fault or hang.

    pytest -p bench.gpu.pytest_log …, with the file's name in the environment

A kernel that faults takes the process's CUDA context with it: the process ends then, as it does at
a test that takes too long. Whoever started it starts it again; it leaves out what has been begun.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import process, stages, timing
from bench.gpu.stages import FAILED, NOT_REACHED, PASSED, SKIPPED, STARTED

_MOST_LETTERS = 200
_NEW = {"outcome": NOT_REACHED}


def _path() -> Path:
    return Path(os.environ[stages.TEST_LOG])


def _put(test: str, outcome: str, error: str | None = None) -> None:
    with _path().open("a") as out:
        print(json.dumps({"test": test, "outcome": outcome, "error": error}), file=out)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    # The line that pytest marks with an E; else the last, as where a file cannot be imported.
    lines = [line.strip() for line in report.longreprtext.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or [""])[0][:_MOST_LETTERS]


@pytest.hookimpl(trylast=True)  # behind what the options leave out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = stages.read_tests(_path())
    items[:] = [item for item in items if known.get(item.nodeid, _NEW)["outcome"] == NOT_REACHED]
    for item in items:
        _put(item.nodeid, NOT_REACHED)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _put(report.nodeid, FAILED, _reason(report))


def pytest_runtest_logstart(nodeid: str, location: Sequence[Any]) -> None:
    _put(nodeid, STARTED)
    process.end_after(stages.TEST_S)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _put(report.nodeid, FAILED, _reason(report))
    elif report.skipped:
        _put(report.nodeid, SKIPPED)
    elif report.when == "call":
        _put(report.nodeid, PASSED)


def pytest_runtest_logfinish(nodeid: str, location: Sequence[Any]) -> None:
    # What was launched last may fault after its test; it would be found in the next one.
    if timing.context_is_lost():
        _put(nodeid, FAILED, "the CUDA context is lost behind it")
        pytest.exit("the CUDA context is lost", stages.LOST_CONTEXT)
    process.end_after(0)
