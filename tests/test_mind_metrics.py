"""Metrics of ranked impressions against scikit-learn and against all orders of ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedkd_fast.tasks.mind_metrics import Floats, Integers, impression_softmax, ranking_metrics

TOLERANCE = 1e-9


def impressions(seed: int, *, ties: bool, most: int = 30) -> tuple[Floats, Integers, Integers]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, most, size=40)
    scores = generator.normal(size=sizes.sum())
    if ties:
        scores = np.round(scores)
    labels = (generator.random(sizes.sum()) < 0.3).astype(np.int64)
    return scores, labels, np.concatenate([[0], sizes.cumsum()[:-1]])


def pieces(scores: Floats, labels: Integers, starts: Integers) -> list[tuple[Floats, Integers]]:
    """Impressions that have both kinds of candidates."""
    parts = zip(np.split(scores, starts[1:]), np.split(labels, starts[1:]), strict=True)
    return [(score, label) for score, label in parts if 0 < label.sum() < len(label)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(seed: int, ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    data = impressions(seed, ties=ties)
    kept = pieces(*data)
    assert 0 < len(kept) < len(data[2])
    found = ranking_metrics(*data)
    for name, one in (
        ("AUC", lambda score, label: metrics.roc_auc_score(label, score)),
        ("nDCG@5", lambda score, label: metrics.ndcg_score([label], [score], k=5)),
        ("nDCG@10", lambda score, label: metrics.ndcg_score([label], [score], k=10)),
    ):
        wanted = np.mean([one(score, label) for score, label in kept])
        assert abs(found[name] - wanted) <= TOLERANCE, name


@pytest.mark.parametrize("seed", range(5))
def test_without_ties_mrr_is_that_of_the_mind_evaluation(seed: int) -> None:
    data = impressions(seed, ties=False)

    def reciprocal(score: Floats, label: Integers) -> float:
        """As in the evaluation script of MIND."""
        sorted_labels = np.take(label, np.argsort(score)[::-1])
        return float(np.sum(sorted_labels / (np.arange(len(label)) + 1)) / np.sum(label))

    wanted = np.mean([reciprocal(*piece) for piece in pieces(*data)])
    assert abs(ranking_metrics(*data)["MRR"] - wanted) <= TOLERANCE


def test_ties_count_as_the_mean_over_all_orders() -> None:
    scores = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    labels = np.array([1, 0, 1, 0, 0])
    totals: dict[str, list[float]] = {"AUC": [], "MRR": [], "nDCG@5": [], "nDCG@10": []}
    for order in itertools.permutations(range(5)):
        if [scores[place] for place in order] != sorted(scores, reverse=True):
            continue
        ranked = [labels[place] for place in order]
        clicked = [rank for rank, label in enumerate(ranked, 1) if label]
        others = [rank for rank, label in enumerate(ranked, 1) if not label]
        totals["AUC"].append(np.mean([one < two for one in clicked for two in others]))
        totals["MRR"].append(np.mean([1 / rank for rank in clicked]))
        best = 1 + 1 / math.log2(3)
        for name in ("nDCG@5", "nDCG@10"):
            totals[name].append(sum(1 / math.log2(rank + 1) for rank in clicked) / best)
    found = ranking_metrics(scores, labels, [0])
    for name, values in totals.items():
        assert abs(found[name] - np.mean(values)) <= TOLERANCE, name


def test_the_order_in_the_file_counts_nowhere() -> None:
    scores, labels, starts = impressions(7, ties=True)
    generator = np.random.default_rng(1)
    ends = [*starts[1:], len(scores)]
    order = np.concatenate(
        [
            start + generator.permutation(end - start)
            for start, end in zip(starts, ends, strict=True)
        ]
    )
    shuffled = ranking_metrics(scores[order], labels[order], starts)
    for name, value in ranking_metrics(scores, labels, starts).items():
        assert abs(shuffled[name] - value) <= TOLERANCE, name


def test_perfect_and_worst_rankings() -> None:
    labels = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    starts = [0, 4]
    best = ranking_metrics(labels.astype(float), labels, starts)
    assert best == {"AUC": 1.0, "MRR": 0.875, "nDCG@5": 1.0, "nDCG@10": 1.0}
    worst = ranking_metrics(-labels.astype(float), labels, starts)
    assert worst["AUC"] == 0.0
    assert ranking_metrics(np.zeros(12), labels, starts)["AUC"] == 0.5


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="no impression has both clicked and other candidates"):
        ranking_metrics([0.1, 0.2, 0.3], [1, 1, 0], [0, 2])
    with pytest.raises(ValueError, match="scores must be numbers, got 1 NaN"):
        ranking_metrics([0.1, math.nan], [1, 0], [0])


def test_probabilities_of_impressions() -> None:
    scores, _, starts = impressions(3, ties=False)
    shares = impression_softmax(1000 * scores, starts)
    for part, piece in zip(np.split(shares, starts[1:]), np.split(scores, starts[1:]), strict=True):
        exponents = np.exp(1000 * (piece - piece.max()))
        assert np.abs(part - exponents / exponents.sum()).max() <= TOLERANCE
