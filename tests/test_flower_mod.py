"""Small messages for Flower apps: `in_flower/` has the tests, and Flower's own Python runs them."""

from __future__ import annotations

from pathlib import Path

from flower_env import ROOT, run_flower


def test_in_flower(tmp_path: Path) -> None:
    folder = str(ROOT / "tests" / "in_flower")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    found = run_flower(tmp_path, "-m", "pytest", *options, folder, timeout_s=300)
    # An empty run would also end well.
    assert " passed" in found.stdout and "failed" not in found.stdout, found.stdout
