"""Thousands of clients in bounded memory: those in use are in memory, the others in files.

A client that never trained needs neither: it is made from the run's seed. So what a run costs in
memory follows from the bound, and on the disk from the clients that took part.
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from fedkd_fast._errors import own_file
from fedkd_fast._memory import give_back
from fedkd_fast.assembly import Maker
from fedkd_fast.checkpoint import Store
from fedkd_fast.client import Client
from fedkd_fast.methods import Learner, Losses
from fedkd_fast.trees import Tree, copied

_SETTLE_S = 1.0  # between two times that memory is given back, which takes milliseconds


class Peer(Protocol):
    """A client as the loop sees it: one of `client.Client`, or what stands for one elsewhere."""

    @property
    def index(self) -> int:
        """Number of the client."""

    @property
    def version(self) -> int:
        """Version of the shared parameters that it holds."""

    @property
    def learner(self) -> Learner:
        """Its models, or those that it had before its first round where it is elsewhere."""

    @property
    def elsewhere(self) -> tuple[float, float]:
        """Seconds that its turn took in another process, and how many of them went on coding."""

    def train(self, round_number: int, lr_share: float = 1.0) -> Losses:
        """As `Client.train`."""

    def upload(self, energy: float, *, factor: float = 1.0) -> bytes:
        """As `Client.upload`."""

    def absent(self, rounds: int) -> None:
        """As `Client.absent`."""

    def lost(self, frame: bytes) -> None:
        """As `Client.lost`."""

    def refused(self) -> None:
        """As `Client.refused`."""

    def apply(self, *frames: bytes) -> None:
        """As `Client.apply`."""

    def require(self, digest: bytes, version: int) -> None:
        """As `Client.require`."""

    def refresh(self, lr_share: float = 1.0) -> None:
        """As `Client.refresh`."""


class Pool(Protocol):
    """The clients of a run as the loop sees them."""

    def __len__(self) -> int:
        """Return how many clients there are."""

    def look(self, index: int, *, lasting: bool = False) -> Peer:
        """Return a client that is not changed."""

    def take(self, index: int) -> Peer:
        """Return a client that will be changed."""

    def version(self, index: int) -> int:
        """Return the version of the shared parameters that a client holds."""

    def together(self, asked: Sequence[int]) -> Sequence[Sequence[int]]:
        """Group clients that have their turn at the same time."""

    def start(
        self, together: Sequence[int], round_number: int, energy: float, lr_share: float
    ) -> None:
        """Let these begin to train, where several can: they have all they need for it."""

    def before(self, index: int) -> Tree:
        """Return what `undo` needs to take back what happens to a client from now on."""

    def undo(self, index: int, before: Tree) -> None:
        """Put a client back to where `before` was called."""

    def write_changed(self) -> None:
        """Write the clients that changed into the store."""

    def settle(self) -> None:
        """Give memory that rounds left behind back to the system."""

    def versions(self) -> dict[int, int]:
        """Return the versions of all clients that ever received something."""

    def load_versions(self, versions: Iterable[tuple[int, int]]) -> None:
        """Go on where `versions` was taken."""

    def close(self) -> None:
        """Let go of everything."""


class ClientPool:
    """The clients of a run, by index.

    Args:
        make: makes a client as it is before its first round.
        count: how many there are.
        store: where those go that do not fit; None takes a temporary folder once it is needed.
        limit: bytes that the clients in memory may take together; one is there in any case.
    """

    def __init__(self, make: Maker, count: int, store: Store | None, limit: float) -> None:
        self._make, self._count, self._limit = make, count, limit
        self._store = store
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        # The one that was used longest ago comes first.
        self._present: OrderedDict[int, Client] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._changed: set[int] = set()  # differ from what the store has
        self._versions: dict[int, int] = {}
        self._settled = time.monotonic()  # when memory was last given back
        self._spare: Learner | None = None  # of a client that left, for the next that is made
        self._lasting: set[int] = set()  # whose models somebody holds

    def __len__(self) -> int:
        """Return how many clients there are, in memory or not."""
        return self._count

    @property
    def present(self) -> int:
        """How many are in memory."""
        return len(self._present)

    def look(self, index: int, *, lasting: bool = False) -> Client:
        """Return a client, not to be changed; it is valid until the next one is asked for.

        Args:
            index: of the client.
            lasting: its models are to stay as they are, also when others take its place.

        Raises:
            DiskError: others cannot be written to make room.
        """
        if index not in self._present:
            stored = self._store is not None and _key(index) in self._store
            state = self._opened().read(_key(index)) if stored else None
            client, self._spare = self._make(index, self._spare, fresh=not stored), None
            if stored:
                client.load(state)
            self._present[index] = client
            self._shrink()
        if lasting:
            self._lasting.add(index)
        self._present.move_to_end(index)
        return self._present[index]

    def take(self, index: int) -> Client:
        """Return a client that will be changed; it is valid until the next one is asked for."""
        client = self.look(index)
        self._changed.add(index)
        self._sizes.pop(index, None)  # it may keep more when it has taken part
        return client

    def version(self, index: int) -> int:
        """Return the version of the shared parameters that a client holds, without making it."""
        client = self._present.get(index)
        return self._versions.get(index, 0) if client is None else client.version

    def together(self, asked: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return each client alone: they train one after the other."""
        return [[index] for index in asked]

    def start(
        self, together: Sequence[int], round_number: int, energy: float, lr_share: float
    ) -> None:
        """Do nothing: a client trains when it is asked for what it trained."""

    def before(self, index: int) -> Tree | None:
        """Return what `undo` needs to take back what happens to a client from now on."""
        if index not in self._changed:
            return None  # the store has it, or it is as it was made
        return copied(self.look(index).state())

    def undo(self, index: int, before: Tree | None) -> None:
        """Put a client back to where `before` was called.

        What is in memory of it may be in any state, so it is made anew.
        """
        self._present.pop(index, None)
        self._sizes.pop(index, None)
        self._changed.discard(index)
        client = self.look(index)
        if before is not None:
            client.load(before)
            self._changed.add(index)

    def write_changed(self) -> None:
        """Write all clients into the store that changed since they were written.

        Raises:
            DiskError: they cannot be written.
        """
        for index in sorted(self._changed):
            self._write(index)

    def _write(self, index: int) -> None:
        store = self._opened()
        with own_file(store.folder):
            store.write(_key(index), self._present[index].state())
        self._changed.discard(index)

    def _opened(self) -> Store:
        if self._store is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedkd-fast-clients-")
            self._store = Store(Path(self._temporary.name))
        return self._store

    def _shrink(self) -> None:
        """Put clients into the store until the others fit."""
        for index in self._present.keys() - self._sizes.keys():
            self._sizes[index] = self._present[index].nbytes()
        while len(self._present) > 1 and sum(self._sizes.values()) > self._limit:
            index = next(iter(self._present))
            if index in self._changed:
                self._write(index)
            client, _ = self._present.pop(index), self._sizes.pop(index)
            self._versions[index] = client.version
            if index in self._lasting:
                self._lasting.discard(index)
            else:
                self._spare = client.learner

    def settle(self) -> None:
        """Give memory that rounds left behind back to the system."""
        if time.monotonic() - self._settled >= _SETTLE_S:
            give_back()
            self._settled = time.monotonic()

    def versions(self) -> dict[int, int]:
        """Return the versions of all clients that ever received something."""
        present = {index: client.version for index, client in self._present.items()}
        return {i: version for i, version in {**self._versions, **present}.items() if version}

    def load_versions(self, versions: Iterable[tuple[int, int]]) -> None:
        """Go on where `versions` was taken."""
        self._versions = dict(versions)

    def close(self) -> None:
        """Remove temporary files."""
        if self._temporary is not None:
            self._temporary.cleanup()


def _key(index: int) -> str:
    return f"client-{index}"
