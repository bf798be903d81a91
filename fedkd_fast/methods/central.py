"""One mentor is trained on all data in one place. The upper bound, without any privacy."""

from __future__ import annotations

from fedkd_fast.methods.base import LocalSettings, Method, SoloLearner
from fedkd_fast.tasks import Task


def _learner(task: Task, settings: LocalSettings) -> SoloLearner:
    return SoloLearner(task, settings, "mentor", shares=False)


CENTRAL = Method("central", _learner, exchanges=False, pools_data=True)
