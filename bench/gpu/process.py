"""Processes that end in time, whatever they run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE_S = 5.0


@dataclass(frozen=True)
class Finished:
    """What a process came to."""

    status: int | None  # None where it ran out of time
    output: str

    @property
    def ended_itself(self) -> bool:
        """Whether it was over by `end_after`."""
        return self.status == -signal.SIGALRM

    @property
    def problem(self) -> str | None:
        """Why it did not succeed, in a line."""
        if self.status == 0:
            return None
        if self.status is None:
            return "ran out of time"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return f"exit status {self.status}: {lines[-1] if lines else 'no output'}"


def end_after(seconds: float) -> None:
    """End this process in so many seconds, not at all for 0; each call takes back the last.

    The signal has no handler: no kernel that hangs and no holder of Python's lock can delay it.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def run(
    command: Sequence[str], *, folder: Path, env: Mapping[str, str], limit_s: float, log: Path
) -> Finished:
    """Run a command, keep its output in the log, and end all of its processes after `limit_s`."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which ends as one
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A driver that waits for a hung kernel may keep even a killed process.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        output.seek(0)
        text = output.read()
    with log.open("a") as lines:
        lines.write(f"\n$ {' '.join(command)}\n{text}\n(exit status {status})\n")
    return Finished(status, text)


@dataclass(frozen=True)
class Place:
    """Where processes run, and until when."""

    root: Path  # a checkout, or a copy of what is needed of one
    out: Path  # results and the log
    ends: float  # on the clock of time.monotonic()

    def left_s(self) -> float:
        """Seconds until everything has to be over."""
        return max(0.0, self.ends - time.monotonic())

    def python(
        self, *arguments: str, limit_s: float, prefix: Sequence[str] = (), **env: str
    ) -> Finished:
        """Run this Python on the code in `root`."""
        if not self.left_s():
            return Finished(None, "")
        paths = [str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]
        return run(
            [*prefix, sys.executable, *arguments],
            folder=self.root,
            env={"PYTHONPATH": os.pathsep.join(paths), **env},
            limit_s=min(limit_s, self.left_s()),
            log=self.out / "gpu.log",
        )
