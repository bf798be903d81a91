"""The log of a run, one JSON object a line: what arrived, what was refused and why, what it cost.

Every line has ``time`` (UTC), ``event`` and, but for what concerns no round, ``round``:

``start``, ``resume``, ``stop``, ``finish``
    of the process; ``resume`` says after which round it goes on.
``round``
    a round is over: clients ``asked`` and ``accepted``, ``bytes_up`` and ``bytes_down`` of all,
    ``seconds``, the ``digest`` of the shared parameters.
``failed``
    a ``client`` did not finish its part; ``reason``.
``refused``
    a reply does not count: ``client``, ``reason`` (a word, see `replies.Refused`), ``detail``.
``retry``
    a ``client`` is asked to send its reply again.
``left-out``
    a robust mean does not use, or scales down, what a ``client`` sent; ``detail``.
``quorum``
    too few replies were accepted; ``accepted``, ``needed``.
``checkpoint``
    all that the run needs to go on from here is on the disk; ``sha256`` of it, ``seconds``.

The log is only ever added to: a run that was killed and resumed shows both attempts at a round.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkd_fast._errors import own_file
from fedkd_fast._files import parse_json, read_text

# What says that something went wrong.
FAULTS = ("failed", "refused", "retry", "left-out", "quorum")


class Journal:
    """Writes the log of a run.

    Args:
        path: file to add to; None keeps counts alone.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.counts: Counter[str] = Counter()
        if path is not None:
            _mend(path)

    def faults(self) -> dict[str, int]:
        """Return how often what went wrong, by event; the order is that of `FAULTS`."""
        return {event: self.counts[event] for event in FAULTS if self.counts[event]}

    def add(self, event: str, **fields: Any) -> None:
        """Add a line; it is on its way to the disk when this returns.

        Raises:
            DiskError: it cannot be written.
        """
        self.counts[event] += 1
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}, allow_nan=False)
        with own_file(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Read a log.

    Raises:
        ValueError: a line is no JSON object; names file and line. Or the file is no text.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}:{number}"
        found = parse_json(line, where)
        if not isinstance(found, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(found).__name__}")
        yield found


def _mend(path: Path) -> None:
    """Cut off a line that a process was killed in the middle of."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
