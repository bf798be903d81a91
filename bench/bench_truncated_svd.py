"""truncated_svd_list on the updates of whole models, against everything that does the same.

    python bench/bench_truncated_svd.py --out bench/results/truncated_svd.json

measures on one thread, and twice at two. Under pytest one matrix keeps the bench alive.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deltas
import pytest
import svd_end_to_end
import svd_memory
import torch
from provenance import facts
from pytest_benchmark.fixture import BenchmarkFixture
from svd_peers import METHODS, STARTS, Case, Method, ours
from svd_rounds import Rounds, judge
from svd_tables import show

from fedkd_fast._files import read_json_object

ENERGIES = [0.90, 0.95, 0.98]
QUICK_MATRICES = 3
GEMM_SIDE = 1536
TOUCHED_ROWS = 539  # by a batch of 32 texts of up to 64 tokens
NOISE = 0.5  # of a row's norm: makes rows that repeat others
SLOW_ROUNDS = 3  # at most: of whole compressors, and of processes that tell their memory
SMOKE = ("ours, warm", "ours, cold", "torch.linalg.svd", "Gram + eigh")
NOTES = [
    "over_ours, over_floor: median over rounds of the ratio of sums over the model; ms: the sum of "
    "each matrix's best round; both over the matrices that a method did not fail on",
    "bert: the 18 matrices of 3 layers; a model of 12 such layers has the same ratios",
    "torch.linalg.svd and numpy.linalg.svd compute everything: one call a round for all energies, "
    "their cut by energy not counted",
    "told the rank: the peer gets the true rank, which no caller knows",
    "PowerSGD's step makes no SVD and promises no energy",
]

Record = dict[str, Any]


@pytest.mark.parametrize("name", SMOKE)
def test_truncated_svd(benchmark: BenchmarkFixture, name: str) -> None:
    record = read_json_object(deltas.SPECTRA)["minilm"][0]
    case = Case.of(deltas.build(record), [deltas.ENERGY])
    call = METHODS[name].call
    benchmark.group = f"truncated_svd {tuple(case.matrix.shape)}"
    assert not judge(case, deltas.ENERGY, call(case, deltas.ENERGY)).missed
    benchmark.extra_info.update(rank=case.optimum[deltas.ENERGY])
    benchmark(call, case, deltas.ENERGY)


# ---- parts ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold every BLAS in the process to one thread, numpy's and scipy's own ones too."""
    torch.set_num_threads(1)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1):
        yield


def last_round(pairs: list[deltas.Pair]) -> list[deltas.Pair]:
    """Keep one pair a matrix: a whole model's update."""
    numbers = [int(re.split(r"round ", pair.name)[1]) for pair in pairs]
    return [pair for pair, number in zip(pairs, numbers, strict=True) if number == max(numbers)]


def measure(
    source: str,
    cases: list[Case],
    energies: list[float],
    methods: dict[str, Method],
    rounds: int,
) -> Record:
    table = Rounds(cases, energies, methods)
    table.check()
    table.run(rounds)
    return {
        "source": source,
        "matrices": [f"{case.name} {list(case.matrix.shape)}" for case in cases],
        "energies": {str(energy): table.summary(energy) for energy in energies},
        "errors": table.errors,
    }


def two_threads(cases: list[Case], energies: list[float], rounds: int) -> list[Record]:
    """Compare what a second thread brings the op with what it brings torch's own product."""
    side = torch.randn(GEMM_SIDE, GEMM_SIDE)

    def wall(threads: int, energy: float, start: str | None) -> float:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        if start is None:
            side @ side
        else:
            ours(cases, energy, start)
        return time.perf_counter() - began

    records = []
    for energy in energies:
        gains: dict[str | None, list[float]] = {start: [] for start in (*STARTS, None)}
        for _ in range(rounds + 1):
            for start, found in gains.items():
                found.append(wall(1, energy, start) / wall(2, energy, start))
        # The first round wakes the threads.
        medians = {start: statistics.median(found[1:]) for start, found in gains.items()}
        for start in STARTS:
            records.append(
                {
                    "energy": energy,
                    "start": start,
                    "gain": round(medians[start], 2),
                    "gemm_gain": round(medians[None], 2),
                    "share_of_ideal": round(medians[start] / 2, 2),
                    "gemm_share_of_ideal": round(medians[None] / 2, 2),
                }
            )
    torch.set_num_threads(1)
    return records


def sparse_pairs() -> list[deltas.Pair]:
    """Return the word embeddings' gradient as it is, and one of `TOUCHED_ROWS` rows."""
    found = deltas.load_rows()
    noise = torch.Generator().manual_seed(0)
    count, width = found.rows.shape
    pairs = []
    for wanted in sorted({count, TOUCHED_ROWS}):
        rows = found.rows[torch.arange(wanted) % count].clone()
        norms = rows[count:].norm(dim=1, keepdim=True) / width**0.5
        rows[count:] += NOISE * norms * torch.randn(rows[count:].shape, generator=noise)
        ids = (
            found.ids if wanted == count else torch.randperm(found.height, generator=noise)[:wanted]
        )
        dense = torch.zeros(found.height, width).index_copy(0, ids, rows)
        made = "" if wanted <= count else f", {wanted - count} of them others' with noise"
        # Nothing precedes a first gradient: the op starts cold.
        pairs.append(deltas.Pair(f"{wanted} rows{made}, round 0", dense, dense, found.source))
    return pairs


def row_sparse(energies: list[float], rounds: int) -> list[Record]:
    methods = {name: METHODS[name] for name in ("ours, cold", "torch.linalg.svd")}
    return [
        measure(pair.source, [Case.of(pair, energies)], energies, methods, rounds)
        for pair in sparse_pairs()
    ]


def memory(cases: list[Case], energies: list[float], runs: int) -> list[Record]:
    largest = max(cases, key=lambda case: case.matrix.numel())
    return [
        svd_memory.measure(largest.matrix, largest.subspace(start, energy), energy, runs)
        for energy in energies
        for start in ("cold", "warm")
    ]


# ---- command line --------------------------------------------------------------------------------


def whole_model(model: str, methods: dict[str, Method], arguments: argparse.Namespace) -> Record:
    pairs, energies, rounds = last_round(deltas.load(model)), arguments.energies, arguments.rounds
    if arguments.quick:
        pairs = sorted(pairs, key=lambda pair: pair.current.numel())[:QUICK_MATRICES]
    with one_thread():
        cases = [Case.of(pair, energies) for pair in pairs]
        record = measure(pairs[0].source, cases, energies, methods, rounds)
        few = min(rounds, SLOW_ROUNDS)
        record["memory"] = memory(cases, energies, few)
        record["compressor"] = svd_end_to_end.measure(pairs, energies, few)
    return record | {"two_threads": two_threads(cases, energies, rounds)}


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["bert", "minilm"], choices=deltas.MODELS)
    parser.add_argument("--energies", nargs="+", type=float, default=ENERGIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="one round of a few matrices: does it run?"
    )
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.rounds = 1
    methods = {name: method for name, method in METHODS.items() if not method.missing()}
    result: Record = {
        "command": f"python bench/bench_truncated_svd.py {shlex.join(given)}",
        "provenance": facts(1),
        "notes": NOTES,
        "not_installed": {
            name: method.missing() for name, method in METHODS.items() if method.missing()
        },
        "fewer_rounds": {
            name: method.most_rounds for name, method in methods.items() if method.most_rounds
        },
        "models": {},
    }
    for model in arguments.models:
        print(f"measuring {model}", flush=True)
        result["models"][model] = whole_model(model, methods, arguments)
    with one_thread():
        result["row_sparse"] = row_sparse(arguments.energies, arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result) + "\n")
    show(result)


if __name__ == "__main__":
    main()
