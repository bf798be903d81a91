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

from fedkd_fast._files import absolute_path, replacing
from fedkd_fast.integrations.flower.records import CONTROL, app
from fedkd_fast.integrations.link import Receiver

MOST_IN_CONTEXT = 4 << 20  # bytes, where a file can be written
MOST_WITHOUT_FILE = 64 << 20  # what Flower can be trusted with if none can
KEPT_DAYS = 30  # after which files of runs that ended are removed
_STATE, _FILE = "state", "file"
# Owner (run and node), then what tells one state from the next; also before it is complete.
_NAME = re.compile(r"(-?\d+_-?\d+)_[0-9a-f]{16}\.fkd")
_NAMES = re.compile(rf"{_NAME.pattern}|\.{_NAME.pattern}\.\d+\.part")

_log = logging.getLogger("flwr")


def default_folder() -> Path:
    """Return where Flower keeps what belongs to this machine's user.

    Raises:
        RuntimeError: the user has no home.
    """
    home = os.environ.get("FLWR_HOME")
    return (Path(home) if home else Path.home() / ".flwr") / "fedkd_fast"


class States:
    """Loads and saves the state of a `Receiver`.

    Args:
        folder: of the files; None takes `default_folder`. Made when it is needed.

    Raises:
        ValueError: the folder is not absolute: processes of a client may run anywhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._given = None if folder is None else absolute_path("state_dir", folder)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._given or default_folder()

    def load(self, context: Any, receiver: Receiver) -> None:
        """Let a new receiver go on where the last message ended, if that is known.

        What cannot be read is as good as lost: the server is asked for the whole model then.
        """
        kept = context.state.config_records.get(CONTROL)
        if kept is None:
            return
        name = str(kept.get(_FILE, ""))
        found = _NAME.fullmatch(name)
        if name and (found is None or found[1] != _owner(context)):
            return  # of another run, whose context Flower hands on in a series of runs
        try:
            receiver.load((self.folder / name).read_bytes() if name else kept[_STATE])
        except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
            _log.warning("fedkd_fast: what this client held is lost: %s %s", name, error)
        if name:
            self._remove(context, {name})

    def save(self, context: Any, receiver: Receiver) -> None:
        """Keep what a receiver holds; in the context, if need be, where no file can be written.

        Raises:
            OSError, RuntimeError: nor is it small enough for that; what was kept is as it was.
        """
        state = receiver.state()
        before = str(context.state.config_records.get(CONTROL, {}).get(_FILE, ""))
        if len(state) > MOST_IN_CONTEXT:
            name = f"{_owner(context)}_{secrets.token_hex(8)}.fkd"
            try:
                self._write(name, state)
            except (OSError, RuntimeError) as error:
                if len(state) > MOST_WITHOUT_FILE:
                    raise
                _log.warning(
                    "fedkd_fast: no file for what this client holds, which Flower may lose as it "
                    "is (compress_mod(state_dir=…) names another folder): %s",
                    error,
                )
            else:
                context.state[CONTROL] = app.ConfigRecord({_FILE: name})
                self._remove(context, {name, before})
                return
        context.state[CONTROL] = app.ConfigRecord({_STATE: state})
        self._remove(context, {before})

    def _write(self, name: str, state: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self.folder / name) as part, open(part, "xb", opener=_private) as file:
            file.write(state)

    def _remove(self, context: Any, but: set[str]) -> None:
        """Remove other files of this client, and what runs left that ended long ago."""
        old = time.time() - KEPT_DAYS * 86400
        # Whoever may not remove them can still train.
        with contextlib.suppress(OSError, RuntimeError):
            for path in list(self.folder.iterdir()):
                found = _NAMES.fullmatch(path.name)
                if found is None or path.name in but:
                    continue
                with contextlib.suppress(OSError):
                    own = _owner(context) in found.groups()
                    if own or path.stat().st_mtime < old:
                        path.unlink()


def _private(path: str, flags: int) -> int:
    # What a client left out of its updates is nobody else's business.
    return os.open(path, flags, 0o600)


def _owner(context: Any) -> str:
    return f"{context.run_id}_{context.node_id}"
