"""Scores and bytes of whole federated runs, several seeds, as one JSON: the README's quality table.

    python bench/quality.py --seeds 0 1 2 --out bench/results/digits.json -- --task digits

What follows `--` goes to `fedkd-fast train`; method, seed and folder are added here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import commit

import fedkd_fast
from fedkd_fast.methods import METHODS

# Means and spreads over the seeds are made of these.
FIGURES = (
    *("score_mentor", "score_mentee", "score_mean"),
    *("bytes_up", "bytes_down", "saving", "seconds"),
)


def run(method: str, seed: int, folder: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "fedkd_fast", "train", "--method", method, "--seed", str(seed)]
    subprocess.run([*command, "--out", str(folder), "--quiet", *options], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def spread(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for figure in FIGURES:
        values = [summary[figure] for summary in summaries if summary[figure] is not None]
        if values:
            found[figure] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="passed to fedkd-fast train, after --")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for method in arguments.methods:
            runs[method] = []
            for seed in arguments.seeds:
                folder = Path(scratch) / f"{method}-{seed}"
                runs[method].append(run(method, seed, folder, arguments.options))
                shutil.rmtree(folder)
    result = {
        "command": f"python bench/quality.py --seeds {' '.join(map(str, arguments.seeds))} "
        f"--methods {' '.join(arguments.methods)} -- {' '.join(arguments.options)}",
        "commit": commit(),
        "version": fedkd_fast.__version__,
        "torch": torch.__version__,
        "methods": {method: spread(summaries) for method, summaries in runs.items()},
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for method, figures in result["methods"].items():
        print(method, {name: round(value["mean"], 4) for name, value in figures.items()})


if __name__ == "__main__":
    main()
