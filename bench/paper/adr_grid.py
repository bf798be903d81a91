r"""The ADR grid: methods by seeds on one test set, with paired bootstrap intervals of differences.

    python bench/paper/adr_grid.py --data PSYTAR_FOLDER/by_review --mentor MINILM_FOLDER \
        --methods fedkd fedavg local central --seeds 0 1 2 --out bench/results/adr.json

Runs whose results are in the file already are not repeated, so that a grid can be made in parts. A
name may carry options: ``paper=fedkd,preset=paper`` is FedKD with that preset under another name.
What follows ``--`` goes to every run. Test data are scored once, when a run ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import commit, facts
from quality import run

from fedkd_fast.runs import load_run
from fedkd_fast.tasks import PredictingTask

RESAMPLES = 4000
INTERVAL = (2.5, 97.5)
ROLES = ("mentor", "mentee", "mean")


def named(text: str) -> tuple[str, str, list[str]]:
    """Split ``name=method,option=value`` into name, method and command-line options."""
    name, _, rest = text.partition("=")
    method, *pairs = rest.split(",") if rest else [name]
    options = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        options += [f"--{key.replace('_', '-')}", *([value] if value else [])]
    return name, method, options


def positive(folder: Path) -> tuple[list[np.ndarray[Any, Any]], list[list[np.ndarray[Any, Any]]]]:
    """Return truth, and the probability of the second class by role and client."""
    loaded = load_run(folder)
    task = loaded.task
    assert isinstance(task, PredictingTask)
    truth: np.ndarray[Any, Any] | None = None

    def probabilities(model: Any) -> np.ndarray[Any, Any]:
        nonlocal truth
        rows = list(task.predict(model, None))
        truth = np.array([row["truth"] == "1" for row in rows])
        return np.array(
            [row["probability"] if row["label"] == "1" else 1 - row["probability"] for row in rows]
        )

    mentors = [probabilities(model) for model in loaded.mentors]
    mentees = [probabilities(model) for model in loaded.mentees]
    means = [(one + mentees[0]) / 2 for one in mentors] if mentees and mentors else []
    assert truth is not None
    return [truth], [mentors, mentees, means]


def bits(values: np.ndarray[Any, Any]) -> str:
    return "".join("1" if value else "0" for value in values)


def unbits(text: str) -> np.ndarray[Any, Any]:
    return np.array([char == "1" for char in text])


def f1(truth: np.ndarray[Any, Any], guesses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return F1 of class 1 along the last axis."""
    hits = (truth & guesses).sum(-1)
    return 2 * hits / np.maximum(truth.sum(-1) + guesses.sum(-1), 1)


def measure(name: str, method: str, seed: int, options: list[str]) -> dict[str, Any]:
    """Train once, and keep the summary and what every model says of every test text."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        summary = run(method, seed, folder, options)
        dev = [
            {key: row[key] for key in ("round", "score_mentor", "score_mentee")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
            if (row := json.loads(line))["split"] == "dev" and row["client"] == 0
        ]
        (truth,), roles = positive(folder)
    predictions = {
        role: [bits(one >= 0.5) for one in found] for role, found in zip(ROLES, roles, strict=True)
    }
    return {
        "name": name,
        "seed": seed,
        "summary": summary,
        "dev": dev,
        "truth": bits(truth),
        "predictions": predictions,
    }


def table(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and spreads over seeds by name."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record["summary"] for record in records if record["name"] == name]
        row: dict[str, Any] = {"seeds": len(own)}
        for key in (*(f"score_{role}" for role in ROLES), "bytes_up", "bytes_down", "saving"):
            values = [one[key] for one in own if one.get(key) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                row[key] = {"mean": statistics.fmean(values), "std": spread}
        found[name] = row
    return found


def differences(records: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """Return what each model of one name gains over those of all others, by paired bootstrap.

    Test texts are drawn with replacement, the same for both sides; F1 is the mean over seeds and
    clients of each draw, over the seeds that both have.
    """
    truth = unbits(records[0]["truth"])
    generator = np.random.default_rng(0)
    draws = generator.integers(len(truth), size=(RESAMPLES, len(truth)))

    def scores(name: str, role: str, seeds: set[int]) -> np.ndarray[Any, Any] | None:
        models = [
            unbits(one)
            for record in records
            if record["name"] == name and record["seed"] in seeds
            for one in record["predictions"][role]
        ]
        if not models:
            return None
        whole = [np.append(f1(truth[draws], one[draws]), f1(truth, one)) for one in models]
        return np.mean(whole, axis=0)

    def seeds_of(name: str) -> set[int]:
        return {record["seed"] for record in records if record["name"] == name}

    found = []
    for name in dict.fromkeys(record["name"] for record in records):
        # The seed also deals the data: only equal seeds compare.
        seeds = seeds_of(against) & seeds_of(name)
        for role, other_role in itertools.product(ROLES, ROLES):
            mine, other = scores(against, role, seeds), scores(name, other_role, seeds)
            if mine is None or other is None or name == against:
                continue
            gain = mine - other
            low, high = np.percentile(gain[:-1], INTERVAL)
            found.append(
                {
                    "model": f"{against}, {role}",
                    "over": f"{name}, {other_role}",
                    "seeds": sorted(seeds),
                    "gain": float(gain[-1]),
                    "interval": [float(low), float(high)],
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--mentor", required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="passed to every run, after --")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"runs": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    records: list[dict[str, Any]] = result["runs"]
    for seed in arguments.seeds:
        for text in arguments.methods:
            name, method, options = named(text)
            wanted = [*options, *arguments.options]
            known = [one for one in records if (one["name"], one["seed"]) == (name, seed)]
            if known:
                if known[0]["options"] != wanted:
                    raise ValueError(f"{name}, seed {seed} is there with {known[0]['options']}")
                continue
            source = ["--task", "adr", "--data", arguments.data, "--mentor", arguments.mentor]
            record = measure(name, method, seed, [*source, *options, *arguments.options])
            record["options"], record["commit"] = wanted, commit()
            records.append(record)
            result = {
                "command": "python bench/paper/adr_grid.py --methods "
                + " ".join(sorted({one["name"] for one in records})),
                "facts": facts(0),
                "methods": table(records),
                "differences": differences(records, records[0]["name"]),
                "runs": records,
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            print(name, seed, {k: record["summary"][f"score_{k}"] for k in ROLES}, flush=True)


if __name__ == "__main__":
    main()
