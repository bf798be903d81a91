"""The part of a GPU bench that touches the GPU, in a process of its own.

    python -m bench.gpu.worker facts --out FILE
    python -m bench.gpu.worker measure --part quick --first 0 --out FILE

A kernel that faults takes its process's CUDA context with it, and a hung one never returns; so the
results go to FILE as one line of JSON each, at once, and whoever started this process starts it
again behind the job that broke it. A job that takes too long ends the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cases, plan, process, timing
from bench.gpu.cases import Prepared
from bench.gpu.plan import Job
from bench.gpu.stages import WRONG_RESULT
from fedkd_fast._driver import driver_version

LOST_CONTEXT = 3
_MOST_LETTERS = 200  # of an error; torch can be wordy
Record = dict[str, Any]


class WrongResult(Exception):
    """A check failed: told apart from assertions inside torch and its compiler."""


def facts() -> Record:
    """Name card, driver and software, and measure the card's ceilings.

    Raises:
        RuntimeError: the library has no CUDA half.
    """
    from fedkd_fast import __version__, ops  # noqa: F401

    if not torch._C._dispatch_has_kernel_for_dispatch_key("fedkd_fast::distill_loss", "CUDA"):
        raise RuntimeError("the ops library has no CUDA half: it was built without nvcc")
    card = torch.cuda.get_device_properties(0)
    return {
        "version": __version__,
        "gpu": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "memory_bytes": card.total_memory,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_per_s": timing.copy_gb_per_s(),
        "bf16_tflop_per_s": timing.bf16_tflop_per_s(),
    }


def measure_jobs(
    jobs: Sequence[Job],
    device: torch.device,
    clock: Callable[[Callable[[], object]], timing.Timing],
) -> Iterator[Record]:
    """Check and time each job; yields its name before it and its outcome after it."""
    case: tuple[str, tuple[int, ...], str] | None = None
    prepared: Prepared | None = None
    for job in jobs:
        record = dict(job._asdict(), shape=list(job.shape))
        yield dict(record, outcome="started")
        try:
            if prepared is None or case != job[:3]:
                prepared = None  # frees the inputs of the last case first
                prepared, case = cases.prepare(*job[:3], device), job[:3]
            call = prepared.calls[job.impl]
            start = time.perf_counter()
            result = call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            first_s = time.perf_counter() - start
            # The copy is there for its time; what it copies means nothing.
            error = None if job.impl == "copy" else _checked(prepared, job.impl, result)
            del result
            # What was compiled in that call, or what we had to load, is nothing to count.
            once = first_s > plan.SLOW_S and job.impl != plan.COMPILED
            if once and not plan.is_ours(job.impl):
                times = timing.Timing(1e3 * first_s, 1e3 * first_s, 1)
            else:
                times = clock(call)
            record.update(times._asdict(), deviation=error, outcome="measured")
            record.update(moved_bytes=prepared.moved_bytes, flops=prepared.flops)
        except WrongResult as error:
            record.update(outcome="failed", error=f"{WRONG_RESULT}: {error}")
        except Exception as error:
            # A compiler that does not work here says nothing about the op.
            outcome = "skipped" if job.impl == plan.COMPILED else "failed"
            record.update(outcome=outcome, error=f"{type(error).__name__}: {_first_line(error)}")
        yield record


def _checked(prepared: Prepared, impl: str, result: object) -> float:
    try:
        return prepared.check(impl, result)
    except AssertionError as error:
        raise WrongResult(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:_MOST_LETTERS]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker")
    parser.add_argument("task", choices=("facts", "measure"))
    parser.add_argument("--part", choices=plan.PASSES)
    parser.add_argument("--only", choices=tuple(plan.TABLE))
    parser.add_argument("--first", type=int, default=0, help="number of the job to begin with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    with arguments.out.open("w") as out:

        def put(record: Record) -> None:
            print(json.dumps(record), file=out, flush=True)

        if arguments.task == "facts":
            put(facts())
            return 0
        jobs = plan.jobs(arguments.part, arguments.only)[arguments.first :]
        for record in measure_jobs(jobs, torch.device(arguments.device), timing.measure):
            put(record)
            if record["outcome"] == "started":
                process.end_after(plan.JOB_S)
                continue
            process.end_after(0)
            if "error" in record and timing.context_is_lost():
                return LOST_CONTEXT
    return 0


if __name__ == "__main__":
    sys.exit(main())
