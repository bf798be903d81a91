"""The configuration of a run."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fedkd_fast._device import check_device
from fedkd_fast.adapters import check_adapter
from fedkd_fast.codec.message import CODECS
from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.methods import get_method
from fedkd_fast.robust import check_rule
from fedkd_fast.tasks import TaskOptions
from fedkd_fast.tasks.partition import check_partition
from fedkd_fast.updates import EXACT_INTEGERS

# More threads than any machine has processors are a slip, and torch dies over very many.
MOST_THREADS = 1024
# Something is kept of each, and all are gone through in each round.
MOST_CLIENTS = 1_000_000

_CHOICES: dict[str, tuple[str, ...]] = {
    "codec": CODECS,
    "codec_down": CODECS,
    "energy_shape": ("linear", "cosine", "geometric", "public-code"),
    "feedback": ("none", "up", "down", "both"),
    "weighting": ("equal", "samples"),
    "server_optimizer": ("none", "momentum", "adam"),
    "inference": ("mentor", "mentee", "mean"),
    "precision": ("fp32", "bf16"),
}
_TEXTS = ("task", "method", "data", "mentor", "mentee", "text_column", "label_column", "out")
_SWITCHES = (
    *("gradient_checkpointing", "hidden", "attention", "mutual", "encrypt"),
    *("overwrite", "tensorboard", "spectra"),
)
# What both presets undo of a task's own recipe for FedKD.
_PURE: dict[str, Any] = {
    "codec": "factors-fp32",
    "feedback": "none",
    "mentor_adapter": None,
    "mentee_adapter": None,
    "energy_start": 0.95,
    "energy_end": 0.98,
    "refresh_steps": 0,
    "inference": "mentor",
    "hidden": True,
    "attention": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The method as Nature Communications 13:2032 describes it.
    "paper": {**_PURE, "distillation": {}, "energy_shape": "linear"},
    # What the authors' released code does, but for its defects.
    "public_code": {
        **_PURE,
        "distillation": {
            name: value
            for name, value in dataclasses.asdict(DistillationConfig.public_code()).items()
            if value != getattr(DistillationConfig(), name)
        },
        "energy_shape": "public-code",
    },
}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run; with equal configurations, bytes and weights are equal too.

    So it is on the CPU of one type of machine. A GPU's results differ from these in their last
    bits, and from one run to the next where its kernels add up in any order.
    """

    task: str = "digits"  # digits, text, adr, ner, mind, or the name of a task of your own
    method: str = "fedkd"  # one of `fedkd_fast.methods.METHODS`
    preset: str | None = None  # paper or public_code instead of the task's own recipe for fedkd
    clients: int = 4  # more: smaller shards, and more knowledge that only the others have
    partition: str | None = None  # iid, dirichlet:α, key:COLUMN, file; None: the task's own
    # Digits: each client draws so many images, so that there may be thousands; None: dealt.
    samples_per_client: int | None = None
    rounds: int = 10  # more: more exchanges, more bytes
    participation: float = 1.0  # share of the clients in each round; less: fewer bytes, slower
    local_epochs: float = 1.0  # also 0.5; more: fewer exchanges for the same work, more drift
    local_steps: int | None = None  # batches a round instead of whole epochs
    energy_start: float = 0.95  # share of an update's squared norm sent in the first round
    energy_end: float = 0.98  # and in the last; larger keeps finer detail and costs more bytes
    energy_shape: str = "linear"  # between the two; cosine, geometric, public-code
    codec: str | None = (
        None  # wf1, dense, wf0, factors-fp32 (the paper's payload), raw; None: the method's
    )
    codec_down: str | None = None  # of the broadcast; None: as the uploads
    feedback: str | None = None  # legs on which what a message leaves out travels with the next
    weighting: str = "equal"  # samples: clients with more data count more
    server_optimizer: str = "none"  # of the mean update: momentum, adam; smoother over rounds
    server_lr: float = 1.0  # larger moves the shared model further than the clients' mean
    aggregation: str = "mean"  # or a robust mean: clip[:NORM], median, trimmed:SHARE, krum:FAULTY
    dp_clip: float | None = None  # C: differential privacy, each update's norm is at most this
    dp_noise: float = 1.0  # z: noise of z·C on the sum of updates; more: more private, worse
    dp_delta: float = 1e-5  # δ: well below one over the number of clients
    dp_seed: int | None = None  # of noise and participants; None: secret, from the system
    server_momentum: float = 0.9  # larger remembers earlier rounds longer
    lr_mentor: float = 1e-3  # larger learns faster, until it diverges
    lr_mentee: float = 1e-3  # likewise
    lr_end: float = 1.0  # share of the learning rates left in the last round; smaller ends calmer
    warmup_steps: int = 0  # a client's first steps, with rising rates; more starts calmer
    clip_norm: float | None = None  # longest gradient; smaller: steadier and slower
    weight_decay: float = 0.01  # larger holds matrices closer to zero
    batch_size: int = 32  # larger: fewer, smoother steps an epoch
    precision: str = "fp32"  # bf16: faster where the machine multiplies bfloat16, less exact
    gradient_checkpointing: bool = False  # True: less memory, a third more time
    refresh_steps: int = 0  # of the mentor alone, taught by the fresh mentee, after each broadcast
    inference: str = "mentor"  # whose score counts: mentor, mentee or mean, of both together
    patience: int | None = None  # rounds without a better score on dev before training stops
    hidden: bool = True  # distil hidden states, where the models have them
    attention: bool = True  # distil attention maps, where the models have them
    mutual: bool = True  # False: only the mentee learns from the mentor; that from labels alone
    # Further fields of `DistillationConfig` by name.
    distillation: Mapping[str, Any] = field(default_factory=dict)
    mentor_adapter: str | None = None  # lora:RANK trains an adapter and the head of the mentor only
    mentee_adapter: str | None = None  # lora:RANK: likewise of the mentee, and sends only that
    proximal: float = 0.01  # fedprox: larger holds clients closer to the shared model
    bits: int = 8  # fedpaq: of each number; fewer: fewer bytes, more noise
    rank: int = 4  # powersgd: more: more bytes, finer updates
    top_share: float = 0.02  # sparseloco: share of the entries sent; more: more bytes, finer
    eval_every: int = 1  # larger: scores in fewer rounds, faster; the last round always has them
    seed: int = 0  # of everything random
    threads: int = 0  # of torch's operators; 0 leaves torch's own choice
    device: str = "cpu"  # cuda, cuda:N: models are trained and scored there; codecs stay on the CPU
    mentor: str | None = None  # folder or name of the pretrained mentor, for tasks that take one
    mentee: str | None = None  # the same for the mentee; None: the first layers of the mentor
    mentee_layers: int | None = None  # more: a better and costlier mentee; None: the task's choice
    max_length: int = 48  # tokens a text; larger cuts less and takes longer
    data: str | None = None  # where a task's data lie, for tasks that take some
    text_column: str = "text"  # of the data, for tasks that read tables
    label_column: str = "label"  # likewise
    encrypt: bool = False  # True: seal what travels, 46 bytes a frame, also within this process
    quorum: float = 0.5  # share of the asked clients whose replies must count; 1: any fault ends it
    norm_limit: float | None = 100.0  # refuse updates of more than this times the median norm
    client_timeout: float | None = None  # seconds after which a client's reply is not waited for
    retries: int = 1  # how often a client is asked again for a reply that arrives damaged
    checkpoint_every: int = 1  # rounds between checkpoints in the run folder; 0: none
    memory_gb: float = 4.0  # of the clients in memory; the others lie in files
    scored_clients: int = 100  # the first so many clients' own models are scored and saved
    faults: float = 0.0  # share of the replies that go wrong on purpose, to see what comes of it
    attackers: float = 0.0  # share of the clients that send attack_factor times their update
    attack_factor: float = -10.0  # below 0 pushes the model backwards; larger sizes do more harm
    out: str | None = None  # run folder to write; None writes nothing
    overwrite: bool = False  # True: replace a run folder that exists
    tensorboard: bool = False  # True: write events for TensorBoard into the run folder
    spectra: bool = False  # True: record how fast singular values of each mean update fall

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            left_out = value is None and name in _OPTIONAL
            if not isinstance(value, (str, os.PathLike)) and not left_out:
                raise TypeError(f"{name} must be text, got {value!r}")
        get_method(self.method)
        check_preset(self.preset)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.distillation, Mapping):
            raise TypeError(f"distillation must be a mapping, got {self.distillation!r}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, (check, rule, words) in _RULES.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check(name, value, rule, words)
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        check_device(self.device)
        if self.bits not in (2, 4, 8, 16):
            raise ValueError(f"bits must be 2, 4, 8 or 16, got {self.bits}")
        for name in ("mentor_adapter", "mentee_adapter"):
            if getattr(self, name) is not None:
                check_adapter(name, getattr(self, name))
        if self.partition is not None:
            check_partition(self.partition)
        self._check_aggregation()
        if self.tensorboard and self.out is None:
            raise ValueError("tensorboard needs out, the run folder that events go to, got None")
        loss = self.distillation_config().loss
        if not self.mutual and loss != "separate":
            raise ValueError(f"mutual=False needs separate losses, got loss={loss!r}")
        if not self.mutual and self.refresh_steps:
            raise ValueError(
                "mutual=False leaves the mentor to the labels, so refresh_steps must be 0, got "
                f"{self.refresh_steps}"
            )

    def _check_aggregation(self) -> None:
        """Refuse what the mean of a round cannot be."""
        rule = check_rule(self.aggregation, "aggregation")
        exchanges = get_method(self.method).exchanges
        asked = max(1, round(self.participation * self.clients))
        if exchanges and rule.least > asked:
            raise ValueError(
                f"aggregation {rule.text} needs at least {rule.least} clients a round, got {asked}"
            )
        if rule.kind in ("median", "trimmed") and self.weighting != "equal":
            raise ValueError(
                f"aggregation {rule.text} needs weighting to be equal, got {self.weighting!r}"
            )
        if self.norm_limit is not None and self.norm_limit <= 1.0:
            raise ValueError(f"norm_limit must be more than 1, got {self.norm_limit}")
        if self.dp_clip is None:
            return
        # Anything else that depends on the updates gives away more than is accounted for.
        without = {"aggregation": "mean", "weighting": "equal", "patience": None}
        if self.quorum == 1.0:
            raise ValueError(
                "dp_clip needs quorum to be below 1: a run that ends where a client fails depends "
                "on that client's data"
            )
        for name, value in without.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"dp_clip needs {name} to be {value}: differential privacy does not cover "
                    f"{getattr(self, name)!r}"
                )
        if not exchanges:
            raise ValueError(f"dp_clip needs a method that exchanges updates, got {self.method}")

    def needed(self, asked: int) -> int:
        """Return how many replies of a round must count.

        With differential privacy none has to: what waits for a quorum depends on the data.
        """
        if self.dp_clip is not None:
            return 0
        least = check_rule(self.aggregation, "aggregation").least
        return max(1, least, math.ceil(self.quorum * asked - 1e-9))

    def energy(self, round_number: int) -> float:
        """Return the energy threshold of a round, equation (9) of the paper.

        ``T(t) = T_start + (T_end - T_start)·t``, t = share of the rounds that lie behind, so
        that the first round has T_start and the last T_end. Other shapes put another function of t
        in its place; ``public-code`` counts the round itself in t, so that no round has T_start;
        ``geometric`` interpolates ``log(1 - T)``, or is linear where an end is 1.
        """
        first, last, shape = self.energy_start, self.energy_end, self.energy_shape
        if shape == "public-code":
            return first + (last - first) * round_number / self.rounds
        if shape == "geometric" and max(first, last) < 1.0:
            return 1.0 - math.exp(
                self._between(math.log(1.0 - first), math.log(1.0 - last), round_number)
            )
        return self._between(first, last, round_number, cosine=shape == "cosine")

    def lr_share(self, round_number: int) -> float:
        """Return the share of the learning rates that a round uses, linear from 1 to `lr_end`."""
        return self._between(1.0, self.lr_end, round_number)

    def _between(
        self, first: float, last: float, round_number: int, *, cosine: bool = False
    ) -> float:
        progress = (round_number - 1) / (self.rounds - 1) if self.rounds > 1 else 0.0
        if cosine:
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        # Exact at both ends, whatever the rounding in between.
        return first * (1.0 - progress) + last * progress

    def distillation_config(self) -> DistillationConfig:
        """Return how mentor and mentee teach each other.

        Raises:
            TypeError: `distillation` names no field of `DistillationConfig`.
            ValueError: a value out of its range.
        """
        known = {one.name for one in dataclasses.fields(DistillationConfig)}
        for name in self.distillation:
            if name not in known - {"hidden", "attention"}:
                raise TypeError(
                    "distillation must name fields of DistillationConfig, but for hidden and "
                    f"attention, got {name!r}"
                )
        return DistillationConfig(
            **{**self.distillation, "hidden": self.hidden, "attention": self.attention}
        )


def check_preset(value: object) -> None:
    """Refuse what names no preset; None is none.

    Raises:
        ValueError: something else.
    """
    if value is not None and value not in [*PRESETS]:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {value!r}")


def _check_integer(name: str, value: object, least: float, words: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {words}, got {value}")
    return value


def _check_count(
    name: str, value: object, least: float, words: str, *, most: int = EXACT_INTEGERS
) -> None:
    """Refuse also what is more than any run counts."""
    number = _check_integer(name, value, least, words)
    if number > most:
        # Python does not write out integers of thousands of digits.
        shown = number if number.bit_length() < 1000 else f"one of {number.bit_length()} bits"
        raise ValueError(f"{name} must be at most {most}, got {shown}")


def _check_positive(name: str, value: object, least: float, words: str) -> None:
    """Hold a number against a lower bound, itself excluded below zero and at it."""
    number = _number(name, value)
    if not (math.isfinite(number) and (number > 0.0 or number == least)):
        raise ValueError(f"{name} must be {words}, got {number}")


def _check_finite(name: str, value: object, least: float, words: str) -> None:
    """Let any number pass that is one: there is no bound."""
    number = _number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {words}, got {number}")


def _check_share(name: str, value: object, least: float, words: str) -> None:
    number = _number(name, value)
    if not (0.0 < number <= 1.0 or number == least):
        raise ValueError(f"{name} must lie in {words}, got {number}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


_Rule = tuple[Callable[[str, object, float, str], object], float, str]
_COUNT: _Rule = (_check_count, 1, "at least 1")
_NUMBER: _Rule = (_check_count, 0, "at least 0")
_SEED: _Rule = (_check_integer, 0, "at least 0")  # all bits of it count
_SHARE: _Rule = (_check_share, 1.0, "(0, 1]")
_RATE: _Rule = (_check_positive, 1.0, "positive and finite")
_AMOUNT: _Rule = (_check_positive, 0.0, "finite and at least 0")
_RULES: dict[str, _Rule] = {
    "clients": (partial(_check_count, most=MOST_CLIENTS), 1, "at least 1"),
    **dict.fromkeys(("rounds", "local_steps", "batch_size"), _COUNT),
    **dict.fromkeys(("eval_every", "max_length", "mentee_layers", "rank", "patience"), _COUNT),
    "scored_clients": _COUNT,
    **dict.fromkeys(("checkpoint_every", "retries"), _NUMBER),
    "samples_per_client": _COUNT,
    **dict.fromkeys(("threads", "warmup_steps", "refresh_steps", "bits"), _NUMBER),
    **dict.fromkeys(("seed", "dp_seed"), _SEED),
    **dict.fromkeys(("energy_start", "energy_end", "lr_end"), _SHARE),
    **dict.fromkeys(("participation", "top_share", "quorum"), _SHARE),
    **dict.fromkeys(("faults", "attackers"), (_check_share, 0.0, "[0, 1]")),
    "attack_factor": (_check_finite, 0.0, "finite"),
    **dict.fromkeys(("norm_limit", "client_timeout", "memory_gb"), _RATE),
    "dp_clip": _RATE,
    "dp_noise": _AMOUNT,
    "dp_delta": (_check_share, 1.0, "(0, 1]"),
    "server_momentum": (_check_share, 0.0, "[0, 1]"),
    **dict.fromkeys(("local_epochs", "lr_mentor", "lr_mentee"), _RATE),
    **dict.fromkeys(("server_lr", "clip_norm"), _RATE),
    **dict.fromkeys(("weight_decay", "proximal"), _AMOUNT),
}
_OPTIONAL = {
    *("data", "mentor", "mentee", "out"),
    *("codec", "codec_down", "feedback"),
    *("norm_limit", "client_timeout", "dp_clip", "dp_seed"),
    *("local_steps", "clip_norm", "patience", "mentee_layers", "samples_per_client"),
}


def task_options(config: TrainConfig) -> TaskOptions:
    """Return what a built-in task is told of a configuration."""
    names = [option.name for option in dataclasses.fields(TaskOptions)]
    return TaskOptions(**{name: getattr(config, name) for name in names})
