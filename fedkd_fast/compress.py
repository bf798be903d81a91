"""Named tensors <-> frames: the one call that makes an update small, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from fedkd_fast import codec as _codec
from fedkd_fast import wire
from fedkd_fast.codec import DTYPES, all_finite
from fedkd_fast.feedback import ErrorFeedback, SubspaceCache
from fedkd_fast.reference import Factors
from fedkd_fast.rows import Rows, touched, whole_entry
from fedkd_fast.tensors import (
    Shaped,
    as_tensors,
    check_same_tensors,
    digest_of_tensors,
    specs_of,
    tied_names,
)
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Entry, Mode, WireError

CODECS = ("wf0", "factors-fp32", "raw")
BACKENDS = ("native", "reference")
_FEEDBACK_PREFIX, _CACHE_PREFIX = "feedback.", "cache."


def _backend(name: str) -> ModuleType:
    if name == "native":
        from fedkd_fast import ops

        return ops
    if name == "reference":
        from fedkd_fast import reference

        return reference
    raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")


def _check_energy(energy: float) -> float:
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    return float(energy)


def _difference(value: Tensor, base: Tensor) -> Tensor:
    # Integers and booleans travel whole: a rounded difference of counters helps nobody.
    return value - base if value.is_floating_point() else value


def _dense(value: Tensor) -> Tensor:
    return value if value.layout == torch.strided else value.to_dense()


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


class Compressor:
    """Make updates small: truncated SVD by energy, factors quantised to integer bits per column.

    For every matrix of an update X, ``wf0`` sends ``Y = Σ_k s_k · a_k b_kᵀ`` with integer vectors
    a_k, b_k of 1 to 12 bits an entry, chosen so that ``|X - Y|² ≤ (1 - energy)·|X|²``: truncation
    and quantisation together, measured on the decoded bytes. Where two factors do not pay in
    encoded bytes, rows are quantised directly, or the tensor travels raw. Vectors keep a 16 times
    smaller error. ``factors-fp32`` is the paper's payload, ``U·diag(σ)·Vᵀ`` in float32 with the
    smallest rank K whose energy exceeds the threshold (Nature Communications 13:2032, eq (8)), or
    raw bytes where that is smaller. ``raw`` loses nothing; nor does any codec with ``energy=1``.
    Where at least half of a matrix's rows are zero, only the others are factorised and sent; lossy
    codecs take -0.0 for zero there. With a base it is ``update - base`` that is encoded, after one
    rounding to the tensor's dtype.

    Args:
        energy: share of the squared norm to keep, in (0, 1]; larger means more bytes.
        codec: "wf0", "factors-fp32" or "raw".
        feedback: add to each update what the messages before left out (`ErrorFeedback`).
        cache: start the factorisations where the last ones ended (`SubspaceCache`): several times
            faster.
        stateless: promise that nothing is kept between calls; excludes `feedback` and `cache`.
        backend: "native", or "reference" where the ops library is not built: the same promise, and
            decoding to the same bits, slowly.

    Raises:
        ValueError: an argument out of its range, or `stateless` together with state.
    """

    def __init__(
        self,
        energy: float = 0.95,
        codec: str = "wf0",
        *,
        feedback: bool = False,
        cache: SubspaceCache | None = None,
        stateless: bool = False,
        backend: str = "native",
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
        if feedback and stateless:
            raise ValueError("stateless=True excludes feedback=True: a residual is state")
        if cache is not None and stateless:
            raise ValueError("stateless=True excludes cache: a subspace is state")
        self.energy = _check_energy(energy)
        self.codec = codec
        self._backend = _backend(backend)
        self._feedback = ErrorFeedback() if feedback else None
        self._cache = cache

    def compress(
        self,
        update: Mapping[str, object],
        base: Mapping[str, object] | None = None,
        *,
        energy: float | None = None,
        base_digest: bytes | None = None,
    ) -> bytes:
        """Encode named tensors as one frame.

        Args:
            update: torch tensors or numpy arrays by name, of the dtypes of `codec.DTYPES`, on any
                device. Tensors that share their memory are sent once. Tensors whose rows are
                sparse, as the gradient of ``nn.Embedding(sparse=True)``, are decoded as dense ones,
                and take their memory here only with a base or with feedback.
            base: if given, ``update - base`` is encoded (integers and booleans whole) and the frame
                carries the base's digest, so that it only decodes against the same base.
            energy: overrides the instance's energy for this call.
            base_digest: instead of a base, for updates that are differences already: the digest of
                what they are differences to (`tensors.digest_of`).

        Returns:
            The frame; its length is the cost. Same input and state give the same bytes.

        Raises:
            TypeError: a value that is no such CPU/CUDA tensor of a known dtype; names the tensor.
            ValueError: NaN or Inf (names the tensor), an energy out of (0, 1], a base that does not
                match. State is unchanged then.
        """
        kept = self.energy if energy is None else _check_energy(energy)
        tensors = as_tensors(update, "update", sparse=True)
        tied = tied_names(update)
        digest = base_digest
        if base is not None or self._feedback:
            tensors = {name: _dense(value) for name, value in tensors.items()}
        if base is not None:
            if base_digest is not None:
                raise ValueError("give base or base_digest, not both")
            bases = as_tensors(base, "base")
            check_same_tensors(tensors, bases, "base")
            base_ties = tied_names(base)
            tied = {name: owner for name, owner in tied.items() if base_ties.get(name) == owner}
            tensors = {name: _difference(value, bases[name]) for name, value in tensors.items()}
            digest = digest_of_tensors(bases)
        sent = tensors
        if self._feedback:
            # A tensor with a residual of its own is not what it is tied to.
            tied = {name: owner for name, owner in tied.items() if name not in self._feedback}
            sent = {
                name: self._feedback.add(name, _wide(value))
                if name not in tied and value.is_floating_point()
                else value
                for name, value in tensors.items()
            }

        rows: dict[str, Rows] = {}
        lossy = self.codec != "raw" and kept < 1.0
        for name, value in sent.items():
            if name in tied:
                continue
            rows[name] = touched(value, exactly=not (lossy and value.is_floating_point()))
            # Finite inputs: what is not finite now, a difference or a residual made so.
            dtype = tensors[name].dtype
            if dtype.is_floating_point and not all_finite(rows[name].values.to(dtype)):
                raise ValueError(
                    f"update[{name!r}], less its base and with its residual, overflows "
                    f"{DTYPES[dtype]}"
                )
        entries, factors = self._encode(tensors, rows, tied, kept)
        made_against = None if digest is None else wire.Base(digest=digest)
        frame = wire.encode(entries, codec=self.codec, base=made_against)
        if self._feedback:
            for entry in entries:
                if entry.name in rows and sent[entry.name].is_floating_point():
                    decoded = _codec.decode_entry(entry, self._backend)
                    self._feedback.keep(entry.name, sent[entry.name], decoded)
        if self._cache is not None:
            for name, found in factors.items():
                self._cache.keep(name, found, some_rows=rows[name].ids is not None)
        return frame

    def _encode(
        self,
        tensors: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        tied: Mapping[str, str],
        energy: float,
    ) -> tuple[list[Entry], dict[str, Factors]]:
        """Encode the rows that were found in each tensor; of tensors only dtype and shape count."""
        factors: dict[str, Factors] = {}
        entries = {
            name: _codec.raw_entry(name, found.values.to(tensors[name].dtype))
            for name, found in rows.items()
        }
        if self.codec != "raw" and energy < 1.0:
            lossy = {
                name: _wide(found.values)
                for name, found in rows.items()
                if entries[name].mode is Mode.RAW
                and found.values.is_floating_point()
                and _codec.representable(found.values)
            }
            factors = self._factorise(lossy, entries, energy)
            for name, value in lossy.items():
                # What may be lost depends on the tensor: a row alone of a matrix is no vector.
                allowed = _codec.may_lose(tuple(tensors[name].shape), energy)
                entries[name] = self._encode_lossy(entries[name], value, allowed, factors.get(name))
        order = {name: index for index, name in enumerate(tensors)}
        listed = [
            whole_entry(tuple(tensor.shape), rows[name].ids, entries[name])
            if name in entries
            else Entry(
                name, DTYPES[tensor.dtype], tuple(tensor.shape), Mode.ALIAS, order[tied[name]]
            )
            for name, tensor in tensors.items()
        ]
        return listed, factors

    def _encode_lossy(
        self, raw: Entry, value: Tensor, allowed: float, factors: Factors | None
    ) -> Entry:
        if factors is not None and not factors.pays:
            factors = None
        if self.codec == "wf0":
            return _codec.encode_lossy(raw, value, allowed, factors, self._backend)
        if factors is None:
            return raw
        entry = _codec.factors_entry(raw.name, raw.dtype, raw.shape, factors)
        return entry if len(entry.payload) < len(raw.payload) else raw

    def _factorise(
        self, lossy: Mapping[str, Tensor], raws: Mapping[str, Entry], energy: float
    ) -> dict[str, Factors]:
        """Factorise all matrices in one call."""
        if self.codec == "wf0":
            energy = 1.0 - (1.0 - energy) * _codec.TAIL_SHARE
        matrices = {
            name: value.reshape(_codec.matrix_shape(tuple(value.shape))).float()
            for name, value in lossy.items()
            if _codec.is_matrix(tuple(value.shape))
        }
        earlier = [
            self._cache.get(name, (matrix.shape[0], matrix.shape[1])) if self._cache else None
            for name, matrix in matrices.items()
        ]
        factors: list[Factors] = self._backend.truncated_svd_list(
            list(matrices.values()),
            energy=energy,
            earlier=earlier,
            budgets_bytes=[
                len(raws[name].payload) if self.codec == "factors-fp32" else None
                for name in matrices
            ],
        )
        return dict(zip(matrices, factors, strict=True))

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
        before = {prefix: keeper.state_dict() for prefix, keeper in own.items()}
        try:
            for prefix, keeper in own.items():
                keeper.load_state_dict(parts[prefix])
        except (TypeError, ValueError):
            for prefix, keeper in own.items():
                keeper.load_state_dict(before[prefix])
            raise

    def _state(self) -> dict[str, ErrorFeedback | SubspaceCache]:
        kept = {_FEEDBACK_PREFIX: self._feedback, _CACHE_PREFIX: self._cache}
        return {prefix: part for prefix, part in kept.items() if part is not None}


def decode_frame(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None = None,
    *,
    schema_name: str = "schema",
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> tuple[dict[str, Tensor], bytes | None]:
    """Decode a frame without applying it to a base; also return the base's digest, if any.

    The schema is compared before anything is decoded, so that a frame costs no more than what the
    receiver expects. `schema_name` is what messages call it.
    """
    module = _backend(backend)
    # A frame without a schema of its own needs the receiver's, and its order.
    needed = None if schema is None or wire.header(frame).schema_embedded else schema
    parsed = wire.decode(
        frame,
        schema=None if needed is None else specs_of(needed),
        max_bytes=max_bytes,
    )
    if schema is not None:
        check_same_tensors({entry.name: entry for entry in parsed.entries}, schema, schema_name)
    tensors: dict[str, Tensor] = {}
    names = [entry.name for entry in parsed.entries]
    for entry in parsed.entries:
        if entry.mode is Mode.ALIAS:
            tensors[entry.name] = tensors[names[entry.rank]]
            continue
        try:
            tensor = _codec.decode_entry(entry, module)
        except RuntimeError as error:
            # torch has no error of its own for this.
            if "allocate" not in str(error):
                raise
            raise WireError(f"tensor {entry.name!r} {entry.shape} does not fit in memory") from None
        # No honest sender sends these, and one of them would poison a mean.
        if tensor.is_floating_point() and not all_finite(tensor):
            raise WireError(f"tensor {entry.name!r} decodes to NaN or Inf")
        tensors[entry.name] = tensor
    return tensors, None if parsed.base is None else parsed.base.digest


def decompress(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None = None,
    base: Mapping[str, object] | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> dict[str, Tensor]:
    """Decode a frame into CPU tensors.

    Args:
        frame: what `Compressor.compress` returned; any contiguous bytes-like object.
        schema: expected tensors; names, shapes and dtypes must be equal. Anything with `.shape` and
            `.dtype` serves as a value, for instance the model's own state dict.
        base: the tensors that the frame is a difference to; the result is then base + difference.
        max_bytes: refuse frames that would decode to more; decoding may take some four times that
            for a moment, where tensors have 16 bits, and 50 times that where a matrix lists nearly
            all of its rows of one byte.
        backend: as in `Compressor`.

    Returns:
        Tensors by name, in the order they were sent; tied tensors share their memory.

    Raises:
        WireError: anything wrong with the bytes: truncated, corrupted, newer, too large.
        ValueError: a schema or base that does not match, or a missing or unneeded base.
    """
    bases = None if base is None else as_tensors(base, "base")
    wanted, name = (bases, "base") if schema is None else (schema, "schema")
    tensors, digest = decode_frame(
        frame, wanted, schema_name=name, max_bytes=max_bytes, backend=backend
    )
    if digest is None:
        if base is not None:
            raise ValueError("base was given, but the frame is not a difference: decode it without")
        return tensors
    if base is None or bases is None:
        raise ValueError(f"frame is a difference to base {digest.hex()}: pass base=")
    check_same_tensors(tensors, bases, "base")
    own = digest_of_tensors(bases)
    if own != digest:
        raise ValueError(
            f"base does not match: the frame was made against {digest.hex()}, "
            f"this base is {own.hex()}"
        )
    # Tied differences give tied results only where the base is tied as well.
    base_ties = tied_names(base)
    applied: dict[tuple[int, str], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        key = id(value), base_ties.get(name, name)
        if key not in applied:
            applied[key] = bases[name] + value if value.is_floating_point() else value
            if value.is_floating_point() and not all_finite(applied[key]):
                raise ValueError(f"base[{name!r}] + difference overflows {DTYPES[value.dtype]}")
        result[name] = applied[key]
    return result
