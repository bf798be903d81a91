"""One seed for a run, from which every other random number of it follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(seed: int, *path: int) -> int:
    """Derive an independent seed for one use, as ``SeedSequence((seed, *path))`` does.

    Args:
        seed: seed of the run, at least 0.
        path: what the numbers are for, for instance client, round and epoch.

    Returns:
        63 random bits: fit for numpy and torch generators.
    """
    words = np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with torch's generators at ``seed``, and put that of the CPU back after it.

    Initialisers and dropout know no other generators than the global ones, one a device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
