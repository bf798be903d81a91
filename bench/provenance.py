"""Where a number comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Name the commit of this checkout; "unknown" without git, or outside a checkout."""
    root = Path(__file__).parent.parent
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
