"""One client in a process of its own: it carries out orders, and keeps its state in files.

The server decides what a client does and when (`remote`). An order says after which earlier order
the client goes on, so a reply that got lost, or did not count, has never happened: the state from
before it is still there. All of it is on the disk before the reply leaves, so a process may end, or
be killed, at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkd_fast import __version__
from fedkd_fast._errors import spoken
from fedkd_fast._files import parse_json
from fedkd_fast.adapters import merge_adapter
from fedkd_fast.assembly import client_maker, deal
from fedkd_fast.checkpoint import Store
from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.methods import get_method
from fedkd_fast.models import MeanOfModels, save_model
from fedkd_fast.tasks import PredictingTask, Task
from fedkd_fast.trees import Tree, copied

_log = logging.getLogger(__name__)
# What an order leads to lies in the place that the state it began with does not lie in.
_PLACES = ("state-0", "state-1")
_SCORE = "score"
_STEPS = (_SCORE, "lost", "refused", "apply", "require", "absent", "refresh", "train", "upload")


@dataclass(frozen=True)
class Order:
    """What a client is to do, one step after the other.

    Steps are a name and its arguments: ``lost``; ``refused``; ``apply COUNT`` (of the next frames);
    ``require DIGEST VERSION``; ``absent ROUNDS``; ``refresh LR_SHARE``; ``train ROUND LR_SHARE``;
    ``upload ENERGY``, as the methods of `client.Client` of these names; and ``score SPLIT ROLES
    FINAL COUNT``, which changes nothing: each role with the client whose test data it is scored on,
    after the next ``COUNT`` frames were applied.
    """

    base: int  # the order that the client goes on after; 0: it is as it was made
    number: int  # of this order, larger than those before
    steps: Sequence[Sequence[Any]]
    frames: Sequence[bytes] = ()

    def text(self) -> str:
        """Return all but the frames, for `read`."""
        return json.dumps([self.base, self.number, self.steps])

    @classmethod
    def read(cls, text: str, frames: Sequence[bytes]) -> Order:
        """Return the order that `text` was taken of.

        Raises:
            ValueError: it is something else.
        """
        found = parse_json(text, "order")
        if not (isinstance(found, list) and len(found) == 3 and isinstance(found[2], list)):
            raise ValueError(f"order must be a list of base, number and steps, got {text[:80]!r}")
        base, number, steps = found
        return cls(base, number, steps, frames)


@dataclass
class Answer:
    """What came of an order.

    ``facts`` holds ``state``, the order after which the client is what it is now; as far as steps
    ask for them ``losses``, ``seconds``, ``seconds_codec``, ``scores`` and ``failed``, why
    refreshing failed. Or, where nothing was done, ``error`` alone, and with ``missing`` the state
    that should be there and is not.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    frame: bytes = b""  # of an upload

    def text(self) -> str:
        """Return all but the frame."""
        return json.dumps(self.facts)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for another process of this client, which a killed node may have left behind."""
    # What lies there was learned from the client's data: no other user's affair.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Node:
    """A client whose state lies in a folder.

    Args:
        config: of the run, the same as the server's.
        task: the data and models.
        index: number of the client.
        folder: of this client in this run; made where it is missing.
        own_data: all samples of the task are the client's own. Otherwise they are dealt to all
            clients, as they are within one process, and it takes its shard.

    Raises:
        ValueError: data that cannot be dealt.
    """

    def __init__(
        self, config: TrainConfig, task: Task, index: int, folder: Path, *, own_data: bool = False
    ) -> None:
        if not 0 <= index < config.clients:
            raise ValueError(f"client must be 0 to {config.clients - 1}, got {index}")
        own = deal(config, task, 1)[0] if own_data else None
        dealt = [own] * config.clients if own_data else None
        self._make, self._shards = client_maker(config, task, get_method(config.method), dealt)
        self._task, self._index, self._folder = task, index, folder

    def hello(self) -> dict[str, Any]:
        """Return who this is, ready for JSON: what the server holds against what it expects."""
        sizes, client = self._shards.sizes(), self._make(self._index)
        return {
            "client": self._index,
            "clients": len(self._shards),
            "samples": None if sizes is None else sizes[self._index],
            "sample": self._shards.sample(self._task, self._index).hex(),
            "digest": client.digest().hex(),
            "version": __version__,
        }

    def execute(self, order: Order) -> Answer:
        """Carry an order out; whatever goes wrong with it is in the answer."""
        try:
            with locked(self._folder / "lock"):
                return self._execute(order)
        except MissingStateError as error:
            _log.warning("client %d, order %d: %s", self._index, order.number, error)
            return Answer({"error": str(error), "missing": True})
        except Exception as error:
            _log.exception("client %d, order %d", self._index, order.number)
            return Answer({"error": spoken(error)})

    def _execute(self, order: Order) -> Answer:
        store = self._store(order.number)
        scores = [step for step in order.steps if step[0] == _SCORE]
        changed = len(order.steps) > len(scores)
        newest = max(store.facts.values(), default=0)
        if changed and order.number < newest:
            # Its outcome would take the place of one that the server goes on from.
            raise ValueError(f"order {order.number} comes too late: order {newest} is carried out")
        client, frame, place = self._client(store, order.base)
        doing = _Doing(client, frame, iter(order.frames))
        answer = doing.answer
        for name, *arguments in order.steps:
            if name not in _STEPS:
                raise ValueError(f"order has the unknown step {name!r}: is the server newer?")
            if name != _SCORE:
                getattr(doing, name)(*arguments)
        if changed:
            state = {"client": client.state(), "frame": doing.frame}
            store.write(place, state)
            store.commit({**store.facts, place: order.number})
        answer.facts["state"] = order.number if changed else order.base
        for _, *arguments in scores:
            answer.facts["scores"] = self._scores(client, doing.frames, *arguments)
        return answer

    def _client(self, store: Store, base: int) -> tuple[Client, bytes, str]:
        """Return the client after an order, its last frame, and where the next state goes."""
        client = self._make(self._index)
        if base == 0:
            return client, b"", _PLACES[0]
        place = next((one for one in _PLACES if store.facts.get(one) == base), None)
        if place is None:
            raise MissingStateError(
                f"client {self._index} has no state after order {base} in {store.folder}, only "
                f"after {sorted(store.facts.values())}: was the folder changed or removed?"
            )
        with _readable(store.folder):
            state: Tree = store.read(place)
            client.load(state["client"])
            return client, state["frame"], _PLACES[1 - _PLACES.index(place)]

    def _store(self, number: int) -> Store:
        """Open what is kept; what is damaged there is put aside, for the client to begin anew."""
        folder = self._folder / "state"
        try:
            with _readable(folder):
                return Store(folder)
        except MissingStateError:
            aside = self._folder / f"state.damaged-{number}"
            _log.warning("client %d: %s is damaged and now %s", self._index, folder, aside)
            folder.rename(aside)
            raise

    def _scores(
        self,
        client: Client,
        frames: Iterator[bytes],
        split: str,
        roles: Sequence[tuple[str, int]],
        final: bool,
        count: int,
    ) -> dict[str, dict[str, float]]:
        """Score models as they would be after further frames; nothing of it is kept but models."""
        received = [next(frames) for _ in range(count)]
        if received:
            client.apply(*received)
        mentor, mentee = client.learner.mentor, client.learner.mentee
        models = {"mentor": mentor, "mentee": mentee}
        for role, model in models.items() if final else ():
            if model is not None:
                merge_adapter(model)
                # The order may come twice.
                shutil.rmtree(self._folder / role, ignore_errors=True)
                save_model(model, self._folder / role)
                if isinstance(self._task, PredictingTask):
                    self._task.save_assets(self._folder / role)
        if mentor is not None and mentee is not None:
            models["mean"] = MeanOfModels([mentor, mentee])
        found = {}
        for role, test in roles:
            model = models[role]
            if model is None:
                raise ValueError(f"client {self._index} has no {role} to score")
            found[role] = dict(self._task.evaluate(model, split=split, client=test))
        return found


class MissingStateError(LookupError):
    """The state that an order goes on from is not there, or not what it was."""


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Take a damaged state for a missing one: as after that, the client can begin anew.

    Raises:
        MissingStateError: instead of any ValueError, with what it says.
    """
    try:
        yield
    except (ValueError, KeyError) as error:
        raise MissingStateError(f"what lies in {folder} cannot be used: {error}") from error


class _Doing:
    """The steps of one order."""

    def __init__(self, client: Client, frame: bytes, frames: Iterator[bytes]) -> None:
        self.client, self.frame, self.frames = client, frame, frames
        self.answer = Answer({"seconds": 0.0, "seconds_codec": 0.0})

    @contextlib.contextmanager
    def _timed(self, *, codec: bool = False) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent, facts = time.perf_counter() - started, self.answer.facts
        facts["seconds"] += spent
        facts["seconds_codec"] += spent if codec else 0.0

    def lost(self) -> None:
        self.client.lost(self.frame)

    def refused(self) -> None:
        self.client.refused()

    def apply(self, count: int) -> None:
        with self._timed(codec=True):
            self.client.apply(*(next(self.frames) for _ in range(count)))

    def require(self, digest: str, version: int) -> None:
        self.client.require(bytes.fromhex(digest), version)

    def absent(self, rounds: int) -> None:
        self.client.absent(rounds)

    def refresh(self, lr_share: float) -> None:
        before = copied(self.client.state())
        try:
            with self._timed():
                self.client.refresh(lr_share)
        except Exception as error:
            # The client goes on without, as it would in the server's process.
            self.client.load(before)
            self.answer.facts["failed"] = spoken(error)

    def train(self, round_number: int, lr_share: float) -> None:
        with self._timed():
            self.answer.facts["losses"] = list(self.client.train(round_number, lr_share))

    def upload(self, energy: float) -> None:
        with self._timed(codec=True):
            self.frame = self.answer.frame = self.client.upload(energy)
