"""What models of a run cost: parameters, and the bytes that FedAvg of the mentor would send."""

from __future__ import annotations

import torch
from torch import nn

from fedkd_fast.compress import Compressor
from fedkd_fast.methods import Learner
from fedkd_fast.methods.base import Role
from fedkd_fast.models import parameter_count, trainable_parameters
from fedkd_fast.tasks import Task
from fedkd_fast.wire import Base


def model_sizes(task: Task, learner: Learner) -> dict[str, int]:
    """Count parameters of models and of what is shared; models that do not train count too."""
    return {
        "parameters_mentor": parameter_count(_plain(task, learner, "mentor")),
        "parameters_mentee": parameter_count(_plain(task, learner, "mentee")),
        "parameters_shared": sum(value.numel() for value in learner.exchanged().values()),
    }


def mentor_frame_bytes(task: Task, learner: Learner) -> int:
    """Return the bytes of a lossless frame of a mentor's update, what fedavg sends each way."""
    private = tuple(getattr(task, "private", ()))
    # Not of the weights themselves: biases that start at zero would cost nothing.
    update = {
        name: torch.ones_like(value)
        for name, value in trainable_parameters(_plain(task, learner, "mentor")).items()
        if not name.startswith(private)
    }
    # What a frame says of its base is counted in both.
    base = Base(digest=bytes(16))
    return len(Compressor(codec="raw", schema=False).compress(update, relative_to=base))


def _plain(task: Task, learner: Learner, role: Role) -> nn.Module:
    """Return a model as the task makes it, without adapters."""
    mentor = role == "mentor"
    model = learner.mentor if mentor else learner.mentee
    if model is None or learner.adapted(role):
        return task.build_mentor() if mentor else task.build_mentee()
    return model
