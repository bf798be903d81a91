"""Brings orders to Flower's nodes: who is which client, who is gone, who came back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkd_fast.integrations.flower.messages import (
    HELLO,
    GoneError,
    answer_of,
    facts_of,
    kind,
    pack_order,
    size_of,
)
from fedkd_fast.node import Answer, Order
from fedkd_fast.remote import NoAnswerError

log = logging.getLogger("flwr")  # what `flwr run --stream` shows
_PULL_S = 0.25  # between two looks for replies
_NODES_S = 2.0  # between two looks for nodes that are gone
_HELLO_S = 60.0  # until a new node that has not said who it is, is asked again
_GRACE_S = 5.0  # for new nodes, of which one may be a client that was waited for in vain


class GridCarrier:
    """Carries orders over Flower's grid.

    Where a node is gone, its client's order is kept for a while, and goes to the node once it is
    back, or to another one that is this client now: carrying an order out twice does no harm. A
    client that was waited for in vain is not waited for again before it has come back.

    Args:
        grid: of the server app.
        timeout_s: for the answers to orders that go out together; None waits as long as it takes.
        wait_s: for all clients to come, at the beginning.
        rejoin_s: for a node that is gone to come back.
    """

    def __init__(self, grid: Grid, timeout_s: float | None, wait_s: float, rejoin_s: float) -> None:
        self._grid, self._timeout_s, self._wait_s = grid, timeout_s, wait_s
        self._rejoin_s = rejoin_s
        self._gone: set[int] = set()  # clients that were waited for in vain
        self._nodes: dict[int, int] = {}  # by client
        self._clients: dict[int, Mapping[str, Any]] = {}  # what they said at the beginning
        self._asked: dict[str, tuple[int, float]] = {}  # nodes by message, and until when
        self._heard: set[int] = set()  # nodes that said who they are, or why they are nobody
        self.bytes_sent = self.bytes_received = 0  # of messages, as Flower counts them

    def gather(self, clients: int) -> Mapping[int, Mapping[str, Any]]:
        """Wait until each client has a node.

        Raises:
            NoAnswerError: some did not come; names them.
            ValueError: a node cannot be a client, or two would be the same; says why.
        """
        found: dict[int, Mapping[str, Any]] = {}
        until = time.monotonic() + self._wait_s
        while len(found) < clients:
            for node, facts in self._hellos().items():
                if isinstance(facts, ValueError):
                    raise ValueError(f"node {node}: {facts}") from facts
                client = facts.get("client")
                if not isinstance(client, int) or not 0 <= client < clients:
                    raise ValueError(f"node {node} is client {client!r}, the run has {clients}")
                if client in found:
                    raise ValueError(
                        f"nodes {self._nodes[client]} and {node} are both client {client}: give "
                        "each SuperNode a partition-id of its own"
                    )
                found[client], self._nodes[client] = facts, node
            missing = [str(client) for client in range(clients) if client not in found]
            if missing and time.monotonic() >= until:
                raise NoAnswerError(
                    f"clients {', '.join(missing)} did not come within {self._wait_s:g} s"
                )
            time.sleep(_PULL_S if missing else 0.0)
        self._clients = found
        return found

    def _hellos(self) -> dict[int, Mapping[str, Any] | ValueError]:
        """Ask new nodes who they are, and return what others have said since, or why it is wrong.

        Nobody is waited for: a node that keeps silent keeps nobody away.
        """
        now = time.monotonic()
        self._asked = {one: asked for one, asked in self._asked.items() if now < asked[1]}
        busy = self._heard | {node for node, _ in self._asked.values()}
        for node in set(self._grid.get_node_ids()) - busy:
            content = RecordDict({HELLO: ConfigRecord({"who": "are you"})})
            message = self._push(Message(content, node, f"query.{HELLO}"))
            if message is not None:
                self._asked[message] = node, now + _HELLO_S
        found: dict[int, Mapping[str, Any] | ValueError] = {}
        for reply in self._pull(self._asked) if self._asked else ():
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                log.warning("node %d: %s", node, reply.error.reason)
                continue  # it is asked again
            self._heard.add(node)
            try:
                found[node] = facts_of(reply)
            except Exception as error:  # whatever a stranger says
                found[node] = ValueError(str(error))
        return found

    def exchange(
        self, orders: Mapping[int, Order], round_number: int, retried: Callable[[int], None]
    ) -> Mapping[int, Answer | Exception]:
        """Bring an order to each of some clients at once, and return what came of it."""
        found: dict[int, Answer | Exception] = {}
        waiting: dict[str, int] = {}
        # Clients without a node, why, and until when it may come back.
        away: dict[int, tuple[Exception, float]] = {}

        def send(client: int) -> None:
            content, node = pack_order(orders[client]), self._nodes[client]
            message = Message(content, node, kind(orders[client]), group_id=str(round_number))
            identity = self._push(message)
            if identity is None:
                leave(client, GoneError(f"client {client} has no node that takes messages"))
            else:
                waiting[identity] = client

        def leave(client: int, error: Exception) -> None:
            patience = self._rejoin_s
            if client in self._gone:
                patience = _GRACE_S if self._asked else -math.inf
            _, latest = away.get(client, (error, time.monotonic() + patience))
            away[client] = error, latest

        there = self._look_for(set(orders))
        for client in orders:
            if client in there:
                send(client)
            else:
                leave(client, GoneError(f"client {client} has no node that is connected"))
        until = math.inf if self._timeout_s is None else time.monotonic() + self._timeout_s
        looked = time.monotonic()
        while (waiting or away) and time.monotonic() < until:
            for reply in self._pull(waiting):
                client = waiting.pop(reply.metadata.reply_to_message_id)
                try:
                    found[client] = answer_of(client, reply)
                    self._gone.discard(client)
                except GoneError as error:
                    leave(client, error)
                except Exception as error:
                    found[client] = error
            for client, (reason, latest) in list(away.items()):
                if time.monotonic() >= latest:
                    del away[client]
                    self._gone.add(client)
                    found[client] = reason
            if away and (self._asked or time.monotonic() - looked >= _NODES_S):
                looked = time.monotonic()
                for client in self._look_for(set(away)):
                    del away[client]
                    log.info("client %d is back and gets its order again", client)
                    retried(client)
                    send(client)
            time.sleep(_PULL_S if waiting or away else 0.0)
        for client in (*waiting.values(), *away):
            found[client] = NoAnswerError(
                f"client {client} did not answer within {self._timeout_s:g} s"
            )
        return found

    def _look_for(self, clients: set[int]) -> set[int]:
        """Return which of some clients have a node that is connected, maybe another than before."""
        there = set(self._grid.get_node_ids())
        missing = {client for client in clients if self._nodes[client] not in there}
        if missing:
            for node, facts in self._hellos().items():
                if isinstance(facts, ValueError):
                    log.warning("node %d: %s", node, facts)
                    continue
                client = facts.get("client")
                if not isinstance(client, int) or client not in missing:
                    continue
                if facts != self._clients.get(client):
                    log.warning("node %d says it is client %d, but is another", node, client)
                    continue
                self._nodes[client] = node
                missing.discard(client)
        return clients - missing

    def _push(self, message: Message) -> str | None:
        size = size_of(message.content)
        identities = list(self._grid.push_messages([message]))
        if not identities or not identities[0]:
            return None
        self.bytes_sent += size
        return str(identities[0])

    def _pull(self, waiting: Mapping[str, Any]) -> list[Message]:
        """Return replies that are there, of those that are waited for."""
        found = []
        for reply in self._grid.pull_messages(list(waiting)):
            if reply.metadata.reply_to_message_id in waiting:
                self.bytes_received += 0 if reply.has_error() else size_of(reply.content)
                found.append(reply)
        return found
