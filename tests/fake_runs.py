"""Run folders written by hand, in the format of `train`, for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A two-layer mentee: shape of each shared tensor.
TENSORS: dict[str, tuple[int, ...]] = {
    f"encoder.layer.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attention.self.query.weight": (96, 96),
        "attention.self.key.weight": (96, 96),
        "attention.self.value.weight": (96, 96),
        "attention.output.dense.weight": (96, 96),
        "attention.output.dense.bias": (96,),
        "attention.output.LayerNorm.weight": (96,),
        "intermediate.dense.weight": (384, 96),
        "output.dense.weight": (96, 384),
        "output.dense.bias": (96,),
    }.items()
} | {"classifier.weight": (10, 96), "classifier.bias": (10,)}
MENTOR_PARAMETERS = 6 * 112_000

_FINAL = {"fedkd": 0.971, "local": 0.921, "central": 0.986, "fedavg": 0.969, "fedavg-mentee": 0.948}


def _layers(method: str, energy: float, noise: random.Random) -> list[dict[str, Any]]:
    layers = []
    for name, shape in TENSORS.items():
        dense = 4 * math.prod(shape)
        full = min(shape) if len(shape) > 1 else 0
        if method != "fedkd":
            record = {"mode": "RAW", "rank": 0, "bytes": dense}
        elif len(shape) == 1:
            record = {"mode": "PACKED_DENSE", "rank": 1, "bytes": dense // 4 + 5}
        else:
            share = (0.06 + 2.2 * (energy - 0.95)) * noise.uniform(0.6, 1.6)
            rank = max(1, round(share * full))
            size = rank * (sum(shape[:1]) + math.prod(shape[1:])) * 6 // 8 + 6 * rank
            record = {"mode": "PACKED_FACTORS", "rank": rank, "bytes": size}
        layers.append(
            {"name": name, "shape": list(shape), "full_rank": full, "dense_bytes": dense} | record
        )
    return layers


def _spectra(number: int) -> list[dict[str, Any]]:
    """Ranks that grow from round to round."""
    energies = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    return [
        {
            "name": name,
            "full_rank": min(shape),
            "ranks": {str(t): min(min(shape), at + number) for at, t in enumerate(energies, 1)},
        }
        for name, shape in TENSORS.items()
        if len(shape) > 1
    ]


def make_run(
    folder: Path,
    method: str = "fedkd",
    *,
    task: str = "digits",
    seed: int = 0,
    clients: int = 4,
    rounds: int = 8,
    dev: bool = False,
    spectra: bool = False,
    metrics: tuple[str, ...] = ("accuracy",),
    **summary: Any,
) -> Path:
    """Write one run folder; ``summary`` replaces fields of ``summary.json``.

    With ``dev``, rounds are scored on dev data, and the last one on test data.
    """
    folder.mkdir(parents=True)
    noise = random.Random(f"{method}-{seed}")
    sends = method not in {"local", "central"}
    final = _FINAL[method] + noise.uniform(-0.003, 0.003)
    has_mentor, has_mentee = method != "fedavg-mentee", method in {"fedkd", "fedavg-mentee"}
    lines = []
    up = down = 0
    rows: list[dict[str, Any]] = []

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return sum(values) / len(values) if values else None

    for number in range(1, rounds + 1):
        progress = (number - 1) / (rounds - 1) if rounds > 1 else 0.0
        energy = 0.95 + 0.03 * progress
        level = final - 0.35 * math.exp(-0.9 * number)
        broadcast = _layers(method, energy, noise) if sends else []
        bytes_down = 64 + sum(layer["bytes"] for layer in broadcast) if sends else 0
        rows = []
        for client in range(clients if method != "central" else 1):
            layers = _layers(method, energy, noise) if sends else []
            bytes_up = 64 + sum(layer["bytes"] for layer in layers) if sends else 0
            spread = noise.uniform(-0.012, 0.012)
            rows.append(
                {
                    "round": number,
                    "client": client,
                    "energy": energy if method == "fedkd" else None,
                    "loss_mentor": 2.2 * math.exp(-0.4 * number),
                    "loss_mentee": 2.3 * math.exp(-0.35 * number) if has_mentee else None,
                    "score_mentor": level + spread if has_mentor else None,
                    "score_mentee": level - 0.02 + spread / 2 if has_mentee else None,
                    "split": "dev" if dev and number < rounds else "test",
                    "bytes_up": bytes_up,
                    "bytes_down": bytes_down,
                    "seconds": 1.3,
                    "seconds_codec": 0.02 if sends else 0.0,
                    "layers": layers,
                }
            )
        up += sum(row["bytes_up"] for row in rows) // len(rows)
        down += bytes_down
        lines += rows
        if sends:
            scores = {key: mean(key) for key in ("score_mentor", "score_mentee")}
            server = {"client": None, "bytes_up": 0, "layers": broadcast}
            server |= {"spectra": _spectra(number)} if spectra else {}
            lines.append(rows[0] | scores | server)

    scores = {key: mean(key) for key in ("score_mentor", "score_mentee")}
    both = [score for score in scores.values() if score is not None]
    scores["score_mean"] = max(both) + 0.004 if len(both) > 1 else None
    fedavg = 2 * rounds * 4 * MENTOR_PARAMETERS
    facts = {
        "method": method,
        "task": task,
        "seed": seed,
        "rounds": rounds,
        "clients": clients,
        "version": "0.1.0",
        "energy_start": 0.95,
        "energy_end": 0.98,
        "codec": "wf0",
    }
    result = {
        **facts,
        **scores,
        "metrics": {
            role: {name: scores[f"score_{role}"] - 0.01 * at for at, name in enumerate(metrics)}
            if scores[f"score_{role}"] is not None
            else {}
            for role in ("mentor", "mentee", "mean")
        },
        "metric": metrics[0],
        "bytes_up": up,
        "bytes_down": down,
        "bytes_fedavg_mentor": fedavg,
        "saving": 1 - (up + down) / fedavg if sends else None,
        "seconds": 42.7,
        "seconds_codec": 1.31 if sends else 0.0,
        "parameters_mentor": MENTOR_PARAMETERS,
        "parameters_mentee": 224_970,
        "parameters_shared": 224_970,
        "scores_mentor": [row["score_mentor"] for row in rows] if has_mentor else [],
        **summary,
    }
    config = {
        **facts,
        "lr_mentor": 5e-4,
        "lr_mentee": 1e-3,
        "local_epochs": 1,
        "batch_size": 32,
        "feedback": None,
        "data": None,
        "environment": {"python": "3.11.7", "torch": "2.13.0", "platform": "Linux", "threads": 1},
        "task_facts": {
            "samples": 1797,
            "classes": 10,
            "parameters_mentor": MENTOR_PARAMETERS,
            "shard_sizes": [300 + 40 * client for client in range(clients)],
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(result), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_journal(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the journal of a run folder, with a time in each line."""
    time = "2026-01-02T03:04:05.678+00:00"
    text = "".join(json.dumps({"time": time, **line}) + "\n" for line in lines)
    (folder / "journal.jsonl").write_text(text, encoding="utf-8")
    return folder


def round_line(number: int, asked: int = 8, accepted: int = 8, **fields: Any) -> dict[str, Any]:
    """Return the journal's line on a round that was finished."""
    return {
        "event": "round",
        "round": number,
        "asked": asked,
        "accepted": accepted,
        "bytes_up": 6000 + number,
        "bytes_down": 5000,
        "seconds": 1.5,
        "digest": "00" * 16,
        **fields,
    }


def refused_line(number: int, client: int, reason: str, detail: str = "why") -> dict[str, Any]:
    """Return the journal's line on a reply that does not count."""
    place = {"event": "refused", "round": number, "client": client}
    return {**place, "reason": reason, "detail": detail}
