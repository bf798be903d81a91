"""OpenFL's compression pipelines and ours: bytes, error and time of one 512×512 tensor.

In an environment with openfl 1.9, numpy below 2.4, scikit-learn and this package:
python bench/openfl_pipelines.py --out bench/results/openfl.json

The tensors: what 100 steps of Adam changed of a layer, on scikit-learn's digits; and noise, which
has no structure that a codec could use. For each of OpenFL's pipelines ours is run once more at the
same error. Bytes are those of the protobuf message.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from openfl.pipelines import (
    EdenPipeline,
    KCPipeline,
    NoCompressionPipeline,
    SKCPipeline,
    STCPipeline,
)
from openfl.pipelines.pipeline import TransformationPipeline
from openfl.protocols import utils
from openfl.utilities import TensorKey
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

from fedkd_fast.integrations.openfl import FramePipeline

SIDE, STEPS, REPEATS = 512, 100, 3
KEY = TensorKey("layer.weight", "collaborator", 0, False, ("trained", "delta"))


def trained_difference() -> np.ndarray[Any, Any]:
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, SIDE), nn.ReLU(), nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, 10)
    )
    before = model[2].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(pixels), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
    return (model[2].weight.detach() - before).numpy()


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    noise = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    return {"trained difference": trained_difference(), "noise": 1e-3 * noise}


def measured(pipeline: TransformationPipeline, value: np.ndarray[Any, Any]) -> dict[str, float]:
    """Check what comes back, then time it; the best of some runs."""
    seconds: dict[str, list[float]] = {"encode_s": [], "decode_s": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        data, metadata = pipeline.forward(value)
        seconds["encode_s"].append(time.perf_counter() - start)
        message = utils.construct_named_tensor(KEY, data, metadata, lossless=False)
        start = time.perf_counter()
        found = pipeline.backward(data, list(metadata))
        seconds["decode_s"].append(time.perf_counter() - start)
        assert found.shape == value.shape
    error = float(np.linalg.norm(found - value) / np.linalg.norm(value))
    best = {name: min(times) for name, times in seconds.items()}
    return {"bytes": len(message.SerializeToString()), "error": error, **best}


def rows(value: np.ndarray[Any, Any]) -> Iterator[dict[str, Any]]:
    theirs = {
        "NoCompression": NoCompressionPipeline(),
        "Eden, 8 bits": EdenPipeline(n_bits=8),
        "Eden, 4 bits": EdenPipeline(n_bits=4),
        "Eden, 2 bits": EdenPipeline(n_bits=2),
        "KC": KCPipeline(),
        "SKC": SKCPipeline(),
        "STC": STCPipeline(),
    }
    for energy in (0.95, 0.99):
        yield {"pipeline": f"frames, T = {energy}", **measured(FramePipeline(energy), value)}
    for name, pipeline in theirs.items():
        one = measured(pipeline, value)
        row = {"pipeline": name, **one}
        if 0 < one["error"] < 1:
            ours = measured(FramePipeline(1 - one["error"] ** 2), value)
            row |= {f"ours_{key}": figure for key, figure in ours.items()}
        yield row


def shown(name: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=name)
    for column in ("pipeline", "bytes", "error", "encode ms", "decode ms", "ours at that error"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    for row in found:
        table.add_row(
            row["pipeline"],
            f"{row['bytes']:,}",
            f"{row['error']:.4f}",
            f"{1e3 * row['encode_s']:.0f}",
            f"{1e3 * row['decode_s']:.0f}",
            f"{row['ours_bytes']:,}" if "ours_bytes" in row else "–",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: list(rows(value)) for name, value in tensors().items()}
    for name, found in results.items():
        Console(width=110).print(shown(name, found))
    about = provenance.facts(1) | {"openfl": version("openfl"), "numpy": np.__version__}
    content = {"about": about, "side": SIDE, "repeats": REPEATS, "tensors": results}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
