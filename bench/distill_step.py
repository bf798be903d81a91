"""What the loss is of a whole training step of FedKD, and what the step gains from ours.

    python bench/distill_step.py --out bench/results/distill_step.json

A MiniLM mentor (6 layers of 384) and its first two layers as mentee, random weights, which cost
what trained ones do; batch 16 of 48 tokens, the paper's whole loss, AdamW for all but the
embeddings. As classifiers of two classes, and as masked language models (30,522 classes) with a
label on every token or on 15 % of them; there, the eager loss takes the labelled rows out first.
Peers: the same step with the loss written in torch, eager and compiled. Rounds are interleaved;
medians. `loss` is loss and backward alone, on outputs that have no graph. Also: what attention maps
cost, eager attention that returns them against sdpa, which cannot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peers import eager_losses
from provenance import facts
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from fedkd_fast.losses import MutualDistillationLoss, map_layers

SAMPLES, LENGTH, WIDTH = 16, 48, 384
LAYERS = (6, 2)
TASKS = {"2 classes": None, "30522 classes, all tokens": 1.0, "30522 classes, 15 % of tokens": 0.15}
# A step of either kind gives the same loss up to roundings of float32.
AGREEMENT = 1e-4


def model(layers: int, vocabulary_task: bool, attention: str) -> nn.Module:
    config = BertConfig(
        vocab_size=30522,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_labels=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    made = (BertForMaskedLM if vocabulary_task else BertForSequenceClassification)(config)
    made.bert.embeddings.requires_grad_(False)
    return made.eval()  # dropout would make two steps differ


class EagerLoss(nn.Module):
    """The paper's loss as one writes it in torch, with the projections of ours."""

    def __init__(self, ours: MutualDistillationLoss) -> None:
        super().__init__()
        self.ours = ours

    def forward(
        self, mentor: Any, mentee: Any, labels: Tensor, mask: Tensor, counted: Tensor | None
    ) -> Tensor:
        """Return what `MutualDistillationLoss` calls the total; `counted` names labelled rows."""
        classes = mentor.logits.shape[-1]
        rows = [one.logits.reshape(-1, classes) for one in (mentor, mentee)]
        targets = labels.reshape(-1)
        if counted is not None:
            rows, targets = [one[counted] for one in rows], targets[counted]
        total = eager_losses(rows[0], rows[1], targets)
        with torch.no_grad():
            ce = sum(
                functional.cross_entropy(
                    one.logits.transpose(1, -1), labels, ignore_index=-100, reduction="none"
                )
                for one in (mentor, mentee)
            )
            if labels.dim() > 1:
                counts = labels != -100
                ce = (ce * counts).sum(1) / counts.sum(1).clamp(min=1)
        tokens = mask / mask.sum(1, keepdim=True)
        error = torch.zeros_like(ce)
        for index, (top, low) in enumerate(self.ours.layer_pairs):
            # The value of W_h with twice its gradient: both losses train it.
            weight = self.ours.projections[index].weight
            projected = functional.linear(
                mentee.hidden_states[low + 1], 2 * weight - weight.detach()
            )
            squares = (mentor.hidden_states[top + 1] - projected).square().mean(-1)
            error = error + (squares * tokens).sum(1)
            squares = (mentor.attentions[top] - mentee.attentions[low]).square().mean(1)
            error = error + (squares * tokens[:, :, None] * tokens[:, None, :]).sum((1, 2))
        return total + (error / ce.clamp(min=1e-6)).mean()


def batch(labelled: float | None) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30522, (SAMPLES, LENGTH), generator=noise)
    mask = torch.ones(SAMPLES, LENGTH)
    mask[::3, LENGTH - 8 :] = 0.0
    if labelled is None:
        return ids, mask, torch.randint(0, 2, (SAMPLES,), generator=noise)
    counts = (torch.rand(SAMPLES, LENGTH, generator=noise) < labelled) & (mask > 0)
    counts[:, 0] = True  # a label in every sample
    return ids, mask, torch.where(counts, ids, -100)


def detached(output: Any) -> SimpleNamespace:
    return SimpleNamespace(
        logits=output.logits.detach().clone().requires_grad_(),
        hidden_states=[state.detach().requires_grad_() for state in output.hidden_states],
        attentions=[maps.detach().requires_grad_() for maps in output.attentions],
    )


class Call(NamedTuple):
    """What is measured, and what has to be done before."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def seconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median of each, of rounds in which every one has its turn."""
    for call in calls.values():
        call.prepare()
        call.run()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call.prepare()
            start = time.perf_counter()
            call.run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def outputs_of(models: list[nn.Module], ids: Tensor, mask: Tensor, maps: bool) -> list[Any]:
    return [
        one(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=maps)
        for one in models
    ]


def measure(labelled: float | None, rounds: int) -> dict[str, Any]:
    """One task: whole steps and the loss alone, with each implementation of the loss."""
    ids, mask, labels = batch(labelled)
    counted = None
    if bool((labels == -100).any()):
        counted = (labels.reshape(-1) != -100).nonzero()[:, 0]
    models = [model(layers, labelled is not None, "eager") for layers in LAYERS]
    ours = MutualDistillationLoss(
        mentor_hidden=WIDTH, mentee_hidden=WIDTH, layer_pairs=map_layers(*LAYERS)
    )
    in_place = MutualDistillationLoss(
        mentor_hidden=WIDTH, mentee_hidden=WIDTH, layer_pairs=map_layers(*LAYERS), in_place=True
    )
    in_place.projections = ours.projections
    eager = EagerLoss(ours)
    torch.compiler.reset()
    compiled = torch.compile(eager, dynamic=False)
    losses: dict[str, Callable[[Any, Any], Tensor]] = {
        "ours": lambda t, s: ours(t, s, labels, mask).total,
        "ours in place": lambda t, s: in_place(t, s, labels, mask).total,
        "eager": lambda t, s: eager(t, s, labels, mask, counted),
        "compile": lambda t, s: compiled(t, s, labels, mask, counted),
    }
    outputs = outputs_of(models, ids, mask, True)
    kept = {name: [detached(one) for one in outputs] for name in losses}
    values = {name: float(loss(*kept[name]).detach()) for name, loss in losses.items()}
    for name, value in values.items():
        error = abs(value - values["ours"]) / abs(values["ours"])
        assert error <= AGREEMENT, f"the loss of {name} is {value}, ours {values['ours']}"
    parameters = [p for one in (*models, ours) for p in one.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(loss: Callable[[Any, Any], Tensor]) -> None:
        optimizer.zero_grad()
        loss(*outputs_of(models, ids, mask, True)).backward()
        optimizer.step()

    def renew(name: str) -> None:
        for one, output in zip(kept[name], outputs, strict=True):
            for part in (one.logits, *one.hidden_states, *one.attentions):
                part.grad = None
            one.logits.data.copy_(output.logits)  # which gradients may have taken the place of

    def alone(name: str) -> None:
        losses[name](*kept[name]).backward()

    calls: dict[str, Call] = {}
    for name, loss in losses.items():
        calls[f"step {name}"] = Call(lambda loss=loss: step(loss))
        calls[f"loss {name}"] = Call(lambda name=name: alone(name), lambda name=name: renew(name))
    found = seconds(calls, rounds)
    mine = found["step ours"]
    return {
        "ms": {name: round(1e3 * value, 2) for name, value in found.items()},
        "loss_share": {
            name: round(found[f"loss {name}"] / found[f"step {name}"], 3) for name in losses
        },
        "step_ratio": {name: round(found[f"step {name}"] / mine, 2) for name in losses},
        "loss_ratio": {
            name: round(found[f"loss {name}"] / found["loss ours"], 2) for name in losses
        },
    }


def cost_of_maps(rounds: int) -> dict[str, Any]:
    """Forward and backward of both models: eager attention with maps, and without, and sdpa."""
    ids, mask, labels = batch(None)
    calls: dict[str, Call] = {}
    for name, attention, maps in (
        ("eager, maps returned", "eager", True),
        ("eager", "eager", False),
        ("sdpa", "sdpa", False),
    ):
        models = [model(layers, False, attention) for layers in LAYERS]

        def run(models: list[nn.Module] = models, maps: bool = maps) -> None:
            logits = [one.logits for one in outputs_of(models, ids, mask, maps)]
            sum(functional.cross_entropy(one, labels) for one in logits).backward()

        calls[name] = Call(run)
    found = seconds(calls, rounds)
    return {
        "ms": {name: round(1e3 * value, 2) for name, value in found.items()},
        "over_sdpa": {name: round(value / found["sdpa"], 3) for name, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        tasks = {name: measure(labelled, arguments.rounds) for name, labelled in TASKS.items()}
        results.append({"threads": threads, "tasks": tasks, "maps": cost_of_maps(arguments.rounds)})
        print(json.dumps(results[-1], indent=1))
    if arguments.out:
        told = {
            "fedkd_fast": facts(threads=max(arguments.threads)),
            "batch": [SAMPLES, LENGTH],
            "layers": list(LAYERS),
            "rounds": arguments.rounds,
            "results": results,
        }
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
