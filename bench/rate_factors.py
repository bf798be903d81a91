"""FedKD's payload, truncated SVD factors, in float32 and rounded: all columns to the same bits.

Each falls back to the matrix itself, rounded alike, where that takes fewer bytes.
"""

from __future__ import annotations

import torch
from rate_case import SCALE_BYTES, Case, Coded, Peer, smallest
from torch import Tensor

from fedkd_fast.reference import select_rank

FLOAT_BYTES, HALF_BYTES = 4, 2
CLIPS = [0.30 + 0.05 * step for step in range(15)]  # of a column's largest value
DENSE, FACTORS = "dense", "factors"


def truncated(case: Case, allowed: float) -> Coded:
    """Keep the smallest rank whose energy exceeds the threshold: the paper's eq (8)."""
    left, sigma, right = case.svd
    rank = select_rank(sigma, 1 - allowed)
    rows, cols = case.matrix.shape
    size = FLOAT_BYTES * rank * (rows + cols + 1)
    if size >= FLOAT_BYTES * case.matrix.numel():
        return Coded(FLOAT_BYTES * case.matrix.numel(), case.matrix, DENSE)
    return Coded(size, (left[:rank].mT * sigma[:rank]) @ right[:rank], FACTORS)


def halved(matrix: Tensor) -> Tensor:
    """Round to float16 at a scale at which nothing is lost below its smallest number."""
    scale = float(matrix.abs().max())
    return (matrix / scale).half().float() * scale


def truncated_half(case: Case, allowed: float) -> Coded | None:
    left, sigma, right = case.svd
    rows, cols = case.matrix.shape
    dense = Coded(HALF_BYTES * case.matrix.numel() + SCALE_BYTES, halved(case.matrix), DENSE)
    rank = select_rank(sigma, 1 - allowed)
    u, v = halved(left), halved(right)
    while rank <= len(sigma):
        decoded = (u[:rank].mT * sigma[:rank]) @ v[:rank]
        if case.share(decoded) <= allowed:
            size = rank * (HALF_BYTES * (rows + cols) + SCALE_BYTES)
            return smallest([Coded(size, decoded, FACTORS), dense])
        rank += 1
    return dense


# ---- integers ------------------------------------------------------------------------------------


def to_levels(rows: Tensor, bits: int) -> Tensor:
    """Round each row to 2^bits even levels at the clip that loses least, for a scale that fits.

    Returns:
        Rows that differ from what is decoded by that scale: the one of least squares.
    """
    peak = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    half = 2 ** (bits - 1)
    best, least = rows, torch.full((len(rows), 1), torch.inf)
    for clip in CLIPS if bits < 8 else [1.0]:
        levels = (rows / (clip * peak) * half).floor().clamp(-half, half - 1) + 0.5
        gain = (levels * rows).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        fitted = levels * gain
        lost = (fitted - rows).square().sum(1, keepdim=True)
        best, least = torch.where(lost < least, fitted, best), torch.minimum(lost, least)
    return best


def rounded(case: Case, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rounded factors, and what each rank of them loses of the squared norm."""
    key = ("rounded", bits)
    if key not in case.shared:
        left, sigma, right = case.svd
        u, v = to_levels(left, bits) * sigma[:, None], to_levels(right, bits)
        # |A - Σ u_k v_kᵀ|² for all ranks at once, from the products of the terms.
        grams = ((u @ u.mT) * (v @ v.mT)).double()
        own = 2 * grams.tril(-1).sum(1) + grams.diagonal()
        held = ((u @ case.matrix) * v).sum(1).double()
        shares = (case.total + (own - 2 * held).cumsum(0)) / case.total
        case.shared[key] = u, v, shares
    found: tuple[Tensor, Tensor, Tensor] = case.shared[key]
    return found


def dense_rows(case: Case, allowed: float, bits: int) -> Coded | None:
    """Round the matrix itself, each row at a scale of its own."""
    rows, cols = case.matrix.shape
    key = ("dense", bits)
    if key not in case.shared:
        case.shared[key] = to_levels(case.matrix, bits)
    decoded: Tensor = case.shared[key]
    size = rows * (-(-bits * cols // 8) + SCALE_BYTES)
    return Coded(size, decoded, f"{DENSE} int{bits}") if case.share(decoded) <= allowed else None


def integers(case: Case, allowed: float, bits: int) -> Coded | None:
    """Round all columns to equal bits, at the rank where both losses together meet the target.

    A column takes one scale for both sides, σ included. Where no rank meets the target, or the
    rounded matrix is smaller, that is sent; where neither does, twice the bits.
    """
    u, v, shares = rounded(case, bits)
    rows, cols = case.matrix.shape
    column = -(-bits * rows // 8) + -(-bits * cols // 8) + SCALE_BYTES
    candidates = [dense_rows(case, allowed, bits)]
    for rank in (1 + (shares <= allowed).nonzero().flatten()).tolist():
        decoded = u[:rank].mT @ v[:rank]
        if case.share(decoded) <= allowed:  # sums of float32 may have been a hair off
            candidates.append(Coded(rank * column, decoded, f"{FACTORS} int{bits}"))
            break
    found = smallest(candidates)
    if found is None and bits < 8:
        return integers(case, allowed, 8)
    return found


FP32 = "FedKD factors, fp32"
FACTOR_CODECS = {
    FP32: Peer(truncated),
    "FedKD factors, fp16": Peer(truncated_half),
    **{
        f"FedKD factors, int{bits} a column": Peer(
            lambda case, allowed, bits=bits: integers(case, allowed, bits)
        )
        for bits in (8, 6, 4)
    },
}
