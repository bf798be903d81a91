"""The way between clients and server within one process: sealed or not, and as bad as asked for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fedkd_fast.config import TrainConfig
from fedkd_fast.faults import Faults, InjectedFault, not_finite_frame
from fedkd_fast.journal import Journal
from fedkd_fast.pool import Peer
from fedkd_fast.records import ClientRow
from fedkd_fast.replies import Refused, Replies
from fedkd_fast.sealing import SEAL_BYTES, Channel, PrivateKey, SealError, require_cryptography
from fedkd_fast.server import Server
from fedkd_fast.trees import Tree

# What a second attempt may mend: bytes that were lost or changed on the way.
_MENDABLE = {
    "damaged",
    *(f"sealed-{one}" for one in ("short", "long", "version", "other-direction", "other-client")),
    "sealed-damaged",
}


class _Seals:
    """Keys and channels of a process: those of the server, and those of its simulated clients.

    They are new in every process, so that no key ever seals two different things with one nonce.
    """

    def __init__(self) -> None:
        require_cryptography()
        self._run = secrets.token_bytes(16)
        self._server = PrivateKey.generate()
        self._channels: dict[int, tuple[Channel, Channel]] = {}

    def ends(self, client: int) -> tuple[Channel, Channel]:
        """Return the client's end and the server's."""
        if client not in self._channels:
            own = PrivateKey.generate()
            self._channels[client] = (
                Channel(own, self._server.public, run=self._run, client=client, side="client"),
                Channel(self._server, own.public, run=self._run, client=client, side="server"),
            )
        return self._channels[client]


class Delivery:
    """Carries replies to the server and broadcasts to clients, and counts their bytes.

    Args:
        config: of the run.
        clients: how many there are.
        journal: takes down what goes wrong.
        remote: clients are in other processes; what seals cost is counted here, and who sends
            to them seals it.
    """

    def __init__(
        self, config: TrainConfig, clients: int, journal: Journal, *, remote: bool = False
    ) -> None:
        self._config, self._journal = config, journal
        share, attackers = config.faults, config.attackers
        self._faults = Faults(share, attackers, config.attack_factor, clients, config.seed)
        self._seals = _Seals() if config.encrypt and not remote else None
        self._seal_bytes = SEAL_BYTES if config.encrypt else 0
        # Replies that come one round too late: client, its round, the frame.
        self._late: list[tuple[int, int, bytes]] = []

    def factor(self, client: int) -> float:
        """Return what a client multiplies its update with: 1, unless it attacks."""
        return self._faults.factor(client)

    def send(self, client: Peer, row: ClientRow, replies: Replies, server: Server) -> None:
        """Bring the frame of a row to the server, and note in the row what became of it.

        Raises:
            InjectedFault: the client is made to fail.
        """
        number, index = replies.number, client.index
        fault = self._faults.kind(index, number)
        if fault == "fail":
            raise InjectedFault("the client stopped answering")
        if fault == "not-finite":
            row.frame = not_finite_frame(*server.expected())
        for attempt in range(1 + self._config.retries):
            message = self._sealed(index, number, row.frame)
            row.bytes_up += len(row.frame) + self._seal_bytes
            row.messages += 1
            if fault == "late":
                self._late.append((index, number, row.frame))
                row.refused, row.lost = "no reply in time", True
                return
            if fault == "corrupt":
                message = self._faults.corrupt(message, index, number, attempt)
            refused = self._arrive(index, number, message, row.seconds, replies)
            if refused is None or refused.reason not in _MENDABLE:
                break
            if attempt < self._config.retries:
                self._journal.add("retry", round=number, client=index, attempt=attempt + 1)
        if fault == "duplicate":
            row.bytes_up += len(row.frame) + self._seal_bytes
            row.messages += 1
            self._arrive(index, number, message, row.seconds, replies)
        if refused is not None:
            row.refused = refused.detail
            # What is not there yet comes with the next message; what was refused for what it holds
            # does not.
            row.lost = refused.reason in (*_MENDABLE, "timeout")

    def _sealed(self, client: int, number: int, frame: bytes) -> bytes:
        return frame if self._seals is None else self._seals.ends(client)[0].seal(frame, number)

    def _arrive(
        self, client: int, number: int, message: bytes, seconds: float, replies: Replies
    ) -> Refused | None:
        limit = self._config.client_timeout
        try:
            if limit is not None and seconds > limit:
                raise Refused(
                    client, "timeout", f"took {seconds:.3g} s, client_timeout is {limit:g} s"
                )
            replies.add(client, number, self._opened(client, number, message))
        except Refused as refused:
            self.note(replies.number, refused)
            return refused
        return None

    def _opened(self, client: int, number: int, message: bytes) -> bytes:
        if self._seals is None:
            return message
        try:
            return self._seals.ends(client)[1].open(message, number)
        except SealError as error:
            reason = f"sealed-{error.reason.replace(' ', '-')}"
            raise Refused(client, reason, str(error)) from error

    def late(self, replies: Replies) -> None:
        """Let the replies arrive that the last round waited for in vain."""
        late, self._late = self._late, []
        for client, number, frame in late:
            self._arrive(client, number, self._sealed(client, number, frame), 0.0, replies)

    def note(self, number: int, refused: Refused) -> None:
        """Take down that a reply does not count."""
        self._journal.add(
            "refused",
            round=number,
            client=refused.client,
            reason=refused.reason,
            detail=refused.detail,
        )

    def broadcast(
        self, client: int, number: int, row: ClientRow, frames: Sequence[bytes]
    ) -> Sequence[bytes]:
        """Bring what the server sends after a round to a client."""
        row.bytes_down += self.broadcast_bytes(frames)
        row.messages += 1
        if self._seals is None:
            return frames
        own, server = self._seals.ends(client)
        return [own.open(server.seal(frame, number), number) for frame in frames]

    def broadcast_bytes(self, frames: Sequence[bytes]) -> int:
        """Return what it costs to send these to one client."""
        return sum(map(len, frames)) + self._seal_bytes * len(frames)

    def state(self) -> Tree:
        """Return the replies that are under way."""
        return [list(one) for one in self._late]

    def load(self, state: Tree) -> None:
        """Go on with these replies."""
        self._late = [(client, number, message) for client, number, message in state]
