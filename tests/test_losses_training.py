"""The mutual distillation loss inside what trainers put around it: checkpoints, processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from fedkd_fast.losses import DistillationConfig, MutualDistillationLoss, map_layers

SAMPLES, LENGTH, CLASSES, VOCABULARY = 8, 6, 3, 40
LAYERS = {"mentor": 4, "mentee": 2}
WIDTHS = {"mentor": 24, "mentee": 16}
PROCESSES = 2
PATIENCE_S = 60.0
# Sums of a few hundred float64 terms of size 1 to 10.
TOLERANCE = 1000 * torch.finfo(torch.float64).eps


class Pair(nn.Module):
    """Both models and their loss, as one module: what a wrapper for training takes."""

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("mentor", "mentee"):
            model = BertForSequenceClassification(
                BertConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=WIDTHS[name],
                    intermediate_size=32,
                    num_hidden_layers=LAYERS[name],
                    num_attention_heads=2,
                    max_position_embeddings=LENGTH,
                    num_labels=CLASSES,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    attn_implementation="eager",
                )
            )
            setattr(self, name, model.double())
        self.loss = MutualDistillationLoss(
            config,
            mentor_hidden=WIDTHS["mentor"],
            mentee_hidden=WIDTHS["mentee"],
            layer_pairs=map_layers(LAYERS["mentor"], LAYERS["mentee"]),
        ).double()

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        outputs = [
            model(
                input_ids=ids,
                attention_mask=mask,
                output_hidden_states=True,
                output_attentions=True,
            )
            for model in (self.mentor, self.mentee)
        ]
        return self.loss(*outputs, labels, mask).total


def batch() -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=noise)
    lengths = torch.arange(SAMPLES) % 3 + LENGTH - 2
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return ids, mask, torch.arange(SAMPLES) % CLASSES


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: part.grad for name, part in module.named_parameters() if part.grad is not None}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        allowed = TOLERANCE * max(1.0, float(gradient.abs().max()))
        assert float((found[name] - gradient).abs().max()) <= allowed, name


CONFIGS = {
    "paper": DistillationConfig.paper(),
    "attached": DistillationConfig(
        denominator_gradient="attached", targets="attached", loss="joint"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_models_that_compute_their_layers_again(config: DistillationConfig) -> None:
    plain = Pair(config)
    plain(*batch()).backward()
    again = Pair(config)
    for model in (again.mentor, again.mentee):
        model.gradient_checkpointing_enable()
    again(*batch()).backward()
    agree(gradients(again), gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_is_computed_again(reentrant: bool) -> None:
    pair = Pair(CONFIGS["paper"])
    pair(*batch()).backward()
    expected = gradients(pair)
    pair = Pair(CONFIGS["paper"])
    ids, mask, labels = batch()
    outputs = [
        model(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        for model in (pair.mentor, pair.mentee)
    ]

    def total(*parts: Tensor) -> Tensor:
        models, rest = [], iter(parts)
        for layers in LAYERS.values():
            models.append(
                SimpleNamespace(
                    logits=next(rest),
                    hidden_states=[next(rest) for _ in range(layers + 1)],
                    attentions=[next(rest) for _ in range(layers)],
                )
            )
        return pair.loss(*models, labels, mask).total

    flat = [part for one in outputs for part in (one.logits, *one.hidden_states, *one.attentions)]
    checkpoint(total, *flat, use_reentrant=reentrant).backward()
    agree(gradients(pair), expected)


def train_share(rank: int, folder: str, config: DistillationConfig) -> None:
    """Run one of the processes: a step on its share of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    wrapped = DistributedDataParallel(Pair(config))
    share = slice(rank * SAMPLES // PROCESSES, (rank + 1) * SAMPLES // PROCESSES)
    wrapped(*(part[share] for part in batch())).backward()
    save_file(gradients(wrapped.module), Path(folder) / f"{rank}.writing")
    os.rename(Path(folder) / f"{rank}.writing", Path(folder) / f"{rank}.safetensors")
    # Gloo has been seen to wait for ever, on the way out, for a peer that was gone: all stay until
    # all are done, and leave without it.
    end = time.monotonic() + PATIENCE_S
    while len(list(Path(folder).glob("*.safetensors"))) < PROCESSES and time.monotonic() < end:
        time.sleep(0.05)
    os._exit(0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_many_processes_train_as_one(config: DistillationConfig, tmp_path: Path) -> None:
    # With D of each sample, and as many samples everywhere, the mean over the processes is exact.
    processes = torch.multiprocessing.spawn(
        train_share, (str(tmp_path), config), nprocs=PROCESSES, join=False
    )
    end = time.monotonic() + 2 * PATIENCE_S
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < end, "the processes do not come to an end"
    finally:
        for process in processes.processes:
            process.kill()
    whole = Pair(config)
    whole(*batch()).backward()
    for rank in range(PROCESSES):
        agree(load_file(tmp_path / f"{rank}.safetensors"), gradients(whole))
