"""A task of the kind a user writes: plain torch modules on points around class centres."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkd_fast.models import run_model
from fedkd_fast.tasks import Batch

CLASSES, FEATURES = 3, 6
_PROJECTIONS = ("query", "value")


class LayeredModel(nn.Module):
    """Two layers over two tokens, with hidden states as transformers models return them."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES // 2, width, bias=bias)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, points: Tensor) -> SimpleNamespace:
        states = [self.embed(points.reshape(len(points), 2, -1))]
        for layer in self.layers:
            states.append(torch.tanh(layer(states[-1])))
        return SimpleNamespace(
            logits=self.head(states[-1].mean(1)), hidden_states=tuple(states), attentions=None
        )


class AttentiveModel(nn.Module):
    """Two projections with the names that adapters look for, under a head."""

    base_model_prefix = "encoder"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({name: nn.Linear(FEATURES, width) for name in _PROJECTIONS})
        self.head = nn.Linear(width, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        query, value = (self.encoder[name](points) for name in _PROJECTIONS)
        logits: Tensor = self.head(torch.tanh(query) + value)
        return logits


class TinyTask:
    """Three classes of points; the mentor is a wider perceptron than the mentee."""

    name = "tiny"
    metric = "accuracy"

    def __init__(self, samples: int = 60, *, layered: bool = False, seed: int = 0) -> None:
        self.layered, self.seed = layered, seed
        generator = torch.Generator().manual_seed(seed)
        centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
        self.labels = torch.arange(2 * samples) % CLASSES
        noise = torch.randn(2 * samples, FEATURES, generator=generator)
        self.points = centres[self.labels] + noise
        self.samples = samples

    def _build(self, width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + width)
            if self.layered:
                return LayeredModel(width)
            return _Points(
                nn.Linear(FEATURES, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, CLASSES)
            )

    def build_mentor(self, client: int = 0) -> nn.Module:
        return self._build(24)

    def build_mentee(self, client: int = 0) -> nn.Module:
        return self._build(12)

    def shards(self, clients: int, seed: int) -> Sequence[Any]:
        if clients > self.samples:
            raise ValueError(f"clients must be at most {self.samples}, got {clients}")
        return np.array_split(np.random.default_rng(seed).permutation(self.samples), clients)

    def merge(self, shards: Sequence[Any]) -> Any:
        return np.concatenate(list(shards))

    def batches(self, shard: Any, seed: int) -> Iterable[Batch]:
        order = np.random.default_rng(seed).permutation(shard)
        for start in range(0, len(order), 8):
            index = torch.from_numpy(order[start : start + 8])
            yield Batch({"points": self.points[index]}, self.labels[index])

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        model.eval()
        with torch.inference_mode():
            logits = run_model(model, {"points": self.points[self.samples :]}).logits
        hits = logits.argmax(1).cpu() == self.labels[self.samples :]
        return {"accuracy": float(hits.double().mean())}

    def describe(self) -> dict[str, Any]:
        return {"samples_train": self.samples}

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        return {"rounds": 2, "clients": 3, "lr_mentor": 1e-2, "lr_mentee": 1e-2}


class AttentiveTask(TinyTask):
    """The same points for models that adapters fit."""

    def _build(self, width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + width)
            return AttentiveModel(width)


def tiny_task(method: str) -> TinyTask:
    """Make a tiny task whose models a method can train."""
    return AttentiveTask() if method == "fedlora" else TinyTask()


class _Points(nn.Sequential):
    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = super().forward(points)
        return logits
