"""What runs that were stopped and resumed are held against: all that equal runs have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import TinyTask

from fedkd_fast.trainer import Stopped, train

TIMES = ("seconds", "seconds_codec")


def bare(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what differs between runs that are otherwise equal."""
    return {key: value for key, value in record.items() if key not in TIMES}


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that two equal runs have in common."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    models = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return {
        "metrics": [bare(json.loads(line)) for line in lines],
        "summary": bare(summary),
        "models": models,
        "checkpoints": hashes(folder),
    }


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def hashes(folder: Path) -> dict[int, str]:
    """Return the hash of the checkpoint after each round, all attempts agreeing."""
    found: dict[int, str] = {}
    inside = False
    for line in journal(folder):
        inside = inside or line["event"] == "stop"
        if line["event"] == "checkpoint" and not inside:
            assert found.setdefault(line["round"], line["sha256"]) == line["sha256"]
        inside = inside and line["event"] != "checkpoint"
    return found


def after(clients: int) -> Callable[[], bool]:
    """Stop when so many clients had their turn."""
    seen = [0]

    def stop() -> bool:
        seen[0] += 1
        return seen[0] == clients

    return stop


def stopped(out: Path, **fields: Any) -> None:
    with pytest.raises(Stopped, match="stopped in round 2 of 3; what was trained is kept"):
        train(TinyTask(), "fedkd", rounds=3, out=out, stop=after(4), **fields)
