"""FedProx (Li et al., MLSys 2020): federated averaging with a pull towards the shared model.

Each client minimises ``F_i(w) + μ/2·|w - w_global|²``: every step's gradient gains
``μ·(w - w_global)`` on what is shared. With μ = 0 (``proximal``) this is ``fedavg``; the bytes are
the same for every μ.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedkd_fast.methods.base import LocalSettings, Method, SoloLearner
from fedkd_fast.tasks import Task
from fedkd_fast.trees import Tree, tensor_bytes


class ProximalLearner(SoloLearner):
    """A shared mentor that is held near to where the round began."""

    def __init__(self, task: Task, settings: LocalSettings) -> None:
        super().__init__(task, settings, "mentor", shares=True)
        self._start = self._shared_copies()

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over what the server holds now, which is what the next round is held near to."""
        super().adopt(state)
        self._start = self._shared_copies()

    def _shared_copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.shared_parameters().items()}

    def state(self) -> Tree:
        """Return the model, its optimizer's state, and what it is held near to."""
        return {**super().state(), "start": self._start}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken; its tensors are taken over."""
        super().load(state)
        self._start = {
            name: state["start"][name].to(value.device)
            for name, value in self.shared_parameters().items()
        }

    def nbytes(self) -> int:
        """Count the copies that it is held near to, too."""
        return super().nbytes() + tensor_bytes(self._start)

    def correct_gradients(self) -> None:
        """Add ``μ·(w - w_global)``."""
        for name, parameter in self.shared_parameters().items():
            if parameter.grad is not None:
                distance = parameter.detach() - self._start[name]
                parameter.grad.add_(distance, alpha=self.settings.proximal)


FEDPROX = Method("fedprox", ProximalLearner, exchanges=True)
