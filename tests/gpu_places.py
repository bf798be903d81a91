"""Places for the stages of `python -m bench.gpu` to run in, and processes that only pretend."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import process
from bench.gpu.process import Finished, Place


def place(root: Path, seconds: float = 60) -> Place:
    """A place whose time is over after so many seconds."""
    return Place(root, root, time.monotonic() + seconds)


def pretend(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Finished]
) -> list[list[str]]:
    """Answer instead of running; returns the list in which the commands gather."""
    commands: list[list[str]] = []

    def run(line: list[str], **_: Any) -> Finished:
        commands.append(line)
        return answer(line)

    monkeypatch.setattr(process, "run", run)
    return commands
