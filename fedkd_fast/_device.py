"""The device that models are trained on: its names, whether it is there, and the way to it."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]{0,2}))?")
_WANTED = "device must be cpu, cuda or cuda:N"


def check_device(value: object) -> None:
    """Refuse what names no device, whether or not this machine has it.

    Raises:
        ValueError: something else than ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{_WANTED}, got {value!r}")


def require_device(name: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: no such device; says what is missing.
    """
    check_device(name)
    if name == "cpu":
        return
    if torch.version.cuda is None:
        raise ValueError(f"{_WANTED} that is there, got {name!r}: this torch has no CUDA")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= count:
        raise ValueError(f"{_WANTED} that is there, got {name!r}: this torch finds {count} GPUs")


def device_of(model: nn.Module) -> torch.device:
    """Return where a model lies: its first parameter, or the CPU where it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, itself where it lies there."""
    # Towards a GPU nobody has to wait for the copy; from there, the CPU would read too early.
    return value.to(device, non_blocking=device.type == "cuda")
