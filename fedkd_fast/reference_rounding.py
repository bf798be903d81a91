"""How tensors become integers, in plain torch: what `fit_factors` and `round_rows` must compute."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.reference_rans import FIRST_LEVEL, LARGEST, MOST_LEVEL

# Levels of dense rows travel in quarters of an octave, 63 of them at most; zeros have their own.
ROW_QUANTUM, MOST_ROW_CODES, ZERO_LEVEL = 4, 63, -(2**15)
# What is taken off numbers before they are rounded, as a share of what suits Gaussians, because
# rows have heavier tails; and what is left of them at least.
ROW_SHRINK, LEAST_SHRINK = 0.7, 0.3
# Of the variance inflation factors of rows that count as independent of each other.
MOST_INFLATION = 16.0


def fit_factors(
    matrix: Tensor,
    through: Tensor | None,
    near: Tensor,
    far: Tensor,
    sigma: Tensor,
    multiplier: Tensor,
    near_shrink: Tensor,
    far_shrink: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `ops.fit_factors`: the near side as float32 rounds it, all else in float64.

    What `far` and `sigma` know of the matrix is not needed here.
    """
    whole = matrix.double() if through is None else matrix.double() @ through.double()
    sent = (near * (multiplier * near_shrink)[:, None]).round().clamp(-LARGEST, LARGEST)
    nothing = sent, torch.zeros_like(far), whole.new_tensor(-math.inf)
    gram = sent.double() @ sent.double().T
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return nothing
    inflation = torch.cholesky_inverse(factor).diagonal() * gram.diagonal()
    if not bool((inflation < MOST_INFLATION).all()):
        return nothing
    best = torch.cholesky_solve(sent.double() @ whole.T, factor)
    fitted = (best * (far_shrink.double() / scale.double())[:, None]).round()
    fitted = fitted.clamp(-LARGEST, LARGEST)
    lost = whole - (fitted * scale.double()[:, None]).T @ sent.double()
    return sent, fitted.float(), whole.square().sum() - lost.square().sum()


def measure_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Specify `ops.measure_rows`: squares in float64."""
    largest = values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
    return values.double().square().sum(1), largest


def round_rows(values: Tensor, squares: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `ops.round_rows`: integers as float32 gives them, what is lost in float64."""
    # The ops, which know this module, do without the other native one.
    import fedkd_fast._C as _C

    found = (8.0 * torch.log2(squares / values.shape[1]) - step / 16).clamp(min=-1e6)
    levels = ROW_QUANTUM * torch.round(found / ROW_QUANTUM)
    top = float(levels.max()) if len(levels) else 0.0
    least = max(FIRST_LEVEL, top - ROW_QUANTUM * (MOST_ROW_CODES - 1))
    coded = (levels >= least) & (top <= MOST_LEVEL)
    (scale,) = torch.from_numpy(_C.exp2_fixed(np.array([step])))
    ratios = torch.from_numpy(_C.exp2_fixed(32 * levels.clamp(FIRST_LEVEL).long().numpy()))
    shares = (1.0 - ROW_SHRINK / (12.0 * ratios)).clamp(min=LEAST_SHRINK)
    multiplier = torch.where(coded, shares / scale, 0.0).float()
    sent = (values * multiplier[:, None]).round().clamp(-LARGEST, LARGEST)
    lost = (values.double() - (sent * scale.float()).double()).square().sum()
    return multiplier, torch.where(coded, levels, ZERO_LEVEL).short(), lost


def dense_step(values: Tensor, squares: Tensor, most_lost: float, whole: bool = True) -> int:
    """Specify `ops.dense_step`, in halves of what is left; all rows are looked at in any case."""
    largest = 8.0 * math.log2(float(squares.max()) / values.shape[1])
    finest = math.ceil(16 * (largest - MOST_LEVEL + ROW_QUANTUM))
    fine, coarse = finest, math.floor(16 * (largest - FIRST_LEVEL)) + 1
    while coarse - fine > 1:
        middle = (fine + coarse) // 2
        lost = float(round_rows(values, squares, middle)[2])
        fine, coarse = (middle, coarse) if lost <= most_lost else (fine, middle)
    return fine
