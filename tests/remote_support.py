"""Runs with clients that are nodes, made anew for each order as processes are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_task import TinyTask, tiny_task

from fedkd_fast.connect import connect
from fedkd_fast.envelopes import SealedCarrier, SealedNode
from fedkd_fast.node import Answer, Node, Order
from fedkd_fast.remote import Carrier, read_answer
from fedkd_fast.sealing import PrivateKey
from fedkd_fast.trainer import Run, configure, train

# What only one of both has, or what takes time.
CLOCKS = ("seconds", "seconds_codec")
NEEDED = {"checkpoint_every": 0, "retries": 0}

Happens = Callable[[int, Order], Exception | None]


class Mail:
    """Carries orders as text and bytes to nodes, each made anew, as processes are."""

    def __init__(
        self, folder: Path, task: TinyTask, method: str, fields: Mapping[str, Any]
    ) -> None:
        self._folder, self._task = folder, task
        self.config = configure(task, method, fields)
        self.before: Happens = lambda client, order: None  # an error: the order does not arrive
        self.after: Happens = lambda client, order: None  # an error: the answer does not
        # What a carrier that cannot be trusted does to answers.
        self.changed: Callable[[int, Order, Answer], Answer] = lambda client, order, answer: answer
        self.orders: list[tuple[int, Order]] = []
        self.round = 0
        self.server = PrivateKey.generate()
        self.keys = {index: PrivateKey.generate() for index in range(self.config.clients)}

    def node(self, client: int) -> Node:
        if self.config.encrypt:
            keys = {"key": self.keys[client], "server": self.server.public, "run": "7"}
            place = self._folder / str(client)
            return SealedNode(self.config, self._task, client, place, **keys)
        return Node(self.config, self._task, client, self._folder / str(client))

    def gather(self, clients: int) -> Mapping[int, Mapping[str, Any]]:
        return {index: json.loads(json.dumps(self.node(index).hello())) for index in range(clients)}

    def exchange(
        self, orders: Mapping[int, Order], round_number: int, retried: Callable[[int], None]
    ) -> Mapping[int, Answer | Exception]:
        self.round = round_number
        found: dict[int, Answer | Exception] = {}
        for client, order in reversed(orders.items()):  # answers come in any order
            self.orders.append((client, order))
            error = self.before(client, order)
            if error is None:
                answer = self.node(client).execute(Order.read(order.text(), order.frames))
                answer = self.changed(client, order, answer)
                error = self.after(client, order)
            found[client] = error or read_answer(client, answer.text(), answer.frame)
        return found


def remote(
    tmp_path: Path,
    method: str = "fedkd",
    *,
    mail: Callable[[Mail], None] = lambda mail: None,
    wait_s: float = 0.0,
    **fields: Any,
) -> tuple[Run, Mail]:
    """Train with clients of their own."""
    task = tiny_task(method)
    fields = {**NEEDED, **fields, "out": str(tmp_path / "remote")}
    found = Mail(tmp_path / "nodes", task, method, fields)
    mail(found)
    carrier: Carrier = found
    if found.config.encrypt:
        known = {index: key.public for index, key in found.keys.items()}
        carrier = SealedCarrier(found, found.server, known, "7")
    ways = connect(found.config, task, carrier, wait_s)
    return train(task, method, connect=ways, **fields), found


def here(tmp_path: Path, method: str = "fedkd", **fields: Any) -> Run:
    """Train in this process."""
    return train(tiny_task(method), method, out=str(tmp_path / "here"), **fields)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


def summary(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.summary.items() if name not in CLOCKS}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def assert_same(tmp_path: Path, run: Run, other: Run) -> None:
    assert lines(tmp_path / "remote") == lines(tmp_path / "here")
    assert summary(run) == summary(other)
