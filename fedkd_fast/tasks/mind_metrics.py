"""Metrics of ranked impressions: AUC, MRR and nDCG, as in the MIND evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class _Ranked(NamedTuple):
    """Candidates of all impressions in descending order of score, ties in groups."""

    order: Integers  # (T,) of the candidates
    starts: Integers  # (I,) of the impressions in that order
    ranks: Integers  # (T,) from 1, within the impression
    groups: Integers  # (G,) starts of runs of equal scores

    def expected(self, values: Floats) -> Floats:
        """Average values of ranks, (T,), over the ranks that each run of equal scores takes."""
        sizes = np.diff(self.groups, append=len(values))
        return np.repeat(np.add.reduceat(values, self.groups) / sizes, sizes)

    def sums(self, values: Floats) -> Floats:
        """Add values up by impression, (I,)."""
        return np.add.reduceat(values, self.starts)


def ranking_metrics(
    scores: npt.ArrayLike, labels: npt.ArrayLike, starts: npt.ArrayLike
) -> dict[str, float]:
    """Return AUC, MRR, nDCG@5 and nDCG@10, means over the impressions that have them.

    In an impression with P clicked (label 1) of n candidates, c over the clicked ones, r_c their
    ranks from 1::

        AUC    = (Σ_c (n + 1 - r_c) - P·(P + 1)/2) / (P·(n - P))
        MRR    = 1/P · Σ_c 1/r_c
        nDCG@k = Σ_{c: r_c <= k} 1/log2(r_c + 1) / Σ_{r <= min(P, k)} 1/log2(r + 1)

    Equal scores leave the order open: each of these sums is then its mean over all orders, so that
    a tie counts half in the AUC, and the order in the file counts nowhere. Impressions with clicks
    on all or none of the candidates are left out.

    Args:
        scores: (T,) candidates of all impressions, one impression after the other; larger is
            better.
        labels: (T,) 1 for clicked, 0 for others.
        starts: (I,) where each impression starts, ascending from 0; none is empty.

    Raises:
        ValueError: a score is NaN, or no impression has both kinds of candidates.
    """
    values, clicked = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    begins = np.asarray(starts, np.int64)
    if np.isnan(values).any():
        raise ValueError(f"scores must be numbers, got {int(np.isnan(values).sum())} NaN")
    ranked = _rank(values, begins)
    hits = clicked[ranked.order].astype(np.float64)
    sizes = np.diff(begins, append=len(values))
    positives = ranked.sums(hits)  # (I,)
    kept = (positives > 0) & (positives < sizes)
    if not kept.any():
        raise ValueError("no impression has both clicked and other candidates")
    ranks = ranked.ranks.astype(np.float64)
    both = np.where(kept, positives * (sizes - positives), 1.0)
    ascending = np.repeat(sizes, sizes) + 1 - ranked.expected(ranks)
    above = ranked.sums(hits * ascending) - positives * (positives + 1) / 2
    by_impression = {
        "AUC": above / both,
        "MRR": ranked.sums(hits * ranked.expected(1 / ranks)) / np.maximum(positives, 1),
    }
    for k in (5, 10):
        discounts = np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)
        best = ranked.sums(np.where(ranks <= np.repeat(positives, sizes), discounts, 0.0))
        gained = ranked.sums(hits * ranked.expected(discounts))
        by_impression[f"nDCG@{k}"] = gained / np.where(kept, best, 1.0)
    return {name: float(found[kept].mean()) for name, found in by_impression.items()}


def _rank(scores: Floats, starts: Integers) -> _Ranked:
    sizes = np.diff(starts, append=len(scores))
    impressions = np.repeat(np.arange(len(starts)), sizes)
    order = np.lexsort((-scores, impressions))
    ranks = np.arange(len(scores)) - np.repeat(starts, sizes) + 1
    new = np.ones(len(scores), dtype=bool)
    new[1:] = scores[order[1:]] != scores[order[:-1]]
    new[starts] = True
    return _Ranked(order, starts, ranks, np.flatnonzero(new))


def impression_softmax(scores: Floats, starts: Integers) -> Floats:
    """Turn scores into probabilities that add up to 1 over each impression."""
    sizes = np.diff(starts, append=len(scores))
    powers = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), sizes))
    return np.asarray(powers / np.repeat(np.add.reduceat(powers, starts), sizes))
