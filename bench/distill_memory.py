"""How much memory a loss and its backward take beside the logits: asked of a new process each.

    python bench/distill_memory.py --out bench/results/distill_memory.json

Of `distill_loss`, of the same in place, and of the loss written in torch. Bytes by which the peak
of the process rose in its second call; in units of one model's logits, two of which are the
gradients that have to be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import Losses, eager_losses
from provenance import facts
from shapes import DISTILL
from svd_memory import fill_up_to_peak, give_back, peak_bytes
from torch import Tensor

from fedkd_fast import ops
from fedkd_fast.distillation import DistillationConfig

RUNS = 3


def ours(config: DistillationConfig, in_place: bool) -> Losses:
    return lambda *logits: ops.distill_loss(*logits, config=config, in_place=in_place).total


def compiled(mentor: Tensor, mentee: Tensor, labels: Tensor) -> Tensor:
    return COMPILED(mentor, mentee, labels)


COMPILED: Callable[..., Tensor] = torch.compile(eager_losses, dynamic=False)
BATCH = DistillationConfig(denominator="batch")
LOSSES: dict[str, Losses] = {
    "ours": ours(DistillationConfig.paper(), False),
    "ours, D over the batch": ours(BATCH, False),
    "ours in place": ours(DistillationConfig.paper(), True),
    "ours in place, D over the batch": ours(BATCH, True),
    "eager": eager_losses,
    "compile": compiled,
}


def child(impl: str, rows: int, classes: int) -> int:
    """Call twice, and tell by how much the second call raised the peak."""
    torch.set_num_threads(1)
    labels = torch.arange(rows) % classes
    extra = 0
    for _ in range(2):
        logits = [torch.randn(rows, classes).requires_grad_() for _ in range(2)]
        give_back()
        taken = fill_up_to_peak()
        before = peak_bytes()
        gradients = torch.autograd.grad(LOSSES[impl](*logits, labels), logits)
        extra = peak_bytes() - before
        del taken, gradients
    return extra


def measure(impl: str, rows: int, classes: int) -> dict[str, Any]:
    """Ask several processes; the worst of them."""
    command = [sys.executable, __file__, "--child", impl, str(rows), str(classes)]
    told = [
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(RUNS)
    ]
    logits_bytes = 4 * rows * classes
    return {
        "impl": impl,
        "shape": [rows, classes],
        "dtype": "float32",
        "extra_bytes": max(told),
        "logits_bytes": logits_bytes,
        "ratio": round(max(told) / logits_bytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        impl, rows, classes = arguments.child
        print(child(impl, int(rows), int(classes)))
        return
    found = []
    # Below that, pages and pools are all that one sees.
    for rows, classes in (shape for shape in DISTILL if shape[0] * shape[1] > 10**5):
        for impl in LOSSES:
            found.append(measure(impl, rows, classes))
            print(f"{rows}x{classes} {impl}: {found[-1]['ratio']} x the logits of a model")
    if arguments.out:
        result = {"fedkd_fast": facts(threads=1), "runs": RUNS, "cases": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
