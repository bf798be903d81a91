"""What every bench shares: one thread count, and the facts that make a number worth keeping."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from provenance import commit

import fedkd_fast._C as _C

THREADS = 1  # two noisy cores: one thread gives ratios that repeat


def pytest_sessionstart() -> None:
    torch.set_num_threads(THREADS)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single time: megabytes that nobody reads
    # These say more of a host than a result should.
    del output_json["machine_info"], output_json["commit_info"]
    output_json["fedkd_fast"] = {
        "version": _C.version,
        "commit": commit(),
        "compiler": _C.compiler,
        "cuda_archs": _C.cuda_archs if _C.has_cuda else None,
        "torch": torch.__version__,
        "threads": THREADS,
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
