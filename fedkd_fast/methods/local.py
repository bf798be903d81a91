"""Every client trains its mentor on its own shard; nothing travels. The lower bound."""

from __future__ import annotations

from fedkd_fast.methods.base import LocalSettings, Method, SoloLearner
from fedkd_fast.tasks import Task


def _learner(task: Task, settings: LocalSettings) -> SoloLearner:
    return SoloLearner(task, settings, "mentor", shares=False)


LOCAL = Method("local", _learner, exchanges=False)
