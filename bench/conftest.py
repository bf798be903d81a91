"""What every bench shares: one thread count, and the facts that make a number worth keeping."""

from __future__ import annotations

from typing import Any

import torch
from provenance import facts

THREADS = 1  # two noisy cores: one thread gives ratios that repeat


def pytest_sessionstart() -> None:
    torch.set_num_threads(THREADS)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single time: megabytes that nobody reads
    # These say more of a host than a result should.
    del output_json["machine_info"], output_json["commit_info"]
    output_json["fedkd_fast"] = facts(THREADS)
