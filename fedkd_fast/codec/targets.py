"""What a caller may ask of a message, and what that leaves each tensor to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedkd_fast.codec.common import is_number
from fedkd_fast.codec.curves import SPACING, Curve, Point, at_error

# With scope "message" no tensor loses more than this many times its share, nor all of itself.
MESSAGE_CAP = 4.0
# And none is asked to lose less than this of it, so that factors need not be known any deeper.
LEAST_SHARE = 0.5
MOST_LOST = 0.999
# Where the message may lose more than this, all of that is handed out, whatever one step gives.
_MUCH_LOST = 0.5


class Target(NamedTuple):
    """How much of a message may be lost, or how many bytes it may take; one of the two."""

    energy: float | None = None  # share of each tensor's squared norm to keep
    budget_bytes: int | None = None  # of the whole frame
    bits_per_param: float | None = None  # of the whole frame, over its number of elements

    def limit_bytes(self, numel: int) -> int | None:
        """Return the most bytes that a frame of so many elements may take."""
        if self.bits_per_param is not None:
            # No update is larger than the most that this can be.
            return math.floor(min(self.bits_per_param * numel / 8, 2.0**63))
        return self.budget_bytes


def check_energy(energy: float) -> float:
    """Return an energy as a float, or say what it must be."""
    _check_number("energy", energy)
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    return float(energy)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def make_target(
    energy: float | None,
    error: float | None,
    budget_bytes: int | None,
    bits_per_param: float | None,
    default: float,
) -> Target:
    """Read the arguments that say what a message may lose or take.

    Raises:
        TypeError: one that is no number.
        ValueError: more than one of them, or one out of its range.
    """
    given = {
        "energy": energy,
        "error": error,
        "budget_bytes": budget_bytes,
        "bits_per_param": bits_per_param,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"give one of energy, error, budget_bytes, bits_per_param, got {named}")
    for name in named:
        _check_number(name, given[name])
    if error is not None:
        if not 0.0 <= error < 1.0:
            raise ValueError(f"error must lie in [0, 1), got {error}")
        return Target(energy=1.0 - error * error)
    if budget_bytes is not None:
        if not 1 <= budget_bytes < math.inf:
            raise ValueError(f"budget_bytes must be at least 1, got {budget_bytes}")
        return Target(budget_bytes=int(budget_bytes))
    if bits_per_param is not None:
        if not 0.0 < bits_per_param < math.inf:
            raise ValueError(f"bits_per_param must be positive, got {bits_per_param}")
        return Target(bits_per_param=float(bits_per_param))
    return Target(energy=check_energy(default if energy is None else energy))


class Priced(NamedTuple):
    """What the rate control knows of one lossy tensor."""

    total: float  # squared norm
    share: float  # of what a matrix may lose; vectors lose less
    curves: Sequence[Curve]


def _smallest(curves: Sequence[Curve], target: float) -> Point | None:
    places = [place for curve in curves if (place := at_error(curve, target))]
    return min(places, key=lambda place: place.size, default=None)


def expected_size(tensors: Sequence[Priced], allowed: Sequence[float]) -> float:
    """Return the payload bytes that these losses are expected to cost."""
    size = 0.0
    for tensor, share in zip(tensors, allowed, strict=True):
        place = _smallest(tensor.curves, share * tensor.total)
        if place is not None:
            size += place.size
    return size


def shares_of(tensors: Sequence[Priced], lost: float, *, one_step: bool) -> list[float]:
    """Return the share of its squared norm that each tensor may lose.

    Args:
        tensors: of the message.
        lost: share of the squared norm that the message as a whole may lose, in (0, 1).
        one_step: one step for all matrices, so that a byte buys as much of the error in each of
            them: more is lost where that is cheap, up to MESSAGE_CAP times `lost`. Otherwise each
            tensor loses the same share.
    """
    same = [min(MOST_LOST, lost * tensor.share) for tensor in tensors]
    matrices = [i for i, tensor in enumerate(tensors) if tensor.share == 1.0 and tensor.curves]
    if not one_step or not matrices:
        return same
    most = min(MOST_LOST, MESSAGE_CAP * lost)
    whole = lost * sum(tensors[i].total for i in matrices)

    def at_step(step: float) -> list[float]:
        errors = []
        for i in matrices:
            least = LEAST_SHARE * lost * tensors[i].total
            found = max(_error_at(tensors[i].curves, step), least)
            errors.append(min(found, most * tensors[i].total))
        return errors

    low = min(float(curve.steps[0]) for i in matrices for curve in tensors[i].curves)
    high = max(float(curve.steps[-1]) for i in matrices for curve in tensors[i].curves)
    for _ in range(24):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if sum(at_step(middle)) <= whole else (low, middle)
    found = at_step(low)
    # Between two steps the best mode may change. Where little is lost, its error hardly jumps.
    grow = max(1.0, whole / sum(found)) if lost > _MUCH_LOST else 1.0
    for i, error in zip(matrices, found, strict=True):
        same[i] = min(grow * error / tensors[i].total, most)
    return same


def _error_at(curves: Sequence[Curve], step: float) -> float:
    """Return the error of the mode that is best at this step, bits at the price of the step."""
    price = 4.0 ** (step / 16) * 8 * math.log(2) / 6
    best, error = math.inf, 0.0
    for curve in curves:
        place = (step - float(curve.steps[0])) / SPACING
        place = min(max(place, 0.0), len(curve.steps) - 1.0)
        index = min(int(place), len(curve.steps) - 2)
        part = place - index
        found, size = (
            float(values[index] * (1 - part) + values[index + 1] * part)
            for values in (curve.error, curve.size)
        )
        if found + price * size < best:
            best, error = found + price * size, found
    return error
