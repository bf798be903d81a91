"""One matrix whose bytes are counted, and what the codecs of `rate_distortion` have in common.

A codec gets a matrix and the share of its squared norm that may be lost, and answers with bytes and
the matrix that a receiver would have; whether that meets the share is for the caller to check.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALE_BYTES = 4  # of one float32
# How close to what is allowed a search has to come, and how often it may try.
AIM, CLOSE_ENOUGH, ATTEMPTS = 0.999, 0.998, 40
TINY = 1e-12


class Coded(NamedTuple):
    """What a codec made of a matrix."""

    size: float  # bytes; those of ideal codes are no whole numbers
    decoded: Tensor  # (P, Q) float32
    kind: str = ""  # which of its forms the codec chose, where it has several


class Case:
    """A matrix (P, Q) float32, with what several codecs need of it."""

    def __init__(self, name: str, matrix: Tensor) -> None:
        self.name, self.matrix = name, matrix.float().contiguous()
        self.total = float(self.matrix.double().square().sum())
        self.shared: dict[Any, Any] = {}  # what codecs share with each other, by what it is

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U as rows (K, P), σ (K), V as rows (K, Q)."""
        u, sigma, vh = torch.linalg.svd(self.matrix, full_matrices=False)
        return u.mT.contiguous(), sigma, vh.contiguous()

    def share(self, decoded: Tensor) -> float:
        """Return the lost share of the squared norm: the relative error, squared."""
        return float((self.matrix - decoded).square().sum(dtype=torch.float64)) / self.total


Codec = Callable[[Case, float], Coded | None]  # None: the codec does not get that near
Point = Callable[[Case], Coded]  # a codec without a knob


class Peer(NamedTuple):
    """A codec of others, and the packages that it comes from."""

    call: Any  # Codec or Point
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Name the packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def smallest(candidates: list[Coded | None]) -> Coded | None:
    found = [coded for coded in candidates if coded is not None]
    return min(found, key=lambda coded: coded.size) if found else None


def by_step(
    case: Case, allowed: float, attempt: Callable[[float], tuple[Tensor, Callable[[], Coded]]]
) -> Coded | None:
    """Find the coarsest step that loses no more than allowed.

    Args:
        case: the matrix.
        allowed: share of its squared norm.
        attempt: given a step, returns the decoded matrix, and what says how large it is.
    """
    # A uniform quantiser loses a twelfth of its squared step.
    step = (12 * AIM * allowed * case.total / case.matrix.numel()) ** 0.5
    best, nearest = None, 0.0
    power, before = 2.0, (0.0, 0.0)
    for _ in range(ATTEMPTS):
        decoded, size_up = attempt(step)
        share = case.share(decoded)
        if nearest < share <= allowed:
            best, nearest = size_up, share
        if CLOSE_ENOUGH * allowed <= share <= allowed:
            break
        # The share grows as a power of the step, of 2 where steps are fine, that two tries show.
        point = math.log(step), math.log(max(share, TINY))
        if before != (0.0, 0.0) and point[0] != before[0]:
            slope = (point[1] - before[1]) / (point[0] - before[0])
            power = min(3.0, max(0.5, slope))
        before = point
        step *= min(2.0, (AIM * allowed / max(share, TINY)) ** (1 / power))
    return best() if best is not None else None
