"""Logistic regression on the shards that the digits clients get: the floor for `local`.

python bench/logistic_regression.py --seeds 0 1 2 --out bench/results/digits_logistic.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedkd_fast._seeds import derived_seed
from fedkd_fast.tasks.digits import DigitsTask
from fedkd_fast.trainer import _SHARDS

CLIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    task = DigitsTask()
    pixels, labels = task._images.flatten(1).numpy(), task._labels.numpy()
    scores: dict[str, list[float]] = {"pixels": [], "standardised pixels": []}
    for seed in arguments.seeds:
        shards = task.shards(CLIENTS, derived_seed(seed, _SHARDS))
        for name, model in (
            ("pixels", LogisticRegression(max_iter=5000)),
            (
                "standardised pixels",
                make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
            ),
        ):
            found = [
                float(model.fit(pixels[s], labels[s]).score(pixels[task._test], labels[task._test]))
                for s in shards
            ]
            scores[name].append(statistics.fmean(found))
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python bench/logistic_regression.py --seeds {seeds} --out {arguments.out}"
    result = {"command": command, "accuracy": scores}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print({name: round(statistics.fmean(values), 4) for name, values in scores.items()})


if __name__ == "__main__":
    main()
