"""The server: averages the clients' updates and broadcasts the mean, compressed once more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkd_fast.aggregation import Aggregate
from fedkd_fast.codec.common import all_finite
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import NotFiniteError
from fedkd_fast.legs import Leg
from fedkd_fast.privacy import GaussianMean
from fedkd_fast.robust import Rule, check_rule, robust_mean
from fedkd_fast.tensors import digest_of, specs_of
from fedkd_fast.trees import Tree
from fedkd_fast.updates import Client, Update, largest, squared_norm, written
from fedkd_fast.wire import Base, TensorSpec

MOST_SQUARED = 1e19  # the square of a float32 beyond that is infinite


@dataclass
class ServerOptimizer:
    """What the server makes of a mean update g before it broadcasts it.

    ``none``: ``η·g``. ``momentum`` (FedAvgM, Hsu et al. 2019): ``v ← β·v + g; η·v``. ``adam``
    (FedAdam, Reddi et al. 2021, without bias correction, as there)::

        m ← β·m + (1-β)·g; s ← 0.99·s + 0.01·g²; η·m/(√s + ε)

    Integers and booleans are passed on as they are, and so is what is no parameter (`averaged`).
    """

    kind: str = "none"  # none, momentum or adam
    lr: float = 1.0  # η: more moves the shared model further than the clients' mean did
    momentum: float = 0.9  # β: more remembers earlier rounds longer
    epsilon: float = 1e-3  # ε: more damps entries with small updates
    averaged: tuple[str, ...] = ()  # beginnings of names of means that are broadcast as they are
    _first: dict[str, Tensor] = field(default_factory=dict)
    _second: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("none", "momentum", "adam"):
            raise ValueError(f"kind must be none, momentum or adam, got {self.kind!r}")

    @property
    def identity(self) -> bool:
        """Whether nothing is changed."""
        return self.kind == "none" and self.lr == 1.0

    @property
    def gain(self) -> float:
        """How far an update moves parameters in all rounds, over its own length; adam's own: 1."""
        if self.kind == "momentum":
            return self.lr / max(1.0 - self.momentum, 1e-3)
        return self.lr if self.kind == "none" else 1.0

    def step(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the update to broadcast, and remember."""
        return {
            name: self._step(name, value) if self._concerns(name, value) else value
            for name, value in mean.items()
        }

    def state(self) -> Tree:
        """Return the moments; the tensors are shared, not copied."""
        return {"first": dict(self._first), "second": dict(self._second)}

    def load(self, state: Tree) -> None:
        """Go on with these moments."""
        self._first, self._second = dict(state["first"]), dict(state["second"])

    def _concerns(self, name: str, mean: Tensor) -> bool:
        return mean.is_floating_point() and not name.startswith(self.averaged)

    def _step(self, name: str, mean: Tensor) -> Tensor:
        if self.kind == "none":
            return mean * self.lr
        first = self._first.setdefault(name, torch.zeros_like(mean))
        if self.kind == "momentum":
            first.mul_(self.momentum).add_(mean)
            return first * self.lr
        second = self._second.setdefault(name, torch.zeros_like(mean))
        first.lerp_(mean, 1.0 - self.momentum)
        second.mul_(0.99).addcmul_(mean, mean, value=0.01)
        return self.lr * first / (second.sqrt() + self.epsilon)


class Server:
    """Keeps the shared parameters in step with the clients.

    Args:
        parameters: the shared parameters at the start, the same at every client.
        up: decodes and averages updates.
        down: encodes the broadcast; its own, because it may keep state.
        optimizer: what becomes of the mean; None changes nothing.
        rule: which mean of decoded updates it is, see `robust`; ``mean`` adds up factors as they
            come.
        private: takes the mean instead, with clipping and noise.
        asked: clients that take part in a round. What the optimizer only passes on (`averaged`) is
            the sum of their updates, each alike, over that number, however many reply: they are
            changes to a mean over all clients. None: over those that reply.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        up: Leg,
        down: Leg,
        optimizer: ServerOptimizer | None = None,
        rule: str = "mean",
        private: GaussianMean | None = None,
        asked: int | None = None,
    ) -> None:
        self._parameters: Mapping[str, Tensor] = dict(parameters)
        self._up, self._down = up, down
        self._optimizer = optimizer or ServerOptimizer()
        self._rule: Rule = check_rule(rule, "aggregation")
        self._private, self._asked = private, asked
        self.version = 0
        # Of the round's updates, before the optimizer and the codec of the broadcast.
        self.mean: Mapping[str, Tensor] = {}
        self.left_out: dict[int, str] = {}  # whom the last mean did not use in full, and why
        self._sent: dict[int, bytes] = {}  # what led to each version, as long as it may be replayed
        # The parameters of this version as a frame, and their digest, once asked for.
        self._whole: bytes | None = None
        self._digest: bytes | None = None
        self._rooms: dict[str, float] = {}  # by parameter of this version, see `_room`

    def schemas(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Return names, dtypes and shapes in frames of updates, and in those of broadcasts."""
        up, down = self._up.schema(self._parameters), self._down.schema(self._parameters)
        return specs_of(up), specs_of(down)

    def expected(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what tensors frames of updates hold, and the parameters they are made against."""
        return self._up.schema(self._parameters), self._parameters

    def norm(self, frame: bytes) -> float:
        """Return the L2 norm of the update in a frame, which is decoded for it.

        Raises:
            WireError: the frame is damaged, or holds NaN or Inf, or takes parameters there.
            ValueError: it does not fit the shared parameters.
        """
        update = self._up.update(frame, self._parameters)
        norm, gain = math.sqrt(squared_norm(update)), self._optimizer.gain
        most = MOST_SQUARED if self._optimizer.kind == "adam" else math.inf
        for name, value in self._parameters.items():
            # No element of an update is longer than all of it, which mostly is short enough.
            if name not in update or not value.is_floating_point():
                continue
            if norm * gain > self._room(name) or norm > most:
                moved = written(update[name], tuple(value.shape))
                there = (value.double() + gain * moved).to(value.dtype)
                if not all_finite(there) or largest(moved) > most:
                    raise NotFiniteError(f"the update takes {name!r} beyond {value.dtype}")
        return norm

    def _room(self, name: str) -> float:
        """Return how far any element of a parameter can go before its dtype ends."""
        if name not in self._rooms:
            value = self._parameters[name]
            self._rooms[name] = torch.finfo(value.dtype).max - largest(value)
        return self._rooms[name]

    def step(
        self,
        frames: Sequence[bytes] | Mapping[int, bytes],
        energy: float,
        weights: Sequence[float] | None = None,
    ) -> bytes:
        """Turn one round's uploads into the broadcast.

        ``g = Σ_i w_i·decode(frame_i) / Σ_i w_i``, unweighted in Algorithm 1 of the paper; what the
        optimizer makes of g is encoded with the same energy, and what that decodes to is what
        server and clients add. Of what is no parameter, g is as ``asked`` says.

        Raises:
            WireError: a frame is damaged.
            ValueError: a frame does not fit the shared parameters.
        """
        named = frames if isinstance(frames, Mapping) else dict(enumerate(frames))
        mean = self.mean = self._balanced(named, weights)
        if not self._optimizer.identity:
            mean = Aggregate(self._optimizer.step(mean), mean.relative_to, mean.refused)
        broadcast = self._down.encode_mean(mean, self._parameters, energy)
        self._parameters = self._down.decode(broadcast, self._parameters)
        self.version += 1
        self._sent[self.version], self._whole, self._digest = broadcast, None, None
        self._rooms.clear()
        self._forget()
        return broadcast

    def _balanced(self, frames: Mapping[int, bytes], weights: Sequence[float] | None) -> Aggregate:
        """Return the mean, in which what is no parameter counts alike and over all that were asked.

        With noise, weights have no meaning, and the mean is over the expected number as it is.
        """
        averaged, asked = self._optimizer.averaged, self._asked or len(frames)
        alike = weights is None and len(frames) == asked
        if alike or not averaged or self._private is not None:
            return self._mean(frames, weights)
        share = len(frames) / asked
        plain = self._mean(frames, None)
        mean = plain if weights is None else self._mean(frames, weights)
        values = {
            name: plain[name] * share if name.startswith(averaged) else mean[name] for name in mean
        }
        return Aggregate(values, mean.relative_to, mean.refused)

    def _mean(self, frames: Mapping[int, bytes], weights: Sequence[float] | None) -> Aggregate:
        base, self.left_out = self._parameters, {}
        if self._private is None and self._rule.kind == "mean":
            return self._up.mean(list(frames.values()), base, weights)
        updates: dict[Client, Update] = {
            client: self._up.update(frame, base) for client, frame in frames.items()
        }
        if self._private is not None:
            values = self._private.mean(updates, base)
        else:
            shares: dict[Client, float] | None = None
            if weights is not None:
                shares = dict(zip(frames, weights, strict=True))
            found = robust_mean(updates, self._rule, like=base, weights=shares)
            values = found.values
            self.left_out = {int(one): f"left out by {self._rule.text}" for one in found.left_out}
            for client, scale in found.clipped.items():
                self.left_out[int(client)] = f"scaled by {scale:.4g} to the norm of the rule"
        return Aggregate(values, Base(digest=self.digest()), {})

    def catch_up(self, version: int) -> list[bytes]:
        """Return what takes a client from an older version to this one, in the fewest bytes.

        That is every broadcast it missed, or one frame with the whole parameters.
        """
        if version == self.version:
            return []
        if self._whole is None:
            self._whole = Compressor(codec="raw", schema=False).compress(self._parameters)
        missed = [self._sent.get(number) for number in range(version + 1, self.version + 1)]
        known = [frame for frame in missed if frame is not None]
        if len(known) < len(missed) or sum(map(len, known)) > len(self._whole):
            return [self._whole]
        return known

    def _forget(self) -> None:
        """Drop broadcasts that nobody would be sent: the later ones alone outweigh the model."""
        total, most = 0, sum(value.nbytes for value in self._parameters.values())
        for number in sorted(self._sent, reverse=True):
            if total > most:
                del self._sent[number]
            else:
                total += len(self._sent[number])

    def epsilon(self, rounds: int) -> float:
        """Return ε of differential privacy after so many rounds; infinite without noise."""
        return math.inf if self._private is None else self._private.epsilon(rounds)

    def state(self) -> Tree:
        """Return all that another server needs to go on; nothing is copied."""
        return {
            "version": self.version,
            "parameters": dict(self._parameters),
            "sent": dict(self._sent),
            "optimizer": self._optimizer.state(),
            "up": self._up.state(),
            "down": self._down.state(),
            # As text: its integers are longer than other readers of JSON know.
            "private": None if self._private is None else json.dumps(self._private.state_dict()),
        }

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        self.version, self._parameters = state["version"], state["parameters"]
        self._sent, self._whole, self._digest = state["sent"], None, None
        self._rooms.clear()
        self._optimizer.load(state["optimizer"])
        self._up.load(state["up"])
        self._down.load(state["down"])
        if self._private is not None:
            self._private.load_state_dict(json.loads(state["private"]))

    def digest(self) -> bytes:
        """Return 16 bytes that identify the shared parameters."""
        if self._digest is None:
            self._digest = digest_of(self._parameters)
        return self._digest
