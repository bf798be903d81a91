"""Nodes that are gone, and what others say in their place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from grid import through_proto

from fedkd_fast.integrations.flower import carrier
from fedkd_fast.integrations.flower.messages import HELLO, GoneError, pack_answer
from fedkd_fast.node import Answer, Order

GONE = 101


class Nodes:
    """A grid of nodes that say of themselves what they are told to, and do what they are asked."""

    def __init__(self) -> None:
        self.hellos: dict[int, str | None] = {100: '{"client": 0}', GONE: '{"client": 1}'}
        self._numbers, self._replies = itertools.count(), dict[str, Message]()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.hellos)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity, node = str(next(self._numbers)), message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = identity
            content = pack_answer(Answer({"state": node}))
            identities.append(identity)
            if message.metadata.message_type.startswith("query"):
                facts = self.hellos[node]
                if facts is None:
                    continue  # it keeps silent
                content = RecordDict({HELLO: ConfigRecord({"facts": facts})})
            self._replies[identity] = through_proto(Message(content, reply_to=message))
        return identities

    def pull_messages(self, identities: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(one) for one in list(identities) if one in self._replies]


@pytest.mark.parametrize(
    "nonsense",
    [
        '{"error": "no data"}',
        '{"client": []}',
        '{"client": 1, "version": "9"}',
        "[" * 100_000,
        "{}",
        "1",
    ],
)
def test_nonsense_of_a_new_node_does_not_keep_others_away(
    monkeypatch: pytest.MonkeyPatch, nonsense: str
) -> None:
    monkeypatch.setattr(carrier, "_PULL_S", 0.001)
    nodes = Nodes()
    found = carrier.GridCarrier(nodes, 5.0, 5.0, 0.5)  # type: ignore[arg-type]
    assert found.gather(2).keys() == {0, 1}
    del nodes.hellos[GONE]
    nodes.hellos.update({200: nonsense, 201: '{"client": 1}', 202: nonsense})
    answers = found.exchange({0: Order(0, 1, []), 1: Order(0, 2, [])}, 1, lambda client: None)
    assert {client: one.facts for client, one in answers.items() if isinstance(one, Answer)} == {
        0: {"state": 100},
        1: {"state": 201},
    }


def test_a_silent_new_node_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "_PULL_S", 0.001)
    monkeypatch.setattr(carrier, "_GRACE_S", 0.2)
    monkeypatch.setattr(carrier, "_HELLO_S", math.inf)  # who waited for it would wait for ever
    nodes = Nodes()
    found = carrier.GridCarrier(nodes, None, 5.0, 0.5)  # type: ignore[arg-type]
    nodes.hellos[200] = None
    assert found.gather(2).keys() == {0, 1}
    orders = {0: Order(0, 1, []), 1: Order(0, 2, [])}
    del nodes.hellos[GONE]
    answers = found.exchange(orders, 1, lambda client: None)
    # The client is known to be gone then, and only gets a grace for new nodes to say who they are.
    again = found.exchange(orders, 2, lambda client: None)
    for one in (answers, again):
        assert isinstance(one[0], Answer) and isinstance(one[1], GoneError)
    nodes.hellos[201] = '{"client": 1}'
    back = found.exchange(orders, 3, lambda client: None)
    assert isinstance(back[1], Answer) and back[1].facts == {"state": 201}


def test_a_silent_node_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "_PULL_S", 0.001)
    monkeypatch.setattr(carrier, "_HELLO_S", 0.05)
    nodes = Nodes()
    asked: list[int] = []
    push = nodes.push_messages

    def wakes_up(messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        asked.append(message.metadata.dst_node_id)
        if asked.count(GONE) == 3:
            nodes.hellos[GONE] = '{"client": 1}'
        return push([message])

    monkeypatch.setattr(nodes, "push_messages", wakes_up)
    nodes.hellos[GONE] = None
    found = carrier.GridCarrier(nodes, 5.0, 5.0, 0.5)  # type: ignore[arg-type]
    assert found.gather(2).keys() == {0, 1}
    assert asked.count(GONE) == 3 and asked.count(100) == 1


def test_a_node_that_cannot_be_a_client_ends_the_beginning() -> None:
    nodes = Nodes()
    nodes.hellos[102] = '{"error": "no data"}'
    found = carrier.GridCarrier(nodes, 5.0, 5.0, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="node 102: no data"):
        found.gather(3)


@pytest.mark.parametrize("of", ["a new node", "a client"])
@pytest.mark.parametrize("bad", ["", []])
def test_what_flower_cannot_count_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, bad: str | list[int], of: str
) -> None:
    monkeypatch.setattr(carrier, "_PULL_S", 0.001)

    class Evil(Nodes):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages = list(messages)
            (identity,) = super().push_messages(messages)
            hello = message.metadata.message_type.startswith("query")
            if message.metadata.dst_node_id == (300 if of == "a new node" else GONE) and (
                hello == (of == "a new node")
            ):
                content = RecordDict({"x": ConfigRecord({"x": bad})})
                self._replies[identity] = through_proto(Message(content, reply_to=message))
            return [identity]

    nodes = Evil()
    found = carrier.GridCarrier(nodes, 5.0, 5.0, 0.5)  # type: ignore[arg-type]
    assert found.gather(2).keys() == {0, 1}
    if of == "a new node":
        nodes.hellos[300] = None
        del nodes.hellos[GONE]
    answers = found.exchange({0: Order(0, 1, []), 1: Order(0, 2, [])}, 1, lambda client: None)
    assert isinstance(answers[0], Answer) and isinstance(answers[1], Exception)
