"""FedKD: a private mentor and a shared mentee teach each other; only the mentee's update travels.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature
Communications 13:2032 (2022), Algorithm 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkd_fast._seeds import seeded
from fedkd_fast.losses import (
    DistillationConfig,
    ModelOutput,
    MutualDistillationLoss,
    map_layers,
)
from fedkd_fast.methods.base import LocalSettings, Losses, Method, make_optimizer, mean_loss, set_lr
from fedkd_fast.models import run_model
from fedkd_fast.tasks import Batch, Task

_log = logging.getLogger(__name__)
# (N, L, H): layers of other models, for instance of convolutions, are not aligned.
_HIDDEN_DIMENSIONS = 3


def _hidden_states(outputs: ModelOutput) -> tuple[Tensor, ...]:
    states = getattr(outputs, "hidden_states", None) or ()
    return tuple(states) if all(s.ndim == _HIDDEN_DIMENSIONS for s in states) else ()


def _has_attentions(outputs: ModelOutput) -> bool:
    return getattr(outputs, "attentions", None) is not None


class _Distilling(NamedTuple):
    loss: MutualDistillationLoss
    optimizer: torch.optim.Optimizer  # of the mentee and of the loss's private projections


class MutualLearner:
    """A mentor and a mentee that learn from the labels and from each other."""

    def __init__(self, task: Task, settings: LocalSettings) -> None:
        self._mentor, self._mentee = task.build_mentor(), task.build_mentee()
        self._settings = settings
        self._mentor_optimizer = make_optimizer(
            [self._mentor], settings.lr_mentor, settings.weight_decay
        )
        # Need the widths of the hidden states, which the first batch shows.
        self._distilling: _Distilling | None = None

    @property
    def mentor(self) -> nn.Module:
        """The private model."""
        return self._mentor

    @property
    def mentee(self) -> nn.Module:
        """The shared model."""
        return self._mentee

    @property
    def shared(self) -> nn.Module:
        """The mentee."""
        return self._mentee

    def _prepare(self, mentor: ModelOutput, mentee: ModelOutput) -> _Distilling:
        """Make the loss for models with these outputs, and the optimizer of mentee and W_h."""
        settings = self._settings
        states = _hidden_states(mentor), _hidden_states(mentee)
        layered = all(states)
        config = DistillationConfig(
            hidden=settings.hidden and layered,
            attention=settings.attention
            and layered
            and _has_attentions(mentor)
            and _has_attentions(mentee),
        )
        _log.info("distilling hidden states: %s, attention: %s", config.hidden, config.attention)
        # The embeddings' output comes first and is no layer.
        pairs = map_layers(len(states[0]) - 1, len(states[1]) - 1) if layered else []
        with seeded(settings.seed):
            loss = MutualDistillationLoss(
                config,
                mentor_hidden=states[0][-1].shape[-1] if layered else 1,
                mentee_hidden=states[1][-1].shape[-1] if layered else 1,
                layer_pairs=pairs,
            )
        optimizer = make_optimizer([self._mentee, loss], settings.lr_mentee, settings.weight_decay)
        self._distilling = _Distilling(loss, optimizer)
        return self._distilling

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train both models on all batches in turn, with one backward pass for both."""
        settings = self._settings
        self._mentor.train()
        self._mentee.train()
        totals, samples = torch.zeros(2, dtype=torch.float64), 0
        for batch in batches:
            mentor = run_model(self._mentor, batch.inputs, layers=True)
            mentee = run_model(self._mentee, batch.inputs, layers=True)
            distilling = self._distilling or self._prepare(mentor, mentee)
            mask = batch.inputs.get("attention_mask")
            losses = distilling.loss(mentor, mentee, batch.labels, mask)
            optimizers = self._mentor_optimizer, distilling.optimizer
            set_lr(optimizers[0], settings.lr_mentor * lr_share)
            set_lr(optimizers[1], settings.lr_mentee * lr_share)
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.total.backward()
            for optimizer in optimizers:
                optimizer.step()
            parts = torch.stack([losses.mentor.detach(), losses.mentee.detach()])
            totals += parts * len(batch.labels)
            samples += len(batch.labels)
        return Losses(mean_loss(totals[0], samples), mean_loss(totals[1], samples))


FEDKD = Method("fedkd", MutualLearner, exchanges=True)
