"""What a client keeps from one message to the next: in its context while small, else in a file.

A deployed ClientApp is a process for each message. It hands over its context when it ends, in one
piece, and is killed five seconds later (flwr 1.41, ``flwr_exit``): a state of hundreds of megabytes
is lost on a busy machine. So the context holds the name of a file instead. The file before is kept
until the context has been seen with the new name, because it may be the old one that comes back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

from fedkd_fast._files import replacing
from fedkd_fast.integrations.flower.records import CONTROL, app
from fedkd_fast.integrations.link import Receiver

MOST_IN_CONTEXT = 4 << 20  # bytes
KEPT_DAYS = 30  # after which files of runs that ended are removed
_STATE, _FILE, _SUFFIX = "state", "file", ".fkd"

_log = logging.getLogger("flwr")


def default_folder() -> Path:
    """Return where Flower keeps what belongs to this machine's user."""
    home = os.environ.get("FLWR_HOME")
    return (Path(home) if home else Path.home() / ".flwr") / "fedkd_fast"


class States:
    """Loads and saves the state of a `Receiver`.

    Args:
        folder: of the files; None takes `default_folder`. Made when it is needed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._given = folder

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._given or default_folder()

    def load(self, context: Any, receiver: Receiver) -> None:
        """Let a new receiver go on where the last message ended, if that is known.

        Raises:
            ValueError, TypeError: the context holds a state that `Receiver.state` did not make.
            OSError: the file is there and cannot be read.
        """
        kept = context.state.config_records.get(CONTROL)
        if kept is None:
            return
        if _FILE not in kept:
            receiver.load(kept[_STATE])
            return
        name = str(kept[_FILE])
        if not re.fullmatch(re.escape(_owner(context)) + r"[0-9a-f]+\.fkd", name):
            return  # of another run, whose context Flower hands on in a series of runs
        path = self.folder / name
        try:
            receiver.load(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            # As on a new machine: the server is asked for the whole model.
            _log.warning("fedkd_fast: the state of this client is lost: %s: %s", path, error)
        self._remove(context, {name})

    def save(self, context: Any, receiver: Receiver) -> None:
        """Keep what a receiver holds.

        Raises:
            OSError: the file cannot be written; the state before is as it was.
        """
        state = receiver.state()
        if len(state) <= MOST_IN_CONTEXT:
            context.state[CONTROL] = app.ConfigRecord({_STATE: state})
            return
        kept = context.state.config_records.get(CONTROL, {})
        name = _owner(context) + secrets.token_hex(8) + _SUFFIX
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self.folder / name) as part, open(part, "xb", opener=_private) as file:
            file.write(state)
        context.state[CONTROL] = app.ConfigRecord({_FILE: name})
        self._remove(context, {name, str(kept.get(_FILE))})

    def _remove(self, context: Any, but: set[str]) -> None:
        """Remove other files of this client, and what runs left that ended long ago."""
        old = time.time() - KEPT_DAYS * 86400
        with contextlib.suppress(OSError):  # whoever may not remove them can still train
            for path in self.folder.glob("*" + _SUFFIX):
                own = path.name.startswith(_owner(context))
                if (own and path.name not in but) or path.stat().st_mtime < old:
                    path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    # What a client left out of its updates is nobody else's business.
    return os.open(path, flags, 0o600)


def _owner(context: Any) -> str:
    return f"{context.run_id}-{context.node_id}-"
