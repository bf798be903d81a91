"""State between rounds: what a message left out, and where its energy lay.

Error feedback: ``x_r = δ_r + e_{r-1}``; send ``C(x_r)``; ``e_r = x_r - decode(C(x_r))``
(Seide et al. 2014; Karimireddy et al. 2019). The residual is taken from the decoded bytes, so it is
exactly what the receiver lacks.

Warm starts: the update of a layer points much the same way in the next round, so the subspace of
the last factors is where the search for the next ones begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkd_fast.reference import TruncatedSVD


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


# Of the shorter side: with more vectors than this a cold start is always the faster one.
MOST_USEFUL_RANK = 0.45


class SubspaceCache:
    """Short-side singular vectors by tensor name, float32: warm starts for `ops.truncated_svd`.

    A `Compressor` that holds one finds factors faster where matrices are nearly square and ranks
    small, at the promised energy. The rank may lie above the smallest: a little where updates drift
    from round to round, more where an update has nothing to do with the one before. Tensors that
    change their shape start cold again. Not for two Compressors at once.

    Args:
        max_bytes: bound on what is kept; the tensors that were factorised longest ago go first,
            after `load_state_dict` in the order of the state.
    """

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self._vectors: dict[str, Tensor] = {}  # (K, N) each, least recently kept first

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(vectors.nbytes for vectors in self._vectors.values())

    def basis(self, names: Sequence[str], side: int) -> Tensor | None:
        """Return the vectors of these tensors, (B, L, N) padded with zeros; None where none fits.

        Args:
            names: B tensors of one shape.
            side: N, the shorter side of that shape.
        """
        known = [self._vectors.get(name) for name in names]
        fits = [v if v is not None and v.shape[1] == side else None for v in known]
        longest = max((len(vectors) for vectors in fits if vectors is not None), default=0)
        if not longest:
            return None
        padded = torch.zeros(len(names), longest, side)
        for index, vectors in enumerate(fits):
            if vectors is not None:
                padded[index, : len(vectors)] = vectors
        return padded

    def keep(self, name: str, svd: TruncatedSVD) -> None:
        """Store where the energy of this tensor lies.

        Args:
            name: of the tensor.
            svd: its factors, of one matrix, padded or not.
        """
        rank = int(svd.rank)
        wide = svd.U.shape[0] < svd.Vh.shape[1]
        vectors = (svd.U.mT if wide else svd.Vh)[:rank].float().contiguous()  # (K, N)
        self._vectors.pop(name, None)
        useful = 0 < rank <= MOST_USEFUL_RANK * vectors.shape[1]
        if useful and vectors.nbytes <= self.max_bytes:
            # Factors of a batch are views of it.
            self._vectors[name] = vectors.clone()
        while self.nbytes > self.max_bytes:
            del self._vectors[next(iter(self._vectors))]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the vectors by tensor name; the tensors are shared, not copied."""
        return dict(self._vectors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all vectors.

        Raises:
            TypeError: a value is not a float32 tensor.
            ValueError: a value is not a finite matrix, or all are more than `max_bytes`.
        """
        for name, vectors in state.items():
            if not isinstance(vectors, torch.Tensor) or vectors.dtype != torch.float32:
                raise TypeError(f"subspace {name!r} must be a float32 tensor, got {vectors!r}")
            if vectors.dim() != 2 or not bool(torch.isfinite(vectors).all()):
                raise ValueError(
                    f"subspace {name!r} must be a finite matrix, got shape {tuple(vectors.shape)}"
                )
        total = sum(vectors.nbytes for vectors in state.values())
        if total > self.max_bytes:
            raise ValueError(f"subspaces must be at most {self.max_bytes} bytes, got {total}")
        self._vectors = {name: vectors.detach().clone() for name, vectors in state.items()}
