"""NVFLARE's own quantisers against the filters of `fedkd_fast.integrations.nvflare`, on CPU.

    .venv-nvflare/bin/python bench/nvflare_quantizer.py --out bench/results/nvflare_quantizer.json

A network on handwritten digits is trained in rounds; each round's update travels as a client's
WEIGHT_DIFF. Bytes are those of the serialised message, seconds those of both filters together, of
the process's own CPU time with one thread, since others may use the machine. The error is of the
sum of all rounds, ``|Σ sent − Σ restored| / |Σ sent|``, which counts for a server that adds up.

`ModelQuantizer` cannot be imported without bitsandbytes. Its float16 and adaquant need nothing of
it, so they run here behind an empty module of that name; the others call ``.cuda()``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nvflare import __version__
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.fuel.utils import fobs
from provenance import facts
from sklearn.datasets import load_digits
from torch import nn

from fedkd_fast.integrations.nvflare import (
    CompressBroadcast,
    CompressReply,
    RestoreBroadcast,
    RestoreReply,
)

WIDTHS = {"1M": 960, "20M": 4416}
ROUNDS, STEPS, BATCH, LR = 3, 12, 32, 1e-3
BUILT_IN = ("float16", "adaquant", "blockwise8", "float4", "normfloat4")
OURS: dict[str, dict[str, Any]] = {
    "fedkd_fast, energy 0.8": {"energy": 0.8},
    "fedkd_fast, energy 0.95": {"energy": 0.95, "feedback": False},
    "fedkd_fast, energy 0.9999": {"energy": 0.9999, "feedback": False},
    "fedkd_fast, dense, energy 0.8": {"energy": 0.8, "codec": "dense"},
    "fedkd_fast, dense, energy 0.95": {"energy": 0.95, "feedback": False, "codec": "dense"},
    "fedkd_fast, dense, energy 0.9999": {"energy": 0.9999, "feedback": False, "codec": "dense"},
}
Arrays = dict[str, Any]
Process = Callable[[Shareable], Shareable]


def rounds(width: int) -> tuple[Arrays, list[Arrays]]:
    """Train; return the first weights and what each round adds."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(one) for one in load_digits(return_X_y=True))
    images = images.float() / 16
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    states = [{name: value.numpy().copy() for name, value in model.state_dict().items()}]
    for _ in range(ROUNDS):
        for batch in torch.randperm(len(images)).split(BATCH)[:STEPS]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        states.append({name: value.numpy().copy() for name, value in model.state_dict().items()})
    updates = [
        {name: after[name] - before[name] for name in after} for before, after in pairwise(states)
    ]
    return states[0], updates


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let `ModelQuantizer` be imported where bitsandbytes is not installed."""
    functional = ModuleType("bitsandbytes.functional")
    verbs = ("quantize", "dequantize")
    calls = (f"{verb}_{kind}" for verb in verbs for kind in ("4bit", "blockwise"))
    for name in ("QuantState", *calls):
        setattr(functional, name, None)
    sys.modules["bitsandbytes"] = ModuleType("bitsandbytes")
    sys.modules["bitsandbytes.functional"] = functional
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"], sys.modules["bitsandbytes.functional"]


def built_in(kind: str) -> tuple[Process, Process]:
    with without_bitsandbytes():
        from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
        from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
    shrink, restore = ModelQuantizer(kind), ModelDequantizer()
    context = FLContext()
    return lambda one: shrink.process(one, context), lambda one: restore.process(one, context)


def ours(options: dict[str, Any], start: Arrays) -> tuple[Process, Process]:
    """Return the filters of replies, of ends that hold the first weights."""
    ends = {}
    broadcast, reply = CompressBroadcast(feedback=False), CompressReply(**options)
    for name, one in (("server", broadcast), ("site-1", reply)):
        ends[name] = FLContextManager(None, name, "job").new_context()
        one.handle_event(EventType.START_RUN, ends[name])
    task = broadcast.process(DXO(DataKind.WEIGHTS, start).to_shareable(), ends["server"])
    RestoreBroadcast().process(task, ends["site-1"])
    restore = RestoreReply("fail")
    return (
        lambda one: reply.process(one, ends["site-1"]),
        lambda one: restore.process(one, ends["server"]),
    )


def measured(shrink: Process, restore: Process, updates: list[Arrays]) -> dict[str, Any]:
    sizes, seconds, restored = [], [], []
    for update in updates:
        copied = {name: value.copy() for name, value in update.items()}
        task = DXO(DataKind.WEIGHT_DIFF, copied).to_shareable()
        started = time.process_time()
        task = shrink(task)
        between = time.process_time() - started
        sent = fobs.dumps(task["DXO"])
        task["DXO"] = fobs.loads(sent)
        started = time.process_time()
        restored.append(from_shareable(restore(task)).data)
        seconds.append(between + time.process_time() - started)
        sizes.append(len(sent))
    wanted, found = (
        np.concatenate([sum(np.float64(one[name]) for one in side).ravel() for name in updates[0]])
        for side in (updates, restored)
    )
    return {
        "bytes": round(statistics.mean(sizes)),
        "cpu_seconds": round(statistics.median(seconds), 4),
        "cpu_seconds_first": round(seconds[0], 4),
        "error_of_sum": float(f"{np.linalg.norm(wanted - found) / np.linalg.norm(wanted):.3g}"),
    }


def import_error() -> str | None:
    try:
        import nvflare.app_opt.pt.quantization.quantizer  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    numpy_decomposers.register()
    result: dict[str, Any] = {
        "facts": {**facts(1), "nvflare": __version__},
        "recipe": {"rounds": ROUNDS, "steps": STEPS, "batch": BATCH, "lr": LR, "widths": WIDTHS},
        "import_of_ModelQuantizer": import_error(),
        "sizes": {},
    }
    for size in arguments.sizes:
        start, updates = rounds(WIDTHS[size])
        rows = {"as it is": measured(lambda one: one, lambda one: one, updates)}
        for kind in BUILT_IN:
            try:
                rows[f"ModelQuantizer {kind}"] = measured(*built_in(kind), updates)
            except Exception as error:  # whatever it is, it is the result
                rows[f"ModelQuantizer {kind}"] = {"error": f"{type(error).__name__}: {error}"}
        for name, options in OURS.items():
            rows[name] = measured(*ours(options, start), updates)
        result["sizes"][size] = {
            "parameters": sum(value.size for value in start.values()),
            "rows": rows,
        }
        print(size, json.dumps(rows, indent=1), flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
