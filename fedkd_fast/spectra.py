"""How fast the singular values of updates fall: what low-rank messages live from (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Shares of the squared norm for which the smallest rank is recorded.
ENERGIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def energy_ranks(matrix: Tensor) -> list[int]:
    """Return the smallest rank K at each of `ENERGIES`: ``Σ_{k≤K} σ_k² ≥ T·Σ_k σ_k²``.

    In float64, from the eigenvalues σ² of the smaller Gram matrix.

    Args:
        matrix: (P, Q); a matrix of zeros has rank 0 at every energy.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    squares = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0.0).flip(0)
    reached = squares.cumsum(0)
    if not reached[-1] > 0.0:
        return [0] * len(ENERGIES)
    wanted = reached[-1] * torch.tensor(ENERGIES, dtype=torch.float64, device="cpu")
    return [int(rank) + 1 for rank in torch.searchsorted(reached, wanted)]


def spectra(update: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return the ranks of every matrix of an update, ready for JSON.

    Tensors of more than two dimensions count as matrices of their first and all others; what has
    fewer, or but one row or column, is left out.

    Returns:
        Records of ``name``, ``full_rank`` and ``ranks``, the latter by energy as text.
    """
    records = []
    for name, value in update.items():
        if value.ndim < 2 or not value.is_floating_point():
            continue
        matrix = value.flatten(1)
        if min(matrix.shape) > 1:
            ranks = zip(map(str, ENERGIES), energy_ranks(matrix), strict=True)
            record = {"name": name, "full_rank": min(matrix.shape), "ranks": dict(ranks)}
            records.append(record)
    return records
