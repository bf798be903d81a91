"""Both ends of a link that carries a model in rounds, whatever transport is between them.

Systems like Flower and NVFLARE send the whole weights w to clients and whole weights back. Here the
server's end (`Broadcaster`) and the client's end (`Receiver`) hold the same tensors h, bit for bit,
and only differences to them travel. With C a lossy codec and D what it decodes to::

    down: frame_v = C(w_v - h_{v-1} + e_{v-1});  h_v = h_{v-1} + D(frame_v);  e_v = what C left out
    up:   frame   = C(w' - h_v + r);             the server reads h_v + D(frame)

e and r are residuals of error feedback: what is left out of one message is sent with the next.
Every version is encoded once, however many clients receive it. Who holds the last version gets one
frame; who missed some gets those, or the whole model where that is smaller; who already holds the
newest, as in training after evaluation, gets none.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.codec.common import DTYPES, raw_entry
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decompress
from fedkd_fast.integrations.averages import can_be_averaged, counted, like
from fedkd_fast.integrations.letters import Compression as Compression
from fedkd_fast.integrations.letters import Letter as Letter
from fedkd_fast.integrations.letters import MissingBaseError as MissingBaseError
from fedkd_fast.tensors import (
    as_tensors,
    check_same_names,
    check_same_tensors,
    cloned,
    digest_of,
    tied_names,
)
from fedkd_fast.wire import Base, Entry, Mode

State = Mapping[str, Tensor]
_RUN_BITS = 63  # what signed integers of other systems can carry
# Of the model in raw form: an honest frame is never much larger than that.
_FRAME_SLACK, _FRAME_EXTRA = 1.1, 1 << 16
_HELD, _KEPT, _REPLIES = "held.", "kept.", "replies"  # in the state of a client


class Broadcaster:
    """The server's end: turns weights into letters, and replies into weights.

    Args:
        compression: of the way down.
        shared_start: every client can make the first weights itself, so they are not sent
            (`Receiver` takes a function for that, and checks what it makes).
        keep: most versions whose frames are kept for clients that missed some.

    Attributes:
        version: of the newest weights; 0 before the first.
        held: the newest weights as the clients hold them.
    """

    def __init__(
        self,
        compression: Compression | None = None,
        *,
        shared_start: bool = False,
        keep: int = 32,
    ) -> None:
        self.run = secrets.randbits(_RUN_BITS)
        self.version = 0
        self.held: dict[str, Tensor] = {}
        self._compressor = (compression or Compression()).compressor()
        self._whole = Compressor(codec="raw")
        self._shared_start, self._keep = shared_start, keep
        self._published: bytes | None = None  # digest of the weights, before coding
        self._frames: dict[int, bytes] = {}  # by the version that they lead to
        self._whole_frame: bytes | None = None
        self._known: dict[Hashable, int] = {}  # version by client, as far as it was confirmed
        self._replied: dict[Hashable, int] = {}  # number of the last reply that counts, by client
        self._failed: set[Hashable] = set()  # clients to which nothing may be left to make

    def publish(self, weights: Mapping[str, object]) -> int:
        """Make these weights the newest version, unless they are already; return its number.

        Integers that came back as floating numbers, as averages of counters do, are rounded.

        Raises:
            TypeError: a value is no dense tensor or array; names it.
            ValueError: NaN or Inf, or other names or shapes than before; names the first. Nothing
                is changed then.
        """
        tensors = as_tensors(weights, "weights")
        if self.held:
            check_same_names(tensors, self.held, "weights of the version before")
            tensors = {name: like(name, tensors[name], held) for name, held in self.held.items()}
            check_same_tensors(tensors, self.held, "weights of the version before")
        digest = digest_of(tensors)
        if digest == self._published:
            return self.version
        if self.version == 0:
            # Not the caller's: who trains in place would change what the clients hold.
            self.held = cloned(tensors)
        else:
            base, before = Base(run=self.run, round=self.version), self._compressor.state_dict()
            most = max(_dense(self.held), 1)
            try:
                frame = self._compressor.compress(tensors, base=self.held, relative_to=base)
                held = decompress(frame, self.held, self.held, relative_to=base, max_bytes=most)
            except BaseException:
                self._compressor.load_state_dict(before)
                raise
            self.held, self._frames[self.version + 1] = held, frame
            self._frames.pop(self.version + 1 - self._keep, None)
        self.version += 1
        self._published, self._whole_frame = digest, None
        return self.version

    def letter(self, client: Hashable) -> Letter:
        """Return what brings a client to the newest version, in the fewest bytes.

        Until `confirm` says so, nothing that was sent counts as received.

        Raises:
            ValueError: nothing was published yet.
        """
        if not self.version:
            raise ValueError("publish must come before letter: there are no weights yet")
        frames, digest = self._frames_for(client)
        return Letter(self.run, self.version, frames, digest, self._replied.get(client, 0))

    def _frames_for(self, client: Hashable) -> tuple[tuple[bytes, ...], bytes]:
        known = self._known.get(client)
        if known == self.version:
            return (), b""
        if self.version == 1 and self._shared_start and client not in self._failed:
            return (), digest_of(self.held)
        if known is not None:
            missed = [self._frames.get(one) for one in range(known + 1, self.version + 1)]
            frames = tuple(frame for frame in missed if frame is not None)
            if len(frames) == len(missed) and sum(map(len, frames)) < _dense(self.held):
                return frames, b""
        if self._whole_frame is None:
            self._whole_frame = self._whole.compress(self.held)
        return (self._whole_frame,), b""

    def confirm(self, client: Hashable, version: int, *, reply: int | None = None) -> None:
        """Note which version a client says it holds.

        Args:
            client: as in `letter`.
            version: of the weights.
            reply: number of the reply that it was said with, if that counts.

        Raises:
            ValueError: there is no such version.
        """
        if not 1 <= version <= self.version:
            raise ValueError(f"version must lie in [1, {self.version}], got {version}")
        self._known[client] = version
        if reply is not None:
            self._replied[client] = reply

    def forget(self, client: Hashable) -> None:
        """Send the whole model next time: the client failed, or may have lost what it held."""
        self._known.pop(client, None)
        self._failed.add(client)

    def weights(self, frame: bytes) -> dict[str, Tensor]:
        """Return the weights that a client's reply stands for: ``h + D(frame)``.

        Raises:
            WireError: the bytes are damaged, hold NaN or Inf, or are more than the model.
            ValueError: made against another version, or for other tensors, or with numbers that
                averages cannot hold.
        """
        return self._decoded(frame, self.held)

    def differences(self, frame: bytes) -> dict[str, Tensor]:
        """Return the differences that a client's reply stands for: ``D(frame)``.

        Raises:
            WireError, ValueError: as `weights`.
        """
        return self._decoded(frame, None)

    def _decoded(self, frame: bytes, base: State | None) -> dict[str, Tensor]:
        dense = _dense(self.held)
        most = int(_FRAME_SLACK * dense) + _FRAME_EXTRA
        if len(frame) > most:
            raise wire.WireError(f"a reply must be at most {most} bytes, got {len(frame)}")
        version = Base(run=self.run, round=self.version)
        found = decompress(frame, self.held, base, relative_to=version, max_bytes=max(dense, 1))
        for name, value in found.items():
            if not can_be_averaged(value, None if base is None else base[name]):
                raise ValueError(f"{name!r} holds numbers that averages cannot hold")
        return found


class Receiver:
    """The client's end: turns letters into weights, and trained weights into replies.

    Args:
        compression: of the way up.
        initial: makes the first weights, where the server does not send them (`shared_start`).

    Attributes:
        version: of the weights it holds; 0 before the first letter.
    """

    def __init__(
        self,
        compression: Compression | None = None,
        initial: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        self.version, self._run = 0, 0
        self._replies = 0  # made in this run
        self._held: dict[str, Tensor] = {}
        self._initial = initial
        self._compressor = (compression or Compression()).compressor()

    def receive(self, letter: Letter) -> dict[str, Tensor]:
        """Return the weights of the letter's version; they are the caller's to change.

        Raises:
            WireError: the bytes are damaged.
            MissingBaseError: the letter builds on weights that are not held here.
            ValueError: it is for other tensors.
        """
        held, version = self._held, self.version
        if letter.run != self._run:
            held, version = {}, 0
        whole = bool(letter.frames) and wire.header(letter.frames[0]).base is None
        if whole:
            held, version = _whole(letter.frames[0], like=held or None), letter.version
        elif letter.digest and version == 0:
            held, version = self._first(letter.digest), letter.version
        else:
            # A message that the server takes for lost may have come: what it brought is held.
            start = letter.version - len(letter.frames)
            if not max(start, 1) <= version <= letter.version:
                raise MissingBaseError(
                    f"the server's message leads from version {start} of the weights to "
                    f"{letter.version}, but version {version} is held here: the whole model must "
                    "be sent"
                )
            most = max(_dense(held), 1)
            for frame in letter.frames[version - start :]:
                base = Base(run=letter.run, round=version)
                held = decompress(frame, held, held, relative_to=base, max_bytes=most)
                version += 1
        if letter.run != self._run or letter.replied > self._replies:
            # Residuals of another run are of no use. Those of a state that is older than a reply
            # which the server has would be sent once more.
            self._compressor.load_state_dict({})
            self._replies = letter.replied
        self._held, self.version, self._run = held, version, letter.run
        return cloned(held)

    def _first(self, digest: bytes) -> dict[str, Tensor]:
        if self._initial is None:
            raise MissingBaseError(
                "the server does not send its first weights, and initial= was not given here"
            )
        found = as_tensors(self._initial(), "initial")
        if digest_of(found) != digest:
            raise MissingBaseError(
                f"initial= makes weights {digest_of(found).hex()}, the server's first ones are "
                f"{digest.hex()}: both must come from the same seed or file"
            )
        return cloned(found)

    def reply(self, weights: Mapping[str, object], *, differences: bool = False) -> bytes:
        """Encode what was trained, less what was received.

        Args:
            weights: after training.
            differences: they are less what was received already, and are taken for numbers of its
                dtypes. The server reads them with `Broadcaster.differences`.

        Raises:
            TypeError: a value is no dense tensor or array; names it.
            ValueError: NaN or Inf, or other names, shapes or dtypes than were received.
        """
        if not self.version:
            raise MissingBaseError("there is nothing to compare with: receive comes before reply")
        base = Base(run=self._run, round=self.version)
        if not differences:
            # Counters of a model may be held as the averages that they began with.
            trained = {
                name: counted(name, value, self._held.get(name)) for name, value in weights.items()
            }
            frame = self._compressor.compress(trained, base=self._held, relative_to=base)
            self._replies += 1
            return frame
        found = as_tensors(weights, "the reply", finite=False)
        check_same_names(found, self._held, "what was received")
        update = {name: like(name, found[name], held) for name, held in self._held.items()}
        check_same_tensors(update, self._held, "what was received")
        frame = self._compressor.compress(update, relative_to=base)
        self._replies += 1
        return frame

    @property
    def replies(self) -> int:
        """Number of the last reply, counted in this run."""
        return self._replies

    @property
    def run(self) -> int:
        """The run whose weights are held; 0 before the first letter."""
        return self._run

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The weights of that version as they were received; not to be changed."""
        return self._held

    @property
    def digest(self) -> bytes:
        """16 bytes that identify the weights that are held."""
        return digest_of(self._held)

    def state(self) -> bytes:
        """Return all that another process needs to go on, as one frame."""
        kept = {_HELD + name: value for name, value in self._held.items()}
        kept |= {_KEPT + name: value for name, value in self._compressor.state_dict().items()}
        kept[_REPLIES] = torch.tensor(self._replies, device="cpu")
        places = {name: index for index, name in enumerate(kept)}
        tied = tied_names(kept)  # residuals stay one where they were one
        entries = [
            Entry(name, DTYPES[value.dtype], tuple(value.shape), Mode.ALIAS, places[tied[name]])
            if name in tied
            else raw_entry(name, value, copy=False)
            for name, value in kept.items()
        ]
        return wire.encode(entries, base=Base(run=self._run, round=self.version))

    def load(self, state: bytes) -> None:
        """Go on where `state` was taken.

        Raises:
            WireError: the bytes are damaged.
            ValueError, TypeError: the state of another kind of link. Nothing is changed then.
        """
        base = wire.header(state).base
        if base is None or base.run is None or base.round is None:
            raise ValueError("state must be what Receiver.state returned: it names no run")
        kept = _whole(state, base)
        found: dict[str, dict[str, Tensor]] = {_HELD: {}, _KEPT: {}, _REPLIES: {}}
        for name, value in kept.items():
            prefix = next((one for one in found if name.startswith(one)), None)
            if prefix is None:
                raise ValueError(f"state must be what Receiver.state returned: it has {name!r}")
            found[prefix][name.removeprefix(prefix)] = value
        replies = found[_REPLIES].get("")
        if replies is None or replies.numel() != 1:
            raise ValueError("state must be what Receiver.state returned: it lacks 'replies'")
        self._compressor.load_state_dict(found[_KEPT])
        self._run, self.version, self._held = base.run, base.round, found[_HELD]
        self._replies = int(replies)


def _dense(state: State) -> int:
    return sum(value.nbytes for value in state.values())


def _whole(frame: bytes, base: Base | None = None, like: State | None = None) -> dict[str, Tensor]:
    """Decode a whole model or state, which is about as long as what it says, however large it is.

    Args:
        frame: of raw tensors.
        base: that it names.
        like: tensors that it must be of, where they are known; they bound what it takes.
    """
    most = max(wire.DEFAULT_MAX_BYTES, 2 * len(frame))
    return decompress(frame, like, relative_to=base, max_bytes=most)
