"""The configuration of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fedkd_fast.codec.message import CODECS
from fedkd_fast.methods import get_method
from fedkd_fast.tasks import TaskOptions

# More threads than any machine has processors are a slip, and torch dies over very many.
MOST_THREADS = 1024


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run; with equal configurations, bytes and weights are equal too."""

    task: str = "digits"  # digits, text, or the name of a task of your own
    method: str = "fedkd"  # fedkd, local, central, fedavg or fedavg-mentee
    clients: int = 4  # more: smaller shards, and more knowledge that only the others have
    rounds: int = 10  # more: more exchanges, more bytes
    local_epochs: int = 1  # more: fewer exchanges for the same work, updates drift further apart
    energy_start: float = 0.95  # share of an update's squared norm sent in the first round
    energy_end: float = 0.98  # and in the last; larger keeps finer detail and costs more bytes
    codec: str = "wf1"  # wf1, wf0, factors-fp32 (the paper's payload) or raw
    feedback: bool = False  # True: what a message leaves out travels with the next
    lr_mentor: float = 1e-3  # larger learns faster, until it diverges
    lr_mentee: float = 1e-3  # likewise
    lr_end: float = 1.0  # share of the learning rates left in the last round; smaller ends calmer
    weight_decay: float = 0.01  # larger holds matrices closer to zero
    batch_size: int = 32  # larger: fewer, smoother steps an epoch
    hidden: bool = True  # distil hidden states, where the models have them
    attention: bool = True  # distil attention maps, where the models have them
    eval_every: int = 1  # larger: scores in fewer rounds, faster; the last round always has them
    seed: int = 0  # of everything random
    threads: int = 0  # of torch's operators; 0 leaves torch's own choice
    mentor: str | None = None  # folder or name of the pretrained mentor, for tasks that take one
    mentee_layers: int | None = None  # more: a better and costlier mentee; None: the task's choice
    max_length: int = 48  # tokens a text; larger cuts less and takes longer
    data: str | None = None  # where a task's data lie, for tasks that take some
    out: str | None = None  # run folder to write; None writes nothing
    overwrite: bool = False  # True: replace a run folder that exists

    def __post_init__(self) -> None:
        get_method(self.method)
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        for name in ("clients", "rounds", "local_epochs", "batch_size", "eval_every", "max_length"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("seed", "threads"):
            _check_integer(name, getattr(self, name), 0)
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        if self.mentee_layers is not None:
            _check_integer("mentee_layers", self.mentee_layers, 1)
        for name in ("energy_start", "energy_end"):
            energy = _number(name, getattr(self, name))
            if not 0.0 < energy <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {energy}")
        for name in ("lr_mentor", "lr_mentee"):
            rate = _number(name, getattr(self, name))
            if not (math.isfinite(rate) and rate > 0.0):
                raise ValueError(f"{name} must be positive and finite, got {rate}")
        share = _number("lr_end", self.lr_end)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"lr_end must lie in (0, 1], got {share}")
        decay = _number("weight_decay", self.weight_decay)
        if not (math.isfinite(decay) and decay >= 0.0):
            raise ValueError(f"weight_decay must be finite and at least 0, got {decay}")

    def energy(self, round_number: int) -> float:
        """Return the energy threshold of a round, equation (9) of the paper.

        ``T(t) = T_start + (T_end - T_start)·t``, t = share of the rounds that lie behind, so
        that the first round has T_start and the last T_end.
        """
        return self._between(self.energy_start, self.energy_end, round_number)

    def lr_share(self, round_number: int) -> float:
        """Return the share of the learning rates that a round uses, linear from 1 to `lr_end`."""
        return self._between(1.0, self.lr_end, round_number)

    def _between(self, first: float, last: float, round_number: int) -> float:
        progress = (round_number - 1) / (self.rounds - 1) if self.rounds > 1 else 0.0
        # Exact at both ends, whatever the rounding in between.
        return first * (1.0 - progress) + last * progress


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def task_options(config: TrainConfig) -> TaskOptions:
    """Return what a built-in task is told of a configuration."""
    names = [option.name for option in dataclasses.fields(TaskOptions)]
    return TaskOptions(**{name: getattr(config, name) for name in names})
