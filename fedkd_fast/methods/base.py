"""What all methods share: the record of one, and the learner that a client trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd_fast.models import run_model
from fedkd_fast.tasks import IGNORED_LABEL, Batch, Task

Role = Literal["mentor", "mentee"]


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains."""

    lr_mentor: float  # larger learns faster, until it diverges
    lr_mentee: float  # likewise
    weight_decay: float  # of matrices, as in AdamW; larger holds them closer to zero
    hidden: bool  # distil hidden states, where both models have them
    attention: bool  # distil attention maps, where both models have them
    seed: int  # of what a client initialises for itself


class Losses(NamedTuple):
    """Mean losses over the samples of a round; None where there is no such model."""

    mentor: float | None
    mentee: float | None


class Learner(Protocol):
    """The models of one client and the way they are trained."""

    @property
    def mentor(self) -> nn.Module | None:
        """The private model, if there is one."""

    @property
    def mentee(self) -> nn.Module | None:
        """The small model, if there is one."""

    @property
    def shared(self) -> nn.Module | None:
        """The model whose trainable parameters are exchanged, if any is."""

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn, with this share of the learning rates."""


@dataclass(frozen=True)
class Method:
    """A way to train on data that lie at several clients."""

    name: str
    make_learner: Callable[[Task, LocalSettings], Learner]
    exchanges: bool  # something travels each round
    pools_data: bool = False  # all data at one place: no federation, the upper bound
    lossless: bool = False  # what travels is exact, whatever codec is asked for


def make_optimizer(
    modules: Iterable[nn.Module], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters; only matrices decay.

    The state is kept from round to round: with a fresh optimizer for the mentee each round the
    digits took 11 per cent more bytes for equal scores of the mentee and no better mentors (means
    of seeds 0 to 2), for a fresh Adam's first steps have the size of the learning rate in every
    entry, which is noise of full rank.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Change the learning rate and keep the state."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class SoloLearner:
    """One model, trained by cross entropy."""

    def __init__(self, task: Task, settings: LocalSettings, role: Role, *, shares: bool) -> None:
        mentor = role == "mentor"
        self._model = task.build_mentor() if mentor else task.build_mentee()
        self._role, self._shares = role, shares
        self._lr = settings.lr_mentor if mentor else settings.lr_mentee
        self._optimizer = make_optimizer([self._model], self._lr, settings.weight_decay)

    @property
    def mentor(self) -> nn.Module | None:
        """The model, if its role is that of the mentor."""
        return self._model if self._role == "mentor" else None

    @property
    def mentee(self) -> nn.Module | None:
        """The model, if its role is that of the mentee."""
        return self._model if self._role == "mentee" else None

    @property
    def shared(self) -> nn.Module | None:
        """The model, if it is exchanged."""
        return self._model if self._shares else None

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn, with this share of the learning rate."""
        self._model.train()
        set_lr(self._optimizer, self._lr * lr_share)
        total, samples = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            logits = run_model(self._model, batch.inputs).logits
            loss = F.cross_entropy(
                logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED_LABEL
            )
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            total += loss.detach() * len(batch.labels)
            samples += len(batch.labels)
        mean = mean_loss(total, samples)
        return Losses(mean, None) if self._role == "mentor" else Losses(None, mean)


def mean_loss(total: Tensor, samples: int) -> float:
    """Divide a sum over samples, which may be none."""
    return float(total) / max(samples, 1)
