"""Tasks: data, models and metric behind one small protocol; one file a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fedkd_fast._device import on_device

# Label of positions that belong to no class and cost no loss, as in torch's cross entropy.
IGNORED_LABEL = -100

_HOMES = {
    "digits": ("fedkd_fast.tasks.digits", "DigitsTask"),
    "text": ("fedkd_fast.tasks.text", "TextTask"),
    "adr": ("fedkd_fast.tasks.adr", "AdrTask"),
    "ner": ("fedkd_fast.tasks.ner", "NerTask"),
    "mind": ("fedkd_fast.tasks.mind", "MindTask"),
}
TASKS = tuple(_HOMES)


class Batch(NamedTuple):
    """Samples that are trained on together."""

    inputs: dict[str, Tensor]  # by name of the model's argument, first dimension N, or U for texts
    labels: Tensor  # (N,) int64, or (N, L) with IGNORED_LABEL where there is nothing to learn
    # (N, U) share of each of U texts in each sample, where the model's layers are of such texts.
    layer_share: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, itself where it lies there."""
        return Batch(
            {name: on_device(value, device) for name, value in self.inputs.items()},
            on_device(self.labels, device),
            None if self.layer_share is None else on_device(self.layer_share, device),
        )


@runtime_checkable
class Task(Protocol):
    """What the federated loop needs to know of a problem; implement it for models of your own.

    What its methods return follows from their arguments alone, random numbers included: a run that
    goes on after a crash asks for the same batches again.

    Models are modules as `fedkd_fast.models` describes them. The parameters of the mentee with
    ``requires_grad`` are what clients share. Every task has what stands here; these attributes it
    may have beside it:

    ``private``
        tuple of beginnings of parameter names that stay at the client, for instance
        ``("classifier.",)`` where each client has labels of its own.
    ``has_dev``
        True: `evaluate` also knows ``split="dev"``, which is then scored after each round, and the
        test data once, at the end.
    ``own_tests``
        True: each client has test data of its own, and the mentee is scored on each.
    ``poolable``
        False: the shards cannot be put together.
    ``content``
        digests of all data by split, each a `content.content_digest`: a run whose data changed does
        not go on, and runs on other data are no seeds of one thing. They do not depend on the seed.
    """

    name: str
    metric: str  # of what `evaluate` returns, the one that counts: larger is better

    def build_mentor(self, client: int = 0) -> nn.Module:
        """Make the large private model; every call gives equal weights, heads aside."""

    def build_mentee(self, client: int = 0) -> nn.Module:
        """Make the small shared model; every call gives equal weights, private ones aside."""

    def shards(self, clients: int, seed: int) -> Sequence[Any]:
        """Split the training data, one shard a client; ``len`` of each is its samples.

        Raises:
            ValueError: there are fewer samples than clients.
        """

    def merge(self, shards: Sequence[Any]) -> Any:
        """Put shards together, for training in one place."""

    def batches(self, shard: Any, seed: int) -> Iterable[Batch]:
        """Go through a shard once, in an order that ``seed`` decides."""

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> Mapping[str, float]:
        """Score a model on data that nobody trains on: values within [0, 1] by metric.

        The model may lie on a GPU: `fedkd_fast.models.run_model` takes the inputs there.
        """

    def describe(self) -> dict[str, Any]:
        """Return facts for the record of a run, ready for JSON."""

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        """Return fields of `TrainConfig` that suit this task better than the general defaults.

        Those that hold for every method, and with ``method`` also those for it alone.
        """


@runtime_checkable
class PredictingTask(Task, Protocol):
    """A task that can also label new samples, as all built-in ones can."""

    def save_assets(self, folder: Path) -> None:
        """Write what prediction needs beside the weights into a model's folder."""

    def predict(
        self, model: nn.Module, data: str | None, *, client: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Label samples.

        Args:
            model: a trained model.
            data: a file of samples; None takes the test data, where the task has them.
            client: whose model it is.

        Yields:
            One record a sample: ``label``, its ``probability``, and what identifies the sample.

        Raises:
            ValueError: data that cannot be read; names file and line.
        """


@dataclass(frozen=True)
class TaskOptions:
    """What a built-in task can be told."""

    seed: int = 0  # of the initial weights
    batch_size: int = 32  # larger: fewer, smoother steps an epoch
    data: str | None = None  # where the data lie; None for data that a package carries
    mentor: str | None = None  # folder or name of a pretrained encoder
    mentee: str | None = None  # the same for the mentee; None: the first layers of the mentor
    mentee_layers: int | None = None  # more: a better and costlier mentee; None: the task's choice
    mentee_adapter: str | None = None  # a mentee that sends little can be as deep as the mentor
    max_length: int = 48  # tokens a text; more is slower and cuts less
    partition: str | None = None  # how samples are dealt to clients; None: the task's own way
    samples_per_client: int | None = None  # each draws so many instead, of digits; None: dealt
    text_column: str = "text"  # of tables
    label_column: str = "label"  # of tables


def _task_class(name: str) -> Any:
    if name not in _HOMES:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, class_name = _HOMES[name]
    return getattr(import_module(module), class_name)


def task_defaults(name: str, method: str | None = None) -> dict[str, Any]:
    """Return the fields of `TrainConfig` that a built-in task sets, as `Task.defaults` says.

    Raises:
        ValueError: no such task.
    """
    task = _task_class(name)
    return recipe(task.DEFAULTS, getattr(task, "METHOD_DEFAULTS", {}), method)


def recipe(
    general: Mapping[str, Any], special: Mapping[str, Mapping[str, Any]], method: str | None
) -> dict[str, Any]:
    """Return the defaults of every method, and those of one over them."""
    return {**general, **(special.get(method, {}) if method is not None else {})}


def build_task(name: str, options: TaskOptions) -> PredictingTask:
    """Make a built-in task.

    Raises:
        ValueError: no such task, or options that it cannot follow.
        ImportError: a package that the task needs is missing.
    """
    task = _task_class(name)
    if options.samples_per_client is not None and not getattr(task, "draws", False):
        raise ValueError(
            f"samples_per_client must be left out for task {name}, whose samples are dealt to "
            f"clients and not drawn, got {options.samples_per_client}"
        )
    return cast(PredictingTask, task(options))
