"""Frames sealed and opened: the format, and the order of what is checked."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from fedkd_fast.sealing._keys import KEY_BYTES, MOST, PrivateKey, PublicKey, Secret, described

if TYPE_CHECKING:
    from typing_extensions import Buffer

Reason: TypeAlias = Literal[
    "short",
    "long",
    "version",
    "other direction",
    "other client",
    "damaged",
    "replayed",
    "reordered",
    "other round",
]
Side: TypeAlias = Literal["server", "client"]
_Direction: TypeAlias = Literal["up", "down"]

_MAGIC, _VERSION = b"FKS1", 1
_LABEL = b"fedkd_fast sealed frame 1"
# Magic, version, direction, client, round, counter, nonce.
_HEADER = struct.Struct("<4sBBIII12s")
_NAMES = struct.Struct("<BI")  # direction and client, in the derivation of a key
_DIRECTIONS: tuple[_Direction, _Direction] = ("up", "down")
_NONCE_BYTES, _TAG_BYTES = 12, 16
# Counters of messages that did not come, the last so many, to tell late ones from repeated ones.
_MISSED = 32

SEAL_BYTES = _HEADER.size + _TAG_BYTES
"""What sealing adds to a frame of any size."""
MAX_FRAME_BYTES = 2**31 - 1 - _TAG_BYTES
"""The longest frame that can be sealed."""


class SealError(ValueError):
    """A sealed frame is refused.

    Attributes:
        reason: ``short`` or ``long``: its size; ``version``: of another format, or not sealed at
            all; ``other direction``: for the other side; ``other client``: its header names another
            one; ``damaged``: changed on the way, or sealed with other keys or for another run;
            ``replayed``: accepted before; ``reordered``: older than one that was accepted;
            ``other round``: sealed for another one. Reasons before ``damaged`` are what an
            unverified header says, those after it what the peer has sealed.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        # Both are arguments of the base, so that the error can travel between processes.
        super().__init__(message, reason)
        self.reason: Reason = reason

    def __str__(self) -> str:
        """Return the message alone."""
        return str(self.args[0])


class Channel(Secret):
    """Both directions between the server and one client in one run, seen from one side.

    Counters of messages only rise, over the whole run; gaps are allowed, because messages may get
    lost. One that is refused changes nothing, so that the right one can still come. Each side keeps
    its own counters: a receiver that starts anew without its `state` accepts old messages again,
    and a sender without its `state` is taken for a replay.

    Args:
        key: of this side.
        peer: the other side's, known beforehand by a way that can be trusted.
        run: names the run, equal on both sides and never used for another run of the same keys;
            16 random bytes will do. It need not be secret.
        client: number of the client, 0 to 2^32 - 1.
        side: who holds this object.

    Raises:
        ValueError: an argument is out of range, or ``peer`` is the public half of ``key``.
    """

    def __init__(
        self, key: PrivateKey, peer: PublicKey, *, run: bytes, client: int, side: Side
    ) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        if side not in get_args(Side):
            raise ValueError(f"side must be server or client, got {side!r}")
        if not isinstance(run, bytes) or not run:
            raise ValueError(f"run must be at least one byte, got {described(run)}")
        if peer == key.public:
            raise ValueError(f"peer must be the other side's key, got this side's own: {peer}")
        self._client, self._run = _number("client", client), run
        self._sends, self._receives = _DIRECTIONS if side == "client" else _DIRECTIONS[::-1]
        server_key, client_key = (peer, key.public) if side == "client" else (key.public, peer)
        shared = key.agree(peer)

        def cipher(direction: _Direction) -> AESGCM:
            names = _NAMES.pack(_DIRECTIONS.index(direction), client)
            # The run once more: as a salt, HMAC takes it for the same with zeros behind it.
            info = b"".join((_LABEL, server_key.raw, client_key.raw, names, run))
            return AESGCM(HKDF(SHA256(), KEY_BYTES, salt=run, info=info).derive(shared))

        self._sealer, self._opener = cipher(self._sends), cipher(self._receives)
        self._sent = self._accepted = 0  # the highest counters; the first message has 1
        self._missed: list[int] = []

    def seal(self, frame: Buffer, round: int) -> bytes:
        """Encrypt a frame for the peer.

        Equal frames give different bytes: nonces are random, so that a round that is done again
        after a crash never meets a nonce again.

        Args:
            frame: any bytes, at most `MAX_FRAME_BYTES`.
            round: number of the round, 0 to 2^32 - 1.

        Returns:
            `SEAL_BYTES` more bytes than the frame has.

        Raises:
            ValueError: the round is out of range, the frame is too long, or 2^32 - 1 messages have
                been sealed.
            TypeError: the frame is no contiguous bytes.
        """
        plain = _view("frame", frame)
        if len(plain) > MAX_FRAME_BYTES:
            raise ValueError(f"frame must be at most {MAX_FRAME_BYTES} bytes, got {len(plain)}")
        # No more random nonces than these are safe under one key (NIST SP 800-38D, 8.3).
        counter = _number("messages of this run", self._sent + 1)
        nonce = os.urandom(_NONCE_BYTES)
        header = _HEADER.pack(
            *(_MAGIC, _VERSION, _DIRECTIONS.index(self._sends)),
            *(self._client, _number("round", round), counter, nonce),
        )
        sealed = self._sealer.encrypt(nonce, plain, header + self._run)
        self._sent = counter
        return b"".join((header, sealed))

    def open(self, sealed: Buffer, round: int, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """Decrypt what the peer has sealed for this side and this round.

        Memory is that of the frame. What was not verified is never handed out.

        Args:
            sealed: what `seal` returned, any bytes.
            round: number of the round that it must have been sealed for.
            max_bytes: refuse a longer frame before anything is done with it.

        Raises:
            SealError: it is something else, see `SealError.reason`; the message names client,
                round, direction and what was expected.
            ValueError: the round is out of range.
            TypeError: it is no contiguous bytes.
        """
        from cryptography.exceptions import InvalidTag

        _number("round", round)
        data = _view("sealed", sealed)

        def refused(reason: Reason, found: str) -> SealError:
            place = f"client {self._client}, round {round}, {self._receives}"
            return SealError(f"sealed frame refused ({place}): {found}", reason)

        if len(data) < SEAL_BYTES:
            raise refused("short", f"at least {SEAL_BYTES} bytes expected, got {len(data)}")
        most = SEAL_BYTES + min(max_bytes, MAX_FRAME_BYTES)
        if len(data) > most:
            raise refused("long", f"at most {most} bytes expected, got {len(data)}")
        header = bytes(data[: _HEADER.size])
        magic, version, direction, client, of_round, counter, nonce = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise refused("version", f"magic {_MAGIC!r} expected: this is not a sealed frame")
        if version != _VERSION:
            raise refused("version", f"version {_VERSION} expected, got {version}")
        wanted = _DIRECTIONS.index(self._receives)
        if direction != wanted:
            found = f"direction {self._receives} ({wanted}) expected, got {direction}"
            raise refused("other direction", found)
        if client != self._client:
            raise refused("other client", f"client {self._client} expected, got {client}")
        try:
            frame = self._opener.decrypt(nonce, data[_HEADER.size :], header + self._run)
        except InvalidTag:
            found = "changed on the way, or not sealed with the expected keys for the expected run"
            raise refused("damaged", found) from None
        # Only now: whoever sends rubbish must not make it look as if the peer had repeated itself.
        if counter in self._missed:
            found = f"a counter above {self._accepted} expected, message {counter} came too late"
            raise refused("reordered", found)
        if counter <= self._accepted:
            found = f"a counter above {self._accepted} expected, message {counter} was accepted"
            raise refused("replayed", found)
        if of_round != round:
            raise refused("other round", f"round {round} expected, got {of_round}")
        skipped = range(max(self._accepted + 1, counter - _MISSED), counter)
        self._missed = [*self._missed, *skipped][-_MISSED:]
        self._accepted = counter
        return frame

    def state(self) -> dict[str, Any]:
        """Return the counters, for JSON: ``sent``, ``accepted``, and ``missed`` below the latter.

        They hold nothing secret, but whoever can set them back can replay messages.
        """
        return {"sent": self._sent, "accepted": self._accepted, "missed": list(self._missed)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            ValueError: it holds something else.
        """
        if set(state) != {"sent", "accepted", "missed"}:
            raise ValueError(f"state must hold sent, accepted and missed, got {sorted(state)}")
        sent, accepted = (_number(name, state[name]) for name in ("sent", "accepted"))
        missed = state["missed"]
        if not isinstance(missed, list) or len(missed) > _MISSED:
            raise ValueError(f"missed must be a list of at most {_MISSED} counters")
        counters = [_number("missed", counter) for counter in missed]
        if counters != sorted(set(counters)) or not all(0 < c < accepted for c in counters):
            raise ValueError(f"missed must rise and stay below accepted, got {counters}")
        self._sent, self._accepted, self._missed = sent, accepted, counters


def _number(name: str, value: object) -> int:
    """Return what fits the header's fields.

    Raises:
        ValueError: it does not; names it.
    """
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError(f"{name} must be an integer from 0 to {MOST}, got {value!r}")
    return value


def _view(name: str, data: Buffer) -> memoryview:
    """Look at bytes without a copy.

    Raises:
        TypeError: they are no bytes, or have gaps.
    """
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise TypeError(f"{name} must be contiguous bytes: {error}") from error
