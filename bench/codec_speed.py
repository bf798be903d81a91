"""What wf1 takes beside the factorisation: a BERT-size mentee encoded and decoded, by one thread.

    python bench/codec_speed.py --out bench/results/codec_speed.json

Four layers of width 768, 28 million parameters, real updates where `deltas.py` has trained them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltas import load
from provenance import facts
from torch import Tensor

from fedkd_fast import ops, wire
from fedkd_fast.codec import curves, message, wf1
from fedkd_fast.codec.decode import decode_entry
from fedkd_fast.wire import Entry, Mode

LAYERS = 4
ENERGIES = (0.90, 0.95, 0.98)


def mentee(cache: Path | None) -> tuple[dict[str, Tensor], str]:
    """Return the matrices of so many layers: one more than `bert` has comes from another round."""
    pairs = load("bert", cache)
    rounds = sorted({pair.name.rpartition(" ")[2] for pair in pairs}, reverse=True)
    last = {p.name: p.current for p in pairs if p.name.endswith(rounds[0])}
    other = {p.name: p.current for p in pairs if p.name.endswith(rounds[1]) and ".0." in p.name}
    found = {**last, **other}
    sizes = [value.numel() for value in found.values()]
    assert sum(sizes) == LAYERS * 12 * 768 * 768, sizes
    return found, pairs[0].source


def best(call: Callable[[], object], rounds: int) -> float:
    """Return the least CPU time in milliseconds: other tenants only ever add to it."""
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return round(1e3 * min(times), 1)


def measure(matrices: dict[str, Tensor], energy: float, rounds: int) -> dict[str, Any]:
    lost = 1.0 - energy
    factors = ops.truncated_svd_list(
        list(matrices.values()), energy=1.0 - lost * message.TAIL_SHARE
    )
    blanks = [Entry(name, "float32", tuple(m.shape), Mode.RAW) for name, m in matrices.items()]

    def items() -> list[wf1.Item]:
        return [
            wf1.Item(blank, matrix, vector=False, factors=found, backend=ops)
            for blank, matrix, found in zip(blanks, matrices.values(), factors, strict=True)
        ]

    def encode() -> bytes:
        found = wf1.encode(items(), [lost] * len(matrices), ops)
        return wire.encode([part.entry for part in found if part.entry is not None], codec="wf1")

    def control() -> None:
        for item in made:
            for curve in item.curves(0.5 * lost, 1.5 * lost):
                curves.at_error(curve, lost * item.total)

    def decode() -> list[Tensor]:
        return [decode_entry(entry, ops) for entry in wire.decode(frame).entries]

    frame = encode()
    made = items()
    entries = wire.decode(frame).entries
    assert len(entries) == len(matrices)
    for entry in entries:
        exact = matrices[entry.name].double()
        error = (decode_entry(entry, ops).double() - exact).square().sum() / exact.square().sum()
        assert 0.9 * lost <= float(error) <= lost, entry.name
    return {
        "energy": energy,
        "parameters": sum(matrix.numel() for matrix in matrices.values()),
        "frame_bytes": len(frame),
        "encode_ms": best(encode, rounds),
        "rate_control_ms": best(control, rounds),
        "decode_ms": best(
            lambda: [decode_entry(e, ops) for e in wire.decode(frame).entries], rounds
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="as in deltas.py")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    matrices, source = mentee(arguments.cache)
    records = [measure(matrices, energy, arguments.rounds) for energy in ENERGIES]
    for record in records:
        print(record)
    result = {
        "command": "python bench/codec_speed.py --out bench/results/codec_speed.json",
        "provenance": facts(1),
        "source": source,
        "records": records,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
