"""Long runs: what the project promises of its default recipe, on real data."""

from __future__ import annotations

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


def summary(method: str) -> dict[str, Any]:
    return dict(train("digits", method, seed=0).summary)


def test_digits_with_the_default_recipe() -> None:
    local, fedkd, central = (summary(method) for method in ("local", "fedkd", "central"))
    for role in ("score_mentor", "score_mentee"):
        assert fedkd[role] >= local["score_mentor"] + LEAST_GAIN, role
    assert fedkd["saving"] >= LEAST_SAVING
    assert central["score_mentor"] >= LEAST_CENTRAL
