"""Named tensors -> frames: the one call that makes an update small."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.codec.common import DTYPES, all_finite
from fedkd_fast.codec.decode import backend_named, decode_entry
from fedkd_fast.codec.lowrank import LowRank, distinct
from fedkd_fast.codec.message import CODECS, STEPPED, Message, wide
from fedkd_fast.codec.rows import Rows, touched
from fedkd_fast.codec.targets import Target, check_energy, make_target
from fedkd_fast.codec.wf1 import EXACT_SHARE
from fedkd_fast.feedback import EF21, ErrorFeedback, SubspaceCache, all_or_nothing
from fedkd_fast.tensors import (
    as_mapping,
    as_tensors,
    check_same_names,
    check_same_tensors,
    digest_of,
    endings_of,
    tied_names,
)
from fedkd_fast.wire import Base, Entry

SCOPES = ("tensor", "message")
DEFAULT_ENERGY = 0.95
STATISTICS = ("running_mean", "running_var")  # of batch normalisation, as torch calls them
_STEPPED = " or ".join(map(repr, STEPPED))
_FEEDBACK_PREFIX, _CACHE_PREFIX = "feedback.", "cache."


def _difference(value: Tensor, base: Tensor) -> Tensor:
    # Integers and booleans travel whole: a rounded difference of counters helps nobody.
    return value - base if value.is_floating_point() else value


def _dense(value: Tensor) -> Tensor:
    return value if value.layout == torch.strided else value.to_dense()


def _fits(found: Rows, dtype: torch.dtype) -> bool:
    """Tell whether what is sent of a tensor is finite in the dtype that it is sent in."""
    if dtype in (torch.float32, torch.float64) or not dtype.is_floating_point:
        return math.isfinite(found.largest)
    return all_finite(torch.tensor(found.largest, dtype=torch.float64, device="cpu").to(dtype))


class Compressor:
    """Make updates small: truncated SVD by energy, factors quantised and entropy-coded.

    ``wf1`` sends every matrix X of an update so that the decoded Y has
    ``|X - Y|² ≤ (1 - energy)·|X|²``: truncation and quantisation together, measured on what the
    receiver will have. One quantisation step serves all coefficients of ``U·diag(σ)`` and
    ``V·diag(σ)``, which is the optimum, and a static entropy coder gives each column the bits it
    needs. Where two factors do not pay, rows are coded directly, or a few factors and the rest.
    Vectors keep a 4 times smaller error. ``dense`` is wf1 without factors, at the same promise:
    larger frames in a fraction of the time, because nothing is factorised. ``wf0`` does as wf1 does
    with whole bits for each column and no entropy coder: at least a fifth more bytes.
    ``factors-fp32`` is the paper's payload,
    ``U·diag(σ)·Vᵀ`` in float32 with the smallest rank K whose energy exceeds the threshold (Nature
    Communications 13:2032, eq (8)), or raw bytes where that is smaller. ``raw`` loses nothing; nor
    does any codec with ``energy=1``. Where at least half of a matrix's rows are zero, only the
    others are factorised and sent; lossy codecs take -0.0 for zero there. With a base it is
    ``update - base`` that is encoded, after one rounding to the tensor's dtype.

    Args:
        energy: share of the squared norm of each tensor to keep, in (0, 1]; larger means more
            bytes. 0.95 where nothing else is asked for.
        codec: "wf1", "dense", "wf0", "factors-fp32" or "raw".
        error: instead, the largest relative error ``|X - Y| / |X|`` of each tensor, in [0, 1).
        budget_bytes: instead, the most bytes that a frame may take; as little as that allows is
            lost (wf1, dense).
        bits_per_param: instead, the budget as bits for each element of the update.
        scope: "tensor" keeps the promise for each tensor; "message" for all matrices together:
            smaller, because more is lost where that saves most, up to 4 times the share (wf1,
            dense).
        feedback: add to each update what the messages before left out: True, or an `ErrorFeedback`
            with options of its own, or an `EF21`.
        cache: start the factorisations where the last ones ended (`SubspaceCache`): several times
            faster. Nothing to codecs that do not factorise.
        stateless: promise that nothing is kept between calls; excludes `feedback` and `cache`.
        schema: write names, dtypes and shapes into frames, so that they describe themselves; left
            out, receivers have to know them.
        exact: lose nothing of tensors whose name ends with one of these after its last dot or
            slash: a running variance that is rounded to nothing or less ruins a model.
        backend: "native", or "reference" where the ops library is not built: the same promise, and
            decoding to the same bits, slowly.

    One Compressor serves one sender: concurrent calls of one that keeps state are an error.

    Raises:
        ValueError: an argument out of its range, more than one wish, or `stateless` together with
            state.
    """

    def __init__(
        self,
        energy: float | None = None,
        codec: str = "wf1",
        *,
        error: float | None = None,
        budget_bytes: int | None = None,
        bits_per_param: float | None = None,
        scope: str = "tensor",
        feedback: bool | ErrorFeedback | EF21 = False,
        cache: SubspaceCache | None = None,
        stateless: bool = False,
        schema: bool = True,
        exact: Collection[str] = STATISTICS,
        backend: str = "native",
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
        for name, value, kinds in (
            ("feedback", feedback, (bool, ErrorFeedback, EF21)),
            ("cache", cache, (SubspaceCache, type(None))),
        ):
            if not isinstance(value, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} must be {wanted}, got {value!r}")
        if feedback and stateless:
            raise ValueError("stateless=True excludes feedback=True: a residual is state")
        if cache is not None and stateless:
            raise ValueError("stateless=True excludes cache: a subspace is state")
        self.target = make_target(energy, error, budget_bytes, bits_per_param, DEFAULT_ENERGY)
        if codec not in STEPPED and (self.target.energy is None or scope != "tensor"):
            raise ValueError(f"budgets and scope='message' need codec {_STEPPED}, got {codec!r}")
        endings = endings_of(exact, "exact")
        self.codec, self.scope, self.schema, self.exact = codec, scope, schema, endings
        self._backend = backend_named(backend)
        self._feedback = ErrorFeedback() if feedback is True else feedback or None
        self._cache = cache
        self._lock = Lock()
        for state in self._state().values():
            state.claim(self)

    @property
    def feedback(self) -> ErrorFeedback | EF21 | None:
        """What keeps residuals or estimates, where there is feedback."""
        return self._feedback

    def compress(
        self,
        update: Mapping[str, object],
        base: Mapping[str, object] | None = None,
        *,
        energy: float | None = None,
        relative_to: Base | None = None,
    ) -> bytes:
        """Encode named tensors as one frame.

        Args:
            update: torch tensors or numpy arrays by name, of the dtypes of `codec.DTYPES`, on any
                device. Tensors that share their memory are sent once. Tensors whose rows are
                sparse, as the gradient of ``nn.Embedding(sparse=True)``, are decoded as dense ones,
                and take their memory here only with a base or with feedback.
            base: if given, ``update - base`` is encoded (integers and booleans whole) and the frame
                carries the base's digest, so that it only decodes against the same base.
            energy: overrides what the instance was asked for in this call.
            relative_to: how the frame names the base, instead of by its digest: a run and a round
                that receivers know (`wire.Base`). Without `base`, the update is taken for a
                difference already.

        Returns:
            The frame; its length is the cost. Same input and state give the same bytes on one type
            of machine.

        Raises:
            TypeError: a value that is no such CPU/CUDA tensor of a known dtype; names the tensor.
            ValueError: NaN or Inf (names the tensor), an energy out of (0, 1], a base that does not
                match, a budget that is too small. State is unchanged then.
            RuntimeError: another thread is in the middle of a call, and there is state.
        """
        finish = self._finish(base, relative_to)
        with self._alone():
            entries, keep = self._encode(update, base, None, energy, finish)
            frame = finish(entries)
            keep()
        return frame

    def compress_to(
        self,
        file: BinaryIO,
        update: Mapping[str, object],
        base: Mapping[str, object] | None = None,
        *,
        energy: float | None = None,
        relative_to: Base | None = None,
    ) -> int:
        """Encode into a file, one tensor in memory at a time: for models larger than memory.

        The frame is that of `compress`, but that ties are only found between the values of a dict,
        and without a base. Where the values of `update` and `base` are loaded as they are asked
        for, nothing else is held.

        Args:
            file: open for writing bytes, seekable; the frame begins where it stands.
            update: as in `compress`.
            base: as in `compress`.
            energy: as in `compress`.
            relative_to: as in `compress`.

        Returns:
            The length of the frame.

        Raises:
            ValueError: as `compress`, and for a budget or scope "message", which need the whole
                update at once. The file holds no frame then, and state is unchanged; until the
                end, what is kept is there twice.
        """
        if energy is None and (self.target.energy is None or self.scope != "tensor"):
            raise ValueError("compress_to takes an energy or error for each tensor, not a budget")
        if base is not None:
            check_same_names(update, base, "base")
        # Of values that are loaded when asked for, one may lie where another one lay.
        tied = tied_names(update) if isinstance(update, dict) and base is None else {}
        order = {name: index for index, name in enumerate(update)}
        start = file.tell()
        header = self._finish(base, relative_to).keywords
        states = self._state().values()
        with self._alone(), all_or_nothing(states), wire.FrameWriter(file, **header) as writer:
            for name in update:
                part = {name: update[name]}
                before = None if base is None else {name: base[name]}
                owner = {name: tied[name]} if name in tied else {}
                entries, keep = self._encode(part, before, owner, energy, None, order)
                writer.add(entries[0])
                keep()
        return file.tell() - start

    def _finish(
        self, base: Mapping[str, object] | None, relative_to: Base | None
    ) -> partial[bytes]:
        """Return what makes a frame of entries."""
        if base is not None and relative_to is None:
            relative_to = Base(digest=digest_of(base))
        # To a reader dense is a choice that the writer of wf1 made.
        codec = "wf1" if self.codec == "dense" else self.codec
        return partial(wire.encode, codec=codec, base=relative_to, schema=self.schema)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second call beside one that changes the state."""
        stateful = bool(self._state())
        if stateful and not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this Compressor keeps state and is in the middle of another call: "
                "give each sender a Compressor of its own"
            )
        try:
            yield
        finally:
            if stateful:
                self._lock.release()

    def _encode(
        self,
        update: Mapping[str, object],
        base: Mapping[str, object] | None,
        tied: Mapping[str, str] | None,
        energy: float | None,
        finish: Callable[[list[Entry]], bytes] | None,
        order: Mapping[str, int] | None = None,
    ) -> tuple[list[Entry], Callable[[], None]]:
        """Return the entries of an update, and what records in the state that they were sent."""
        target = self.target if energy is None else Target(energy=check_energy(energy))
        # Once each: of values that are loaded when asked for, one may lie where another one lay.
        update = dict(as_mapping(update, "update").items())
        base = None if base is None else dict(as_mapping(base, "base").items())
        names = list(update)
        known, update = self._known(update, base, target)
        # What is sent is looked at for NaN and Inf, which says it of what it is made of.
        tensors = as_tensors(update, "update", sparse=True, finite=False)
        if tied is None:
            tied = tied_names(update)
        if base is not None or self._feedback:
            tensors = {name: _dense(value) for name, value in tensors.items()}
        if base is not None:
            bases = as_tensors(base, "base", finite=False)
            check_same_tensors(tensors, bases, "base")
            base_ties = tied_names(base)
            tied = {name: owner for name, owner in tied.items() if base_ties.get(name) == owner}
            tensors = {name: _difference(value, bases[name]) for name, value in tensors.items()}
        sent = tensors
        if self._feedback is not None:
            # A tensor with a residual of its own is not what it is tied to.
            feedback = self._feedback
            tied = {name: owner for name, owner in tied.items() if feedback.alike(name, owner)}
            sent = {
                name: feedback.add(name, wide(value))
                if name not in tied and value.is_floating_point()
                else value
                for name, value in tensors.items()
            }
        lossy = self.codec != "raw" and target.energy != 1.0
        exact = {name for name in sent if self._is_exact(name)}
        rows = {
            name: touched(
                value,
                exactly=not (lossy and value.is_floating_point()) or name in exact,
                backend=self._backend,
            )
            for name, value in sent.items()
            if name not in tied
        }
        odd = [name for name, found in rows.items() if not _fits(found, tensors[name].dtype)]
        if odd:
            as_tensors(update, "update", sparse=True)
            as_tensors(base or {}, "base")
            raise ValueError(
                f"update[{odd[0]!r}], less its base and with its residual, overflows "
                f"{DTYPES[tensors[odd[0]].dtype]}"
            )
        if known:
            places, ties = distinct(known)
            tied, known = {**tied, **ties}, {n: known[n] for n in known if n not in ties}
            tensors = {name: tensors[name] if name in tensors else places[name] for name in names}
        message = Message(tensors, rows, tied, order, self._cache, self._backend, known, exact)
        entries = self._coded(message, target, finish)

        def keep() -> None:
            if self._feedback is not None:
                for entry in entries:
                    if entry.name in rows and sent[entry.name].is_floating_point():
                        decoded = decode_entry(entry, self._backend)
                        self._feedback.keep(entry.name, sent[entry.name], decoded)
                for name, owner in tied.items():
                    self._feedback.share(name, owner)
            if self._cache is not None:
                for name, factors in message.factors.items():
                    self._cache.keep(name, factors, some_rows=rows[name].ids is not None)

        return entries, keep

    def _is_exact(self, name: str) -> bool:
        return re.split("[./]", name)[-1] in self.exact

    def _known(
        self, update: Mapping[str, object], base: Mapping[str, object] | None, target: Target
    ) -> tuple[dict[str, LowRank], Mapping[str, object]]:
        """Take apart what can stay factors; what cannot is written out."""
        if not any(isinstance(value, LowRank) for value in update.values()):
            return {}, update
        usable = self.codec == "wf1" and base is None and self._feedback is None
        usable = usable and target.energy is not None and 1.0 - target.energy >= EXACT_SHARE
        known, rest = {}, {}
        written: dict[int, Tensor] = {}
        for name, value in update.items():
            if not isinstance(value, LowRank):
                rest[name] = value
            elif usable and value.worth_keeping and not self._is_exact(name):
                known[name] = value
            else:
                if id(value) not in written:
                    written[id(value)] = value.dense()
                rest[name] = written[id(value)]
        return known, rest

    def _coded(
        self, message: Message, target: Target, finish: Callable[[list[Entry]], bytes] | None
    ) -> list[Entry]:
        one_step, factorise = self.scope == "message", self.codec != "dense"
        if target.energy is None:
            limit = target.limit_bytes(message.numel)
            assert limit is not None and finish is not None
            return message.encode_within(
                limit, lambda e: len(finish(e)), one_step=one_step, factorise=factorise
            )
        if self.codec == "raw" or target.energy == 1.0:
            return message.encode_raw()
        if self.codec == "factors-fp32":
            return message.encode_factors(target.energy)
        if self.codec == "wf0":
            return message.encode_wf0(target.energy)
        return message.encode_wf1(1.0 - target.energy, one_step=one_step, factorise=factorise)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept between calls, as tensors that safetensors can store."""
        return {
            prefix + name: value
            for prefix, part in self._state().items()
            for name, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: state of a kind that this Compressor does not keep, or unknown keys.
        """
        parts: dict[str, dict[str, Tensor]] = {_FEEDBACK_PREFIX: {}, _CACHE_PREFIX: {}}
        for name, value in state.items():
            prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
            if prefix is None:
                raise ValueError(f"state must hold only {', '.join(parts)} tensors, got {name!r}")
            parts[prefix][name.removeprefix(prefix)] = value
        own = self._state()
        for prefix, part in parts.items():
            if part and prefix not in own:
                raise ValueError(f"state holds {prefix}* tensors, which this Compressor lacks")
        with all_or_nothing(own.values()):
            for prefix, keeper in own.items():
                keeper.load_state_dict(parts[prefix])

    def _state(self) -> dict[str, ErrorFeedback | EF21 | SubspaceCache]:
        kept = {_FEEDBACK_PREFIX: self._feedback, _CACHE_PREFIX: self._cache}
        return {prefix: part for prefix, part in kept.items() if part is not None}
