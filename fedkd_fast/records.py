"""Records of a run: what each round and each client's part in it was like."""

from __future__ import annotations

import builtins
import contextlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedkd_fast import wire
from fedkd_fast.methods import Losses
from fedkd_fast.replies import Replies
from fedkd_fast.trees import Tree


@dataclass(frozen=True)
class ClientRecord:
    """What one client has just done in a round."""

    round: int
    rounds: int
    client: int
    done: int  # clients of the round that are done
    clients: int  # clients of the round
    loss_mentor: float | None
    loss_mentee: float | None
    seconds: float


@dataclass(frozen=True)
class RoundRecord:
    """What one round was like: means over clients, bytes per client."""

    round: int
    rounds: int
    energy: float | None  # None where nothing is left out
    loss_mentor: float | None
    loss_mentee: float | None
    score_mentor: float | None  # None in rounds without evaluation
    score_mentee: float | None
    score_mean: float | None  # of both models together; None on dev data
    split: str | None  # the data of the scores
    bytes_up: float
    bytes_down: float
    seconds: float
    seconds_codec: float


class ClientRow:
    """One line of ``metrics.jsonl`` in the making; the server's has no client."""

    def __init__(self, client: int | None) -> None:
        self.client = client
        self.losses = Losses(None, None)
        self.spectra: list[dict[str, Any]] | None = None
        self.frame = b""
        self.bytes_up = self.bytes_down = self.messages = 0
        self.seconds = self.seconds_codec = 0.0
        self.refused: str | None = None  # why the reply does not count, if it does not
        self.lost = False  # it did not arrive: the client has still to send what it held
        self.gone = False  # the client failed, and is as it was before the round
        self.error: Exception | None = None  # with which

    def state(self) -> Tree:
        """Return all that `restored` needs; of the error that is its kind and what it says."""
        plain = {"losses": list(self.losses), "error": self.error and _described(self.error)}
        return {**vars(self), **plain}

    @classmethod
    def restored(cls, state: Tree) -> ClientRow:
        """Return the row that `state` is of."""
        row = cls(state["client"])
        error = state["error"] and _raisable(*state["error"])
        vars(row).update(state, losses=Losses(*state["losses"]), error=error)
        return row

    @contextlib.contextmanager
    def timed(self, *, codec: bool = False) -> Iterator[None]:
        """Add the time of the body to the row."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds += spent
        if codec:
            self.seconds_codec += spent

    def add(self, seconds: float, seconds_codec: float) -> None:
        """Add what was spent in another process, and how much of it on coding."""
        self.seconds += seconds
        self.seconds_codec += seconds_codec

    def record(self, schema: Sequence[wire.Described]) -> dict[str, Any]:
        """Return the line without round, energy and scores; the schema is that of the frame."""
        spectra = {} if self.spectra is None else {"spectra": self.spectra}
        try:
            layers = frame_layers(self.frame, schema)
        except wire.WireError:
            # A client elsewhere may send anything; what counts has been decoded before.
            if self.refused is None:
                raise
            layers = []
        return {
            "client": self.client,
            "loss_mentor": self.losses.mentor,
            "loss_mentee": self.losses.mentee,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "seconds_codec": self.seconds_codec,
            "layers": layers,
            **spectra,
        }


def _described(error: Exception) -> list[str]:
    """Return which of Python's own errors this one is, and what it says."""
    kinds = (kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)
    text = error.args[0] if len(error.args) == 1 else error
    return [next(kinds).__name__, str(text)]


def _raisable(kind: str, text: str) -> Exception:
    """Return an error of the kind that `_described` named, so that a run ends as it would have."""
    found = vars(builtins).get(kind)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError(f"{kind!r} is no error of Python")
    try:
        return found(text)
    except TypeError:  # those of text codecs want more than a text
        return ValueError(text)


@dataclass
class OpenRound:
    """A round that is under way."""

    number: int
    asked: list[int]
    rows: list[ClientRow]  # of those that had their turn
    replies: Replies

    def state(self) -> Tree:
        """Return what happened so far."""
        rows = [row.state() for row in self.rows]
        return {"asked": self.asked, "rows": rows, "replies": self.replies.state()}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        self.rows = [ClientRow.restored(row) for row in state["rows"]]
        self.replies.load(state["replies"])


def environment() -> dict[str, Any]:
    """Return what a run's numbers may depend on beside its configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def frame_layers(
    frame: bytes, schema: Sequence[wire.Described] | None = None
) -> list[dict[str, Any]]:
    """List what a frame holds, tensor by tensor; one without a schema needs that of its sender."""
    layers = []
    for entry in wire.inspect(frame, schema) if frame else []:
        full_rank = 0
        if len(entry.shape) > 1 and all(entry.shape):
            full_rank = min(entry.shape[0], math.prod(entry.shape[1:]))
        mode, rank = entry.numbers
        factored = mode in wire.FACTORED
        layers.append(
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "mode": mode.name if entry.rows_mode is None else f"ROWS_{mode.name}",
                "rank": rank if factored else full_rank,
                "full_rank": full_rank,
                "bytes": entry.payload_bytes,
                "dense_bytes": entry.dense_bytes,
            }
        )
    return layers
