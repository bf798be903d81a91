"""Federated learning with mutual distillation and tiny updates: FedKD on a C++/CUDA core.

The names below load what they need on first use, so that `import fedkd_fast` costs nothing that a
caller of `compress` alone would not want to pay for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedkd_fast.aggregation import Aggregate as Aggregate
    from fedkd_fast.aggregation import aggregate as aggregate
    from fedkd_fast.compress import Compressor as Compressor
    from fedkd_fast.decompression import decompress as decompress
    from fedkd_fast.decompression import decompress_from as decompress_from
    from fedkd_fast.feedback import EF21 as EF21
    from fedkd_fast.feedback import ErrorFeedback as ErrorFeedback
    from fedkd_fast.feedback import SubspaceCache as SubspaceCache
    from fedkd_fast.losses import DistillationConfig as DistillationConfig
    from fedkd_fast.losses import MutualDistillationLoss as MutualDistillationLoss
    from fedkd_fast.tasks import Task as Task
    from fedkd_fast.tensors import as_numpy as as_numpy
    from fedkd_fast.trainer import Run as Run
    from fedkd_fast.trainer import TrainConfig as TrainConfig
    from fedkd_fast.trainer import train as train
    from fedkd_fast.wire import WireError as WireError
    from fedkd_fast.wire import inspect as inspect

_HOMES = {
    "Aggregate": "aggregation",
    "aggregate": "aggregation",
    "as_numpy": "tensors",
    "Compressor": "compress",
    "decompress": "decompression",
    "decompress_from": "decompression",
    "EF21": "feedback",
    "ErrorFeedback": "feedback",
    "SubspaceCache": "feedback",
    "DistillationConfig": "losses",
    "MutualDistillationLoss": "losses",
    "Task": "tasks",
    "Run": "trainer",
    "TrainConfig": "trainer",
    "train": "trainer",
    "WireError": "wire",
    "inspect": "wire",
}
_MODULES = ("ops", "reference", "sealing", "wire")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"fedkd_fast.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"fedkd_fast.{name}")
    raise AttributeError(f"module 'fedkd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
