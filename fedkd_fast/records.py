"""Records of a run: what each round and each client's part in it was like."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd_fast import wire
from fedkd_fast.methods import Losses


@dataclass(frozen=True)
class RoundRecord:
    """What one round was like: means over clients, bytes per client."""

    round: int
    rounds: int
    energy: float
    loss_mentor: float | None
    loss_mentee: float | None
    score_mentor: float | None  # None in rounds without evaluation
    score_mentee: float | None
    bytes_up: float
    bytes_down: int
    seconds: float
    seconds_codec: float


class ClientRow:
    """One line of ``metrics.jsonl`` in the making; the server's has no client."""

    def __init__(self, client: int | None) -> None:
        self.client = client
        self.losses = Losses(None, None)
        self.frame = b""
        self.seconds = self.seconds_codec = 0.0

    @contextlib.contextmanager
    def timed(self, *, codec: bool = False) -> Iterator[None]:
        """Add the time of the body to the row."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds += spent
        if codec:
            self.seconds_codec += spent

    def record(
        self,
        score_mentor: float | None,
        score_mentee: float | None,
        bytes_down: int,
        schema: Sequence[wire.Described],
    ) -> dict[str, Any]:
        """Return the line without round and energy; the schema is that of the frame."""
        return {
            "client": self.client,
            "loss_mentor": self.losses.mentor,
            "loss_mentee": self.losses.mentee,
            "score_mentor": score_mentor,
            "score_mentee": score_mentee,
            "bytes_up": len(self.frame),
            "bytes_down": bytes_down,
            "seconds": self.seconds,
            "seconds_codec": self.seconds_codec,
            "layers": frame_layers(self.frame, schema),
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
