"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against drifting clients.

A client corrects each gradient g by what the clients' mean gradient c differs from its own c_i;
after the round, c_i is the mean of the uncorrected gradients over the K steps::

    g + c - c_i;  c_i⁺ = Σ g / K;  c ← c + |S|/N · mean of c_i⁺ - c_i over S, its clients

So c stays the mean of all c_i: who replies in vain keeps its c_i, replies of S that are missing
make a smaller step, and each weighs alike in c, whatever it weighs in the model. Robust rules and
noise step otherwise, and so do lossy codecs.

For SGD that is option II of the paper, ``c_i⁺ = c_i - c + (x - y)/(K·η)``, because there
``x - y = η·Σ(g + c - c_i)``; the mean has a meaning for every optimizer. A model and a control,
``control/<name>``, travel each way: twice the bytes of ``fedavg``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedkd_fast.methods.base import LocalSettings, Losses, Method, SoloLearner
from fedkd_fast.tasks import Batch, Task
from fedkd_fast.trees import Tree, tensor_bytes

PREFIX = "control/"


class ControlledLearner(SoloLearner):
    """A shared mentor with the control variates of the server, c, and of the client, c_i."""

    def __init__(self, task: Task, settings: LocalSettings) -> None:
        super().__init__(task, settings, "mentor", shares=True)
        self.control = self._zeros()  # c_i
        self._server = self._zeros()  # c
        # c_i⁺ between a round's training and its broadcast, which says that the reply counts.
        self._next: dict[str, Tensor] | None = None
        self._total, self._count = self._zeros(), 0  # of raw gradients, over the round's steps

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(one) for name, one in self.shared_parameters().items()}

    def exchanged(self) -> dict[str, Tensor]:
        """Return copies of the parameters and of c with the client's change to it.

        The server's mean of differences to c is then the paper's step of c, also where only some
        clients take part: each has scaled its change by their share of all.
        """
        share, found = self.settings.participation, super().exchanged()
        for name, value in self._server.items():
            change = 0.0 if self._next is None else share * (self._next[name] - self.control[name])
            found[PREFIX + name] = (value + change).cpu()
        return found

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over the parameters and c as the server holds them now, and c_i⁺ as c_i."""
        super().adopt(state)
        self._server = {
            name: state[PREFIX + name].to(self.device, copy=True) for name in self._server
        }
        if self._next is not None:
            self.control, self._next = self._next, None

    def refused(self) -> None:
        """Keep c_i, of which the server's c still is the mean."""
        self._next = None

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn; c_i⁺ is the mean raw gradient on the way."""
        self._total, self._count = self._zeros(), 0
        losses = super().train(batches, lr_share)
        if self._count:
            self._next = {name: total / self._count for name, total in self._total.items()}
        return losses

    def state(self) -> Tree:
        """Return the model, its optimizer's state and the control variates."""
        controls = {"control": self.control, "server": self._server, "next": self._next}
        return {**super().state(), **controls}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        super().load(state)
        # Older checkpoints have no c_i⁺: there it was c_i from the training on.
        self.control, self._server, following = (
            {name: value.to(self.device) for name, value in (state.get(part) or {}).items()}
            for part in ("control", "server", "next")
        )
        self._next = following or None

    def nbytes(self) -> int:
        """Count the control variates, too: c_i, c, c_i⁺, and the sum of gradients."""
        return super().nbytes() + 4 * tensor_bytes(self.control)

    def correct_gradients(self) -> None:
        """Note the raw gradient, then add ``c - c_i``."""
        self._count += 1
        for name, parameter in self.shared_parameters().items():
            if parameter.grad is not None:
                self._total[name] += parameter.grad
                parameter.grad.add_(self._server[name]).sub_(self.control[name])


SCAFFOLD = Method("scaffold", ControlledLearner, exchanges=True, averaged=(PREFIX,))
