"""Test, sanitize and bench every CUDA kernel on the GPU at hand; one JSON, a short table last.

    python -m bench.gpu --out bench/out
    python -m bench.gpu --out bench/out --library libfedkd_fast_ops.so --only distill_loss

Takes the Python and the torch that run it (2.10 or newer). Without --library the native code is
built in the checkout first. Ends within 8 minutes; what the time does not suffice for is said to
be `not reached`, which is no failure. Exit status: 0, 1 where anything failed, 2 without a GPU.
The whole output of every stage is in OUT/gpu.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu import plan, result, sanitizer, stages
from bench.gpu.process import Place
from bench.provenance import commit

TOTAL_S = 465.0
TIMING = (
    "ms: median between two CUDA events, launches enqueued beforehand, L2 overwritten before each "
    "repeat; call_ms: one of many calls in a row by the host's clock, warm; ratio: peer over ours; "
    "with 1 repeat both are one call by the host's clock"
)


def build_parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=lines[0], epilog="\n".join(lines[-5:])
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/out"), help="folder for gpu.json and gpu.log"
    )
    parser.add_argument("--library", type=Path, help="built ops library to use; nothing is built")
    parser.add_argument("--only", choices=tuple(plan.TABLE), help="one op")
    return parser


def no_gpu() -> str | None:
    """Say why nothing can run here; None where a GPU is at hand."""
    import torch

    if torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"no CUDA device (torch {torch.__version__}, {built}): nothing was run"


def sanitize(place: Place, only: str | None) -> dict[str, Any]:
    """Run all tools at once: they mostly wait, and nothing is timed meanwhile."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda tool: sanitizer.sanitize(place, tool, only), sanitizer.TOOLS)
        return dict(zip(sanitizer.TOOLS, found, strict=True))


def run_stages(place: Place, only: str | None, library: Path | None) -> dict[str, Any]:
    """Run all stages and assemble their findings."""
    found: dict[str, Any] = {}
    measured: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    with stage("library"):
        found["library"] = stages.describe(place) if library else stages.build(place)
    # Nothing of the rest can run without the library.
    if found["library"]["outcome"] == stages.PASSED:
        with stage("facts"):
            found["facts"], machine = stages.facts(place)
        with stage("tests"):
            found["tests"] = stages.tests(place, only)
        for part in plan.PASSES:
            # Rivals that may take long come last, with what time is left.
            if part == "late":
                with stage("sanitizers"):
                    found |= sanitize(place, only)
            with stage(part):
                found[part], records = stages.bench(place, part, only)
            measured += records
    return {
        "command": "python -m bench.gpu"
        + (f" --library {library.name}" if library else "")
        + (f" --only {only}" if only else ""),
        "commit": commit(),
        "machine": machine,
        "timing": TIMING,
        "seconds": seconds,
        "stages": found,
        "cases": result.assemble(measured, machine.get("copy_gb_per_s")),
        "measurements": measured,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    ends = time.monotonic() + TOTAL_S
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.library and not arguments.library.is_file():
        parser.error(f"--library: {arguments.library} is not a file")
    if reason := no_gpu():
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        root = stages.CHECKOUT
        if arguments.library:
            root = Path(scratch)
            stages.copy_with_library(arguments.library, root)
        found = run_stages(Place(root, out, ends), arguments.only, arguments.library)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    result.show(found)
    print(f"{arguments.out / 'gpu.json'}, {arguments.out / 'gpu.log'}")
    return 1 if result.failures(found) else 0


if __name__ == "__main__":
    sys.exit(main())
