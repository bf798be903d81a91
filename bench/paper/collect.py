"""What a sweep found, as one JSON: summaries by run and, where recorded, ranks by energy.

fedkd-fast sweep bench/paper/fig4_spectra.yaml --out SWEEP
python bench/paper/collect.py bench/paper/fig4_spectra.yaml SWEEP --out bench/results/fig4.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import facts

# Of a machine, not of a result.
PLACES = ("data", "mentor", "out")


def kind(name: str) -> str:
    """Return what a matrix is, in every layer: ``attention.self.query.weight``."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)


def ranks(folder: Path) -> list[dict[str, Any]]:
    """Return the mean over layers of the rank at each energy, by round and kind of matrix."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kinds: dict[str, list[dict[str, int]]] = defaultdict(list)
        for one in row.get("spectra") or ():
            kinds[kind(one["name"])].append(one["ranks"])
        for name, layers in kinds.items():
            means = {key: statistics.fmean(one[key] for one in layers) for key in layers[0]}
            record = {"round": row["round"], "matrix": name, "layers": len(layers), "ranks": means}
            found.append(record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the sweep's YAML file")
    parser.add_argument("folder", type=Path, help="where its runs lie")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, Any] = {}
    for path in sorted(arguments.folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        runs[path.parent.name] = {k: v for k, v in summary.items() if k not in PLACES}
        if found := ranks(path.parent):
            runs[path.parent.name]["ranks"] = found
    if not runs:
        parser.error(f"folder {arguments.folder} holds no finished run")
    result = {
        "command": f"fedkd-fast sweep {arguments.file} --out SWEEP; "
        f"python bench/paper/collect.py {arguments.file} SWEEP --out {arguments.out}",
        "facts": facts(1),
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
