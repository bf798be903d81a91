"""The server: a Flower app as in its quickstart, and one more line."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkd_fast.integrations.flower import CompressedStrategyMixin, Compression
from quickstart.task import accuracy, make_data, make_model


class SmallFedAvg(CompressedStrategyMixin, FedAvg):
    """The line that makes broadcasts small; with this, all else is as it was."""


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; print accuracy and bytes."""
    config = context.run_config
    net = make_model(config)
    _, (x, y) = make_data(config)
    times = [time.perf_counter()]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        times.append(time.perf_counter())
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(net, x, y)})

    kind = str(config["compress"])
    options = {"fraction_evaluate": 0.0}
    if kind == "none":
        strategy = FedAvg(**options)
    elif kind == "energy":
        down = Compression(energy=0.95, feedback=False)
        strategy = SmallFedAvg(**options, compression=down)
    else:
        # Both ends can make the first model from the seed, so it need not travel.
        down = Compression(codec="dense" if kind == "dense" else "wf1")
        strategy = SmallFedAvg(**options, compression=down, shared_start=True)
    torch.manual_seed(int(config["seed"]))
    result = strategy.start(
        grid,
        ArrayRecord(net.state_dict()),
        num_rounds=int(config["rounds"]),
        evaluate_fn=evaluate,
    )
    scores = [float(one["accuracy"]) for one in result.evaluate_metrics_serverapp.values()]
    rows = [vars(row) for row in getattr(strategy, "traffic", [])]
    rounds = [b - a for a, b in itertools.pairwise(times[1:])]
    found = {"accuracy": scores, "seconds": rounds, "traffic": rows, "config": dict(config)}
    found["model_bytes"] = sum(value.nbytes for value in net.state_dict().values())
    print(f"accuracy {scores[-1]:.4f}, {sum(rounds) / len(rounds):.2f} s a round")
    if rows:
        up, down = (sum(row[name] for row in rows) for name in ("up", "down"))
        dense_up, dense_down = (sum(row[n] for row in rows) for n in ("dense_up", "dense_down"))
        print(f"up {up:,} bytes, {dense_up / up:.1f} times fewer than plain arrays")
        print(f"down {down:,} bytes, {dense_down / down:.1f} times fewer")
    if config["out"]:
        Path(str(config["out"])).write_text(json.dumps(found))
