"""One client: trains on its shard, sends its update as bytes, applies what it receives."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
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
from fedkd_fast.trees import Tree, tensor_bytes

# Where the batches of refreshing come from, among the epochs of a round.
_REFRESHING = 1_000_000
_MOST_LINKS = 1024  # between versions of shared parameters; who missed more is sent all of them


class _Stream(Iterator[Batch]):
    """Batches of one pass after the other, without an end; an empty pass ends it at once.

    Args:
        epoch: makes the batches of a pass, given its number.
        first: number of the first pass.
    """

    def __init__(self, epoch: Callable[[int], Iterable[Batch]], first: int = 0) -> None:
        self._make, self._epoch, self._done = epoch, first, 0
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            # After `load`, what was used of the pass is made again.
            self._batches = itertools.islice(self._make(self._epoch), self._done, None)
        batch = next(self._batches, None)
        if batch is None and self._done:
            self._epoch, self._done = self._epoch + 1, 0
            self._batches = iter(self._make(self._epoch))
            batch = next(self._batches, None)
        if batch is None:
            raise StopIteration
        self._done += 1
        return batch

    def state(self) -> Tree:
        return [self._epoch, self._done]

    def load(self, state: Tree) -> None:
        (self._epoch, self._done), self._batches = state, None


class _Shard:
    """The batches of a client; knows no client, so that one is gone when nobody has it any more."""

    def __init__(self, task: Task, shard: Any, seed: int, index: int) -> None:
        self._task, self._shard, self._seed, self._index = task, shard, seed, index

    def epoch(self, round_number: int, epoch: int) -> Iterable[Batch]:
        """Go through the shard once, in the order of that pass of that round."""
        seed = derived_seed(self._seed, self._index, round_number, epoch)
        return self._task.batches(self._shard, seed)


class Decoded:
    """What broadcasts turn shared parameters into, for clients of one process that hold the same.

    Many clients decode the same frames onto the same parameters, and get the same bits. Kept are
    the newest of these, and of the others only which follow upon which, as digests.
    """

    def __init__(self) -> None:
        self._links: dict[tuple[bytes, bytes], bytes] = {}  # by frame and what it is applied to
        self._newest: tuple[bytes, Mapping[str, Tensor]] | None = None
        # As a rule one and the same frame goes to many clients.
        self._keys: deque[tuple[bytes, bytes]] = deque(maxlen=2)

    def get(
        self,
        frames: Sequence[bytes],
        base: Mapping[str, Tensor],
        digest: bytes,
        decode: Callable[[bytes, Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> tuple[Mapping[str, Tensor], bytes]:
        """Return parameters, not to be changed, and their digest.

        Args:
            frames: broadcasts in their order.
            base: what the first is applied to.
            digest: of it.
            decode: applies one.
        """
        keys = [self._key(frame) for frame in frames]
        # Whole parameters are the same whatever they are applied to.
        anew = [wire.header(frame).base is None for frame in frames]
        found: bytes | None = digest
        for key, whole in zip(keys, anew, strict=True):
            found = None if found is None else self._links.get((key, b"" if whole else found))
        if self._newest is None or found != self._newest[0]:
            for frame, key, whole in zip(frames, keys, anew, strict=True):
                before = b"" if whole else digest
                base = decode(frame, base)
                digest = self._links[key, before] = digest_of(base)
            self._newest = digest, base
            while len(self._links) > _MOST_LINKS:
                del self._links[next(iter(self._links))]
        return self._newest[1], self._newest[0]

    def _key(self, frame: bytes) -> bytes:
        for known, key in self._keys:
            if known is frame:
                return key
        self._keys.append((frame, hashlib.blake2b(frame, digest_size=16).digest()))
        return self._keys[-1][1]


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
        decoded: shared by clients of one process, so that each broadcast is decoded once.
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
        decoded: Decoded | None = None,
    ) -> None:
        self.index, self.learner, self.shard = index, learner, shard
        self._up, self._down = up, down
        self._own = _Shard(task, shard, seed, index)
        self._seed, self._local_epochs, self._local_steps = seed, local_epochs, local_steps
        self._decoded = decoded or Decoded()
        self._round = 0
        # Rounds that are no whole passes go on where the last one stopped.
        self._stream = _Stream(partial(self._own.epoch, 0))
        self.elsewhere = 0.0, 0.0  # seconds spent in other processes, and on coding there
        self.version = 0  # of the shared parameters that the client holds
        # What every client holds: the shared parameters at the start of the round.
        self._base: Mapping[str, Tensor] = learner.exchanged()
        self._base_digest: bytes | None = None  # once asked for
        self._at_base = True  # nothing was trained since

    def train(self, round_number: int, lr_share: float = 1.0) -> Losses:
        """Train for one round on the client's own data, with this share of the learning rates.

        Raises:
            ValueError: a loss or a parameter became NaN or Inf; names client and round.
        """
        self._round, self._at_base = round_number, False
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
                yield from self._own.epoch(self._round, epoch)
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
        return sum(1 for _ in self._own.epoch(0, 0))

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
            endless = _Stream(partial(self._own.epoch, self._round), _REFRESHING)
            batches = itertools.islice(endless, steps)
            self.learner.refresh(batches, lr_share)
        self._check(Losses(None, None))

    def absent(self, rounds: int) -> None:
        """Let what the client has still to send fade, where it missed rounds."""
        self._up.absent(rounds)

    def upload(self, energy: float, *, factor: float = 1.0) -> bytes:
        """Encode the update of the round: what is shared now minus the same at its start.

        Args:
            energy: share of the squared norm of the update to keep.
            factor: of the update. An honest client sends it as it is; -10 is an attack.

        Raises:
            ValueError: a parameter is NaN or Inf.
        """
        state: Mapping[str, Tensor] = self.learner.exchanged()
        if factor != 1.0:
            base = self._base
            state = {
                name: base[name] + factor * (value - base[name]) for name, value in state.items()
            }
        return self._up.encode(state, self._base, energy)

    def lost(self, frame: bytes) -> None:
        """Send what this round's frame held with the next one, if there is error feedback.

        Args:
            frame: what `upload` returned, and the server did not get.
        """
        if not self._up.lost(frame, self._base):
            self.learner.refused()

    def refused(self) -> None:
        """Learn that this round's reply does not count, for what it held."""
        self.learner.refused()

    def apply(self, *frames: bytes) -> None:
        """Roll the shared model back to the round's start and apply what the server sent.

        Args:
            frames: broadcasts in their order, or one frame with whole parameters.

        Raises:
            WireError: the bytes are damaged.
            ValueError: an update is meant for other parameters.
        """
        digest = self._base_digest or digest_of(self._base)
        found = self._decoded.get(frames, self._base, digest, self._applied)
        self._base, self._base_digest = found
        self._at_base = True
        self.learner.adopt(self._base)

    def _applied(self, frame: bytes, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if wire.header(frame).base is None:
            return decompress(frame, schema=base)
        return self._down.decode(frame, base)

    def state(self) -> Tree:
        """Return all that another client of the same index needs to go on; nothing is copied."""
        return {
            "round": self._round,
            "version": self.version,
            "stream": self._stream.state(),
            "learner": self.learner.state(),
            "up": self._up.state(),
            "down": self._down.state(),
            # As a rule the shared parameters are the base.
            "base": None if self._at_base else dict(self._base),
            "digest": None if self._base_digest is None else self._base_digest.hex(),
        }

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: the state is of other models.
        """
        self._round, self.version = state["round"], state["version"]
        self._stream.load(state["stream"])
        self.learner.load(state["learner"])
        self._up.load(state["up"])
        self._down.load(state["down"])
        self._at_base = state["base"] is None
        self._base = self.learner.exchanged() if self._at_base else state["base"]
        self._base_digest = None if state["digest"] is None else bytes.fromhex(state["digest"])

    def nbytes(self) -> int:
        """Return about what the client takes in memory: models, base, and what its legs keep."""
        kept = [dict(self._base), self._up.state(), self._down.state()]
        return self.learner.nbytes() + tensor_bytes(kept)

    def digest(self) -> bytes:
        """Return 16 bytes that identify what is shared."""
        return digest_of(self.learner.exchanged())

    def require(self, digest: bytes, version: int) -> None:
        """Hold what is shared against the server's, bit for bit, and take its version over.

        Raises:
            RuntimeError: they differ.
        """
        self.version = version
        if self.digest() != digest:
            raise RuntimeError(
                f"client {self.index} holds other shared parameters than the server after round "
                f"{version}"
            )
