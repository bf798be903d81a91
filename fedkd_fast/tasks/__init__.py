"""Tasks: data, models and metric behind one small protocol; one file a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor, nn

# Label of positions that belong to no class and cost no loss, as in torch's cross entropy.
IGNORED_LABEL = -100

_HOMES = {
    "digits": ("fedkd_fast.tasks.digits", "DigitsTask"),
    "text": ("fedkd_fast.tasks.text", "TextTask"),
}
TASKS = tuple(_HOMES)


class Batch(NamedTuple):
    """Samples that are trained on together."""

    inputs: dict[str, Tensor]  # by name of the model's argument, first dimension N
    labels: Tensor  # (N,) int64, or (N, L) with IGNORED_LABEL where there is nothing to learn


@runtime_checkable
class Task(Protocol):
    """What the federated loop needs to know of a problem; implement it for models of your own.

    Models are modules as `fedkd_fast.models` describes them. The parameters of the mentee with
    ``requires_grad`` are what clients share.
    """

    name: str
    metric: str  # of `evaluate`: larger is better, within [0, 1]

    def build_mentor(self) -> nn.Module:
        """Make the large private model; every call gives equal weights."""

    def build_mentee(self) -> nn.Module:
        """Make the small shared model; every call gives equal weights."""

    def shards(self, clients: int, seed: int) -> Sequence[Any]:
        """Split the training data, one shard a client.

        Raises:
            ValueError: there are fewer samples than clients.
        """

    def merge(self, shards: Sequence[Any]) -> Any:
        """Put shards together, for training in one place."""

    def batches(self, shard: Any, seed: int) -> Iterable[Batch]:
        """Go through a shard once, in an order that ``seed`` decides."""

    def evaluate(self, model: nn.Module) -> float:
        """Score a model on the test data, the same for all clients."""

    def describe(self) -> dict[str, Any]:
        """Return facts for the record of a run, ready for JSON."""

    def defaults(self) -> dict[str, Any]:
        """Return fields of `TrainConfig` that suit this task better than the general defaults."""


@runtime_checkable
class PredictingTask(Task, Protocol):
    """A task whose trained models can be used on new data from the command line."""

    def save_assets(self, folder: Path) -> None:
        """Write what prediction needs beside the weights into a model's folder."""

    def predict(self, model: nn.Module, data: str | None) -> Iterator[dict[str, Any]]:
        """Label samples.

        Args:
            model: a trained model.
            data: a file of samples; None takes the test data, where the task has them.

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
    mentee_layers: int | None = None  # more: a better and costlier mentee; None: the task's choice
    max_length: int = 48  # tokens a text; more is slower and cuts less


def _task_class(name: str) -> Any:
    if name not in _HOMES:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, class_name = _HOMES[name]
    return getattr(import_module(module), class_name)


def task_defaults(name: str) -> Mapping[str, Any]:
    """Return the fields of `TrainConfig` that a built-in task sets.

    Raises:
        ValueError: no such task.
    """
    return cast("Mapping[str, Any]", _task_class(name).DEFAULTS)


def build_task(name: str, options: TaskOptions) -> PredictingTask:
    """Make a built-in task.

    Raises:
        ValueError: no such task, or options that it cannot follow.
        ImportError: a package that the task needs is missing.
    """
    return cast(PredictingTask, _task_class(name)(options))
