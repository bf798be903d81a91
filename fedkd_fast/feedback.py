"""State between rounds: what a message left out, and where its energy lay.

Error feedback: ``x_r = δ_r + e_{r-1}``; send ``C(x_r)``; ``e_r = x_r - decode(C(x_r))``
(Seide et al. 2014; Karimireddy et al. 2019). The residual is taken from the decoded bytes, so it is
exactly what the receiver lacks.

Warm starts: the update of a layer points much the same way in the next round, so the subspace of
the last factors is where the search for the next ones begins, and their spectrum tells how many
there will be.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkd_fast.reference import Factors, Subspace


class ErrorFeedback:
    """Residuals by tensor name, float32 (float64 for float64 tensors)."""

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Tell whether something was left out of this tensor before."""
        return name in self._residuals

    def add(self, name: str, update: Tensor) -> Tensor:
        """Return ``update + residual``; a residual of another shape is stale and an error.

        Raises:
            ValueError: the tensor changed its shape or precision since the residual was kept.
        """
        residual = self._residuals.get(name)
        if residual is None:
            return update
        if residual.shape != update.shape or residual.dtype != update.dtype:
            raise ValueError(
                f"update[{name!r}] is {tuple(update.shape)} {update.dtype}, but its error-feedback "
                f"residual is {tuple(residual.shape)} {residual.dtype}: use a fresh Compressor"
            )
        return update + residual

    def keep(self, name: str, sent: Tensor, decoded: Tensor) -> None:
        """Store ``sent - decoded`` for the next message."""
        self._residuals[name] = sent - decoded.to(sent.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the residuals by tensor name; the tensors are shared, not copied."""
        return dict(self._residuals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all residuals.

        Raises:
            TypeError: a value is not a floating tensor.
            ValueError: a value holds NaN or Inf.
        """
        for name, residual in state.items():
            if not isinstance(residual, torch.Tensor) or not residual.is_floating_point():
                raise TypeError(f"residual {name!r} must be a floating tensor, got {residual!r}")
            if not bool(torch.isfinite(residual).all()):
                raise ValueError(f"residual {name!r} holds NaN or Inf")
        self._residuals = {name: residual.detach().clone() for name, residual in state.items()}


# Of the shorter side: a wider subspace is not where the search for the next one begins.
MOST_USEFUL_RANK = 0.7
SHARE_SLACK = 1e-3  # of a rounded spectrum
_BASIS_PREFIX, _SHARES_PREFIX = "basis.", "shares."


class SubspaceCache:
    """Long-side singular vectors and spectra by tensor name: warm starts for `truncated_svd_list`.

    A `Compressor` that holds one finds factors several times faster from the second message on, at
    the promised energy. A spectrum alone is worth most of that, so it stays where the vectors are
    too many. Tensors that are new, or changed their shape, start cold; a message left out does no
    harm. Not for two Compressors at once.

    Args:
        max_bytes: bound on what is kept; the tensors that were factorised longest ago go first,
            after `load_state_dict` in the order of the state.
    """

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        # The vectors as bfloat16, (K, max(P, Q)): they are a start. Least recently kept first.
        self._kept: dict[str, Subspace] = {}

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
    if basis.dim() != 2 or not bool(torch.isfinite(basis).all()):
        raise ValueError(
            f"basis of subspace {name!r} must be a finite matrix, got shape {tuple(basis.shape)}"
        )
    descending = shares.dim() == 1 and len(shares) > 0 and bool((shares[1:] <= shares[:-1]).all())
    if not (descending and float(shares[-1]) >= 0.0 and float(shares[0]) <= 1.0 + SHARE_SLACK):
        raise ValueError(f"shares of subspace {name!r} must descend within [0, 1]")
    return Subspace(basis.detach().clone(), shares.detach().clone())
