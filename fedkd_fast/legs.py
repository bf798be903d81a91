"""The two directions of the exchange: how parameters become bytes, bytes updates, updates means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedkd_fast.aggregation import Aggregate, aggregate
from fedkd_fast.codec.common import all_finite
from fedkd_fast.codec.decode import Parts, backend_named
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import (
    NotFiniteError,
    decode_frame,
    decode_frame_parts,
    decompress,
)
from fedkd_fast.feedback import ErrorFeedback
from fedkd_fast.methods.packing import Packing
from fedkd_fast.tensors import digest_of
from fedkd_fast.trees import Tree
from fedkd_fast.updates import check_weights
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base

State = Mapping[str, Tensor]


class Leg(Protocol):
    """One direction of the exchange, seen from one sender; it may keep state."""

    def encode(self, state: State, base: State, energy: float) -> bytes:
        """Encode ``state - base``, of which ``energy`` is kept where the codec can choose."""

    def encode_mean(self, mean: Aggregate, base: State, energy: float) -> bytes:
        """Encode a mean of updates."""

    def decode(self, frame: bytes, base: State) -> dict[str, Tensor]:
        """Return what a frame of this kind of leg turns ``base`` into.

        Raises:
            WireError: the bytes are damaged.
            ValueError: the frame was made against another base, or for other tensors.
        """

    def mean(
        self, frames: Sequence[bytes], base: State, weights: Sequence[float] | None
    ) -> Aggregate:
        """Return the weighted mean of the updates in frames of this kind of leg."""

    def schema(self, base: State) -> State:
        """Return what names, shapes and dtypes the frames have."""

    def update(self, frame: bytes, base: State) -> dict[str, Parts]:
        """Return the update in a frame, of small rank as factors (left (R, P), right (R, Q)).

        Raises:
            NotFiniteError: it holds NaN or Inf.
            WireError: the bytes are damaged.
            ValueError: the frame was made against another base, or for other tensors.
        """

    def absent(self, rounds: int) -> None:
        """Let what is still to be sent fade, where the sender missed rounds."""

    def lost(self, frame: bytes, base: State) -> bool:
        """Send with the next message, too, what this one held: it did not arrive.

        Returns whether it will be: there is error feedback.
        """

    def state(self) -> Tree:
        """Return what the sender keeps between messages; the tensors are shared, not copied."""

    def load(self, state: Tree) -> None:
        """Go on where `state` of such a leg was taken."""


class CompressorLeg:
    """Frames of a `Compressor`."""

    def __init__(self, compressor: Compressor, feedback: ErrorFeedback | None = None) -> None:
        """Keep the compressor, and the error feedback that it was made with."""
        self._compressor, self._feedback = compressor, feedback

    def encode(self, state: State, base: State, energy: float) -> bytes:
        """Encode ``state - base``."""
        return self._compressor.compress(state, base=base, energy=energy)

    def encode_mean(self, mean: Aggregate, base: State, energy: float) -> bytes:
        """Encode a mean, as factors where it is made of few."""
        return mean.recompress(self._compressor, energy=energy)

    def decode(self, frame: bytes, base: State) -> dict[str, Tensor]:
        """Decode a frame against its base."""
        return decompress(frame, schema=base, base=base)

    def mean(
        self, frames: Sequence[bytes], base: State, weights: Sequence[float] | None
    ) -> Aggregate:
        """Average frames, as factors where these are few."""
        relative_to = Base(digest=digest_of(base))
        return aggregate(frames, weights, schema=base, relative_to=relative_to, strict=True)

    def schema(self, base: State) -> State:
        """Return the tensors themselves."""
        return base

    def update(self, frame: bytes, base: State) -> dict[str, Parts]:
        """Decode a frame but for its base and the products of factors."""
        found, made_against = decode_frame_parts(
            frame,
            base,
            schema_name="base",
            max_bytes=DEFAULT_MAX_BYTES,
            module=backend_named("native"),
        )
        _check_made_against(made_against, Base(digest=digest_of(base)))
        return {entry.name: parts for entry, parts in found}

    def absent(self, rounds: int) -> None:
        """Let the residuals decay."""
        if self._feedback is not None:
            self._feedback.absent(rounds)

    def lost(self, frame: bytes, base: State) -> bool:
        """Add what the frame held to the residuals, and say whether there are any."""
        if self._feedback is not None:
            self._feedback.lost(frame, base)
        return self._feedback is not None

    def state(self) -> Tree:
        """Return the residuals."""
        return None if self._feedback is None else self._feedback.state_dict()

    def load(self, state: Tree) -> None:
        """Take the residuals over."""
        if self._feedback is not None:
            self._feedback.load_state_dict(state)


class PackedLeg:
    """Frames of the tensors that a `Packing` makes, with or without error feedback.

    Args:
        packing: turns updates into what is sent.
        feedback: add what one message left out to the next.
        decay: share of that which is added.
    """

    def __init__(self, packing: Packing, *, feedback: bool, decay: float = 1.0) -> None:
        self._packing = packing
        self._feedback = ErrorFeedback(decay) if feedback else None
        self._raw = Compressor(codec="raw", schema=False)

    def encode(self, state: State, base: State, energy: float) -> bytes:
        """Encode ``state - base``; the energy has no meaning here."""
        return self._encode({name: value - base[name] for name, value in state.items()}, base)

    def encode_mean(self, mean: Aggregate, base: State, energy: float) -> bytes:
        """Encode a mean; the energy has no meaning here."""
        return self._encode(dict(mean), base)

    def _encode(self, update: State, base: State) -> bytes:
        feedback = self._feedback
        if feedback is not None:
            feedback.absent()
            update = {name: feedback.add(name, value) for name, value in update.items()}
        packed = self._packing.pack(update)
        frame = self._raw.compress(packed, relative_to=Base(digest=digest_of(base)))
        if feedback is not None:
            for name, decoded in self._packing.unpack(packed, update).items():
                feedback.keep(name, update[name], decoded)
        return frame

    def _update(self, frame: bytes, base: State, relative_to: Base) -> dict[str, Tensor]:
        """Decode a frame without its base, which must be this one."""
        packed, made_against = decode_frame(frame, self.schema(base))
        _check_made_against(made_against, relative_to)
        update = self._packing.unpack(packed, base)
        for name, value in update.items():
            # Products of finite parts may overflow, and one of them would poison a mean.
            if not all_finite(value):
                raise NotFiniteError(f"tensor {name!r} decodes to NaN or Inf")
        return update

    def decode(self, frame: bytes, base: State) -> dict[str, Tensor]:
        """Decode a frame against its base."""
        update = self._update(frame, base, Base(digest=digest_of(base)))
        return {name: value + update[name] for name, value in base.items()}

    def mean(
        self, frames: Sequence[bytes], base: State, weights: Sequence[float] | None
    ) -> Aggregate:
        """Average what frames decode to, in float64."""
        relative_to = Base(digest=digest_of(base))
        given = dict(enumerate([1.0] * len(frames) if weights is None else weights))
        shares = list(check_weights(given).values())
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in base.items()}
        for frame, share in zip(frames, shares, strict=True):
            for name, value in self._update(frame, base, relative_to).items():
                total[name].add_(value, alpha=share / sum(shares))
        means = {name: value.to(base[name].dtype) for name, value in total.items()}
        return Aggregate(means, relative_to, {})

    def schema(self, base: State) -> State:
        """Return what the packing makes of nothing."""
        return self._packing.layout(base)

    def update(self, frame: bytes, base: State) -> dict[str, Parts]:
        """Decode a frame but for its base."""
        return dict(self._update(frame, base, Base(digest=digest_of(base))))

    def lost(self, frame: bytes, base: State) -> bool:
        """Add what the frame held to the residuals, and say whether there are any."""
        if self._feedback is not None:
            self._feedback.lost(self._update(frame, base, Base(digest=digest_of(base))))
        return self._feedback is not None

    def state(self) -> Tree:
        """Return the residuals and what the packing keeps."""
        residuals = None if self._feedback is None else self._feedback.state_dict()
        return {"residuals": residuals, "packing": self._packing.state()}

    def load(self, state: Tree) -> None:
        """Take both over."""
        if self._feedback is not None:
            self._feedback.load_state_dict(state["residuals"])
        self._packing.load(state["packing"])

    def absent(self, rounds: int) -> None:
        """Let the residuals decay."""
        if self._feedback is not None:
            self._feedback.absent(rounds)


def _check_made_against(found: Base | None, wanted: Base) -> None:
    if found != wanted:
        raise ValueError(
            f"base does not match: the frame was made against {found}, the receiver has {wanted}"
        )
