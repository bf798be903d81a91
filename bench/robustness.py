"""What a run is worth when clients fail or attack: digits, by seed, against runs without faults.

    python bench/robustness.py --out bench/results/robustness.json

20 clients in every run. ``clean``: no faults, five seeds, whose spread is the measure. ``faults``:
30 % of the replies fail, are late, doubled, corrupt or not finite. ``attack``: 10 % of the clients
send -10 times their update, under the plain mean and each robust one; refusals by norm are off, so
that the rules stand alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import facts

from fedkd_fast.trainer import train

CLIENTS, ROUNDS, SEEDS = 20, 20, (0, 1, 2, 3, 4)
RULES = ("clip", "median", "trimmed:0.2", "krum:2")


def one(name: str, seed: int, **fields: Any) -> dict[str, Any]:
    """Train, and return scores and what the journal counts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        run = train(
            "digits",
            clients=CLIENTS,
            rounds=ROUNDS,
            seed=seed,
            eval_every=ROUNDS,
            feedback="both",
            threads=1,
            out=folder,
            **fields,
        )
        lines = [json.loads(line) for line in (folder / "journal.jsonl").open(encoding="utf-8")]
    reasons = Counter(
        line.get("reason") if line["event"] == "refused" else line["event"]
        for line in lines
        if line["event"] in ("refused", "failed", "retry", "left-out", "quorum")
    )
    unnamed = [line for line in lines if line["event"] == "refused" and "client" not in line]
    row = {
        "name": name,
        "seed": seed,
        "score_mentor": run.summary["score_mentor"],
        "score_mentee": run.summary["score_mentee"],
        "events": dict(reasons),
        "accepted": sum(line["accepted"] for line in lines if line["event"] == "round"),
        "asked": sum(line["asked"] for line in lines if line["event"] == "round"),
        "unnamed": len(unnamed),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Run all, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [one("clean", seed) for seed in SEEDS]
    rows += [one("faults", seed, faults=0.3) for seed in SEEDS[:2]]
    attack = {"attackers": 0.1, "attack_factor": -10.0, "norm_limit": None}
    rows.append(one("attack, mean", 0, **attack))
    rows += [one(f"attack, {rule}", 0, aggregation=rule, **attack) for rule in RULES]

    def of(name: str) -> list[float]:
        return [row["score_mentee"] for row in rows if row["name"] == name]

    clean = of("clean")
    summary = {
        "clean": [min(clean), max(clean)],
        "faults_mean": statistics.fmean(of("faults")),
        "faults_within": sum(min(clean) <= value <= max(clean) for value in of("faults")),
        "attack_points": {
            rule: 100 * (of(f"attack, {rule}")[0] - clean[0]) for rule in ("mean", *RULES)
        },
    }
    print(json.dumps(summary))
    if args.out is not None:
        command = "python bench/robustness.py --out FILE"
        result = {"command": command, "facts": facts(threads=1), "summary": summary, "rows": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
