"""Kinds of federations by seeds, in one JSON file that may be made in parts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from provenance import commit, facts


def fill(
    program: str,
    description: str,
    kinds: Sequence[str],
    measure: Callable[[str, int], dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Measure what the command line asks for and the file does not have yet.

    Args:
        program: name of the bench and of its file.
        description: of the bench.
        kinds: that there are.
        measure: runs a kind with a seed.
        about: what all runs have in common.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(kinds), choices=list(kinds))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    result: dict[str, Any] = {"runs": []}
    if out.exists():
        result = json.loads(out.read_text())
    result |= {
        "command": f"python bench/{program}.py --out bench/results/{program}.json",
        **about,
        "facts": facts(1),
        "commit": commit(),
    }
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            if any((kind, seed) == (run["kind"], run["seed"]) for run in result["runs"]):
                continue
            result["runs"].append(run := {"kind": kind, "seed": seed, **measure(kind, seed)})
            print(run, flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
