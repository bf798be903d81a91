"""Decoded updates: dense tensors and factors by name; what they fit, their norms and sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fedkd_fast.codec.common import is_number, matrix_shape
from fedkd_fast.codec.decode import Parts
from fedkd_fast.tensors import check_same_names, tied_names

Client: TypeAlias = int | str
# Dense values, flat or in their shape, or (left (R, P), right (R, Q)) for leftᵀ·right.
Update: TypeAlias = Mapping[str, Parts]
_Key = TypeVar("_Key", int, str, int | str)

# Sums run in float64, which holds integers up to here.
EXACT_INTEGERS = 2**53
# Products of Gram matrices that leave less than this of what was added up are not believed.
CANCELLED = 2.0**-12
# How much larger than measured norms may be: of what components add up to, and of the whole.
_ROUNDING, _MARGIN = 2.0**-24, 2.0**-20


def in_order(clients: Iterable[Client]) -> list[Client]:
    """Sort clients, numbers before names, so that sums do not depend on who came first."""
    return sorted(clients, key=lambda client: (isinstance(client, str), client))


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """View any shape as P×Q; vectors are columns."""
    return matrix_shape(shape) if shape else (1, 1)


def check_weights(weights: Mapping[_Key, float]) -> dict[_Key, float]:
    """Return weights as floats.

    Raises:
        TypeError: one that is no number.
        ValueError: one that is negative or not finite, or all are zero.
    """
    for key, weight in weights.items():
        if not is_number(weight):
            raise TypeError(f"weights must be numbers, got {weight!r} at {key}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights must be finite and >= 0, got {weight} at {key}")
    if max(weights.values(), default=0.0) <= 0:
        raise ValueError("weights must not all be zero")
    return {key: float(weight) for key, weight in weights.items()}


def fitting(update: Update, like: Mapping[str, Tensor], what: str) -> dict[str, Parts]:
    """Return an update in the order of `like`, without names that are tied there to earlier ones.

    Args:
        update: its values are not looked at, only names, shapes and kinds of dtypes.
        like: names, shapes and dtypes that are wanted.
        what: what messages call the update.

    Raises:
        ValueError: other names, shapes, or floating values where there should be none or the other
            way round; names the tensor.
    """
    check_same_names(like, update, what)
    tied = tied_names(like)
    for name, one in like.items():
        _check_fits(update[name], one, f"{what}: tensor {name!r}")
    return {name: update[name] for name in like if name not in tied}


def _check_fits(parts: Parts, like: Tensor, label: str) -> None:
    shape = tuple(like.shape)
    if isinstance(parts, Tensor):
        if parts.numel() != like.numel():
            raise ValueError(f"{label} must have shape {shape}, got {tuple(parts.shape)}")
        dtypes = [parts.dtype]
    else:
        found = [tuple(side.shape) for side in parts]
        rank = found[0][0] if found[0] else None
        if found != [(rank, side) for side in sides(shape)]:
            raise ValueError(f"{label} must have factors of a {shape} tensor, got {found}")
        dtypes = [side.dtype for side in parts]
    if any(dtype.is_floating_point != like.is_floating_point() for dtype in dtypes):
        raise ValueError(f"{label} must be of a kind with {like.dtype}, got {dtypes[0]}")


def surely_finite(parts: Parts, dtype: torch.dtype) -> bool:
    """Tell whether parts stand for finite values of a dtype, as far as is seen without a product.

    Values beyond the range of 16 bits are not.
    """
    if not dtype.is_floating_point:
        return True
    return largest_of(parts) < torch.finfo(dtype).max


def largest(values: Tensor) -> float:
    """Return the largest magnitude; NaN where one of the values is."""
    return max(abs(float(end)) for end in values.aminmax()) if values.numel() else 0.0


def largest_of(parts: Parts) -> float:
    """Return a magnitude that no value which parts stand for exceeds; NaN where one is."""
    if isinstance(parts, Tensor):
        return largest(parts)
    left, right = parts
    return len(left) * largest(left) * largest(right)


def exact_integers(values: Tensor) -> bool:
    """Tell whether float64 holds each of these integers."""
    return bool(((values <= EXACT_INTEGERS) & (values >= -EXACT_INTEGERS)).all())


def written(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """Return what parts stand for, in float64."""
    if isinstance(parts, Tensor):
        return parts.reshape(shape).double()
    left, right = parts
    return (left.double().T @ right.double()).reshape(shape)


def add_to(total: Tensor, parts: Parts, weight: float) -> None:
    """Add ``weight · parts`` to a contiguous float64 tensor, without writing factors out."""
    if isinstance(parts, Tensor):
        total.view(-1).add_(parts.reshape(-1), alpha=weight)
        return
    left, right = parts
    matrix = total.view(left.shape[1], right.shape[1])
    matrix.addmm_(left.double().T, right.double(), alpha=weight)


def cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a mean to a dtype: integers to the nearest, booleans are true from one half on."""
    if dtype == torch.bool:
        return mean >= 0.5
    return mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)


def squared_norm(update: Update) -> float:
    """Return the sum of squares of all floating values of an update, in float64.

    Of factors ``|leftᵀ·right|² = Σ (left·leftᵀ) ∘ (right·rightᵀ)``, which writes nothing out. Where
    components nearly cancel, that loses its digits: then it is ``|R_l·R_rᵀ|²``, of the triangles of
    QR of both sides. The root is off by less than 1e-12 of ``Σ_k |l_k|·|r_k|``.

    Args:
        update: tied tensors count as often as they have names.

    Returns:
        At least 0, the same whatever the order of the names; ``inf``, never NaN, where a value is
        NaN or infinite or the sum leaves float64.
    """
    return _total(_measured(parts).squares for parts in update.values())


def norm_bound(update: Update) -> float:
    """Return an L2 norm that an update does not exceed, nor what rounding makes of its sums.

    Within 1e-5 of the norm, unless components of factors nearly cancel: then what is left of them
    is rounding, and the bound is larger.

    Returns:
        As the root of `squared_norm`, which is below it.
    """
    found = [_measured(parts) for parts in update.values()]
    bounds = [math.sqrt(one.squares) + _ROUNDING * one.most for one in found]
    squares = _total(bound * bound for bound in bounds)
    return math.sqrt(squares) * (1.0 + _MARGIN)


class _Measured(NamedTuple):
    squares: float
    most: float  # of the norms of components: what their sum cannot exceed


def _total(squares: Iterable[float]) -> float:
    found = list(squares)
    return math.fsum(found) if math.isfinite(sum(found)) else math.inf


def _measured(parts: Parts) -> _Measured:
    if isinstance(parts, Tensor):
        if not parts.is_floating_point():
            return _Measured(0.0, 0.0)
        norm = float(torch.linalg.vector_norm(parts, dtype=torch.float64))
        return _finite(norm * norm, norm)
    left, right = (side.double() for side in parts)
    grams = left @ left.T, right @ right.T
    # |Σ_k l_k·r_kᵀ| ≤ Σ_k |l_k|·|r_k|; NaN or infinite where a value is.
    most = float((grams[0].diagonal() * grams[1].diagonal()).sqrt().sum())
    total = float((grams[0] * grams[1]).sum())
    if total > CANCELLED * most * most or not math.isfinite(most * most):
        return _finite(total, most)
    between = torch.linalg.qr(left.T).R @ torch.linalg.qr(right.T).R.T
    return _finite(float(between.square().sum()), most)


def _finite(squares: float, most: float) -> _Measured:
    """Put infinities in the place of what is NaN or whose square leaves float64."""
    if math.isfinite(squares) and math.isfinite(most * most):
        return _Measured(squares, most)
    return _Measured(math.inf, math.inf)
