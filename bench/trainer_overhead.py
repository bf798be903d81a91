"""What the trainer adds to the steps themselves: a run against a plain loop of the same steps.

    python bench/trainer_overhead.py --data PSYTAR_FOLDER/by_review --mentor MINILM_FOLDER \
        --out bench/results/trainer_overhead.json

Interleaved rounds, medians. The run is one client, one round, without evaluation; its time is that
of training, and of the codec apart. The plain loop makes the same batches, models and losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from provenance import facts

from fedkd_fast.assembly import make_clients, make_server
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.losses import MutualDistillationLoss
from fedkd_fast.methods import get_method
from fedkd_fast.tasks import build_task
from fedkd_fast.trainer import configure


def plain_solo(models: list[Any], config: TrainConfig, batches: list[Any]) -> None:
    model = models[0].train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr_mentor, fused=True)
    for batch in batches:
        loss = F.cross_entropy(model(**batch.inputs).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_mutual(models: list[Any], config: TrainConfig, batches: list[Any]) -> None:
    mentor, mentee = (model.train() for model in models)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
        for model, lr in ((mentor, config.lr_mentor), (mentee, config.lr_mentee))
    ]
    loss = MutualDistillationLoss(config.distillation_config())
    for batch in batches:
        outputs = mentor(**batch.inputs), mentee(**batch.inputs)
        total = loss(*outputs, batch.labels, batch.inputs["attention_mask"]).total
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()


def timed(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--mentor", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    for name, plain in (("fedavg", plain_solo), ("fedkd", plain_mutual)):
        fields = {
            "data": arguments.data,
            "mentor": arguments.mentor,
            "local_steps": arguments.steps,
            "clients": 1,
            "mentee_adapter": None,
        }
        config = configure("adr", name, fields)
        task, method = build_task("adr", task_options(config)), get_method(name)
        rows: dict[str, list[float]] = {"plain": [], "trainer": [], "codec": []}
        for _ in range(arguments.rounds):
            client = make_clients(config, task, method)[0]
            server = make_server(config, client, method)
            assert server is not None
            # The very batches of this client, which a twin of it makes.
            steps = list(make_clients(config, task, method)[0]._batches())
            models = [task.build_mentor(), task.build_mentee()]
            rows["plain"].append(timed(plain, models, config, steps))
            rows["trainer"].append(timed(client.train, 1))
            started = time.perf_counter()
            client.apply(server.step([client.upload(0.95)], 0.95))
            rows["codec"].append(time.perf_counter() - started)
        median = {key: statistics.median(values) for key, values in rows.items()}
        found[name] = {
            "seconds": median,
            "overhead": median["trainer"] / median["plain"] - 1.0,
            "codec_share": median["codec"] / median["trainer"],
            "all": rows,
        }
        print(name, found[name]["overhead"], found[name]["codec_share"])
    result = {"facts": facts(arguments.threads), "steps": arguments.steps, "methods": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
