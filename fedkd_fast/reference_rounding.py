"""How tensors become integers, in plain torch: what `fit_factors` and `round_rows` must compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkd_fast.reference_rans import LARGEST

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


def row_squares(values: Tensor, minus: Tensor | None = None) -> Tensor:
    """Specify `ops.row_squares`: differences in float32, sums in float64."""
    return (values if minus is None else values - minus).double().square().sum(1)


def round_rows(
    values: Tensor, minus: Tensor | None, divisor: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Specify `ops.round_rows`: integers as float32 gives them, what is lost in float64."""
    exact = values if minus is None else values - minus
    sent = (exact / divisor[:, None]).round().clamp(-LARGEST, LARGEST)
    sent[divisor == 0] = 0.0
    return sent, (exact.double() - sent.double() * step).square().sum()
