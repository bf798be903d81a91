"""A filter that changes nothing and writes down how large messages are, and when they pass."""

from __future__ import annotations

import json
import time
from pathlib import Path

from nvflare.apis.dxo import from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs


class Measure(Filter):
    """Appends a line of JSON to a file for each message.

    Args:
        path: of the file.
        direction: "up" or "down".
    """

    def __init__(self, path: str, direction: str) -> None:
        super().__init__()
        self.path, self.direction = path, direction

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Write a line; return what came."""
        now = time.time()
        dxo = from_shareable(shareable)
        line = {
            "direction": self.direction,
            "round": shareable.get_cookie("contribution_round"),
            "bytes": len(fobs.dumps(dxo.to_dict())),
            "time": now,
            "accuracy": (dxo.get_meta_prop("initial_metrics") or {}).get("accuracy"),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return shareable


def rounds_of(path: Path) -> list[dict[str, float]]:
    """Return bytes and accuracy of each round, means over clients, and seconds from end to end."""
    rounds: dict[int, dict[str, list[dict[str, float]]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        rounds.setdefault(line["round"], {"down": [], "up": []})[line["direction"]].append(line)
    rows = []
    for number, found in sorted(rounds.items()):
        down, up = found["down"], found["up"]
        rows.append(
            {
                "round": number,
                "bytes_down": sum(one["bytes"] for one in down) / len(down),
                "bytes_up": sum(one["bytes"] for one in up) / len(up),
                "seconds": max(one["time"] for one in up) - min(one["time"] for one in down),
                "accuracy_before": sum(one["accuracy"] for one in up) / len(up),
            }
        )
    return rows


def summary(path: Path) -> str:
    """Return a table with a row for each round."""
    rows = ["round   bytes down     bytes up   seconds   accuracy before"]
    for row in rounds_of(path):
        rows.append(
            f"{row['round']:5} {row['bytes_down']:12,.0f} {row['bytes_up']:12,.0f} "
            f"{row['seconds']:9.2f}   {row['accuracy_before']:15.4f}"
        )
    return "\n".join(rows)
