"""Long runs: what the project promises of its default recipe, on real data."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from fedkd_fast.trainer import train

pytest.importorskip("transformers", reason="training needs the extra [train]")
pytest.importorskip("sklearn", reason="training needs the extra [train]")

pytestmark = pytest.mark.slow
# Accuracy that the federation brings to mentors and to the mentee, against training alone.
LEAST_GAIN = 0.01
LEAST_SAVING = 0.95
LEAST_CENTRAL = 0.95


SEEDS = (0, 1, 2)


def mean(method: str, figure: str, runs: dict[str, list[dict[str, Any]]]) -> float:
    return statistics.fmean(summary[figure] for summary in runs[method])


def test_digits_with_the_default_recipe() -> None:
    runs = {
        method: [dict(train("digits", method, seed=seed).summary) for seed in SEEDS]
        for method in ("local", "fedkd", "central")
    }
    for role in ("score_mentor", "score_mentee"):
        assert mean("fedkd", role, runs) >= mean("local", "score_mentor", runs) + LEAST_GAIN, role
    assert mean("fedkd", "saving", runs) >= LEAST_SAVING
    assert mean("central", "score_mentor", runs) >= LEAST_CENTRAL
