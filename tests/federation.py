"""Clients and a server as a run makes them, for tests that take a round apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny_task import TinyTask, tiny_task

from fedkd_fast.assembly import make_clients, make_server
from fedkd_fast.client import Client
from fedkd_fast.methods import get_method
from fedkd_fast.server import Server
from fedkd_fast.trainer import configure


def federation(
    method: str = "fedkd", clients: int = 3, *, task: TinyTask | None = None, **fields: Any
) -> tuple[list[Client], Server]:
    """Make the clients of a run, and its server."""
    task = task or tiny_task(method)
    config = configure(task, method, {"clients": clients, **fields})
    found = make_clients(config, task, get_method(method))
    server = make_server(config, found[0], get_method(method))
    assert server is not None
    return found, server


def exchange(
    clients: Sequence[Client], server: Server, number: int = 1, energy: float = 0.95
) -> tuple[list[bytes], bytes]:
    """Let these clients train and exchange; they must be at the server's version."""
    for client in clients:
        client.train(number)
    frames = [client.upload(energy) for client in clients]
    broadcast = server.step(frames, energy)
    for client in clients:
        client.apply(broadcast)
        client.version = server.version
    return frames, broadcast
