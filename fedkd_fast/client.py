"""One client: trains on its shard, sends its update as bytes, applies what it receives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast._seeds import derived_seed, seeded
from fedkd_fast.decompression import decompress
from fedkd_fast.legs import Leg
from fedkd_fast.methods import Learner, Losses
from fedkd_fast.models import trainable_parameters
from fedkd_fast.tasks import Batch, Task
from fedkd_fast.tensors import digest_of

# Where the batches of refreshing come from, among the epochs of a round.
_REFRESHING = 1_000_000


class Client:
    """A learner with its shard of data; everything that leaves or enters it is bytes.

    Args:
        index: number of the client.
        learner: its models.
        task: makes batches of the shard.
        shard: its training data.
        up: encodes updates; the client's own, because it may keep state.
        down: decodes broadcasts.
        seed: of the run.
        local_epochs: passes over the shard each round; also a part of one.
        local_steps: batches of each round instead.
    """

    def __init__(
        self,
        index: int,
        learner: Learner,
        task: Task,
        shard: Any,
        up: Leg,
        down: Leg,
        *,
        seed: int,
        local_epochs: float = 1,
        local_steps: int | None = None,
    ) -> None:
        self.index, self.learner, self.shard = index, learner, shard
        self._task, self._up, self._down = task, up, down
        self._seed, self._local_epochs, self._local_steps = seed, local_epochs, local_steps
        self._round = 0
        # Rounds that are no whole passes go on where the last one stopped.
        self._stream = self._endless(0, 0)
        self.version = 0  # of the shared parameters that the client holds
        # What every client holds: the shared parameters at the start of the round.
        self._base: Mapping[str, Tensor] = learner.exchanged()

    def train(self, round_number: int, lr_share: float = 1.0) -> Losses:
        """Train for one round on the client's own data, with this share of the learning rates.

        Raises:
            ValueError: a loss or a parameter became NaN or Inf; names client and round.
        """
        self._round = round_number
        # Dropout must not depend on who trained before.
        with seeded(derived_seed(self._seed, self.index, round_number)):
            losses = self.learner.train(self._batches(), lr_share)
        self._check(losses)
        return losses

    def _check(self, losses: Losses) -> None:
        for what in self._not_finite(losses):
            raise ValueError(
                f"training diverged: {what} of client {self.index} holds NaN or Inf after round "
                f"{self._round}; a smaller learning rate may help"
            )

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
        steps = self._steps()
        if steps is None:
            for epoch in range(int(self._local_epochs)):
                yield from self._epoch(self._round, epoch)
        else:
            yield from itertools.islice(self._stream, steps)

    def _steps(self) -> int | None:
        """Return the batches of a round, None for whole passes over the shard."""
        if self._local_steps is not None or float(self._local_epochs).is_integer():
            return self._local_steps
        return max(1, round(self._local_epochs * self._epoch_steps))

    @cached_property
    def _epoch_steps(self) -> int:
        """Batches of one pass, counted once: making them costs what making them to train does."""
        return sum(1 for _ in self._epoch(0, 0))

    def _epoch(self, round_number: int, epoch: int) -> Iterable[Batch]:
        seed = derived_seed(self._seed, self.index, round_number, epoch)
        return self._task.batches(self.shard, seed)

    def _endless(self, round_number: int, first: int) -> Iterator[Batch]:
        """Go through the shard again and again; an empty one ends at once."""
        for epoch in itertools.count(first):
            batches = iter(self._epoch(round_number, epoch))
            first_batch = next(batches, None)
            if first_batch is None:
                return
            yield first_batch
            yield from batches

    def refresh(self, lr_share: float = 1.0) -> None:
        """Let the private model learn from the shared one as it came from the server.

        Nothing happens where the learner's settings ask for no such steps.

        Raises:
            ValueError: a parameter became NaN or Inf; names client and round.
        """
        steps = self.learner.settings.refresh_steps
        if not steps:
            return
        with seeded(derived_seed(self._seed, self.index, self._round, _REFRESHING)):
            batches = itertools.islice(self._endless(self._round, _REFRESHING), steps)
            self.learner.refresh(batches, lr_share)
        self._check(Losses(None, None))

    def absent(self, rounds: int) -> None:
        """Let what the client has still to send fade, where it missed rounds."""
        self._up.absent(rounds)

    def upload(self, energy: float) -> bytes:
        """Encode the update of the round: what is shared now minus the same at its start.

        Args:
            energy: share of the squared norm of the update to keep.

        Raises:
            ValueError: a parameter is NaN or Inf.
        """
        return self._up.encode(self.learner.exchanged(), self._base, energy)

    def apply(self, *frames: bytes) -> None:
        """Roll the shared model back to the round's start and apply what the server sent.

        Args:
            frames: broadcasts in their order, or one frame with whole parameters.

        Raises:
            WireError: the bytes are damaged.
            ValueError: an update is meant for other parameters.
        """
        base = self._base
        for frame in frames:
            whole = wire.header(frame).base is None
            base = decompress(frame, schema=base) if whole else self._down.decode(frame, base)
        self._base = base
        self.learner.adopt(base)

    def digest(self) -> bytes:
        """Return 16 bytes that identify what is shared."""
        return digest_of(self.learner.exchanged())
