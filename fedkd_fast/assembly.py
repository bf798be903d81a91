"""From a configuration to clients and a server: learners, codecs of both legs, who takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fedkd_fast._seeds import derived_seed
from fedkd_fast.client import Client, Decoded
from fedkd_fast.compress import Compressor
from fedkd_fast.config import TrainConfig
from fedkd_fast.feedback import ErrorFeedback
from fedkd_fast.legs import CompressorLeg, Leg, PackedLeg
from fedkd_fast.methods import Learner, LocalSettings, Method
from fedkd_fast.privacy import GaussianMean
from fedkd_fast.server import Server, ServerOptimizer
from fedkd_fast.tasks import Task
from fedkd_fast.tensors import digest_of
from fedkd_fast.trees import Tree, copied

# Uses of the run's seed apart from the clients' own, which start at 0: keys of `derived_seed`.
_SHARDS, _PRIVATE, _PARTICIPANTS, _ADAPTERS = 1_000_001, 1_000_002, 1_000_003, 1_000_004
_CODECS = 1_000_005


class Shards:
    """The training data of all clients."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = shards

    def __len__(self) -> int:
        """Return how many clients have data."""
        return len(self._shards)

    def __getitem__(self, index: int) -> Any:
        """Return the data of a client."""
        return self._shards[index]

    def size(self, index: int) -> int:
        """Return the samples of a client.

        Raises:
            TypeError: the task's shards do not tell.
        """
        return len(self._shards[index])

    def sample(self, task: Task, index: int = 0) -> bytes:
        """Return a digest of the first batch of a client: other data have another one."""
        batch = next(iter(task.batches(self[index], 0)), None)
        if batch is None:
            return b""
        return digest_of({"labels": batch.labels, **{f"x/{k}": v for k, v in batch.inputs.items()}})

    def sizes(self) -> list[int] | None:
        """Return the samples of each client, where shards tell."""
        try:
            return [self.size(index) for index in range(len(self))]
        except TypeError:
            return None

    def facts(self, task: Task) -> dict[str, Any]:
        """Return what is known of all data, for the record of a run, ready for JSON."""
        return {"shard_sizes": self.sizes(), "sample": self.sample(task).hex(), **_content(task)}


def _content(task: Task) -> dict[str, dict[str, str]]:
    content = getattr(task, "content", None)
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not all(
        isinstance(one, str) for pair in content.items() for one in pair
    ):
        raise TypeError(f"task.content must map names of splits to digests, got {content!r}")
    return {"content": dict(content)}


class Maker(Protocol):
    """Makes a client with its models."""

    def __call__(self, index: int, spare: Learner | None = None, *, fresh: bool = True) -> Client:
        """Make the client of an index as it is before its first round.

        Args:
            index: of the client.
            spare: a learner that no client has any more, to be used again where that is possible:
                building models takes longer than setting them back.
            fresh: whether a spare one has to be set back; not where it loads a state next.
        """


def client_maker(
    config: TrainConfig, task: Task, method: Method, dealt: Sequence[Any] | None = None
) -> tuple[Maker, Shards]:
    """Return what makes clients, and the data of all.

    Where all data are put together, there is one client.

    Args:
        config: of the run.
        task: the data and models.
        method: that the run uses.
        dealt: data of each client; None lets the task deal its own.

    Raises:
        ValueError: data that cannot be shared out so, put together, counted or chosen by.
    """
    if config.patience is not None and not getattr(task, "has_dev", False):
        raise ValueError(f"patience needs data to choose by: task {task.name} has no dev split")
    if dealt is None:
        dealt = deal(config, task)
    if method.pools_data:
        if not getattr(task, "poolable", True):
            raise ValueError(
                f"method {method.name} puts all data together, which those of task {task.name} "
                "do not allow: each client has labels of its own"
            )
        dealt = [task.merge(dealt)]
    shards = Shards(dealt)
    if config.weighting == "samples" and shards.sizes() is None:
        raise ValueError("weighting by samples needs shards with a length")

    # Of a learner before its first round; those of all clients are equal but for private parts.
    first: list[Tree] = []
    alike = not getattr(task, "private", ())
    decoded = Decoded()

    def learner(index: int, spare: Learner | None, fresh: bool) -> Learner:
        settings = _settings(config, index)
        if spare is not None and first:
            # All else is the same at every client, and methods may have changed it.
            own: dict[str, Any] = {"seed": settings.seed, "client": settings.client}
            spare.settings = dataclasses.replace(spare.settings, **own)
            if fresh:
                spare.load(copied(first[0]))
            return spare
        made = method.make_learner(task, settings)
        if alike and not first and len(shards) > 1:
            first.append(copied(made.state()))
        return made

    def make(index: int, spare: Learner | None = None, *, fresh: bool = True) -> Client:
        return Client(
            index,
            learner(index, spare, fresh),
            task,
            shards[index],
            _leg(config, method, "up", 1 + index),
            _leg(config, method, "down", 1 + index),
            seed=config.seed,
            local_epochs=config.local_epochs,
            local_steps=config.local_steps,
            decoded=decoded,
        )

    return make, shards


def deal(config: TrainConfig, task: Task, clients: int | None = None) -> Sequence[Any]:
    """Return the shards of a task's data, for so many clients as the run has unless said otherwise.

    Raises:
        ValueError: there are fewer samples than clients, or the task gives another number.
    """
    wanted = clients or config.clients
    found = task.shards(wanted, derived_seed(config.seed, _SHARDS))
    if len(found) != wanted:
        raise ValueError(f"task.shards({wanted}, …) must give {wanted} shards, got {len(found)}")
    return found


def make_clients(config: TrainConfig, task: Task, method: Method) -> list[Client]:
    """Make all clients at once, as `client_maker` says."""
    make, shards = client_maker(config, task, method)
    return [make(index) for index in range(len(shards))]


def _settings(config: TrainConfig, index: int) -> LocalSettings:
    return LocalSettings(
        lr_mentor=config.lr_mentor,
        lr_mentee=config.lr_mentee,
        seed=derived_seed(config.seed, _PRIVATE, index),
        client=index,
        initial_seed=derived_seed(config.seed, _ADAPTERS),
        weight_decay=config.weight_decay,
        distillation=config.distillation_config(),
        mutual=config.mutual,
        warmup_steps=config.warmup_steps,
        clip_norm=config.clip_norm,
        bfloat16=config.precision == "bf16",
        checkpoint=config.gradient_checkpointing,
        refresh_steps=config.refresh_steps,
        mentor_adapter=config.mentor_adapter,
        mentee_adapter=config.mentee_adapter,
        proximal=config.proximal,
        device=config.device,
        participation=_participant_count(config, config.clients) / config.clients,
    )


def _leg(config: TrainConfig, method: Method, direction: str, owner: int) -> Leg:
    """Make the codec of a direction for one end of it: the server, 0, or a client, from 1 on."""
    wanted = config.feedback or method.feedback
    feedback = wanted in (direction, "both")
    codec = config.codec
    if direction == "down":
        codec = config.codec_down or codec
    if codec is None and method.packing is not None:
        # What senders round at random must not go the same way: their mean would not settle it.
        packing = method.packing(config, derived_seed(config.seed, _CODECS, owner))
        return PackedLeg(packing, feedback=feedback, decay=method.feedback_decay)
    # Everyone has the shared model: its names and shapes need not travel.
    codec = codec or method.codec
    residual = ErrorFeedback() if feedback and codec != "raw" else None
    compressor = Compressor(codec=codec, feedback=residual or False, schema=False)
    return CompressorLeg(compressor, residual)


def make_server(config: TrainConfig, client: Client, method: Method) -> Server | None:
    """Make the server that has what this client shares, if it shares anything."""
    if not method.exchanges:
        return None
    optimizer = ServerOptimizer(
        config.server_optimizer,
        lr=config.server_lr,
        momentum=config.server_momentum,
        averaged=method.averaged,
    )
    up, down = _leg(config, method, "up", 0), _leg(config, method, "down", 0)
    private = None
    if config.dp_clip is not None:
        private = GaussianMean(
            config.dp_clip,
            config.dp_noise,
            sampling=config.participation,
            clients=config.clients,
            delta=config.dp_delta,
            seed=config.dp_seed,
        )
    parameters, asked = client.learner.exchanged(), _participant_count(config, config.clients)
    return Server(parameters, up, down, optimizer, config.aggregation, private, asked)


def _participant_count(config: TrainConfig, clients: int) -> int:
    return max(1, round(config.participation * clients))


def participants(config: TrainConfig, clients: int, round_number: int) -> list[int]:
    """Draw the clients that take part in a round, at least one, in ascending order."""
    count = _participant_count(config, clients)
    if count == clients:
        return list(range(clients))
    seed = derived_seed(config.seed, _PARTICIPANTS, round_number)
    chosen = np.random.default_rng(seed).choice(clients, count, replace=False)
    return sorted(int(index) for index in chosen)
