"""Flower's messages without its runtime: the server app and the client app in one process.

Run by Flower's Python as ``flower_grid.py FOLDER``; writes a run folder for each case in it.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedkd_fast.integrations.flower import carrier, client_app
from fedkd_fast.integrations.flower.app_server import main
from fedkd_fast.sealing import PrivateKey

CLIENTS, RUN_ID = 2, 7
Answers = Callable[[Message, Callable[[], Message]], "Message | None"]


class FakeGrid:
    """Hands each message to the client app at once; a case may do something else with it."""

    def __init__(self, folder: Path, run_config: dict[str, Any]) -> None:
        self._folder, self._run_config = folder, run_config
        self._keys = folder.parent / "keys"
        self._replies: dict[str, Message] = {}
        self.nodes = {100 + index: index for index in range(CLIENTS)}
        self.answers: Answers = lambda message, answer: answer()

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = identity
            reply = self.answers(message, lambda message=message: self._answer(message))
            if reply is not None:
                self._replies[identity] = reply
            identities.append(identity)
        return identities

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        own = {"partition-id": self.nodes[node], "num-partitions": CLIENTS}
        own["state-dir"] = str(self._folder / "state")
        if self._run_config["encrypt"]:
            own["key"] = str(self._keys / f"client-{self.nodes[node]}.key")
            own["server-key"] = str(self._keys / "server.key.pub")
        context = Context(RUN_ID, node, own, RecordDict(), self._run_config)
        return client_app(message, context)

    def pull_messages(self, identities: Iterable[str]) -> list[Message]:
        return [self._replies.pop(one) for one in list(identities) if one in self._replies]


def is_train(message: Message, client: int, round_number: int) -> bool:
    """Tell whether a message asks a client to train in a round; under seal, or to score."""
    metadata = message.metadata
    return (metadata.message_type, metadata.dst_node_id - 100, metadata.group_id) == (
        "train",
        client,
        str(round_number),
    )


def restarted(grid: FakeGrid) -> Answers:
    """Let node 1 be killed while it trains in round 2, and come back: it gets its order again."""
    killed: list[Message] = []

    def answers(message: Message, answer: Callable[[], Message]) -> Message | None:
        if is_train(message, 1, 2) and not killed:
            answer()  # as far as it came
            killed.append(message)
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        return answer()

    return answers


def unavailable(grid: FakeGrid) -> Answers:
    """Let node 1 be gone from round 2 on, and be back when the final models are scored."""

    def answers(message: Message, answer: Callable[[], Message]) -> Message | None:
        if is_train(message, 1, 2):
            grid.nodes.pop(101)
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        if message.metadata.group_id == "3":
            grid.nodes[101] = 1
        return answer()

    return answers


def moved(grid: FakeGrid) -> Answers:
    """Let client 1 come back as another node after round 1."""

    def answers(message: Message, answer: Callable[[], Message]) -> Message | None:
        reply = answer()
        if is_train(message, 1, 1):
            grid.nodes.pop(101)
            grid.nodes[202] = 1
        return reply

    return answers


CASES = {"plain": None, "restarted": restarted, "unavailable": unavailable, "moved": moved}


def make_keys(folder: Path) -> None:
    """Make pairs of keys of the server and the clients, and the server's list of these."""
    folder.mkdir()
    server = PrivateKey.generate()
    server.save(folder / "server.key")
    (folder / "server.key.pub").write_text(f"{server.public}\n")
    known = {}
    for client in range(CLIENTS):
        own = PrivateKey.generate()
        own.save(folder / f"client-{client}.key")
        known[str(client)] = str(own.public)
    (folder / "clients.json").write_text(json.dumps(known))


def run(folder: Path, case: str, encrypt: bool) -> None:
    """Run a case; under seal all nodes have keys."""
    name = f"{case}-sealed" if encrypt else case
    config = {"task": "digits", "clients": CLIENTS, "rounds": 3, "samples-per-client": 40}
    config |= {"out": str(folder / name), "data": "", "feedback": "both", "wait": 5}
    config |= {"rejoin": 0.5, "encrypt": encrypt}
    config |= {"server-key": str(folder / "keys" / "server.key")}
    config |= {"enrolment": str(folder / "keys" / "clients.json")}
    grid = FakeGrid(folder / f"{name}-nodes", config)
    special = CASES[case]
    if special is not None:
        grid.answers = special(grid)
    main(grid, Context(RUN_ID, 0, {}, RecordDict(), config))


if __name__ == "__main__":
    carrier._PULL_S, carrier._NODES_S = 0.001, 0.01
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    make_keys(Path(sys.argv[1]) / "keys")
    for one in CASES:
        run(Path(sys.argv[1]), one, False)
    run(Path(sys.argv[1]), "restarted", True)
