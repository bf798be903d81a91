"""Clients in other processes, as the server's loop sees them.

`RemoteClient` has the methods of a client, and writes down what it is asked for. What has an
outcome, training and scoring, goes out as one `node.Order` with all that was written down before
it, to all clients of a round at once. A broadcast therefore travels with the next order. What was
asked for in vain is taken off the list again, and the next order goes on from the state before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from fedkd_fast._files import parse_json
from fedkd_fast.journal import Journal
from fedkd_fast.methods import Learner, Losses
from fedkd_fast.node import Answer, Order
from fedkd_fast.trees import Tree

_MOST_SECONDS = 1e9  # thirty years


class NoAnswerError(RuntimeError):
    """A client did not answer; it may do so later."""


class ClientError(RuntimeError):
    """A client answered that it could not do what it was asked for, or answered nonsense."""


class LostStateError(ClientError):
    """A client lost what it had learned, or cannot read it; it begins anew with its next order."""


class Carrier(Protocol):
    """Brings orders to clients, and their answers back."""

    def gather(self, clients: int) -> Mapping[int, Mapping[str, Any]]:
        """Wait for all clients, and return what `Node.hello` says of each.

        Raises:
            NoAnswerError: some did not come; names them.
            ValueError: who came does not fit.
        """

    def exchange(
        self, orders: Mapping[int, Order], round_number: int, retried: Callable[[int], None]
    ) -> Mapping[int, Answer | Exception]:
        """Bring an order to each of some clients at once, and return what came of it.

        Args:
            orders: by client.
            round_number: that they belong to.
            retried: called with a client that was sent its order once more.
        """


class RemoteClient:
    """What stands for a client in another process.

    Args:
        index: of the client.
        learner: models as it had them before its first round.
    """

    def __init__(self, index: int, learner: Learner) -> None:
        self.index, self.learner = index, learner
        self.version, self.elsewhere = 0, (0.0, 0.0)
        self._base = 0  # order after which the client is what it is known to be
        self._missing: set[int] = set()  # orders whose outcome it lost
        self._steps: list[list[Any]] = []  # to be done before what comes next
        self._frames: list[bytes] = []
        self._frame = b""  # that the last order led to
        self._outcome: Answer | Exception | None = None  # of the order that is out

    def lost(self, frame: bytes) -> None:
        """Have `Client.lost` called; the client still has the frame."""
        self._steps.append(["lost"])

    def refused(self) -> None:
        """Have `Client.refused` called."""
        self._steps.append(["refused"])

    def apply(self, *frames: bytes) -> None:
        """Have frames applied."""
        self._steps.append(["apply", len(frames)])
        self._frames += frames

    def require(self, digest: bytes, version: int) -> None:
        """Have the client hold its parameters against these, and refuse to go on with others."""
        self._steps.append(["require", digest.hex(), version])
        self.version = version

    def absent(self, rounds: int) -> None:
        """Have `Client.absent` called."""
        self._steps.append(["absent", rounds])

    def refresh(self, lr_share: float = 1.0) -> None:
        """Have `Client.refresh` called."""
        self._steps.append(["refresh", lr_share])

    def order(
        self, number: int, steps: Iterable[Sequence[Any]], frames: Iterable[bytes] = ()
    ) -> Order:
        """Return an order to do all that is to be done, and then these steps with these frames."""
        return Order(self._base, number, [*self._steps, *steps], [*self._frames, *frames])

    def take(self, outcome: Answer | Exception) -> None:
        """Take in what came of an order, for `train` and `upload`, or `facts`."""
        self._outcome = outcome

    def facts(self) -> dict[str, Any]:
        """Return what the order led to, and go on from there.

        Raises:
            NoAnswerError: there is no answer.
            ClientError: the client could not do it, or says what cannot be.
        """
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            raise NoAnswerError(f"client {self.index} did not answer")
        if isinstance(outcome, Exception):
            raise outcome
        facts = outcome.facts
        said = str(facts.get("error", "")) or f"client {self.index} failed without a word"
        if facts.get("missing"):
            self._missing.add(self._base)
            self.load((self.version, self._base, [], []))
            raise LostStateError(said)
        if "error" in facts:
            raise ClientError(said)
        self.elsewhere = self._seconds(facts, "seconds"), self._seconds(facts, "seconds_codec")
        self._base, self._steps, self._frames = int(self._number(facts, "state")), [], []
        self._frame = outcome.frame
        return facts

    def _seconds(self, facts: Mapping[str, Any], name: str) -> float:
        found = self._number(facts, name)
        if not 0.0 <= found <= _MOST_SECONDS:  # sums over rounds and clients must stay numbers
            raise ClientError(
                f"{name} of client {self.index} must lie in [0, {_MOST_SECONDS:g}], got {found:g}"
            )
        return found

    def _number(self, facts: Mapping[str, Any], name: str) -> float:
        return finite(facts.get(name), f"{name} of client {self.index}")

    def train(self, round_number: int, lr_share: float = 1.0) -> Losses:
        """Return the losses of the order that went out.

        Raises:
            NoAnswerError, ClientError: as `facts`.
        """
        losses = self.facts().get("losses")
        if not (isinstance(losses, list) and len(losses) == 2):
            raise ClientError(f"losses of client {self.index} must be two, got {losses!r}")
        name = f"loss of client {self.index}"
        return Losses(*(None if loss is None else finite(loss, name) for loss in losses))

    def upload(self, energy: float, *, factor: float = 1.0) -> bytes:
        """Return the frame that came with the losses."""
        return self._frame

    def state(self) -> Tree:
        """Return what `load` needs to forget what is done from now on."""
        return self.version, self._base, [*self._steps], [*self._frames]

    def load(self, state: Tree) -> None:
        """Go back to where `state` was taken; a client that has lost that begins anew."""
        self.version, self._base, steps, frames = state
        if self._base in self._missing:
            self.version, self._base, steps, frames = 0, 0, [], []
        self._steps, self._frames = [*steps], [*frames]


class RemotePool:
    """The clients of a run, each in a process of its own.

    Args:
        learner: models as every client has them before its first round.
        count: how many clients there are.
        exchanges: whether they upload.
        carrier: brings orders to them.
        journal: takes down what they say went wrong.
    """

    def __init__(
        self, learner: Learner, count: int, exchanges: bool, carrier: Carrier, journal: Journal
    ) -> None:
        self._clients = [RemoteClient(index, learner) for index in range(count)]
        self._exchanges, self._carrier, self._journal = exchanges, carrier, journal
        self._number = 0  # of the last order
        self._round = 0

    def __len__(self) -> int:
        """Return how many clients there are."""
        return len(self._clients)

    def look(self, index: int, *, lasting: bool = False) -> RemoteClient:
        """Return what stands for a client."""
        return self._clients[index]

    def take(self, index: int) -> RemoteClient:
        """Return what stands for a client."""
        return self._clients[index]

    def version(self, index: int) -> int:
        """Return the version that a client has, or will have before it does anything else."""
        return self._clients[index].version

    def together(self, asked: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return all at once."""
        return [asked]

    def start(
        self, together: Sequence[int], round_number: int, energy: float, lr_share: float
    ) -> None:
        """Let these train and upload, and wait for all that answer."""
        self._round = round_number
        steps: list[list[Any]] = [["train", round_number, lr_share]]
        if self._exchanges:
            steps.append(["upload", energy])
        self.send({index: (steps, []) for index in together})

    def send(self, work: Mapping[int, tuple[Sequence[Sequence[Any]], Sequence[bytes]]]) -> None:
        """Bring steps and their frames to clients; what comes of it is with each of them."""
        orders = {}
        for index, (steps, frames) in work.items():
            self._number += 1
            orders[index] = self._clients[index].order(self._number, steps, frames)
        answers = self._carrier.exchange(orders, self._round, self._retried) if orders else {}
        for index in orders:
            answer = answers.get(index, NoAnswerError(f"client {index} did not answer"))
            self._clients[index].take(answer)
            if isinstance(answer, Answer) and "failed" in answer.facts:
                self.failed(index, str(answer.facts["failed"]))

    def failed(self, index: int, reason: str) -> None:
        """Take down what a client did not do, without which the run goes on."""
        self._journal.add("failed", round=self._round, client=index, reason=reason)

    def _retried(self, index: int) -> None:
        self._journal.add("retry", round=self._round, client=index)

    def before(self, index: int) -> Tree:
        """Return what `undo` needs."""
        return self._clients[index].state()

    def undo(self, index: int, before: Tree) -> None:
        """Forget what a client did; its next order goes on from the state before that."""
        self._clients[index].load(before)

    def write_changed(self) -> None:
        """Do nothing: clients keep their states themselves."""

    def settle(self) -> None:
        """Do nothing: no client is in this process."""

    def versions(self) -> dict[int, int]:
        """Return the versions of all clients that ever received something."""
        return {one.index: one.version for one in self._clients if one.version}

    def load_versions(self, versions: Iterable[tuple[int, int]]) -> None:
        """Refuse: the server's part of such a run has no checkpoints."""
        raise ValueError("resume needs clients in this process")

    def close(self) -> None:
        """Do nothing: clients stay where they are."""


def finite(value: object, name: str) -> float:
    """Return a number that a client sent."""
    try:
        # Integers of hundreds of digits overflow.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ClientError(f"{name} must be a finite number, got {str(value)[:80]}")


def read_answer(index: int, text: object, frame: object) -> Answer:
    """Return the answer that `Answer.text` and a frame were taken of.

    Raises:
        ClientError: it is something else.
    """
    try:
        facts = parse_json(text, "answer") if isinstance(text, str) else None
    except ValueError as error:
        raise ClientError(f"client {index}: {error}") from error
    if not isinstance(facts, dict) or not isinstance(frame, bytes):
        raise ClientError(f"client {index} answers with something that is no answer")
    return Answer(facts, frame)
