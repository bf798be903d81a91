"""What arrives in one round: at most one frame of each client that was asked, and none that harms.

A reply that does not count is refused with a word that says why and a sentence with the details;
the round goes on without it as long as there is a quorum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedkd_fast.decompression import NotFiniteError
from fedkd_fast.robust import check_norms
from fedkd_fast.trees import Tree
from fedkd_fast.updates import Client
from fedkd_fast.wire import WireError


class Refused(ValueError):
    """A reply does not count.

    Args:
        client: who sent it.
        reason: ``stranger`` (a client that was not asked), ``late``, ``early``, ``duplicate``,
            ``damaged``, ``mismatch`` (another base, other tensors), ``not-finite``, ``norm``,
            ``timeout``, or ``sealed-…`` with the reason of a `sealing.SealError`.
        detail: a sentence with what was expected and what came.
    """

    def __init__(self, client: int, reason: str, detail: str) -> None:
        super().__init__(f"client {client}: {detail}")
        self.client, self.reason, self.detail = client, reason, detail


class Replies:
    """The replies of one round.

    Args:
        number: of the round.
        asked: the clients that take part.
        norm: decodes a frame without applying it, and returns the L2 norm of the update.
    """

    def __init__(self, number: int, asked: Sequence[int], norm: Callable[[bytes], float]) -> None:
        self.number, self._asked, self._norm = number, set(asked), norm
        self.frames: dict[int, bytes] = {}  # those that count, by client
        self.norms: dict[Client, float] = {}

    def add(self, client: int, number: int, frame: bytes) -> None:
        """Take a reply to round ``number`` in.

        Raises:
            Refused: it does not count; what arrived before stands.
        """
        if number != self.number:
            reason = "late" if number < self.number else "early"
            raise Refused(client, reason, f"reply to round {number} came in round {self.number}")
        if client not in self._asked:
            raise Refused(client, "stranger", f"was not asked in round {self.number}")
        if client in self.frames:
            raise Refused(client, "duplicate", f"has replied to round {number} already")
        try:
            norm = self._norm(frame)
        except NotFiniteError as error:
            raise Refused(client, "not-finite", str(error)) from error
        except WireError as error:
            raise Refused(client, "damaged", str(error)) from error
        except ValueError as error:
            raise Refused(client, "mismatch", str(error)) from error
        if not math.isfinite(norm):
            raise Refused(client, "not-finite", f"the norm of the update is {norm}")
        self.frames[client], self.norms[client] = frame, norm

    def state(self) -> Tree:
        """Return what counts so far."""
        return {"frames": dict(self.frames), "norms": dict(self.norms)}

    def load(self, state: Tree) -> None:
        """Go on with these."""
        self.frames, self.norms = state["frames"], state["norms"]

    def refuse_large(self, limit: float) -> list[Refused]:
        """Take back replies whose norm is more than ``limit`` times the median of the round.

        With fewer than three replies none can be told to be the outlier.
        """
        found = check_norms(self.norms, limit)
        for client in found:
            del self.frames[int(client)], self.norms[client]
        return [Refused(int(client), "norm", detail) for client, detail in found.items()]
