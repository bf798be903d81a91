"""Federated averaging (McMahan et al. 2017): a whole model travels in float32, both ways.

``fedavg`` exchanges the mentor and is what savings are measured against; ``fedavg-mentee``
exchanges the mentee, trained alone: what it learns without distillation and compression.
"""

from __future__ import annotations

from fedkd_fast.methods.base import LocalSettings, Method, SoloLearner
from fedkd_fast.tasks import Task


def _mentor(task: Task, settings: LocalSettings) -> SoloLearner:
    return SoloLearner(task, settings, "mentor", shares=True)


def _mentee(task: Task, settings: LocalSettings) -> SoloLearner:
    return SoloLearner(task, settings, "mentee", shares=True)


FEDAVG = Method("fedavg", _mentor, exchanges=True)
FEDAVG_MENTEE = Method("fedavg-mentee", _mentee, exchanges=True)
