"""Flower has an environment of its own; tests that need it start that one's Python."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
_PLACE = "FEDKD_FAST_FLOWER_PYTHON"


def flower_python() -> Path:
    """Return the Python of Flower's environment, or skip the test."""
    python = Path(os.environ.get(_PLACE) or ROOT / ".venv-flower" / "bin" / "python")
    if not python.is_file():
        pytest.skip(f"{python} is missing: make .venv-flower, or set {_PLACE}")
    return python


def flower_environment(folder: Path) -> dict[str, str]:
    """Return variables with which Flower stays on this machine, and by itself."""
    ports = [_free_port(), _free_port()]
    return {
        **os.environ,
        "PATH": f"{flower_python().parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),  # where clients keep their states unless told otherwise
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
    }


def run_flower(folder: Path, *command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a Python program there.

    Raises:
        AssertionError: it failed; with its output.
    """
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": timeout_s}
    found = subprocess.run(
        [str(flower_python()), *command], env=flower_environment(folder), cwd=folder, **options
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found


def end_superlink(port: str) -> None:
    """End the SuperLink that `flwr run` started on a port of its own, and leaves running."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        if f"127.0.0.1:{port}" in command and any("superlink" in one for one in command[:3]):
            os.kill(int(process.parent.name), signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
