"""What travels over a link and how it is coded, see `link`."""

from __future__ import annotations

from dataclasses import dataclass

from fedkd_fast.compress import Compressor
from fedkd_fast.feedback import ErrorFeedback, SubspaceCache


class MissingBaseError(ValueError):
    """A message builds on weights that the receiver does not hold; the whole model is needed."""


@dataclass(frozen=True)
class Compression:
    """How one direction of a link codes differences.

    Args:
        energy: share of the squared norm of each difference to keep, in (0, 1]; larger means more
            bytes. With feedback, what is left out is sent later, so less is enough.
        feedback: add to each message what the messages before left out. Not for weights that
            hold it already, because they are kept apart from what was received of them.
        codec: "wf1", "dense" (larger messages in a fraction of the time), "wf0", "factors-fp32" or
            "raw".
        scope: "tensor" keeps the promise for each tensor, "message" for all together.
        warm: start factorisations where the last ones ended: faster, for half of the factors' size
            in memory, and in the client's state.

    Raises:
        ValueError: an argument out of its range.
    """

    energy: float = 0.9
    feedback: bool = True
    codec: str = "wf1"
    scope: str = "tensor"
    warm: bool = True

    def __post_init__(self) -> None:
        self.compressor()

    def compressor(self) -> Compressor:
        """Make what encodes the messages of one sender."""
        # Who was away holds the newest weights again: its residual is as good as it was.
        return Compressor(
            self.energy,
            self.codec,
            scope=self.scope,
            feedback=ErrorFeedback(decay=1.0) if self.feedback and self.codec != "raw" else False,
            cache=SubspaceCache() if self.warm and self.codec not in ("raw", "dense") else None,
            schema=False,
        )


@dataclass(frozen=True)
class Letter:
    """What a client needs to hold the newest version.

    Args:
        run: names the run, below 2^63.
        version: of the weights that the client will hold, from 1 on.
        frames: the whole model, or differences in their order, or nothing if it holds them already.
        digest: of first weights that the client has to make itself, else empty.
        replied: number of its last reply that counts at the server; 0 if there is none.
    """

    run: int
    version: int
    frames: tuple[bytes, ...]
    digest: bytes = b""
    replied: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return sum(map(len, self.frames))
