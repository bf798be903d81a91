"""Updates as frames decode to, and what they are in numpy's float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedkd_fast.updates import Client, Update

Array = npt.NDArray[Any]
LIKE = {
    "w": torch.zeros(12, 10),
    "conv": torch.zeros(4, 3, 2),
    "b": torch.zeros(7),
    "scale": torch.zeros(()),
    "h": torch.zeros(6, dtype=torch.float16),
}


def random_updates(clients: int, seed: int = 0, size: float = 1.0) -> dict[Client, Update]:
    """Draw factors for `w` and `conv`, but for every third client; the rest dense, often flat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found: dict[Client, Update] = {}
    for client in range(clients):
        update: dict[str, Any] = {
            "w": (size * draw(3, 12), draw(3, 10)),
            "conv": (size * draw(2, 4), draw(2, 6)),
            "b": size * draw(7),
            "scale": size * draw(1),
            "h": (size * draw(6)).clamp(-6e4, 6e4).half(),
        }
        if client % 3 == 2:
            update["w"], update["conv"] = size * draw(120), size * draw(4, 3, 2)
        found[client] = update
    return found


def in_numpy(update: Update, like: Mapping[str, torch.Tensor] = LIKE) -> dict[str, Array]:
    found = {}
    for name, one in like.items():
        parts = update[name]
        if isinstance(parts, torch.Tensor):
            values = parts.double().numpy()
        else:
            left, right = (side.double().numpy() for side in parts)
            values = np.einsum("kp,kq->pq", left, right)
        found[name] = values.reshape(tuple(one.shape))
    return found


def as_vector(update: Mapping[str, Array]) -> Array:
    return np.concatenate([update[name].reshape(-1) for name in sorted(update)])
