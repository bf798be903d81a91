"""What small messages cost beside a federated system's own handling of the same 100 MB.

    python bench/link_speed.py --out bench/results/link_speed.json

Run it where Flower is installed to have its rows: weights to an ``ArrayRecord``, hashed and made
bytes as they travel, and back. The model has the shapes of a BERT of width 768, and moves by
updates with the spectra of real ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from deltas import load
from provenance import facts
from torch import Tensor

from fedkd_fast.integrations.link import Broadcaster, Compression, Receiver

MEGABYTES = 100
PARTS = ("encode", "decode", "publish", "receive", "save", "load")


def moves() -> list[dict[str, Tensor]]:
    """Return the updates of two consecutive rounds, repeated until they are as large as wanted."""
    pairs = load("bert")
    rounds: list[dict[str, Tensor]] = [{}, {}]
    copies = 0
    while sum(value.nbytes for value in rounds[0].values()) < MEGABYTES * 10**6:
        for index, pair in enumerate(pairs):
            for update, one in zip(rounds, (pair.previous, pair.current), strict=True):
                # Shifted, so that no two are tied.
                update[f"{copies}.{index}"] = one.roll(copies, 0).contiguous()
            if sum(value.nbytes for value in rounds[0].values()) >= MEGABYTES * 10**6:
                break
        copies += 1
    return rounds


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def ours(compression: Compression, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each part, by round; the first ones are cold."""
    updates = moves()
    weights = {name: torch.randn_like(value) for name, value in updates[0].items()}
    server, client = Broadcaster(compression), Receiver(compression)
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    found["bytes_up"], found["bytes_down"] = [], []
    server.publish(weights)
    client.receive(server.letter(0))
    server.confirm(0, 1)
    for number in range(rounds):
        trained = {name: value + updates[number % 2][name] for name, value in server.held.items()}
        spent, frame = seconds(lambda trained=trained: client.reply(trained))
        found["encode"].append(spent)
        spent, new = seconds(lambda frame=frame: server.weights(frame))
        found["decode"].append(spent)
        found["publish"].append(seconds(lambda new=new: server.publish(new))[0])
        letter = server.letter(0)
        found["receive"].append(seconds(lambda letter=letter: client.receive(letter))[0])
        server.confirm(0, server.version)
        # Where a client is a process for each message, as in Flower.
        spent, state = seconds(client.state)
        found["save"].append(spent)
        found["load"].append(seconds(lambda state=state: Receiver(compression).load(state))[0])
        found["bytes_up"].append(len(frame))
        found["bytes_down"].append(letter.nbytes)
    return found


def flower(rounds: int) -> dict[str, list[float]]:
    """Return seconds of Flower's own handling of the same weights."""
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    weights = {name: torch.randn_like(value) for name, value in moves()[0].items()}
    found: dict[str, list[float]] = {"to_record": [], "hash_and_deflate": [], "to_torch": []}
    for _ in range(rounds):
        spent, record = seconds(lambda: ArrayRecord(weights))
        found["to_record"].append(spent)
        message = Message(RecordDict({"arrays": record}), dst_node_id=1, message_type="train")

        def deflate(message: Message = message) -> int:
            objects = get_all_nested_objects(message)
            return sum(len(one.deflate()) for one in objects.values())

        found["hash_and_deflate"].append(seconds(deflate)[0])
        found["to_torch"].append(seconds(record.to_torch_state_dict)[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python bench/link_speed.py --out bench/results/link_speed.json",
        "facts": facts(max(arguments.threads)),
        "megabytes": sum(value.nbytes for value in moves()[0].values()) / 1e6,
        "seconds": [],
    }
    cases = {
        "default": Compression(),
        "energy .95, no feedback": Compression(energy=0.95, feedback=False),
        "dense": Compression(codec="dense"),
        "dense, energy .95, no feedback": Compression(0.95, False, "dense"),
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name, compression in cases.items():
            row = ours(compression, arguments.rounds)
            row = {"case": name, "threads": threads, **row}
            result["seconds"].append(row)
            best = {key: min(row[key][1:]) for key in PARTS}
            print(threads, name, {k: round(v, 3) for k, v in best.items()}, row["bytes_up"][-1])
        if find_spec("flwr"):
            handling = flower(arguments.rounds)
            result["seconds"].append({"case": "Flower's handling", "threads": threads, **handling})
            total = sum(statistics.median(values) for values in handling.values())
            print(threads, "Flower", {k: round(min(v), 3) for k, v in handling.items()}, total)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
