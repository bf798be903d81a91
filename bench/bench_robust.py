"""Robust and private means on one thread, as ratios of the plain mean's time in the same run.

    python bench/bench_robust.py [--clients 11] [--seconds 20] [--out FILE.json]

Decoded updates of a two-layer MiniLM mentee, as factors (singular values fall like 1/k) and mostly
dense (k^-0.6); decoding is not timed. `aggregate` stands for comparison: it decodes, too, and may
leave its mean in factors. All take turns; times are the best of all rounds. Every result is checked
before it is timed: no coordinate may lie outside of what clients sent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_aggregate import DECAYS, ENERGY, mentee
from provenance import facts
from torch import Tensor

from fedkd_fast import Compressor, aggregate, ops
from fedkd_fast.decompression import decode_frame_parts
from fedkd_fast.privacy import GaussianMean
from fedkd_fast.robust import robust_mean
from fedkd_fast.updates import Client, Update
from fedkd_fast.wire import DEFAULT_MAX_BYTES

RULES = ("mean", "clip", "median", "trimmed:0.2", "krum:2")


def decoded(frame: bytes) -> dict[str, Any]:
    found, _ = decode_frame_parts(
        frame, None, schema_name="schema", max_bytes=DEFAULT_MAX_BYTES, module=ops
    )
    return {entry.name: parts for entry, parts in found}


def best_seconds(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or float("inf") in best.values():
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def check(found: Mapping[str, Tensor], updates: Mapping[Client, Update], name: str) -> None:
    """Hold one matrix and one vector against the range of what clients sent."""
    for tensor in ("0.query.weight", "0.query.bias"):
        shape = found[tensor].shape
        sent = torch.stack(
            [
                (one if isinstance(one, Tensor) else one[0].T @ one[1]).reshape(shape).double()
                for one in (update[tensor] for update in updates.values())
            ]
        )
        slack = 1e-5 * float(sent.abs().max())
        inside = (found[tensor] >= sent.amin(0) - slack) & (found[tensor] <= sent.amax(0) + slack)
        assert bool(inside.all()), (name, tensor)


def case(decay: float, clients: int, seconds: float) -> dict[str, Any]:
    like = mentee(decay, 0)
    frames = [Compressor(ENERGY).compress(mentee(decay, seed)) for seed in range(clients)]
    updates: dict[Client, Update] = {one: decoded(frame) for one, frame in enumerate(frames)}
    private = GaussianMean(1.0, 1.0, sampling=1.0, clients=clients, delta=1e-5, seed=0)

    def by_rule(rule: str) -> Callable[[], object]:
        return lambda: robust_mean(updates, rule, like=like)

    calls: dict[str, Callable[[], object]] = {rule: by_rule(rule) for rule in RULES}
    calls["gaussian"] = lambda: private.mean(updates, like)
    calls["aggregate, decoding"] = lambda: aggregate(frames)
    for rule in RULES:
        check(robust_mean(updates, rule, like=like).values, updates, rule)
    best = best_seconds(calls, seconds)
    ratios = {name: value / best["mean"] for name, value in best.items()}
    factors = sum(isinstance(one, tuple) for one in updates[0].values())
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"k^-{decay}, {factors} of {len(like)} tensors as factors: x mean: {shown}")
    return {
        "decay": decay,
        "clients": clients,
        "factors": factors,
        "seconds": best,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case(decay, arguments.clients, arguments.seconds) for decay in DECAYS]
    if arguments.out:
        result = {"fedkd_fast": facts(1), "cases": cases}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
