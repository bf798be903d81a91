"""Models, data and training: nothing here knows of Flower or of small messages."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def digits_model(seed: int) -> nn.Module:
    """Return a convolution and two layers, 268,170 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


@cache
def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test images with their labels, in an order of the seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, 8, 8)
    y = torch.tensor(labels[order])
    return (x[360:], y[360:]), (x[:360], y[:360])


class Encoder(nn.Module):
    """A transformers encoder and a layer on the mean of its tokens."""

    def __init__(self, folder: str, seed: int, bf16: bool) -> None:
        super().__init__()
        from transformers import AutoModel

        self.bf16 = bf16
        self.encoder = AutoModel.from_pretrained(folder)
        for parameter in self.encoder.embeddings.parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(seed)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of token ids; 0 is padding."""
        mask = ids != 0
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        hidden = hidden.float()
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(pooled)


@cache
def sentences(
    folder: str, data: str, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test token ids with their labels."""
    import gzip
    import json
    from pathlib import Path

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def split(name: str) -> tuple[Tensor, Tensor]:
        with gzip.open(Path(data) / f"{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        texts, labels = [row["text"] for row in rows], [int(row["label"]) for row in rows]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=40, return_tensors="pt"
        )
        return ids["input_ids"], torch.tensor(labels)

    (x, y), test = split("train"), split("test")
    order = torch.tensor(np.random.default_rng(seed).permutation(len(y)))
    return (x[order], y[order]), test


def make_model(config: dict[str, Any]) -> nn.Module:
    """Return the model that the run's configuration names, new."""
    if config["model"] == "mlp":
        return digits_model(int(config["seed"]))
    return Encoder(str(config["model"]), int(config["seed"]), bool(config["bf16"]))


def make_data(config: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test data."""
    if config["model"] == "mlp":
        return digits(int(config["seed"]))
    return sentences(str(config["model"]), str(config["data"]), int(config["seed"]))


def train(net: nn.Module, x: Tensor, y: Tensor, config: dict[str, Any]) -> float:
    """Train in place; return the last loss."""
    net.train()
    parameters = [one for one in net.parameters() if one.requires_grad]
    pretrained = config["model"] != "mlp"
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=config["lr"])
        if pretrained
        else torch.optim.SGD(parameters, lr=config["lr"], momentum=0.9)
    )
    loss = torch.tensor(0.0)
    for _ in range(int(config["local-epochs"])):
        for chosen in torch.randperm(len(y)).split(32):
            rows = x[chosen]
            if pretrained:
                rows = rows[:, : int((rows != 0).sum(1).max())]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(rows), y[chosen])
            loss.backward()
            optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of rows that are classified rightly."""
    net.eval()
    guesses = torch.cat([net(rows).argmax(1) for rows in x.split(256)])
    return float((guesses == y).float().mean())
