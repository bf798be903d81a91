"""Thousands of clients on one machine: memory, and the cost of a sampled client, by their number.

    python bench/scale.py --out bench/results/scale.json

Each number of clients is a process of its own: FedKD on digits, 20 clients sampled a round (all
where there are fewer), 32 drawn images a client, checkpoints off unless asked for. The cost of a
client-round is the median over rounds after the fifth, in seconds of its one processor, so that
what else the machine does is not in it; throughput is that of the clock. Memory is the peak of the
process; it and what is resident after a round grow from the sixth round to the last but one, whose
successor brings all clients up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import facts

SAMPLED, ROUNDS, IMAGES, WARM = 20, 50, 32, 5


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the most bytes of this process that were in memory at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(clients: int, rounds: int, memory_gb: float, out: str | None) -> dict[str, Any]:
    """Run in this process."""
    from fedkd_fast.records import RoundRecord
    from fedkd_fast.trainer import train

    marks: list[tuple[float, float, int, int]] = []

    def look(record: object) -> None:
        if isinstance(record, RoundRecord):
            marks.append((time.process_time(), time.perf_counter(), resident(), peak()))

    started = time.perf_counter()
    share = min(1.0, SAMPLED / clients)
    run = train(
        "digits",
        clients=clients,
        rounds=rounds,
        participation=share,
        samples_per_client=IMAGES,
        feedback="both",
        eval_every=rounds,
        memory_gb=memory_gb,
        scored_clients=SAMPLED,
        threads=1,
        out=out,
        progress=look,
    )

    def length(clock: int) -> float:
        """Return the median length of a round, the last one left out: it brings all up to date."""
        ends = [mark[clock] for mark in marks]
        pairs = zip(ends[WARM - 1 : -2], ends[WARM:-1], strict=True)
        return statistics.median(after - before for before, after in pairs)

    sampled = max(1, round(share * clients))
    return {
        "clients": clients,
        "sampled": sampled,
        "rounds": rounds,
        "memory_gb": memory_gb,
        "checkpoints": out is not None,
        "first_round_s": marks[0][1] - started,
        "client_round_cpu_s": length(0) / sampled,
        "client_rounds_per_s": sampled / length(1),
        "peak_bytes": peak(),
        "growth_bytes": marks[-2][2] - marks[WARM][2],
        "peak_growth_bytes": marks[-2][3] - marks[WARM][3],
        "score_mentee": run.summary["score_mentee"],
    }


def main() -> None:
    """Measure one number of clients after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory-gb", type=float, default=0.1)
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "run") if args.checkpoints else None
            print(json.dumps(one(args.one, args.rounds, args.memory_gb, out)))
        return
    rows = []
    for clients in args.clients:
        options = ["--one", str(clients), "--rounds", str(args.rounds)]
        options += ["--memory-gb", str(args.memory_gb)]
        options += ["--checkpoints"] if args.checkpoints else []
        found = subprocess.run(
            [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(found.stdout))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        command = "python bench/scale.py " + ("--checkpoints " if args.checkpoints else "")
        result = {"command": f"{command}--out FILE", "facts": facts(threads=1), "rows": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
