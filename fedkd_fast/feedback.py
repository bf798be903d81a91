"""State between rounds: what a message left out, and where its energy lay.

Error feedback: ``x_r = δ_r + e_{r-1}``; send ``C(x_r)``; ``e_r = x_r - decode(C(x_r))``
(Seide et al. 2014; Karimireddy et al. 2019). The residual is taken from the decoded bytes, so it is
exactly what the message left out. What a receiver rounds when it adds that to parameters of its own
is not in it, which matters where these have 16 bits: let the shared ones have 32. EF21
(Richtárik et al. 2021) sends ``C(δ_r - g_{r-1})`` instead, and both ends keep
``g_r = g_{r-1} + decode(C(δ_r - g_{r-1}))``.

Warm starts: the update of a layer points much the same way in the next round, so the subspace of
the last factors is where the search for the next ones begins, and their spectrum tells how many
there will be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedkd_fast.codec.common import all_finite
from fedkd_fast.decompression import decode_frame
from fedkd_fast.reference import Factors, Subspace
from fedkd_fast.tensors import Shaped, as_tensors, is_buffer
from fedkd_fast.wire import DEFAULT_MAX_BYTES


class State:
    """What belongs to one Compressor and is kept between its messages."""

    def __init__(self) -> None:
        self._owner: weakref.ref[object] | None = None
        self._kept: dict[str, Any] = {}

    def claim(self, owner: object) -> None:
        """Bind this state to its Compressor.

        Raises:
            ValueError: another one that still exists has it.
        """
        held = self._owner() if self._owner is not None else None
        if held is not None and held is not owner:
            raise ValueError(
                f"this {type(self).__name__} belongs to another Compressor: give each its own"
            )
        self._owner = weakref.ref(owner)


@contextmanager
def all_or_nothing(states: Iterable[State]) -> Iterator[None]:
    """Let states be as before if the body raises, which replaces values and changes none."""
    before = [(state, dict(state._kept)) for state in states]
    try:
        yield
    except BaseException:
        for state, kept in before:
            state._kept = kept
        raise


class _ByName(State):
    """A tensor for each name, float32 (float64 for float64 tensors)."""

    _kept: dict[str, Tensor]

    def __contains__(self, name: str) -> bool:
        """Tell whether something is kept of this tensor."""
        return name in self._kept

    def alike(self, name: str, other: str) -> bool:
        """Tell whether the same is kept of two tensors, or nothing."""
        return self._kept.get(name) is self._kept.get(other)

    def share(self, name: str, owner: str) -> None:
        """Keep of a tensor that was sent as another one what is kept of that."""
        if owner in self._kept:
            self._kept[name] = self._kept[owner]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept, by tensor name; the tensors are shared, not copied."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all that is kept.

        Raises:
            TypeError: a value is not a floating tensor.
            ValueError: a value holds NaN or Inf.
        """
        for name, kept in state.items():
            if not isinstance(kept, torch.Tensor) or not kept.is_floating_point():
                raise TypeError(f"residual {name!r} must be a floating tensor, got {kept!r}")
            if not all_finite(kept):
                raise ValueError(f"residual {name!r} holds NaN or Inf")
        # What one tensor was kept for several names stays so: it says that they are tied.
        copies = {id(kept): kept.detach().clone() for kept in state.values()}
        self._kept = {name: copies[id(kept)] for name, kept in state.items()}

    def _matching(self, name: str, update: Tensor) -> Tensor | None:
        kept = self._kept.get(name)
        if kept is not None and (kept.shape != update.shape or kept.dtype != update.dtype):
            raise ValueError(
                f"update[{name!r}] is {tuple(update.shape)} {update.dtype}, but its error-feedback "
                f"residual is {tuple(kept.shape)} {kept.dtype}: use a fresh Compressor"
            )
        return kept


class ErrorFeedback(_ByName):
    """Residuals by tensor name.

    Args:
        decay: what `absent` multiplies the residuals with for each round that was missed: what was
            left out long ago points less and less where the model has to go.
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.decay = decay

    def add(self, name: str, update: Tensor) -> Tensor:
        """Return ``update + residual``; a residual of another shape is stale and an error.

        Raises:
            ValueError: the tensor changed its shape or precision since the residual was kept.
        """
        residual = self._matching(name, update)
        return update if residual is None else update + residual

    def keep(self, name: str, sent: Tensor, decoded: Tensor) -> None:
        """Store ``sent - decoded`` for the next message."""
        self._kept[name] = sent - decoded.to(sent.dtype)

    def lost(
        self,
        message: bytes | Mapping[str, Tensor],
        schema: Mapping[str, Shaped] | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """Take back what a message held that did not arrive, so that the next one brings it.

        Args:
            message: the frame; or what it decodes to without a base, the difference.
            schema: as in `decompress`, for a frame without one of its own.
            max_bytes: as in `decompress`.

        Raises:
            WireError: the frame is damaged.
            TypeError: neither a frame nor a mapping of names to tensors.
            ValueError: NaN or Inf, or a tensor of another shape than its residual; names it.
                Nothing is changed then.
        """
        if not isinstance(message, Mapping):
            if not is_buffer(message):
                kind = type(message).__name__
                raise TypeError(f"message must be a frame or a mapping, got {kind}")
            message, _ = decode_frame(message, schema, max_bytes=max_bytes)
        held = as_tensors(message, "message")
        taken: dict[int, Tensor] = {}
        for name, kept in self._kept.items():
            if name in held and id(kept) not in taken:
                if held[name].shape != kept.shape:
                    raise ValueError(
                        f"message[{name!r}] is {tuple(held[name].shape)}, but its error-feedback "
                        f"residual is {tuple(kept.shape)}"
                    )
                taken[id(kept)] = kept + held[name].to(kept.dtype)
        # Nothing is kept of it where this state is newer than the message.
        new = {
            name: value if value.dtype == torch.float64 else value.float()
            for name, value in held.items()
            if name not in self._kept and value.is_floating_point()
        }
        now = {name: taken.get(id(kept), kept) for name, kept in self._kept.items()}
        self._kept = {**now, **new}

    def absent(self, rounds: int = 1) -> None:
        """Let the residuals decay, where the client missed rounds.

        Raises:
            ValueError: a negative number of rounds.
        """
        if rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {rounds}")
        smaller = {id(kept): kept * self.decay**rounds for kept in self._kept.values()}
        self._kept = {name: smaller[id(kept)] for name, kept in self._kept.items()}


class EF21(_ByName):
    """What the receiver has of each tensor, at both ends.

    The sender's Compressor holds one (``feedback=EF21()``) and sends what its update differs from
    it; the receiver holds one for each sender and passes it what it decoded (`receive`). Every
    message counts: one that is lost has to be sent again.
    """

    def add(self, name: str, update: Tensor) -> Tensor:
        """Return ``update - estimate``.

        Raises:
            ValueError: the tensor changed its shape or precision since the estimate was kept.
        """
        estimate = self._matching(name, update)
        return update if estimate is None else update - estimate

    def keep(self, name: str, sent: Tensor, decoded: Tensor) -> None:
        """Add what the receiver got to the estimate."""
        self._kept[name] = self._sum(name, decoded.to(sent.dtype))

    def receive(self, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add a decoded message to the estimates; returns these, in the dtypes of the message.

        Integers and booleans travel whole and are returned as they came.

        Raises:
            ValueError: a tensor changed its shape or precision. Nothing is added then.
        """
        result, added = {}, {}
        for name, value in decoded.items():
            if value.is_floating_point():
                wide = value if value.dtype == torch.float64 else value.float()
                added[name] = self._sum(name, wide)
                result[name] = added[name].to(value.dtype, copy=True)
            else:
                result[name] = value
        self._kept.update(added)
        return result

    def _sum(self, name: str, decoded: Tensor) -> Tensor:
        estimate = self._matching(name, decoded)
        return decoded.clone() if estimate is None else estimate + decoded


# Of the shorter side: a wider subspace is not where the search for the next one begins.
MOST_USEFUL_RANK = 0.7
SHARE_SLACK = 1e-3  # of a rounded spectrum
_BASIS_PREFIX, _SHARES_PREFIX = "basis.", "shares."


class SubspaceCache(State):
    """Long-side singular vectors and spectra by tensor name: warm starts for `truncated_svd_list`.

    A `Compressor` that holds one finds factors several times faster from the second message on, at
    the promised energy. A spectrum alone is worth most of that, so it stays where the vectors are
    too many. Tensors that are new, or changed their shape, start cold; a message left out does no
    harm. Not for two Compressors at once.

    Args:
        max_bytes: bound on what is kept; the tensors that were factorised longest ago go first,
            after `load_state_dict` in the order of the state.
    """

    # The vectors as bfloat16, (K, max(P, Q)): they are a start. Least recently kept first.
    _kept: dict[str, Subspace]

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        super().__init__()
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(_nbytes(subspace) for subspace in self._kept.values())

    def get(self, name: str, shape: tuple[int, int]) -> Subspace | None:
        """Return what is known of a tensor; None where that does not fit a matrix of this shape."""
        subspace = self._kept.get(name)
        if subspace is None or not _fits(subspace, shape):
            return None
        return Subspace(subspace.basis.float(), subspace.shares)

    def keep(self, name: str, factors: Factors, *, some_rows: bool = False) -> None:
        """Store where the energy of this tensor lies.

        `some_rows` says that rows of zeros were left out. Next time these are others, so vectors
        with an entry a row are of no use then, and a spectrum alone is not tied to a shape.
        """
        basis, shares = factors.subspace()
        rows, columns = factors.left.shape[1], factors.right.shape[1]
        if some_rows and rows > columns:
            basis = basis.new_empty(0, 0)
        elif len(basis) > MOST_USEFUL_RANK * min(rows, columns):
            basis = basis[:0]
        self._kept.pop(name, None)
        subspace = Subspace(basis.to("cpu", torch.bfloat16), shares)
        if len(shares) and _nbytes(subspace) <= self.max_bytes:
            self._kept[name] = subspace
        while self.nbytes > self.max_bytes:
            del self._kept[next(iter(self._kept))]

    def state_dict(self) -> dict[str, Tensor]:
        """Return vectors and spectra; the tensors are shared, not copied."""
        return {
            prefix + name: value
            for name, subspace in self._kept.items()
            for prefix, value in zip((_BASIS_PREFIX, _SHARES_PREFIX), subspace, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything that is kept.

        Raises:
            TypeError: a value is no tensor of the dtype that `state_dict` gives it.
            ValueError: a key of another kind or without its other half, vectors that are no finite
                matrix, a spectrum that is no descending one, or more than `max_bytes`.
        """
        kept: dict[str, Subspace] = {}
        for key in state:
            if not key.startswith((_BASIS_PREFIX, _SHARES_PREFIX)):
                raise ValueError(
                    f"state must hold only {_BASIS_PREFIX}* and {_SHARES_PREFIX}*, got {key!r}"
                )
            name = key.split(".", 1)[1]
            halves = [state.get(prefix + name) for prefix in (_BASIS_PREFIX, _SHARES_PREFIX)]
            if name not in kept:
                kept[name] = _checked_subspace(name, *halves)
        total = sum(map(_nbytes, kept.values()))
        if total > self.max_bytes:
            raise ValueError(f"subspaces must be at most {self.max_bytes} bytes, got {total}")
        self._kept = kept


def _nbytes(subspace: Subspace) -> int:
    return subspace.basis.nbytes + subspace.shares.nbytes


def _fits(subspace: Subspace, shape: tuple[int, int]) -> bool:
    (count, length), side = subspace.basis.shape, min(shape)
    return (length == max(shape) and count <= side) or count == length == 0


def _checked_subspace(name: str, basis: Tensor | None, shares: Tensor | None) -> Subspace:
    for kind, value, dtype in (("basis", basis, torch.bfloat16), ("shares", shares, torch.float64)):
        if value is None:
            raise ValueError(f"subspace {name!r} lacks its {kind}")
        usable = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not usable or value.device.type != "cpu" or value.dtype != dtype:
            raise TypeError(
                f"{kind} of subspace {name!r} must be a dense {dtype} tensor on the CPU, "
                f"got {value!r}"
            )
    assert basis is not None and shares is not None
    if basis.dim() != 2 or not all_finite(basis):
        raise ValueError(
            f"basis of subspace {name!r} must be a finite matrix, got shape {tuple(basis.shape)}"
        )
    descending = shares.dim() == 1 and len(shares) > 0 and bool((shares[1:] <= shares[:-1]).all())
    if not (descending and float(shares[-1]) >= 0.0 and float(shares[0]) <= 1.0 + SHARE_SLACK):
        raise ValueError(f"shares of subspace {name!r} must descend within [0, 1]")
    return Subspace(basis.detach().clone(), shares.detach().clone())
