"""Brings orders to Flower's nodes: who is which client, who is gone, who came back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkd_fast.integrations.flower.messages import (
    HELLO,
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
_NODES_S = 2.0  # between two looks at the nodes


class GridCarrier:
    """Carries orders over Flower's grid.

    A node that was started anew since an order went to it gets the order again: carrying one out
    twice does no harm. One that is gone for good is reported so by Flower itself.

    Args:
        grid: of the server app.
        timeout_s: for the answers to orders that go out together; None waits as long as it takes.
        wait_s: for all clients to come, at the beginning.
    """

    def __init__(self, grid: Grid, timeout_s: float | None, wait_s: float) -> None:
        self._grid, self._timeout_s, self._wait_s = grid, timeout_s, wait_s
        self._nodes: dict[int, int] = {}  # by client
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
            for node, facts in self._hellos(until).items():
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
        return found

    def _hellos(self, until: float) -> dict[int, Mapping[str, Any]]:
        """Ask nodes that have not been asked who they are.

        Raises:
            ValueError: a node says that it cannot be a client.
        """
        waiting: dict[str, int] = {}
        for node in set(self._grid.get_node_ids()) - self._heard:
            content = RecordDict({HELLO: ConfigRecord({"who": "are you"})})
            message = self._push(Message(content, node, f"query.{HELLO}"))
            if message is not None:
                waiting[message] = node
        found: dict[int, Mapping[str, Any]] = {}
        while waiting and time.monotonic() < until:
            for reply in self._pull(waiting):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    log.warning("node %d: %s", node, reply.error.reason)
                    continue  # it is asked again
                self._heard.add(node)
                try:
                    found[node] = facts_of(reply)
                except ValueError as error:
                    raise ValueError(f"node {node}: {error}") from error
            time.sleep(_PULL_S)
        return found

    def exchange(
        self, orders: Mapping[int, Order], round_number: int, retried: Callable[[int], None]
    ) -> Mapping[int, Answer | Exception]:
        """Bring an order to each of some clients at once, and return what came of it."""
        found: dict[int, Answer | Exception] = {}
        started = self._started()
        self._look_for(set(orders), started)
        waiting: dict[str, int] = {}
        for client, order in orders.items():
            self._send(client, order, round_number, waiting, found)
        until = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        looked = time.monotonic()
        while waiting:
            for reply in self._pull(waiting):
                client = waiting.pop(reply.metadata.reply_to_message_id)
                try:
                    found[client] = answer_of(client, reply)
                except Exception as error:
                    found[client] = error
            if until is not None and time.monotonic() >= until:
                break
            if waiting and time.monotonic() - looked >= _NODES_S:
                looked, now = time.monotonic(), self._started()
                for message, client in list(waiting.items()):
                    node = self._nodes[client]
                    if now.get(node, started.get(node)) != started.get(node):
                        del waiting[message]
                        log.info("client %d was started anew and is asked again", client)
                        retried(client)
                        self._send(client, orders[client], round_number, waiting, found)
                started |= now
            time.sleep(_PULL_S if waiting else 0.0)
        for client in waiting.values():
            found[client] = NoAnswerError(
                f"client {client} did not answer within {self._timeout_s:g} s"
            )
        return found

    def _started(self) -> dict[int, str]:
        """Return when each node that is there was last started; "" where Flower does not tell."""
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}

    def _look_for(self, clients: set[int], there: Mapping[int, str]) -> None:
        """Look among new nodes for clients whose node is gone."""
        gone = {client for client in clients if self._nodes.get(client) not in there}
        if not gone:
            return
        try:
            hellos = self._hellos(time.monotonic() + self._wait_s)
        except ValueError as error:
            log.warning("%s", error)
            return
        for node, facts in hellos.items():
            client = facts.get("client")
            if client in gone:
                self._nodes[client] = node

    def _send(
        self,
        client: int,
        order: Order,
        round_number: int,
        waiting: dict[str, int],
        found: dict[int, Answer | Exception],
    ) -> None:
        message = Message(
            pack_order(order), self._nodes[client], kind(order), group_id=str(round_number)
        )
        identity = self._push(message)
        if identity is None:
            found[client] = NoAnswerError(f"client {client} has no node that takes messages")
        else:
            waiting[identity] = client

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
