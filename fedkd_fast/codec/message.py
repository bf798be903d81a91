"""The tensors of one message on their way to entries: raw, factorised, coded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.codec import wf0, wf1
from fedkd_fast.codec.common import (
    DTYPES,
    factors_entry,
    is_matrix,
    matrix_shape,
    may_lose,
    raw_entry,
    representable,
)
from fedkd_fast.codec.decode import decode_entry
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.codec.rows import Rows, whole_entry
from fedkd_fast.codec.targets import LEAST_SHARE, Priced, expected_size, shares_of
from fedkd_fast.feedback import SubspaceCache
from fedkd_fast.reference import Factors
from fedkd_fast.wire import Entry, Mode

CODECS = ("wf1", "dense", "wf0", "factors-fp32", "raw")
# Those that choose a step for each tensor: they take budgets, and one price for a whole message.
STEPPED = ("wf1", "dense")
# Where wf1 and wf0 cut the spectrum before they weigh columns against bits: at this share of what
# may be lost. Next to no column below is worth its bits at the prices that meet the target: a third
# instead of a half takes up to half more time and saves a thousandth of the bytes, wf0 a hundredth.
TAIL_SHARE, WF0_TAIL_SHARE = 0.5, 0.35
# A budget is used to this share at least, where the tensors allow it.
FULL_BUDGET, AIM_BUDGET = 0.98, 0.993
_BUDGET_ATTEMPTS, _CURVE_ATTEMPTS = 12, 4
_ALIKE = 1.1  # losses within this factor: tensors do not use all that they may lose
_SAMPLE, _FEW = 4096, 64  # of values; of these, for each value that differs
# What a first look at a message with a budget assumes to be lost.
_FIRST_LOST = 0.05
# log2 of the least that is lost before nothing is: about what float32 distinguishes.
_FINEST = -46.0
# More than what few values lose at a step that all but divides them: a step is off by a 256th of
# an octave at most, and sixteen bits round what is decoded once more.
_NEXT_TO_NOTHING = 2.0**-15
# What their factors may lose in few bytes, where those are exact.
_STILL_LESS = 2.0**-30


def wide(value: Tensor) -> Tensor:
    """Return a floating tensor in the precision that it is encoded from."""
    return value if value.dtype == torch.float64 else value.float()


class Message:
    """What was found in each tensor of an update, and the entries that it becomes.

    Args:
        tensors: of the update; only dtype and shape count.
        rows: what is left of each tensor that is sent, without rows of zeros.
        tied: names that show the memory of an earlier one, and which.
        order: place of each name in the frame; that in `tensors` where it is None.
        cache: where factorisations start, or None.
        backend: `fedkd_fast.ops` or `fedkd_fast.reference`.
        known: tensors that come as factors; for wf1 by an energy.
        exact: names of tensors that lose nothing.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        tied: Mapping[str, str],
        order: Mapping[str, int] | None,
        cache: SubspaceCache | None,
        backend: ModuleType,
        known: Mapping[str, LowRank],
        exact: Collection[str],
    ) -> None:
        self._tensors, self._rows, self._tied, self._known = tensors, rows, tied, known
        self._order = order or {name: index for index, name in enumerate(tensors)}
        self._cache, self._backend = cache, backend
        self._raws: dict[str, Entry] = {}
        self._lossy = {
            name: wide(found.values)
            for name, found in rows.items()
            if found.values.is_floating_point()
            and representable(found.largest)
            and name not in exact
        }
        self.factors: dict[str, Factors] = {}

    def _raw(self, name: str) -> Entry:
        if name not in self._raws:
            values = self._rows[name].values.to(self._tensors[name].dtype)
            self._raws[name] = raw_entry(name, values)
        return self._raws[name]

    def _blank(self, name: str) -> Entry:
        """Return the raw entry without its payload."""
        shape = tuple(self._rows[name].values.shape)
        return Entry(name, DTYPES[self._tensors[name].dtype], shape, Mode.RAW)

    @property
    def numel(self) -> int:
        """Elements of all tensors that are sent."""
        return sum(t.numel() for name, t in self._tensors.items() if name not in self._tied)

    def encode_raw(self) -> list[Entry]:
        """Lose nothing."""
        return self._listed({})

    def encode_factors(self, energy: float) -> list[Entry]:
        """Send the paper's payload, or raw bytes where that is smaller."""
        budgets = [len(self._raw(name).payload) for name in self._matrices()]
        self._factorise(energy, budgets)
        coded = {}
        for name, factors in self._paying().items():
            raw = self._raw(name)
            entry = factors_entry(name, raw.dtype, raw.shape, factors)
            if len(entry.payload) >= len(raw.payload):
                continue
            # Sixteen bits round what factors make, and may have no room for the largest of it.
            roomy = raw.dtype in ("float32", "float64")
            if roomy or self._lost(entry) <= 1.0 - energy:
                coded[name] = entry
        return self._listed(coded)

    def _lost(self, entry: Entry) -> float:
        """Return the share of its squared norm that a tensor loses in what an entry decodes to."""
        exact = self._lossy[entry.name].double()
        decoded = decode_entry(entry, self._backend).double()
        return float((decoded - exact).square().sum() / exact.square().sum())

    def encode_wf0(self, energy: float) -> list[Entry]:
        """Meet an energy with integer bits for each column or row."""
        self._factorise(1.0 - (1.0 - energy) * WF0_TAIL_SHARE)
        paying = self._paying()
        return self._listed(
            {
                name: wf0.encode(
                    self._raw(name),
                    value,
                    may_lose(self._shape(name), energy),
                    paying.get(name),
                    self._backend,
                )
                for name, value in self._lossy.items()
            }
        )

    def encode_wf1(self, lost: float, *, one_step: bool, factorise: bool) -> list[Entry]:
        """Lose at most this share of the squared norm, by tensor or as a whole.

        Args:
            lost: the share.
            one_step: as a whole.
            factorise: whether factors may be sent, and are looked for.
        """
        items = self._items(lost, one_step, factorise)
        # A tensor may lose less than its share where others may lose more.
        priced = _priced(items, 0.1 * lost if one_step else None)
        return self._coded(items, shares_of(priced, lost, one_step=one_step), one_step)[0]

    def encode_within(
        self,
        limit: int,
        size: Callable[[list[Entry]], int],
        *,
        one_step: bool,
        factorise: bool,
    ) -> list[Entry]:
        """Lose as little as a frame of this many bytes allows.

        Args:
            limit: bytes of the frame.
            size: tells how long the frame of some entries is.
            one_step: as in `encode_wf1`.
            factorise: as in `encode_wf1`.

        Raises:
            ValueError: even what takes least is larger.
        """
        exact = self._listed({})
        if size(exact) <= limit:
            return exact
        fixed = self._fixed(size)
        # A little below the limit, because what is expected and what comes differ by less.
        goal = wanted = AIM_BUDGET * limit - fixed
        items, deepest = self._items(_FIRST_LOST, one_step, factorise), _FIRST_LOST
        priced = _priced(items, 2.0**_FINEST)
        best: list[Entry] | None = None
        least, loses = 2**63, math.inf
        beyond, fits = 2.0**_FINEST, 1.0  # losses of frames that were too large, and that were not
        # Of few values, what loses next to nothing may be smaller than what loses something.
        few = self._keeps_to_few_values()
        for attempt in range(-1 if few else 0, _BUDGET_ATTEMPTS):
            if attempt < 0:
                lost = _NEXT_TO_NOTHING
            else:
                # Where numbers keep to a few values, the curves are off by more than they can mend.
                curved = attempt < _CURVE_ATTEMPTS
                lost = _lost_within(priced, wanted, one_step) if curved else math.nan
                if not beyond < lost < fits:
                    lost = math.sqrt(beyond * fits)
                if best is None and attempt == _BUDGET_ATTEMPTS - 1:
                    lost = 1.0
                # With fewer columns, a frame may take less than with coarse ones of all.
                fewer = best is None and not curved and lost > 2.0 * deepest
                if factorise and (lost < deepest or fewer):
                    items, deepest = self._items(lost, one_step, factorise), lost
                    priced = _priced(items, 2.0**_FINEST)
            entries, loss = self._coded(items, shares_of(priced, lost, one_step=one_step), one_step)
            found = size(entries)
            least = min(least, found)
            full = FULL_BUDGET * limit <= found <= limit and attempt >= 0
            # Of few values a larger frame may lose more; a little more says nothing.
            if found <= limit and loss < (_ALIKE if full else 1.0) * loses:
                best, loses = entries, loss
            if (full and best is entries) or loses <= 2.0**_FINEST:
                break
            beyond, fits = (max(beyond, lost), fits) if found > limit else (beyond, min(fits, lost))
            if attempt >= 0:
                wanted *= goal / max(found - fixed, 1)
        if few and _STILL_LESS < loses < _NEXT_TO_NOTHING:
            allowed = shares_of(priced, _STILL_LESS, one_step=one_step)
            entries, loss = self._coded(items, allowed, one_step)
            if loss < loses and size(entries) <= limit:
                best = entries
        if best is None:
            raise ValueError(
                f"the frame takes at least about {least} bytes, got a limit of {limit}"
            )
        return best

    def _keeps_to_few_values(self) -> bool:
        """Tell whether the largest lossy tensor is like signs, as far as a sample shows."""
        if not self._lossy:
            return False
        values = max(self._lossy.values(), key=torch.Tensor.numel).reshape(-1)
        sample = values[:: max(1, len(values) // _SAMPLE)]
        return len(np.unique(sample.double().numpy())) * _FEW < len(sample)

    def _fixed(self, size: Callable[[list[Entry]], int]) -> int:
        """Return the bytes of a frame that are not payloads of lossy tensors."""
        payloads = sum(len(self._raw(name).payload) for name in self._lossy)
        return size(self._listed({})) - payloads

    def _items(self, lost: float, one_step: bool, factorise: bool) -> dict[str, wf1.Item]:
        tail = lost * (TAIL_SHARE * LEAST_SHARE if one_step else TAIL_SHARE)
        if factorise:
            self._factorise(1.0 - tail)
        paying = self._paying()
        items = {
            name: wf1.Item(
                self._blank(name),
                value,
                vector=not is_matrix(self._shape(name)),
                factors=paying.get(name),
                backend=self._backend,
                squares=self._rows[name].squares,
            )
            for name, value in self._lossy.items()
        }
        for name, value in self._known.items():
            blank = Entry(name, DTYPES[value.dtype], value.shape, Mode.RAW)
            factors = value.factors(1.0 - tail)
            items[name] = wf1.Item(
                blank, value, vector=False, factors=factors, backend=self._backend
            )
        return items

    def _coded(
        self, items: Mapping[str, wf1.Item], allowed: list[float], one_step: bool
    ) -> tuple[list[Entry], float]:
        """Return the entries of all tensors, and the share that is lost."""
        coded: dict[str, Entry] = {}
        lost = whole = 0.0
        found = wf1.encode(list(items.values()), allowed, self._backend)
        for (name, item), part in zip(items.items(), found, strict=True):
            if part.entry is not None:
                coded[name] = part.entry
            # One loss for each tensor weighs as bytes do: by the numbers that share it.
            weight = item.total if one_step else math.prod(item.template.shape)
            lost += weight * part.error / item.total
            whole += weight
        return self._listed(coded), lost / whole if whole else 0.0

    def _shape(self, name: str) -> tuple[int, ...]:
        # What may be lost depends on the tensor: a row alone of a matrix is no vector.
        return tuple(self._tensors[name].shape)

    def _matrices(self) -> dict[str, Tensor]:
        return {
            name: value.reshape(matrix_shape(tuple(value.shape))).float()
            for name, value in self._lossy.items()
            if is_matrix(tuple(value.shape))
        }

    def _paying(self) -> dict[str, Factors]:
        return {name: found for name, found in self.factors.items() if found.pays}

    def _factorise(self, energy: float, budgets: Sequence[int | None] | None = None) -> None:
        """Factorise all matrices in one call."""
        matrices = self._matrices()
        earlier = [
            self._cache.get(name, (matrix.shape[0], matrix.shape[1])) if self._cache else None
            for name, matrix in matrices.items()
        ]
        found: list[Factors] = self._backend.truncated_svd_list(
            list(matrices.values()),
            energy=energy,
            earlier=earlier,
            budgets_bytes=budgets or [None] * len(matrices),
        )
        self.factors = dict(zip(matrices, found, strict=True))

    def _listed(self, coded: Mapping[str, Entry]) -> list[Entry]:
        """Return the entries of all tensors in their order; what is not coded is raw."""
        return [
            self._entry(name, tuple(tensor.shape), coded.get(name))
            for name, tensor in self._tensors.items()
        ]

    def _entry(self, name: str, shape: tuple[int, ...], coded: Entry | None) -> Entry:
        if name in self._rows:
            return whole_entry(shape, self._rows[name].ids, coded or self._raw(name))
        if name in self._known:
            return coded or raw_entry(name, self._known[name].dense())
        dtype = DTYPES[self._tensors[name].dtype]
        return Entry(name, dtype, shape, Mode.ALIAS, self._order[self._tied[name]])


def _priced(items: Mapping[str, wf1.Item], least: float | None) -> list[Priced]:
    """Return what tensors cost down to this share of their squared norms, where that is asked."""
    return [
        Priced(item.total, item.share, [] if least is None else item.curves(least * item.share))
        for item in items.values()
    ]


def _lost_within(priced: Sequence[Priced], limit: float, one_step: bool) -> float:
    """Return what is lost where the payloads are expected to take so many bytes."""
    low, high = _FINEST, 0.0  # log2
    for _ in range(20):
        middle = 0.5 * (low + high)
        size = expected_size(priced, shares_of(priced, 2.0**middle, one_step=one_step))
        low, high = (low, middle) if size <= limit else (middle, high)
    return float(2.0**high)
