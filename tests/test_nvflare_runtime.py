"""NVFLARE itself: `make .venv-nvflare`, or FEDKD_FAST_NVFLARE_PYTHON names its Python."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("FEDKD_FAST_NVFLARE_PYTHON", ROOT / ".venv-nvflare/bin/python"))
needs_nvflare = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no NVFLARE: make .venv-nvflare ({PYTHON} is missing)"
)


def run(*arguments: str, folder: Path = ROOT, timeout_s: float = 300) -> str:
    """Run Python with NVFLARE and this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(PYTHON), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@needs_nvflare
def test_the_filters_on_nvflares_own_classes() -> None:
    tests = ["tests/test_nvflare.py", "tests/test_nvflare_recipe.py", "tests/nvflare_job.py"]
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    passed = re.search(r"(\d+) passed", found)
    assert passed is not None and int(passed[1]) >= 45, found[-2000:]


def rows(printed: str) -> tuple[list[tuple[int, int]], float]:
    """Return bytes down and up of each round, and the accuracy at the end."""
    table = re.findall(r"^ +(\d+) +([\d,]+) +([\d,]+) +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    sizes = [(int(down.replace(",", "")), int(up.replace(",", ""))) for _, down, up in table]
    final = re.search(r"accuracy of the final model: ([\d.]+)", printed)
    assert final is not None and sizes, printed[-2000:]
    return sizes, float(final[1])


@pytest.mark.slow
@needs_nvflare
@pytest.mark.parametrize("mode", ["whole", "differences"])
def test_the_example_in_the_simulator(mode: str, tmp_path: Path) -> None:
    """Two clients, as its README shows it."""
    options = ["--rounds", "4", "--workspace", str(tmp_path)]
    if mode == "differences":
        options.append("--diff")
    job = str(ROOT / "examples/nvflare/job.py")
    folder = ROOT / "examples/nvflare"
    small, score = rows(run(job, "--energy", "0.8", *options, folder=folder))
    plain, plain_score = rows(run(job, "--plain", *options, folder=folder))
    assert len(small) == len(plain) == 4
    assert sum(up for _, up in plain) > 40 * sum(up for _, up in small)
    assert sum(down for down, _ in plain[1:]) > 20 * sum(down for down, _ in small[1:])
    assert score > plain_score - 0.03


@pytest.mark.slow
@needs_nvflare
def test_a_job_survives_a_client_whose_replies_are_damaged(tmp_path: Path) -> None:
    run(str(ROOT / "tests/nvflare_hostile.py"), str(tmp_path))
    log = (tmp_path / "hostile/server/log.txt").read_text()
    assert log.count("refused the reply of site-2: frame is truncated") == 2
    assert "refused the reply of site-1" not in log and "Finished FedAvg" in log
