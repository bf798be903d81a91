"""Means of frames on one thread, against what one does without `aggregate`; peak memory.

    python bench/bench_aggregate.py [--out FILE.json]

(a) Ten clients of one matrix at a small rank: mean and broadcast, against adding up the decoded
matrices and factorising their mean with torch.linalg.svd, which sends nothing yet.
(b) A hundred clients of a two-layer MiniLM mentee: the mean, against its floor, which decodes every
frame to the parts that it has and adds each matrix with one GEMM.

Both take turns; times are the best of all rounds. Memory is asked of a new process that reads the
frames and calls `aggregate`: by how much that raises the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import facts
from svd_memory import fill_up_to_peak, give_back, peak_bytes
from torch import Tensor

from fedkd_fast import Compressor, aggregate, decompress, inspect, ops
from fedkd_fast.decompression import decode_frame_parts
from fedkd_fast.wire import DEFAULT_MAX_BYTES

ENERGY = 0.95
FEW_CLIENTS, RANK, SHAPE = 10, 8, (768, 3072)
CLIENTS, DISTINCT, LAYERS, WIDTH = 100, 5, 2, 384
# Of singular values, k^-decay: frames hold factors with a remainder, or factors alone.
DECAYS = (0.6, 1.0)
SECONDS = 20.0  # for each comparison


def few_frames() -> list[bytes]:
    """Updates of exactly RANK components."""
    generator = torch.Generator().manual_seed(0)
    frames = []
    for _ in range(FEW_CLIENTS):
        left, right = (torch.randn(RANK, side, generator=generator) for side in SHAPE)
        frames.append(Compressor(0.999).compress({"weight": left.T @ right}))
    return frames


def power_law(rows: int, cols: int, decay: float, generator: torch.Generator) -> Tensor:
    side = min(rows, cols)
    left, right = (
        torch.linalg.qr(torch.randn(length, side, generator=generator)).Q for length in (rows, cols)
    )
    matrix: Tensor = left * torch.arange(1, side + 1) ** -decay @ right.T
    return matrix


def mentee(decay: float, seed: int) -> dict[str, Tensor]:
    """An update of attention, both dense matrices and the biases of each layer."""
    generator = torch.Generator().manual_seed(seed)
    wide = 4 * WIDTH
    update = {}
    for layer in range(LAYERS):
        for name in ("query", "key", "value", "output"):
            update[f"{layer}.{name}.weight"] = power_law(WIDTH, WIDTH, decay, generator)
            update[f"{layer}.{name}.bias"] = torch.randn(WIDTH, generator=generator) * 0.01
        for name, rows, cols in (("up", wide, WIDTH), ("down", WIDTH, wide)):
            update[f"{layer}.{name}.weight"] = power_law(rows, cols, decay, generator)
            update[f"{layer}.{name}.bias"] = torch.randn(rows, generator=generator) * 0.01
    return update


def densify_and_factorise(frames: list[bytes]) -> Tensor:
    total = torch.zeros(SHAPE)
    for frame in frames:
        total += decompress(frame)["weight"]
    u, s, vh = torch.linalg.svd(total.div_(len(frames)), full_matrices=False)
    broadcast: Tensor = u * s @ vh
    return broadcast


def mean_and_broadcast(frames: list[bytes]) -> bytes:
    return aggregate(frames).recompress(Compressor(ENERGY))


def one_gemm_each(frames: Iterator[bytes]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for frame in frames:
        found, _ = decode_frame_parts(
            frame, None, schema_name="schema", max_bytes=DEFAULT_MAX_BYTES, module=ops
        )
        for entry, parts in found:
            if entry.name not in sums:
                sums[entry.name] = torch.zeros(entry.shape)
            if isinstance(parts, Tensor):
                sums[entry.name].add_(parts.reshape(entry.shape))
            else:
                sums[entry.name].addmm_(parts[0].T, parts[1])
    return {name: value.div_(CLIENTS) for name, value in sums.items()}


def repeated(frames: list[bytes]) -> Iterator[bytes]:
    return (frames[client % len(frames)] for client in range(CLIENTS))


def best_seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def child(folder: Path) -> int:
    """Call once so that libraries have what they keep, and tell what a second call takes."""
    torch.set_num_threads(1)
    frames = [path.read_bytes() for path in sorted(folder.iterdir())]
    aggregate(frames)
    give_back()
    taken = fill_up_to_peak()
    before = peak_bytes()
    mean = aggregate(repeated(frames))
    extra = peak_bytes() - before
    del taken, mean
    return extra


def peak_of(frames: list[bytes]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        for index, frame in enumerate(frames):
            (Path(scratch) / f"{index}.fkd").write_bytes(frame)
        command = [sys.executable, __file__, "--child", scratch]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def broadcast_case() -> dict[str, Any]:
    frames = few_frames()
    mean = aggregate(frames)
    exact = torch.stack([decompress(frame)["weight"].double() for frame in frames]).mean(0)
    sent = decompress(mean.recompress(Compressor(ENERGY)))["weight"].double()
    assert float((mean["weight"] - exact).norm() / exact.norm()) < 1e-5
    assert float((sent - exact).square().sum() / exact.square().sum()) < 1 - ENERGY + 1e-5
    best = best_seconds(
        {
            "ours": lambda: mean_and_broadcast(frames),
            "densify and torch.linalg.svd": lambda: densify_and_factorise(frames),
        }
    )
    times = best["densify and torch.linalg.svd"] / best["ours"]
    print(f"(a) {FEW_CLIENTS} clients, rank {RANK}, {SHAPE}: {times:.1f} times as fast")
    return {"clients": FEW_CLIENTS, "rank": RANK, "seconds": best, "times_as_fast": times}


def mean_case(decay: float) -> dict[str, Any]:
    updates = [mentee(decay, seed) for seed in range(DISTINCT)]
    frames = [Compressor(ENERGY).compress(update) for update in updates]
    mean = dict(aggregate(repeated(frames)))
    assert largest_difference(mean, one_gemm_each(repeated(frames))) < 1e-5
    best = best_seconds(
        {
            "ours": lambda: aggregate(repeated(frames)),
            "decode and one GEMM each": lambda: one_gemm_each(repeated(frames)),
        }
    )
    ratio = best["ours"] / best["decode and one GEMM each"]
    model = sum(value.numel() * value.element_size() for value in updates[0].values())
    extra = peak_of(frames)
    print(
        f"(b) {CLIENTS} clients of {model / 1e6:.1f} MB, frames of {len(frames[0]) / 1e6:.2f} MB:"
        f" {ratio:.2f} x decoding and one GEMM each, peak {extra / model:.2f} x the dense model"
    )
    return {
        "clients": CLIENTS,
        "decay": decay,
        "modes": sorted({entry.mode.name for entry in inspect(frames[0])}),
        "model_bytes": model,
        "frame_bytes": [len(frame) for frame in frames],
        "seconds": best,
        "ratio": ratio,
        "extra_bytes": extra,
        "extra_ratio": extra / model,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(child(arguments.child))
        return
    torch.set_num_threads(1)
    result = {
        "fedkd_fast": facts(1),
        "broadcast": broadcast_case(),
        "means": [mean_case(decay) for decay in DECAYS],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
