"""Orders and answers that only their receiver can read, and only their sender can have written.

What travels between the server and a client in another process is put into an envelope on either
side of the carrier, which needs not know: a sealed order is an order with the one step ``sealed``,
a sealed answer one with the one fact ``sealed``::

    run     = name of the server's process, 16 random bytes | name of the run
    parts   = [JSON of text and number of frames, frame, frame, ...]
    sealed  = [Channel(run, client).seal(part, round=number of the order) for part in parts]

Neither side needs memory that a killed process would lose. Nonces are random, and the number of an
order stands in every seal, so it is what tells new from old: the server awaits one answer to the
order that is out, and a client goes on from the last number that it accepted, which lies in its
folder. That very order it takes again, for it may have been killed over it; older ones it refuses.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkd_fast._errors import spoken
from fedkd_fast._files import parse_json, read_json_object, replacing
from fedkd_fast.config import TrainConfig
from fedkd_fast.node import Answer, Node, Order, locked
from fedkd_fast.remote import Carrier, NoAnswerError, read_answer
from fedkd_fast.sealing import Channel, PrivateKey, PublicKey, SealError
from fedkd_fast.tasks import Task

_log = logging.getLogger(__name__)
_SEALED = "sealed"
_HELLO = [["hello"]]
# An answer has two parts, so its counters follow from the order's number without any memory.
_PARTS = 2
_SESSION_BYTES = 16
_SHOWN = 200  # characters of what nobody has verified


def _seal(channel: Channel, number: int, text: str, frames: Sequence[bytes]) -> list[bytes]:
    """Seal a text and the frames that belong to it."""
    head = json.dumps([text, len(frames)]).encode()
    return [channel.seal(part, number) for part in (head, *frames)]


def _open(channel: Channel, number: int, parts: Sequence[bytes]) -> tuple[str, list[bytes]]:
    """Return what `_seal` was given.

    Counters rise from part to part and the first says how many there are, so none can be missing,
    doubled or in another's place.

    Raises:
        SealError, ValueError: it is something else.
    """
    opened = [channel.open(part, number) for part in parts]
    head = parse_json(opened[0].decode(), "sealed text") if opened else ["", 0]
    if not (isinstance(head, list) and [type(one) for one in head] == [str, int]):
        raise ValueError("sealed parts must begin with a text and a number of frames")
    text, count = head
    if count != len(opened) - 1:
        raise SealError(f"{count} sealed frames expected, got {len(opened) - 1}", "short")
    return text, opened[1:]


class SealedCarrier:
    """Seals orders before a carrier takes them, and opens the answers that it brings.

    Clients are held against their keys before a run begins. What is not sealed by the client, for
    the order that is out, counts as no answer.

    Args:
        carrier: brings orders to clients, and need not be trusted.
        key: of the server.
        clients: public keys of the clients, by number.
        run: names the run, the same as `SealedNode`'s; need be neither new nor secret.
    """

    def __init__(
        self, carrier: Carrier, key: PrivateKey, clients: Mapping[int, PublicKey], run: str
    ) -> None:
        self._carrier, self._key, self._keys, self._run = carrier, key, clients, run
        # New in every process: no answer to an earlier one counts.
        self._session = secrets.token_bytes(_SESSION_BYTES)
        self._channels: dict[int, Channel] = {}

    def gather(self, clients: int) -> Mapping[int, Mapping[str, Any]]:
        """Wait for all clients, and return what `Node.hello` says of each, under seal.

        Raises:
            NoAnswerError: some did not come, or none that has the client's key.
            ValueError: keys are missing, a client does not seal, or cannot take part.
        """
        missing = [str(index) for index in range(clients) if index not in self._keys]
        if missing:
            raise ValueError(f"enrolment must have keys of all clients, {', '.join(missing)} lack")
        for index, said in sorted(self._carrier.gather(clients).items()):
            if said.get(_SEALED) is not True:
                raise ValueError(f"client {index} does not seal what it sends, the server does")
        hello = {index: Order(0, 0, _HELLO) for index in range(clients)}
        found: dict[int, Mapping[str, Any]] = {}
        for index, answer in sorted(self.exchange(hello, 0, lambda client: None).items()):
            if isinstance(answer, Exception):
                raise answer
            if "error" in answer.facts:
                raise ValueError(f"client {index}: {answer.facts['error']}")
            found[index] = answer.facts
        return found

    def exchange(
        self, orders: Mapping[int, Order], round_number: int, retried: Callable[[int], None]
    ) -> Mapping[int, Answer | Exception]:
        """Bring an order to each of some clients at once, and return what came of it."""
        sealed = {client: self._sealed(client, order) for client, order in orders.items()}
        found = self._carrier.exchange(sealed, round_number, retried)
        return {
            client: self._opened(client, orders[client].number, answer)
            for client, answer in found.items()
        }

    def _sealed(self, client: int, order: Order) -> Order:
        """Return the envelope; a carrier that sends it twice sends the same bytes."""
        if client not in self._channels:
            run, peer = _name(self._session, self._run), self._keys[client]
            self._channels[client] = Channel(self._key, peer, run=run, client=client, side="server")
        parts = _seal(self._channels[client], order.number, order.text(), order.frames)
        return Order(0, order.number, [[_SEALED, self._session.hex()]], parts)

    def _opened(self, client: int, number: int, answer: Answer | Exception) -> Answer | Exception:
        """Return the answer, or why it is none: whoever forges one must not speak for a client."""
        if isinstance(answer, Exception):
            return answer
        refused = f"answer of client {client} to order {number} is refused"
        head = answer.facts.get(_SEALED)
        if not isinstance(head, str):
            said = str(answer.facts.get("error", answer.facts))[:_SHOWN]
            return NoAnswerError(f"{refused}: not sealed; whoever wrote it says: {said}")
        try:
            parts = [base64.b64decode(head, validate=True), *([answer.frame] * bool(answer.frame))]
            text, frames = _open(self._channels[client], number, parts)
        except SealError as error:
            return NoAnswerError(f"{refused} ({error.reason}): {error}")
        except ValueError as error:
            return NoAnswerError(f"{refused}: {error}")
        try:
            return read_answer(client, text, frames[0] if frames else b"")
        except Exception as error:
            return error


class SealedNode(Node):
    """A client that takes sealed orders alone, and answers under seal.

    Args:
        config, task, index, folder, own_data: as `Node` takes them.
        key: of the client.
        server: public key of the server.
        run: names the run, the same as `SealedCarrier`'s.

    Raises:
        ValueError: data that cannot be dealt.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        index: int,
        folder: Path,
        *,
        key: PrivateKey,
        server: PublicKey,
        run: str,
        own_data: bool = False,
    ) -> None:
        super().__init__(config, task, index, folder, own_data=own_data)
        self._key, self._server, self._run = key, server, run

    def hello(self) -> dict[str, Any]:
        """Return which client this is; the rest is only for who has the server's key."""
        return {"client": self._index, _SEALED: True}

    def execute(self, order: Order) -> Answer:
        """Carry a sealed order out; one that is refused is answered by the reason, in the clear."""
        try:
            with locked(self._folder / "seals.lock"):
                channel, opened = self._opened(order)
                said = self._said(opened)
                frames = [said.frame] if said.frame else []
                head, *rest = _seal(channel, order.number, said.text(), frames)
        except Exception as error:
            _log.warning("client %d, order %d: %s", self._index, order.number, error)
            return Answer({"error": spoken(error)})
        return Answer({_SEALED: base64.b64encode(head).decode()}, rest[0] if rest else b"")

    def _said(self, order: Order) -> Answer:
        if [list(step) for step in order.steps] != _HELLO:
            return super().execute(order)
        try:
            return Answer(super().hello())
        except Exception as error:
            return Answer({"error": spoken(error)})

    def _opened(self, order: Order) -> tuple[Channel, Order]:
        """Open an order, and have its number on the disk before anything is done.

        Raises:
            SealError: it is not the server's for this client and run, or is older than another.
            ValueError: it is no sealed order, or of another run than the folder.
        """
        name, session = self._session(order)
        run = _name(session, self._run)
        channel = Channel(self._key, self._server, run=run, client=self._index, side="client")
        channel.load({"sent": _PARTS * order.number, "accepted": 0, "missed": []})
        text, frames = _open(channel, order.number, order.frames)
        path = self._folder / "seals.json"
        last: dict[str, Any] = (
            read_json_object(path) if path.exists() else {"run": name, "number": 0}
        )
        if last["run"] != name:
            raise ValueError(f"{self._folder} is of another run than this order")
        if order.number < last["number"]:
            raise SealError(
                f"sealed order refused (client {self._index}): order {last['number']} was accepted "
                f"already, order {order.number} is repeated or too late",
                "replayed",
            )
        with replacing(path, durable=True) as part:
            part.write_text(json.dumps({"run": name, "number": order.number}))
        return channel, Order.read(text, frames)

    def _session(self, order: Order) -> tuple[str, bytes]:
        """Return the name of the server's process, as text and bytes."""
        step = list(order.steps[0]) if len(order.steps) == 1 else []
        if len(step) != 2 or step[0] != _SEALED or not isinstance(step[1], str):
            raise ValueError(f"client {self._index} takes sealed orders only, this one is not")
        session = bytes.fromhex(step[1])
        if len(session) != _SESSION_BYTES:  # else it could take in a piece of the run's name
            raise ValueError(f"sealed order must name {_SESSION_BYTES} bytes, got {len(session)}")
        return session.hex(), session


def _name(session: bytes, run: str) -> bytes:
    """Return what keys are derived for."""
    return session + run.encode()
