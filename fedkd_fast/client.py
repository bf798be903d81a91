"""One client: trains on its shard, sends its update as bytes, applies what is broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkd_fast._seeds import derived_seed, seeded
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decompress
from fedkd_fast.methods import Learner, Losses
from fedkd_fast.models import trainable_parameters
from fedkd_fast.tasks import Batch, Task
from fedkd_fast.tensors import digest_of


class Client:
    """A learner with its shard of data; everything that leaves or enters it is bytes.

    Args:
        index: number of the client.
        learner: its models.
        task: makes batches of the shard.
        shard: its training data.
        compressor: encodes updates; the client's own, because it may keep state.
        seed: of the run.
        local_epochs: passes over the shard each round.
    """

    def __init__(
        self,
        index: int,
        learner: Learner,
        task: Task,
        shard: Any,
        compressor: Compressor,
        *,
        seed: int,
        local_epochs: int,
    ) -> None:
        self.index, self.learner = index, learner
        self._task, self._shard, self._compressor = task, shard, compressor
        self._seed, self._local_epochs = seed, local_epochs
        self._round = 0
        # What every client holds: the shared parameters at the start of the round.
        self._base = _copy(learner.shared)

    def train(self, round_number: int, lr_share: float = 1.0) -> Losses:
        """Train for one round on the client's own data, with this share of the learning rates.

        Raises:
            ValueError: a loss or a parameter became NaN or Inf; names client and round.
        """
        self._round = round_number
        # Dropout must not depend on who trained before.
        with seeded(derived_seed(self._seed, self.index, round_number)):
            losses = self.learner.train(self._batches(), lr_share)
        for what in self._not_finite(losses):
            raise ValueError(
                f"training diverged: {what} of client {self.index} holds NaN or Inf after round "
                f"{round_number}; a smaller learning rate may help"
            )
        return losses

    def _not_finite(self, losses: Losses) -> Iterator[str]:
        """Name the parameters and losses that are NaN or Inf; a last step may spoil either."""
        for role, loss in losses._asdict().items():
            model = getattr(self.learner, role)
            for name, value in trainable_parameters(model).items() if model is not None else ():
                if not bool(torch.isfinite(value).all()):
                    yield f"{name!r} of the {role}"
            if loss is not None and not math.isfinite(loss):
                yield f"the loss of the {role}"

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(self._local_epochs):
            seed = derived_seed(self._seed, self.index, self._round, epoch)
            yield from self._task.batches(self._shard, seed)

    def upload(self, energy: float) -> bytes:
        """Encode the update of the round: shared parameters now minus those at its start.

        Args:
            energy: share of the squared norm of the update to keep.

        Raises:
            ValueError: a parameter is NaN or Inf.
        """
        current = _copy(self.learner.shared)
        return self._compressor.compress(current, base=self._base, energy=energy)

    def apply(self, broadcast: bytes) -> None:
        """Roll the shared model back to the round's start and add the update that all receive.

        Raises:
            WireError: the bytes are damaged.
            ValueError: the update is meant for other parameters.
        """
        self._base = decompress(broadcast, schema=self._base, base=self._base)
        shared = self.learner.shared
        if shared is not None:
            with torch.no_grad():
                for name, parameter in trainable_parameters(shared).items():
                    parameter.copy_(self._base[name])

    def digest(self) -> bytes:
        """Return 16 bytes that identify the shared parameters."""
        return digest_of(_copy(self.learner.shared))


def _copy(model: nn.Module | None) -> Mapping[str, Tensor]:
    if model is None:
        return {}
    return {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
