"""What every CUDA kernel takes of a multiprocessor, as ptxas says: registers, shared bytes, spills.

    python bench/kernel_resources.py

compiles csrc/cuda with nvcc, without a GPU, and writes bench/results/kernel_resources.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "kernel_resources.json"
ARCHITECTURES = ("80", "90")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers.*?(?:, (\d+) bytes smem|$)", re.MULTILINE)
# Of an unnamed namespace, made of the file's path: it differs from one checkout to the next.
UNNAMED = re.compile(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::|_NV_ANON_NAMESPACE::")


def nvcc() -> str | None:
    """Find the compiler."""
    return shutil.which("nvcc")


def sources() -> list[Path]:
    """List the kernel files."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_report(source: Path) -> str:
    """Compile one file for all architectures; returns what ptxas says."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(nvcc()), "-std=c++17", "-O3", "--fmad=false", "--resource-usage"]
        command += [f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        command += ["-I", str(ROOT / "csrc"), "-c", str(source), "-o", f"{scratch}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr}")
    return done.stdout + done.stderr


def readable(symbol: str) -> str:
    """Demangle a kernel's name, without its arguments and namespaces."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = UNNAMED.sub("", name.strip()).removeprefix("void ").replace("fedkd_fast::", "")
    return name.replace("cuda::", "").split("(")[0]


def parse(report: str, source: str) -> list[dict[str, Any]]:
    """Turn ptxas' words into records: one for a kernel and an architecture."""
    records = []
    for part in report.split("Compiling entry function")[1:]:
        part = "Compiling entry function" + part
        entry, frame, used = ENTRY.search(part), FRAME.search(part), USED.search(part)
        if not (entry and frame and used):
            raise RuntimeError(f"ptxas has changed its words: {part[:300]}")
        stack, stores, loads = (int(number) for number in frame.groups())
        records.append(
            {
                "source": source,
                "kernel": readable(entry[1]),
                "sm": int(entry[2]),
                "registers": int(used[1]),
                "shared_bytes": int(used[2] or 0),
                "stack_bytes": stack,
                "spill_bytes": stores + loads,
            }
        )
    return sorted(records, key=lambda record: (record["kernel"], record["sm"]))


def measure() -> list[dict[str, Any]]:
    """Compile everything and report on every kernel."""
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_report, sources()))
    pairs = zip(reports, sources(), strict=True)
    return [record for report, source in pairs for record in parse(report, source.name)]


def main() -> int:
    """Write the report and print it."""
    if nvcc() is None:
        print("nvcc was not found", file=sys.stderr)
        return 2
    records = measure()
    RESULT.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        print(
            f"{record['kernel']:50} sm_{record['sm']} {record['registers']:4} registers "
            f"{record['shared_bytes']:6} B shared {record['stack_bytes']:4} B stack "
            f"{record['spill_bytes']:4} B spilled"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
