"""FedKD: a private mentor and a shared mentee teach each other; only the mentee's update travels.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature
Communications 13:2032 (2022), Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd_fast._seeds import seeded
from fedkd_fast.losses import ModelOutput, MutualDistillationLoss, map_layers
from fedkd_fast.methods.base import (
    Learner,
    LocalSettings,
    Losses,
    Method,
    Steps,
    changing,
    learning_bytes,
    mean_loss,
    restore,
    task_loss,
)
from fedkd_fast.models import PlainOutputs, run_model
from fedkd_fast.tasks import IGNORED_LABEL, Batch, Task
from fedkd_fast.trees import Tree

_log = logging.getLogger(__name__)
# (N, L, H): layers of other models, for instance of convolutions, are not aligned.
_HIDDEN_DIMENSIONS = 3


def _hidden_states(outputs: ModelOutput) -> tuple[Tensor, ...]:
    states = getattr(outputs, "hidden_states", None) or ()
    return tuple(states) if all(s.ndim == _HIDDEN_DIMENSIONS for s in states) else ()


def _has_attentions(outputs: ModelOutput) -> bool:
    return getattr(outputs, "attentions", None) is not None


def _each(outputs: ModelOutput, change: Callable[[Tensor], Tensor]) -> ModelOutput:
    """Return outputs all of whose tensors are changed; there may be no layers."""
    states, maps = (getattr(outputs, name, None) for name in ("hidden_states", "attentions"))
    known = maps is not None and all(one is not None for one in maps)
    return PlainOutputs(
        change(outputs.logits),
        None if states is None else tuple(change(state) for state in states),
        tuple(change(one) for one in maps) if maps is not None and known else None,
    )


class _Shape(NamedTuple):
    """What the loss is made for, as the first batch shows it."""

    hidden: bool  # hidden states are matched
    attention: bool  # attention maps are
    widths: tuple[int, int]  # of the hidden states of mentor and mentee
    pairs: tuple[tuple[int, int], ...]  # layers of both that are matched


class _Distilling(NamedTuple):
    shape: _Shape
    loss: MutualDistillationLoss
    steps: Steps  # of the mentee and of the loss's private projections


class MutualLearner(Learner):
    """A mentor and a mentee that learn from the labels and from each other.

    Without `LocalSettings.mutual` the mentor learns from the labels alone, by the task loss of the
    configuration, while mentee and W_h learn as they do with it.
    """

    mentor: nn.Module
    mentee: nn.Module

    def __init__(self, task: Task, settings: LocalSettings) -> None:
        super().__init__(task, settings, mentor=True, mentee=True, shares="mentee")
        self._mentor_steps = Steps([self.mentor], settings.lr_mentor, settings)
        # Need the widths of the hidden states, which the first batch shows.
        self._distilling: _Distilling | None = None

    def _shape(self, mentor: ModelOutput, mentee: ModelOutput) -> _Shape:
        """Return what there is to match in models with these outputs."""
        states = _hidden_states(mentor), _hidden_states(mentee)
        layered = all(states)
        maps = layered and _has_attentions(mentor) and _has_attentions(mentee)
        wanted = self.settings.distillation
        hidden, attention = wanted.hidden and layered, wanted.attention and maps
        _log.info("distilling hidden states: %s, attention: %s", hidden, attention)
        if not layered:
            return _Shape(hidden, attention, (1, 1), ())
        # The embeddings' output comes first and is no layer.
        pairs = map_layers(len(states[0]) - 1, len(states[1]) - 1)
        widths = states[0][-1].shape[-1], states[1][-1].shape[-1]
        return _Shape(hidden, attention, widths, tuple(pairs))

    def _prepare(self, shape: _Shape) -> _Distilling:
        """Make the loss, and the optimizer of mentee and W_h."""
        settings = self.settings
        config = dataclasses.replace(
            settings.distillation, hidden=shape.hidden, attention=shape.attention
        )
        with seeded(settings.seed):
            loss = MutualDistillationLoss(
                config,
                mentor_hidden=shape.widths[0],
                mentee_hidden=shape.widths[1],
                layer_pairs=list(shape.pairs),
            ).to(self.device)
        steps = Steps([self.mentee, loss], settings.lr_mentee, settings)
        self._distilling = _Distilling(shape, loss, steps)
        return self._distilling

    def state(self) -> Tree:
        """Return both models, W_h, and the state of both optimizers."""
        distilling = self._distilling and {
            "shape": list(self._distilling.shape),
            "loss": changing(self._distilling.loss),
            "steps": self._distilling.steps.state(),
        }
        mentor = self._mentor_steps.state()
        return {**super().state(), "mentor_steps": mentor, "distilling": distilling}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        super().load(state)
        self._mentor_steps.load(state["mentor_steps"])
        found = state["distilling"]
        if found is None:
            self._distilling = None
            return
        hidden, attention, widths, pairs = found["shape"]
        shape = _Shape(hidden, attention, tuple(widths), tuple((one, two) for one, two in pairs))
        distilling = self._distilling
        if distilling is None or distilling.shape != shape:
            distilling = self._prepare(shape)
        restore(distilling.loss, found["loss"])
        distilling.steps.load(found["steps"])

    def nbytes(self) -> int:
        """Count W_h, too."""
        return super().nbytes() + (learning_bytes(self._distilling.loss) if self._distilling else 0)

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train both models on all batches in turn, with one backward pass for both."""
        self.mentor.train()
        self.mentee.train()
        totals, samples = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        for batch in self.placed(batches):
            mentor, mentee, total = self._losses(batch)
            assert self._distilling is not None
            both = self._mentor_steps, self._distilling.steps
            for steps in both:
                steps.zero_grad()
            torch.autograd.backward(total)
            for steps in both:
                steps.step(lr_share)
            parts = torch.stack([mentor, mentee])
            totals += parts * len(batch.labels)
            samples += len(batch.labels)
        return Losses(mean_loss(totals[0], samples), mean_loss(totals[1], samples))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of mentor and mentee, detached, and what to differentiate."""
        wanted, mutual = self.settings.distillation, self.settings.mutual
        layers = wanted.hidden or wanted.attention
        with self.autocast():
            mentor = run_model(self.mentor, batch.inputs, layers=layers)
            mentee = run_model(self.mentee, batch.inputs, layers=layers)
        if self.settings.bfloat16:
            mentor, mentee = _each(mentor, Tensor.float), _each(mentee, Tensor.float)
        distilling = self._distilling or self._prepare(self._shape(mentor, mentee))
        mask = batch.inputs.get("attention_mask")
        teacher = mentor if mutual else _each(mentor, Tensor.detach)
        losses = distilling.loss(teacher, mentee, batch.labels, mask, layer_share=batch.layer_share)
        if mutual:
            return losses.mentor, losses.mentee, losses.total
        own = wanted.task_weight * task_loss(mentor.logits, batch.labels, wanted.label_smoothing)
        return own.detach(), losses.mentee, own + losses.total

    def refresh(self, batches: Iterable[Batch], lr_share: float = 1.0) -> None:
        """Let the mentor learn from the labels and from the mentee as it came from the server."""
        self.mentor.train()
        self.mentee.eval()
        for batch in self.placed(batches):
            with self.autocast():
                logits = run_model(self.mentor, batch.inputs).logits
                with torch.no_grad():
                    target = run_model(self.mentee, batch.inputs).logits
            labels = batch.labels.flatten()
            counts = labels != IGNORED_LABEL
            scores = logits.float().flatten(0, -2)[counts].log_softmax(1)
            wanted = target.float().flatten(0, -2)[counts].log_softmax(1)
            loss = F.nll_loss(scores, labels[counts]) + F.kl_div(
                scores, wanted, log_target=True, reduction="batchmean"
            )
            self._mentor_steps.zero_grad()
            torch.autograd.backward(loss)
            self._mentor_steps.step(lr_share)


FEDKD = Method("fedkd", MutualLearner, exchanges=True, codec="wf1")
