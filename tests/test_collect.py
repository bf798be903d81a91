"""bench/paper/collect.py: what stands in a sweep's folder, as one JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "bench" / "paper" / "collect.py"


def _collect(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "figure.yaml", str(folder), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_summaries_and_mean_ranks_of_layers(tmp_path: Path) -> None:
    run = tmp_path / "spectra-s0"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"score": 0.5, "out": "/somewhere"}))
    spectra = [
        {"name": f"encoder.layer.{layer}.query.weight", "full_rank": 9, "ranks": {"0.9": rank}}
        for layer, rank in ((0, 2), (1, 5))
    ]
    rows = [
        {"round": 1, "client": 0},
        {"round": 1, "client": None, "spectra": spectra},
        {
            "round": 2,
            "client": None,
            "spectra": [*spectra[:1], {**spectra[1], "name": "head.weight"}],
        },
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "unfinished-s0").mkdir()
    out = tmp_path / "out.json"
    done = _collect(tmp_path, out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert "figure.yaml" in found["command"]
    assert found["runs"] == {
        "spectra-s0": {
            "score": 0.5,
            "ranks": [
                {"round": 1, "matrix": "query.weight", "layers": 2, "ranks": {"0.9": 3.5}},
                {"round": 2, "matrix": "query.weight", "layers": 1, "ranks": {"0.9": 2}},
                {"round": 2, "matrix": "head.weight", "layers": 1, "ranks": {"0.9": 5}},
            ],
        }
    }


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    done = _collect(tmp_path, tmp_path / "out.json")
    assert done.returncode == 2
    assert "holds no finished run" in done.stderr
    assert not (tmp_path / "out.json").exists()
