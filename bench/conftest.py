"""What every bench shares: one thread count, and the facts that make a number worth keeping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from provenance import facts


def pytest_addoption(parser: pytest.Parser) -> None:
    # On a noisy machine, one thread gives ratios that repeat.
    parser.addoption("--threads", type=int, default=1, help="threads of torch and of the ops")


def pytest_sessionstart(session: pytest.Session) -> None:
    torch.set_num_threads(session.config.getoption("threads"))


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single time: megabytes that nobody reads
    # These say more of a host than a result should.
    del output_json["machine_info"], output_json["commit_info"]
    output_json["fedkd_fast"] = facts(config.getoption("threads"))
