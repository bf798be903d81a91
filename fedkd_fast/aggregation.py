"""Weighted means of frames: factors stay factors while their ranks are small, one sum otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedkd_fast.codec.common import TORCH_DTYPES
from fedkd_fast.codec.decode import Parts, backend_named
from fedkd_fast.codec.lowrank import STACKED_SHARE, LowRank, stacked
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decode_frame_parts
from fedkd_fast.tensors import Shaped, is_buffer
from fedkd_fast.updates import Client, cast, check_weights, exact_integers, largest_of
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base, Entry, Mode

Frame: TypeAlias = bytes | bytearray | memoryview
_log = logging.getLogger(__name__)

# What frames hold of these has been rounded, as a rule; others are added in float64 in any mode.
_QUANTISED = ("float32", "float16", "bfloat16")
# Of a dtype's range: sums that may go beyond are added up in a wider one, or in larger units.
_REACH = 0.25
_UNIT = 2.0**-64


class Aggregate(Mapping[str, Tensor]):
    """The mean by tensor name.

    Args:
        values: the means; those that are `LowRank` are written out when they are asked for.
        relative_to: what the frames were differences to, if they were.
        refused: frames that do not count, by name or index, and why.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor | LowRank],
        relative_to: Base | None,
        refused: Mapping[str | int, str],
    ) -> None:
        self._values = dict(values)
        self.relative_to, self.refused = relative_to, dict(refused)
        # Tied tensors are one object before and after they are written out. With each, how often
        # it had been changed by then.
        self._written: dict[int, tuple[Tensor, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return a mean as a tensor."""
        value = self._values[name]
        if isinstance(value, Tensor):
            return value
        if id(value) not in self._written:
            dense = value.dense()
            self._written[id(value)] = dense, _changes(dense)
        return self._written[id(value)][0]

    def __iter__(self) -> Iterator[str]:
        """Go through the names in the order they were sent."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._values)

    def recompress(self, compressor: Compressor, *, energy: float | None = None) -> bytes:
        """Encode the mean for the broadcast; receivers decode it against the base of the frames.

        What was added up as factors of small rank is not written out for it, unless the compressor
        keeps residuals.
        """
        values = {name: self._sent(value) for name, value in self._values.items()}
        return compressor.compress(values, energy=energy, relative_to=self.relative_to)

    def _sent(self, value: Tensor | LowRank) -> Tensor | LowRank:
        """Return factors, unless what they were written out as was changed in place."""
        written, version = self._written.get(id(value), (None, 0))
        return value if written is None or _changes(written) == version else written


def _changes(value: Tensor) -> int:
    """Return how often a tensor was changed in place; those of inference mode are not counted."""
    return 0 if value.is_inference() else value._version


class _Sum:
    """A weighted sum of one tensor of many frames.

    Factors are stacked while the ranks add up to less than half of the shorter side, which takes
    less memory than the matrix. From there on, and for what comes in another form, it is one
    buffer: float64 for what is exact, float32 for what was quantised. Whatever some senders add, no
    sum leaves the range of its dtype on the way, and no mean is larger than the largest that came.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._dense: Tensor | None = None
        self._reach, self._unit = 0.0, 1.0  # magnitude that no sum exceeds; of the buffer
        self._largest = 0.0  # magnitude that came

    def add(self, parts: Parts, weight: float, *, exact: bool) -> None:
        largest = largest_of(parts)
        self._largest = max(self._largest, largest)
        self._reach += weight * largest
        # Also of values of 16 bits: their sum is one of 32.
        far = not self._reach < _REACH * torch.finfo(torch.float32).max
        dtype = torch.float64 if exact or far else torch.float32
        if not isinstance(parts, Tensor) and self._dense is None and not far:
            left, right = parts
            self._pairs.append((left * weight, right))
            rank = sum(len(pair[0]) for pair in self._pairs)
            if not rank < STACKED_SHARE * min(left.shape[1], right.shape[1]):
                self._write_out(dtype)
            return
        if self._dense is None or (dtype == torch.float64 and self._dense.dtype != dtype):
            self._write_out(dtype)
        assert self._dense is not None
        if not self._reach < _REACH * torch.finfo(torch.float64).max and self._unit == 1.0:
            self._unit = _UNIT
            self._dense.mul_(_UNIT)
        weight *= self._unit
        if isinstance(parts, Tensor):
            self._dense.add_(parts.reshape(self._shape), alpha=weight)
            return
        left, right = (side.to(self._dense.dtype) for side in parts)
        self._dense.view(left.shape[1], right.shape[1]).addmm_(left.T, right, alpha=weight)

    def _write_out(self, dtype: torch.dtype) -> None:
        if self._dense is not None:
            self._dense = self._dense.to(dtype)
            return
        self._dense = torch.zeros(self._shape, dtype=dtype, device="cpu")
        if self._pairs:
            whole = stacked(self._pairs, self._shape, dtype)
            self._pairs = []
            matrix = self._dense.view(whole.left.shape[1], whole.right.shape[1])
            matrix.addmm_(whole.left.T.to(dtype), whole.right.to(dtype))

    def scale(self, factor: float) -> None:
        """Multiply what has been added."""
        self._reach *= factor
        self._pairs = [(left * factor, right) for left, right in self._pairs]
        if self._dense is not None:
            self._dense.mul_(factor)

    def mean(self, total: float) -> Tensor | LowRank:
        if self._dense is not None:
            mean = self._dense.div_(total * self._unit)
            if self._dtype in (torch.float64, torch.int64):
                # No cast rounds away what the weights, as they are rounded, are more than a whole.
                mean.clamp_(-self._largest, self._largest)
            return cast(mean, self._dtype)
        if not self._pairs:
            return torch.zeros(self._shape, dtype=self._dtype, device="cpu")
        whole = stacked(self._pairs, self._shape, self._dtype)
        whole.left.div_(total)
        return whole


def _weighted(
    frames: Iterable[Frame] | Mapping[Any, Frame],
    weights: Sequence[float] | Mapping[Any, float] | None,
) -> Iterator[tuple[Client, Frame, float]]:
    """Pair frames with names and weights, without holding more than one frame."""
    named: Iterable[tuple[Client, Frame]] = (
        frames.items() if isinstance(frames, Mapping) else enumerate(frames)
    )
    if weights is None:
        yield from ((name, frame, 1.0) for name, frame in named)
        return
    if isinstance(weights, Mapping):
        left: dict[Client, float] = check_weights(weights)
        for name, frame in named:
            if name not in left:
                raise ValueError(f"weights must have an entry for each frame, {name!r} has none")
            yield name, frame, left.pop(name)
        if left:
            raise ValueError(f"weights must be of frames, there is none of {next(iter(left))!r}")
        return
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence or a mapping of numbers, got {weights!r}")
    checked, count = check_weights(dict(enumerate(weights))), 0
    for count, (name, frame) in enumerate(named, 1):
        if count <= len(checked):
            yield name, frame, checked[count - 1]
    if count != len(checked):
        raise ValueError(
            f"weights must have one entry per frame: {count} frames, got {len(checked)}"
        )


def aggregate(
    frames: Iterable[Frame] | Mapping[str, Frame] | Mapping[int, Frame],
    weights: Sequence[float] | Mapping[str, float] | Mapping[int, float] | None = None,
    schema: Mapping[str, Shaped] | None = None,
    *,
    relative_to: Base | None = None,
    strict: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> Aggregate:
    """Average frames: ``Σ_i w_i · decode(frame_i) / Σ_i w_i``, FedAvg; FedKD has equal weights.

    One decoded frame is in memory beside the sums, however many there are. Factors are not
    multiplied out while the ranks that came add up to less than half of a matrix's shorter side.

    Args:
        frames: at least one, also from a generator; by name, or counted from 0.
        weights: one finite number >= 0 per frame, for instance sample counts, in their order or by
            their names; None means equal.
        schema: expected tensors, as in `decompress`; None takes those of the first frame that
            decodes. With a schema, no frame can cost more than what it describes.
        relative_to: the base that frames must be made against; None takes that of the first one.
        strict: raise for a frame that is damaged or does not match, instead of leaving it out.
        max_bytes: bound on each decoded frame.
        backend: as in `Compressor`.

    Returns:
        The mean, in each tensor's dtype, and which frames were refused and why; their weights do
        not count. Integers are rounded to the nearest, booleans are true from one half on. Tensors
        that are tied in every frame stay tied.

    Raises:
        TypeError: one frame instead of several, no frames, or weights that are no numbers.
        ValueError: no frame that counts, or wrong weights. With `strict`, also a frame that does
            not match the others or the schema, or that holds integers beyond 2^53; names it.
        WireError: with `strict`, anything wrong with the bytes of a frame.
    """
    if isinstance(frames, str) or is_buffer(frames):
        raise TypeError("frames must be several, one a sender, got a single one: pass [frame]")
    if not isinstance(frames, Iterable):
        raise TypeError(f"frames must be an iterable or a mapping of frames, got {frames!r}")
    module = backend_named(backend)
    mean = _Mean(schema, relative_to)
    refused: dict[str | int, str] = {}
    for name, frame, weight in _weighted(frames, weights):
        try:
            mean.add(name, frame, weight, max_bytes, module)
        except ValueError as error:
            if strict:
                raise
            refused[name] = str(error)
            _log.warning("frame %s is left out: %s", name, error)
    return mean.finish(refused)


class _Mean:
    def __init__(self, schema: Mapping[str, Shaped] | None, relative_to: Base | None) -> None:
        self._wanted, self._what = schema, "schema"
        self._relative_to, self._any_base = relative_to, relative_to is None
        self._sums: dict[str, _Sum] = {}
        self._ties: dict[str, str] = {}
        self._total = self._unit = 0.0

    def add(
        self, name: str | int, frame: Frame, weight: float, max_bytes: int, module: ModuleType
    ) -> None:
        """Decode a frame completely, then add it: one that is refused leaves no trace."""
        if not is_buffer(frame):
            raise ValueError(f"frame {name} must be bytes, got {type(frame).__name__}")
        found, made_against = decode_frame_parts(
            frame,
            self._wanted,
            schema_name=f"{self._what} of frame {name}",
            max_bytes=max_bytes,
            module=module,
        )
        if not self._any_base and made_against != self._relative_to:
            raise ValueError(f"frame {name} was made against another base than is wanted")
        for entry, parts in found:
            if entry.dtype == "int64" and isinstance(parts, Tensor) and not exact_integers(parts):
                raise ValueError(f"frame {name}: {entry.name!r} holds integers beyond 2^53")
        if weight == 0.0:
            return
        names = [entry.name for entry, _ in found]
        tied = {
            entry.name: names[entry.rank] if entry.mode is Mode.ALIAS else entry.name
            for entry, _ in found
        }
        if not self._sums:
            self._begin([entry for entry, _ in found], made_against, tied)
        # One sender's ties must not overwrite what the others sent.
        self._ties = {one: other for one, other in self._ties.items() if tied[one] == other}
        # Weights in units of the largest that counted so far: what is refused has no say in them.
        if weight > self._unit:
            for one in self._sums.values():
                one.scale(self._unit / weight)
            self._total *= self._unit / weight
            self._unit = weight
        for entry, parts in found:
            if entry.mode is not Mode.ZERO:
                exact = entry.mode is Mode.RAW or entry.dtype not in _QUANTISED
                self._sums[entry.name].add(parts, weight / self._unit, exact=exact)
        self._total += weight / self._unit

    def _begin(
        self, entries: Sequence[Entry], made_against: Base | None, tied: Mapping[str, str]
    ) -> None:
        if self._wanted is None:
            self._wanted, self._what = {entry.name: entry for entry in entries}, "first frame"
        self._relative_to, self._any_base = made_against, False
        self._sums = {entry.name: _Sum(entry.shape, TORCH_DTYPES[entry.dtype]) for entry in entries}
        self._ties = dict(tied)

    def finish(self, refused: Mapping[str | int, str]) -> Aggregate:
        if not self._total:
            raise ValueError(
                f"frames must hold at least one frame that counts, got none: {dict(refused)}"
            )
        means = {name: one.mean(self._total) for name, one in self._sums.items()}
        values = {name: means[self._ties.get(name, name)] for name in means}
        return Aggregate(values, self._relative_to, refused)
