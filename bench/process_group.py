"""What compressed means and the DDP hook cost and lose, on two gloo ranks of one machine.

python bench/process_group.py --seeds 0 1 2 --out bench/results/process_group.json

A multilayer perceptron (64-512-512-10) on scikit-learn's digits, half of the training images on
each rank. Outer steps: each rank trains 20 steps by itself, then all average, 15 times. DDP: 300
steps, gradients averaged at each. Every row is the same training but for what is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import provenance
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fedkd_fast import Compressor
from fedkd_fast.integrations.ddp import LowRankState, ddp_hook
from fedkd_fast.integrations.outer_step import OuterStep

RANKS, OUTER_STEPS, LOCAL_STEPS, DDP_STEPS, BATCH = 2, 15, 20, 300, 32
TEST_IMAGES = 359
OUTER: dict[str, dict[str, Any]] = {
    "raw": {"codec": "raw"},
    "T = 0.95, feedback": {"energy": 0.95, "feedback": True},
    "T = 0.5, feedback": {"energy": 0.5, "feedback": True},
    "T = 0.95": {"energy": 0.95},
}
DDP = {"plain": None, "fp16_compress_hook": "fp16", "ddp_hook, rank 4": 4, "ddp_hook, rank 1": 1}


class Data:
    """This rank's training images, and the test images of all."""

    def __init__(self, rank: int, seed: int) -> None:
        digits = load_digits()
        pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        own = order[TEST_IMAGES:][rank::RANKS]
        self.pixels, self.labels = pixels[own], labels[own]
        self.test = pixels[order[:TEST_IMAGES]], labels[order[:TEST_IMAGES]]
        self._generator = torch.Generator().manual_seed(1000 * seed + rank)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the next batch."""
        chosen = torch.randint(len(self.pixels), (BATCH,), generator=self._generator)
        return nn.functional.cross_entropy(model(self.pixels[chosen]), self.labels[chosen])

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that are classified right."""
        return float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())


def a_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    wide = nn.Linear(512, 512)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), wide, nn.ReLU(), nn.Linear(512, 10))


def outer_steps(rank: int, seed: int, options: dict[str, Any]) -> dict[str, float]:
    data, model = Data(rank, seed), a_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = OuterStep(model, compressor=Compressor(**options))
    sent, seconds = 0, 0.0
    for _ in range(OUTER_STEPS):
        for _ in range(LOCAL_STEPS):
            optimizer.zero_grad()
            data.loss(model).backward()
            optimizer.step()
        dist.barrier()
        start = time.perf_counter()
        sent += outer.step().sent_bytes
        seconds += time.perf_counter() - start
    return {
        "accuracy": data.accuracy(model),
        "bytes": sent / OUTER_STEPS,
        "exchange_s": seconds / OUTER_STEPS,
    }


def ddp_steps(rank: int, seed: int, hook: str | int | None) -> dict[str, float]:
    data, model = Data(rank, seed), DistributedDataParallel(a_model(seed), bucket_cap_mb=0.5)
    state = LowRankState(model, rank=hook if isinstance(hook, int) else 1)
    if hook == "fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    elif hook is not None:
        model.register_comm_hook(state, ddp_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start = time.perf_counter()
    for _ in range(DDP_STEPS):
        optimizer.zero_grad()
        data.loss(model).backward()
        optimizer.step()
    elements = sum(one.numel() for one in model.parameters())
    dense = elements * (2 if hook == "fp16" else 4)
    return {
        "accuracy": data.accuracy(model),
        "bytes": state.sent_bytes / DDP_STEPS if isinstance(hook, int) else dense,
        "step_s": (time.perf_counter() - start) / DDP_STEPS,
    }


def work(rank: int, folder: str, seeds: list[int]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    results: dict[str, dict[str, list[dict[str, float]]]] = {"outer step": {}, "ddp": {}}
    for seed in seeds:
        for name, options in OUTER.items():
            row = results["outer step"].setdefault(name, [])
            row.append(outer_steps(rank, seed, options))
        for name, hook in DDP.items():
            results["ddp"].setdefault(name, []).append(ddp_steps(rank, seed, hook))
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def shown(name: str, found: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=name)
    for column in (name, "accuracy", "bytes", "smaller", "ms"):
        table.add_column(column, justify="left" if column == name else "right")
    first = _mean(next(iter(found.values())), "bytes")
    for row, runs in found.items():
        size, (accuracy, spread) = _mean(runs, "bytes"), _with_spread(runs)
        seconds = _mean(runs, "step_s" if "step_s" in runs[0] else "exchange_s")
        table.add_row(
            row,
            f"{accuracy:.1%} ± {spread:.1%}",
            f"{size:,.0f}",
            f"{first / size:.1f}×",
            f"{1e3 * seconds:.1f}",
        )
    return table


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def _with_spread(runs: list[dict[str, float]]) -> tuple[float, float]:
    found = [run["accuracy"] for run in runs]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, arguments.seeds), nprocs=RANKS)
        results = json.loads(Path(folder, "results.json").read_text())
    for name, found in results.items():
        Console(width=110).print(shown(name, found))
    content = {"about": provenance.facts(1), "seeds": arguments.seeds, "results": results}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
