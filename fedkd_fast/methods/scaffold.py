"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against drifting clients.

A client corrects each gradient g by what the clients' mean gradient c differs from its own c_i;
after the round, c_i is the mean of the uncorrected gradients over the K steps::

    g + c - c_i;  c_i⁺ = Σ g / K;  c ← c + |S|/N · mean of c_i⁺ - c_i over S, its clients

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
        # |S|/N·(c_i⁺ - c_i) between a round's training and its broadcast, zero otherwise.
        self._change = self._zeros()
        self._total, self._count = self._zeros(), 0  # of raw gradients, over the round's steps

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(one) for name, one in self.shared_parameters().items()}

    def exchanged(self) -> dict[str, Tensor]:
        """Return copies of the parameters and of c with the client's change to it.

        The server's mean of differences to c is then the paper's step of c, also where only some
        clients take part: each has scaled its change by their share of all.
        """
        controls = {
            PREFIX + name: (value + self._change[name]).cpu()
            for name, value in self._server.items()
        }
        return {**super().exchanged(), **controls}

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over the parameters and c as the server holds them now."""
        super().adopt(state)
        self._server = {
            name: state[PREFIX + name].to(self.device, copy=True) for name in self._server
        }
        self._change = self._zeros()

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn; c_i becomes the mean raw gradient on the way."""
        self._total, self._count = self._zeros(), 0
        losses = super().train(batches, lr_share)
        if self._count:
            share = self.settings.participation
            for name, total in self._total.items():
                new = total / self._count
                self._change[name] = share * (new - self.control[name])
                self.control[name] = new
        return losses

    def state(self) -> Tree:
        """Return the model, its optimizer's state and the control variates."""
        controls = {"control": self.control, "server": self._server, "change": self._change}
        return {**super().state(), **controls}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        super().load(state)
        self.control, self._server, self._change = (
            {name: value.to(self.device) for name, value in state[part].items()}
            for part in ("control", "server", "change")
        )

    def nbytes(self) -> int:
        """Count the control variates, too: c_i, c, the change, and the sum of gradients."""
        return super().nbytes() + 4 * tensor_bytes(self.control)

    def correct_gradients(self) -> None:
        """Note the raw gradient, then add ``c - c_i``."""
        self._count += 1
        for name, parameter in self.shared_parameters().items():
            if parameter.grad is not None:
                self._total[name] += parameter.grad
                parameter.grad.add_(self._server[name]).sub_(self.control[name])


SCAFFOLD = Method("scaffold", ControlledLearner, exchanges=True, averaged=(PREFIX,))
