"""From the configurations of a Flower run and of its nodes to the one of FedKD's run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedkd_fast._files import absolute_path
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.tasks import Task as Task
from fedkd_fast.tasks import TaskOptions, build_task
from fedkd_fast.trainer import configure

# Keys that are none of `TrainConfig`, with their seconds where they are not given.
_TIMES = {"wait": 600.0, "rejoin": 120.0}
# Of the server's machine; `seals` reads them.
KEY_FILES = ("server-key", "enrolment")
_DISTILLATION = "distillation."
_FIELDS = {one.name for one in dataclasses.fields(TrainConfig)} - {"distillation"}
_SERVER_ONLY = {"out", "overwrite", "tensorboard"}
# What has no meaning where clients are other processes; the values hold there.
_FIXED: dict[str, Any] = {"checkpoint_every": 0, "retries": 0}
# Unless the run says otherwise, whoever carries messages must not read them.
_DEFAULTS = {"encrypt": True}
_WITHOUT = {
    "checkpoint-every": "clients keep their states themselves, and the server has no checkpoints",
    "retries": "the network sends again what was damaged",
    "memory-gb": "each client has a process of its own",
    "faults": "faults on purpose need all clients in one process: fedkd-fast train",
    "attackers": "attacks on purpose need all clients in one process: fedkd-fast train",
    "attack-factor": "attacks on purpose need all clients in one process: fedkd-fast train",
}
# What a node may have otherwise than the run: where things lie on its machine, and what it has.
_OF_NODES = ("data", "mentor", "mentee", "device", "threads")


@dataclass(frozen=True)
class Settings:
    """What a run is, on one of its machines."""

    config: TrainConfig
    task: Task
    fields: Mapping[str, Any]  # of the configuration, that were given
    wait_s: float  # for clients: at the beginning, and to score the final models
    rejoin_s: float  # for a node that is gone to come back, before its client has failed


def settings(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None
) -> Settings:
    """Read the configuration of a run: fields of `TrainConfig` with dashes; "" is not given.

    Args:
        run_config: ``[tool.flwr.app.config]`` with the changes of ``flwr run --run-config``.
        node_config: of the node, whose ``data``, ``mentor``, ``mentee``, ``device`` and
            ``threads`` come first; None for the server.

    Raises:
        ValueError: unknown names, options that need clients in one process, values out of range.
        TypeError: values of a wrong type.
    """
    fields: dict[str, Any] = {**_FIXED, **_DEFAULTS}
    distillation, times = {}, dict(_TIMES)
    for key, value in run_config.items():
        if value == "" or key in KEY_FILES:
            continue
        name = key.replace("-", "_")
        if key in _WITHOUT:
            raise ValueError(f"run config {key!r} must be left out: {_WITHOUT[key]}")
        if key in times:
            times[key] = _seconds(key, value)
        elif key.startswith(_DISTILLATION):
            distillation[key.removeprefix(_DISTILLATION).replace("-", "_")] = value
        elif "_" in key or name not in _FIELDS:
            known = ", ".join(sorted(one.replace("_", "-") for one in _FIELDS - _missing()))
            raise ValueError(f"run config has the unknown name {key!r}; known are {known}")
        else:
            fields[name] = value
    if distillation:
        fields["distillation"] = distillation
    if node_config is not None:
        fields = {name: value for name, value in fields.items() if name not in _SERVER_ONLY}
        fields.update({name: node_config[name] for name in _OF_NODES if name in node_config})
    elif "out" in fields:
        fields["out"] = str(absolute_path("run config 'out'", fields["out"]))
    name, method = fields.pop("task", "digits"), fields.pop("method", "fedkd")
    task = _task(name, task_options(configure(name, method, fields)))
    config = configure(task, method, fields)
    return Settings(config, task, fields, wait_s=times["wait"], rejoin_s=times["rejoin"])


def _missing() -> set[str]:
    return {one.replace("-", "_") for one in _WITHOUT}


def _seconds(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"run config {key!r} must be seconds, at least 0, got {value!r}")
    return float(value)


@lru_cache(maxsize=1)
def _task(name: str, options: TaskOptions) -> Task:
    """Make a task; in a simulation one process carries out many messages."""
    return build_task(name, options)


def partition(node_config: Mapping[str, Any], clients: int) -> int:
    """Return which client a node is.

    Raises:
        ValueError: it does not say, or something that cannot be.
    """
    index, count = node_config.get("partition-id"), node_config.get("num-partitions", clients)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < clients:
        raise ValueError(
            f"node config 'partition-id' must be 0 to {clients - 1}, the run has {clients} "
            f"clients, got {index!r}"
        )
    if count != clients:
        raise ValueError(
            f"node config 'num-partitions' must be {clients}, as many as the run has clients, got "
            f"{count!r}"
        )
    return index


def state_folder(node_config: Mapping[str, Any], run_id: int, client: int) -> Path:
    """Return where a client keeps its state in a run: below ``state-dir`` of the node.

    Raises:
        ValueError: that is no absolute path.
    """
    root = node_config.get("state-dir", "~/.local/state/fedkd_fast")
    folder = absolute_path("node config 'state-dir'", root)
    return folder / f"run-{run_id}" / f"client-{client}"
