"""An NVFLARE job with and without small messages: accuracy, bytes and time a round.

    .venv-nvflare/bin/python bench/nvflare_rounds.py --out bench/results/nvflare_rounds.json

Needs NVFLARE. Each run is ``examples/nvflare/job.py`` in NVFLARE's simulator: 6 rounds, 2 clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import resumable

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples" / "nvflare" / "job.py"
KINDS = {"plain": ["--plain"], "compressed": [], "diff": ["--diff"]}
ROUNDS = 6


def measured(kind: str, seed: int) -> dict[str, Any]:
    """Run one job."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        options = ["--rounds", str(ROUNDS), "--seed", str(seed)]
        subprocess.run(
            [
                *(sys.executable, str(JOB), *KINDS[kind], *options),
                *("--workspace", scratch, "--out", str(found)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        result: dict[str, Any] = json.loads(found.read_text())
    return result


if __name__ == "__main__":
    resumable.fill("nvflare_rounds", __doc__, list(KINDS), measured, {"rounds": ROUNDS})
