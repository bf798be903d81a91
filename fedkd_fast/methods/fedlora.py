"""Federated LoRA (Zhang et al., FedPETuning, ACL Findings 2023): only adapters travel.

Every client has the same frozen mentor; low-rank adapters in its attention and its head are
trained and averaged.
"""

from __future__ import annotations

import dataclasses

from fedkd_fast.methods.base import LocalSettings, Method, SoloLearner
from fedkd_fast.tasks import Task

DEFAULT_ADAPTER = "lora:8"


def _learner(task: Task, settings: LocalSettings) -> SoloLearner:
    adapter = settings.mentor_adapter or DEFAULT_ADAPTER
    settings = dataclasses.replace(settings, mentor_adapter=adapter)
    return SoloLearner(task, settings, "mentor", shares=True)


FEDLORA = Method("fedlora", _learner, exchanges=True)
