"""compute-sanitizer over every kernel, an op at a time: what it says of one op is kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from bench.gpu import plan
from bench.gpu.process import Finished, Place
from bench.gpu.stages import FAILED, NOT_REACHED, PASSED, TOO_SLOW, Result, failed, skipped

TOOLS = ("memcheck", "racecheck")
TOOL_S, OP_S = 100.0, 45.0
_FOUND_STATUS = 99
# cuBLAS, cuSOLVER and torch are not ours to check, and watching them takes most of the time. Our
# kernels have their namespace in their mangled names.
_OURS = ("--kernel-name", "kernel_substring=fedkd_fast")
# What the tools print at once of what they find; the summary comes last.
_FINDING = re.compile(r"^=+ ((?:Invalid|Misaligned|Error|Warning)\b.*)", re.MULTILINE)


def find() -> str | None:
    """Look for compute-sanitizer on the path and beside nvcc."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent if nvcc else None
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=str(beside)) if beside else None
    )


def sanitize(place: Place, tool: str, only: str | None) -> Result:
    """Run every kernel once under a tool of compute-sanitizer."""
    program = find()
    if program is None:
        return skipped("compute-sanitizer was not found on the path, nor beside nvcc")
    over = place.left_s() - TOOL_S
    kernels: tuple[str, ...] = _OURS

    def watched(op: str) -> Finished:
        # torch asks CUDA for things that may fail, and looks at the answer; ours are checked.
        options = ("--report-api-errors", "no", "--error-exitcode", str(_FOUND_STATUS))
        return place.python(
            *("-m", "bench.gpu.once", "--only", op),
            limit_s=min(OP_S, max(0.0, place.left_s() - over)),
            prefix=(program, "--tool", tool, *options, *kernels),
            # One allocation for each tensor: in torch's large blocks a write past an end hits a
            # neighbour, which is no error to memcheck.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )

    ops: dict[str, Result] = {}
    for op in [only] if only else plan.TABLE:
        if place.left_s() <= max(over, 0.0):
            ops[op] = {"outcome": NOT_REACHED, "error": "the time was over"}
            continue
        done = watched(op)
        if kernels and done.status is not None and not summaries(done):
            # A tool that does not know the option ends without one; so does a program that dies.
            kernels = ()
            again = watched(op)
            if summaries(again):
                done = again
            else:
                kernels = _OURS
        ops[op] = read(done)
    said = {
        outcome: [op for op, result in ops.items() if result["outcome"] == outcome]
        for outcome in (FAILED, TOO_SLOW, NOT_REACHED)
    }
    counts = {PASSED: len(ops) - sum(map(len, said.values()))}
    counts |= {outcome: len(names) for outcome, names in said.items() if names}
    more = {**counts, "kernels": "ours" if kernels else "all", "ops": ops}
    if said[FAILED]:
        return failed("; ".join(f"{op}: {ops[op]['error']}" for op in said[FAILED]), **more)
    if said[TOO_SLOW] or said[NOT_REACHED]:
        missed = ", ".join(said[TOO_SLOW] + said[NOT_REACHED])
        return {"outcome": NOT_REACHED, "error": f"no answer for {missed}", **more}
    return {"outcome": PASSED, **more}


def summaries(done: Finished) -> list[str]:
    """Find the lines in which a tool sums up."""
    return [line for line in done.output.splitlines() if " SUMMARY: " in line]


def read(done: Finished) -> Result:
    """Judge an op by the exit status and by the summary line, which has to be there."""
    lines = summaries(done)
    words = lines[-1].split("SUMMARY: ")[1].strip() if lines else None
    if words is not None and not words.startswith("0 "):
        return failed(words)
    if done.status is None:
        if finding := _FINDING.search(done.output):
            return failed(finding[1])
        # Whether the tool is slow or the kernel hangs, the tests tell.
        return {"outcome": TOO_SLOW, "error": "took too long"}
    # The tool's own lines begin with "="; the last of the others says what the program died of.
    program = "\n".join(line for line in done.output.splitlines() if not line.startswith("="))
    if problem := Finished(done.status, program).problem:
        return failed(problem)
    if words is None:
        return failed("compute-sanitizer gave no summary")
    return {"outcome": PASSED, "summary": words}
