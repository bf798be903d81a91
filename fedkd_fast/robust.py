"""Robust means of decoded updates, for rounds in which some clients may be broken or hostile."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.codec.common import all_finite
from fedkd_fast.codec.decode import Parts
from fedkd_fast.tensors import tied_names
from fedkd_fast.updates import (
    CANCELLED,
    Client,
    Update,
    add_to,
    cast,
    check_weights,
    exact_integers,
    fitting,
    in_order,
    sides,
    squared_norm,
    surely_finite,
    written,
)

_SPEC = re.compile(
    r"(mean|clip|median)|(clip|trimmed):([0-9]*\.?[0-9]+(?:e[+-]?[0-9]{1,3})?)|(krum):([0-9]{1,6})"
)
_SPELLING = "mean, clip, clip:NORM, median, trimmed:SHARE (below 0.5) or krum:F (at least 1)"
# Of coordinates that are sorted at a time: 8 MiB of float64.
_BLOCK = 2**20


@dataclass(frozen=True)
class Rule:
    """How updates become a mean, as `check_rule` reads it."""

    kind: str  # mean, clip, median, trimmed or krum
    value: float | None = None  # the norm, the share, or how many clients are assumed hostile
    text: str = "mean"  # as it was written

    @property
    def least(self) -> int:
        """The fewest updates that the rule can do its work on."""
        if self.value is None or self.kind == "clip":
            return 1
        if self.kind == "krum":
            return 2 * int(self.value) + 3
        return math.ceil(1 / Fraction(str(self.value)))

    def cut(self, count: int) -> int:
        """How many of `count` values a coordinate-wise rule leaves out at each end."""
        if self.kind == "median":
            return (count - 1) // 2
        # As it was written: in float64, 0.29·100 is less than 29.
        return math.floor(Fraction(str(self.value)) * count)


class Robust(NamedTuple):
    """A mean, and whose updates did not count as they came."""

    values: dict[str, Tensor]
    left_out: tuple[Client, ...] = ()  # by krum, in the order of the clients
    clipped: Mapping[Client, float] = {}  # by clip: below 1, what the update was scaled by


def check_rule(value: object, name: str = "rule") -> Rule:
    """Read the rule of a mean; see `robust_mean`.

    Args:
        value: ``mean``, ``clip``, ``clip:NORM``, ``median``, ``trimmed:SHARE`` or ``krum:F``.
        name: what messages call it.

    Raises:
        ValueError: something else, a norm that is not positive and finite, a share outside
            (0, 0.5), or F below 1.
    """
    match = _SPEC.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and match is not None:
        plain, kind, number, krum, hostile = match.groups()
        if plain:
            return Rule(plain, None, value)
        if krum and int(hostile) >= 1:
            return Rule(krum, float(hostile), value)
        below = {"clip": math.inf, "trimmed": 0.5}
        if kind and 0.0 < float(number) < below[kind]:
            return Rule(kind, float(number), value)
    raise ValueError(f"{name} must be {_SPELLING}, got {value!r}")


def check_norms(norms: Mapping[Client, float], limit: float) -> dict[Client, str]:
    """Find the updates whose norm is out of proportion to the round's.

    An update is refused where ``norm > limit · median(norms)``, or where the norm is not finite.
    The median is that of the finite norms. Of two updates none can be told to be the wrong one, nor
    can it where more than half of them are zero: with fewer than 3 finite norms, or a median of
    zero, only what is not finite is refused. At least half of the finite norms always remain; a
    majority of hostile clients moves the median itself.

    Args:
        norms: L2 norm of each client's update, the root of `squared_norm`.
        limit: how many times the median is too much, above 1. Smaller refuses more.

    Returns:
        Why, by refused client, in the order of the clients.

    Raises:
        ValueError: a limit that is not above 1 and finite.
    """
    if not 1.0 < limit < math.inf:
        raise ValueError(f"limit must be above 1 and finite, got {limit}")
    finite = [norm for norm in norms.values() if math.isfinite(norm)]
    median = statistics.median(finite) if len(finite) >= 3 else 0.0
    refused: dict[Client, str] = {}
    for client in in_order(norms):
        norm = norms[client]
        if not math.isfinite(norm):
            refused[client] = f"update of client {client} has norm {norm}: it must be finite"
        elif median > 0.0 and norm > limit * median:
            refused[client] = (
                f"update of client {client} has norm {norm:.6g}: it must be at most limit = "
                f"{limit:g} times {median:.6g}, the median norm of the round"
            )
    return refused


class _Round:
    """The checked updates of a round, in the order of the clients, and what is wanted of them."""

    def __init__(self, updates: Mapping[Client, Update], like: Mapping[str, Tensor]) -> None:
        self.updates = {one: _checked(one, updates[one], like) for one in in_order(updates)}
        self._like, self._tied = like, tied_names(like)

    def tensors(self) -> Iterator[tuple[Tensor, list[Parts]]]:
        """Go through what is wanted, tied tensors once, with the parts that clients sent of it."""
        for name, one in self._like.items():
            if name not in self._tied:
                yield one, [update[name] for update in self.updates.values()]

    def named(self, means: Iterable[Tensor]) -> dict[str, Tensor]:
        """Give means in the order of `tensors` their names."""
        owners = [name for name in self._like if name not in self._tied]
        found = dict(zip(owners, means, strict=True))
        return {name: found[self._tied.get(name, name)] for name in self._like}

    def weighted(
        self, weights: Mapping[Client, float], scales: Mapping[Client, float] | None = None
    ) -> dict[str, Tensor]:
        """Return ``Σ_i w_i·s_i·u_i / Σ_i w_i``; integers and booleans are not scaled."""
        plain = [weights.get(client, 0.0) for client in self.updates]
        scaled = [
            weight * (scales or {}).get(client, 1.0)
            for client, weight in zip(self.updates, plain, strict=True)
        ]
        total = math.fsum(plain)
        return self.named(
            _weighted(parts, scaled if one.is_floating_point() else plain, total, one)
            for one, parts in self.tensors()
        )


def _weighted(
    parts: Sequence[Parts], factors: Sequence[float], total: float, like: Tensor
) -> Tensor:
    mean = torch.zeros(like.shape, dtype=torch.float64, device="cpu")
    for one, factor in zip(parts, factors, strict=True):
        if factor:
            add_to(mean, one, factor)
    return cast(mean.div_(total), like.dtype)


def robust_mean(
    updates: Mapping[Client, Update],
    rule: str | Rule,
    *,
    like: Mapping[str, Tensor],
    weights: Mapping[Client, float] | None = None,
) -> Robust:
    """Average updates so that a few of them cannot steer the result.

    ``mean``: ``Σ_i w_i·u_i / Σ_i w_i``. One client moves it anywhere.

    ``clip:NORM`` first scales updates whose L2 norm over all floating tensors is above NORM down to
    it; ``clip`` takes the median norm of the round. F of n clients then move an unweighted mean by
    at most ``2·NORM·F/n``; integers and booleans are averaged as they come.

    ``median``: of each coordinate; between the middle two of an even number. It stays within what
    honest clients sent while less than half of all are hostile.

    ``trimmed:SHARE``: the mean of each coordinate without its ⌊SHARE·n⌋ smallest and its ⌊SHARE·n⌋
    largest values (Yin et al. 2018). It stays within what honest clients sent while no more than
    that are hostile.

    ``krum:F``: multi-Krum (Blanchard et al. 2017), the mean of the n - F updates that have the
    smallest sums of squared distances, over floating tensors, to their n - F - 2 nearest others.
    What is chosen counts as it is, so F hostile updates must lie among the honest ones to count.

    All sums run in float64. Clients are gone through in their order, numbers before names, which
    also breaks ties of krum: the order of the mapping changes no bit.

    Memory, beside the updates as they came and the result: ``mean`` and ``clip`` one tensor in
    float64. ``median`` and ``trimmed`` also the clients' values of a block of rows, some 32 MiB, or
    one row of all clients where that is more. ``krum`` the largest tensor in float64 as often as
    there are clients, or the stacked factors where distances are cheaper in these.

    Args:
        updates: parts by tensor name, by client; `decompression.decode_frame_parts` decodes to
            them.
        rule: as above, or what `check_rule` made of it.
        like: names, shapes and dtypes of the result. Names that are tied there, by showing the same
            memory, stay tied: what updates hold under the later name does not count.
        weights: one finite number >= 0 per client; None means equal. Clients of weight 0 still have
            a say in the median norm of ``clip`` and in the distances of ``krum``.

    Returns:
        The mean, in the dtypes of `like`, who was left out and who was clipped. Integers are
        rounded to the nearest, booleans are true from one half on.

    Raises:
        ValueError: no such rule, fewer updates than it needs (`Rule.least`), wrong weights or, with
            ``median`` and ``trimmed``, unequal ones. An update that does not fit `like`, that holds
            NaN, Inf or values beyond the dtype's range, or integers beyond 2^53; names the client.
    """
    wanted = rule if isinstance(rule, Rule) else check_rule(rule)
    if len(updates) < wanted.least:
        raise ValueError(
            f"rule {wanted.text} needs at least {wanted.least} updates, got {len(updates)}"
        )
    given = _Round(updates, like)
    shares = _shares(list(given.updates), weights)
    if wanted.kind == "krum":
        return _krum(given, wanted, shares)
    if wanted.kind == "clip":
        return _clip(given, wanted, shares)
    if wanted.kind == "mean":
        return Robust(given.weighted(shares))
    if len(set(shares.values())) > 1:
        raise ValueError(f"weights must be equal with rule {wanted.text}, got {weights}")
    cut = wanted.cut(len(updates))
    return Robust(given.named(_middle(parts, one, cut) for one, parts in given.tensors()))


def _shares(
    clients: Sequence[Client], weights: Mapping[Client, float] | None
) -> dict[Client, float]:
    """Return weights in units of the largest, so that their sums stay finite."""
    if weights is None:
        return dict.fromkeys(clients, 1.0)
    if set(weights) != set(clients):
        raise ValueError(f"weights must be of clients {clients}, got {in_order(weights)}")
    checked = check_weights({client: weights[client] for client in clients})
    largest = max(checked.values())
    return {client: weight / largest for client, weight in checked.items()}


def _checked(client: Client, update: Update, like: Mapping[str, Tensor]) -> dict[str, Parts]:
    what = f"update of client {client}"
    parts = fitting(update, like, what)
    for name, one in parts.items():
        dtype = like[name].dtype
        if not (surely_finite(one, dtype) or all_finite(written(one, like[name].shape).to(dtype))):
            raise ValueError(f"{what}: tensor {name!r} holds NaN, Inf or more than {dtype} can")
        if dtype == torch.int64 and isinstance(one, Tensor) and not exact_integers(one):
            raise ValueError(f"{what}: tensor {name!r} holds integers beyond 2^53")
    return parts


def _clip(given: _Round, rule: Rule, shares: Mapping[Client, float]) -> Robust:
    norms = {client: math.sqrt(squared_norm(update)) for client, update in given.updates.items()}
    most = statistics.median(norms.values()) if rule.value is None else rule.value
    clipped = {client: most / norm for client, norm in norms.items() if norm > most}
    return Robust(given.weighted(shares, clipped), clipped=clipped)


def _middle(parts: Sequence[Parts], like: Tensor, cut: int) -> Tensor:
    """Return the mean of each coordinate without so many of its smallest and largest values."""
    rows, cols = sides(like.shape)
    mean = torch.empty(rows, cols, dtype=torch.float64, device="cpu")
    step = max(1, _BLOCK // (len(parts) * max(1, cols)))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        block = np.stack([_rows(one, rows, cols, some).numpy() for one in parts])
        block.sort(axis=0)  # numpy sorts columns several times as fast as torch
        mean[some] = torch.from_numpy(block[cut : len(parts) - cut].mean(axis=0))
    return cast(mean.reshape(like.shape), like.dtype)


def _rows(parts: Parts, rows: int, cols: int, some: slice) -> Tensor:
    if isinstance(parts, Tensor):
        return parts.reshape(rows, cols)[some].double()
    return parts[0][:, some].double().T @ parts[1].double()


def _krum(given: _Round, rule: Rule, shares: Mapping[Client, float]) -> Robust:
    clients, hostile = list(given.updates), int(rule.value or 0)
    distances = torch.zeros(len(clients), len(clients), dtype=torch.float64, device="cpu")
    for one, parts in given.tensors():
        if one.is_floating_point():
            distances += _distances(parts, one.shape)
    # The nearest to each is itself.
    nearest = distances.sort(dim=1).values[:, 1 : len(clients) - hostile - 1]
    scores = dict(zip(clients, nearest.sum(dim=1).tolist(), strict=True))
    # Sorting is stable: of equal scores, the first in the order of the clients.
    chosen = sorted(clients, key=scores.__getitem__)[: len(clients) - hostile]
    if not any(shares[client] for client in chosen):
        raise ValueError(
            f"weights must not all be zero where rule {rule.text} chose: {in_order(chosen)}"
        )
    left_out = tuple(client for client in clients if client not in chosen)
    return Robust(given.weighted({client: shares[client] for client in chosen}), left_out)


def _distances(parts: Sequence[Parts], shape: tuple[int, ...]) -> Tensor:
    """Return squared distances between tensors, (N, N): ``|a - b|² = |a|² + |b|² - 2·a·b``.

    Inner products of factors come from their Gram matrices. Where a and b nearly cancel, this loses
    its digits: they are written out and subtracted, so that equal ones are at distance zero.
    """
    pairs = [one for one in parts if isinstance(one, tuple)]
    rank, (rows, cols) = sum(len(left) for left, _ in pairs), sides(shape)
    cheaper = rank**2 * (rows + cols) < (len(parts) ** 2 + rank) * rows * cols
    whole: Tensor | None = None
    if len(pairs) == len(parts) and cheaper:
        inner, most = _inner_products(pairs)
    else:
        whole = torch.stack([written(one, shape).reshape(-1) for one in parts])  # (N, P·Q)
        inner = whole @ whole.T
        most = inner.diagonal()
    squares = inner.diagonal()
    found = squares[:, None] + squares - 2.0 * inner
    # Not the negation of <=: what left float64 is NaN.
    doubtful = ~(found > CANCELLED * (most[:, None] + most))
    for i, j in doubtful.triu(1).nonzero().tolist():
        a, b = (written(parts[k], shape).reshape(-1) if whole is None else whole[k] for k in (i, j))
        found[i, j] = (a - b).square().sum()
    upper = found.triu(1)
    return upper + upper.T


def _inner_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``Σ (left_a·left_bᵀ) ∘ (right_a·right_bᵀ)``, (N, N), and most of what each adds up."""
    left, right = (torch.cat([pair[side] for pair in pairs]).double() for side in (0, 1))
    ranks = [len(pair[0]) for pair in pairs]
    owner = torch.repeat_interleave(
        torch.arange(len(pairs), device="cpu"), torch.tensor(ranks, device="cpu")
    )  # (ΣK)
    inner = torch.zeros(len(pairs), len(pairs), dtype=torch.float64, device="cpu")
    both = zip(torch.split(left, ranks), torch.split(right, ranks), strict=True)
    for row, (one_left, one_right) in zip(inner, both, strict=True):
        row.index_add_(0, owner, ((one_left @ left.T) * (one_right @ right.T)).sum(dim=0))
    lengths = left.norm(dim=1) * right.norm(dim=1)
    most = torch.zeros(len(pairs), dtype=torch.float64, device="cpu").index_add_(0, owner, lengths)
    return inner, most.square()
