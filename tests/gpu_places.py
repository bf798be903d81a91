"""Places for the stages of `python -m bench.gpu` to run in."""

from __future__ import annotations

import time
from pathlib import Path

from bench.gpu.process import Place


def place(root: Path, seconds: float = 60) -> Place:
    """A place whose time is over after so many seconds."""
    return Place(root, root, time.monotonic() + seconds)
