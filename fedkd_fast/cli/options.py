"""Options of `train`: each is a field of `TrainConfig`, whose default is looked up for the help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from fedkd_fast.cli.common import Parser


def _adapter(text: str) -> str | None:
    """Return an adapter's description; ``none`` turns off what a task's recipe turns on."""
    return None if text == "none" else text


# Option, type, name of its value, what it is. Defaults are left to the task and to TrainConfig.
_Option = tuple[str, Callable[[str], object], str, str]
_OPTIONS: dict[str, tuple[_Option, ...]] = {
    "task and models": (
        ("--task", str, "NAME", "digits, text, adr, ner or mind; all but digits need --data"),
        ("--method", str, "NAME", "fedkd, or what to compare it with: {methods}"),
        ("--preset", str, "NAME", "of fedkd, instead of the task's own recipe: {presets}"),
        ("--data", str, "PATH", "where the task's data lie"),
        ("--text-column", str, "NAME", "column of the texts in tables"),
        ("--label-column", str, "NAME", "column of the labels in tables"),
        ("--mentor", str, "PATH_OR_NAME", "pretrained encoder of the mentors; digits has its own"),
        (
            "--mentee",
            str,
            "PATH_OR_NAME",
            "the same for the mentee; else the mentor's first layers",
        ),
        ("--mentee-layers", int, "N", "layers of the mentee; more: better and costlier"),
        (
            "--mentor-adapter",
            _adapter,
            "lora:RANK",
            "train adapters and the head of the mentors only; none: all",
        ),
        (
            "--mentee-adapter",
            _adapter,
            "lora:RANK",
            "likewise of the mentee, and send only these; none: all",
        ),
        ("--max-length", int, "N", "tokens a text; larger cuts less and takes longer"),
    ),
    "federation": (
        ("--clients", int, "N", "clients that share the training data"),
        (
            "--partition",
            str,
            "KIND",
            "how data are dealt: iid, dirichlet:CONCENTRATION, key:COLUMN; datasets: file",
        ),
        (
            "--samples-per-client",
            int,
            "N",
            "digits: each client draws so many images instead, so that there may be thousands",
        ),
        ("--rounds", int, "N", "exchanges with the server; more: more bytes"),
        ("--participation", float, "SHARE", "share of the clients that take part in a round"),
        (
            "--local-epochs",
            float,
            "N",
            "passes over a client's data between two exchanges; also 0.5",
        ),
        ("--local-steps", int, "N", "batches between two exchanges, instead of whole passes"),
        ("--weighting", str, "KIND", "of updates: equal, or by samples"),
        (
            "--server-optimizer",
            str,
            "KIND",
            "what the mean update goes through: none, momentum, adam",
        ),
        ("--server-lr", float, "RATE", "of the server; larger moves further than the clients did"),
        (
            "--aggregation",
            str,
            "RULE",
            "mean, or a robust one: clip[:NORM], median, trimmed:SHARE, krum:FAULTY",
        ),
        ("--server-momentum", float, "SHARE", "larger remembers earlier rounds longer"),
        ("--eval-every", int, "N", "rounds between evaluations; larger is faster"),
        ("--patience", int, "N", "rounds without a better score on dev before training stops"),
    ),
    "messages": (
        ("--codec", str, "NAME", "what updates travel as: {codecs}; else the method's own"),
        ("--codec-down", str, "NAME", "the same for the broadcast; else as the updates"),
        ("--energy-start", float, "T", "share of an update's energy sent in the first round"),
        ("--energy-end", float, "T", "and in the last; larger: finer, and more bytes"),
        ("--energy-shape", str, "NAME", "in between: linear, cosine, geometric, public-code"),
        ("--feedback", str, "LEGS", "send what was left out with the next: none, up, down, both"),
    ),
    "differential privacy": (
        ("--dp-clip", float, "NORM", "turns it on: each update's norm is at most this"),
        ("--dp-noise", float, "Z", "noise of Z·NORM on the sum of updates; more: more private"),
        ("--dp-delta", float, "DELTA", "well below one over the number of clients"),
        ("--dp-seed", int, "N", "of noise and participants; else secret, as it should be"),
    ),
    "faults and safety": (
        ("--quorum", float, "SHARE", "of the asked clients that must reply; 1: all"),
        (
            "--norm-limit",
            float,
            "FACTOR",
            "refuse updates whose norm is more than this times the round's median",
        ),
        ("--client-timeout", float, "SECONDS", "refuse replies that took longer"),
        ("--retries", int, "N", "times that a client sends a damaged reply again"),
        ("--checkpoint-every", int, "N", "rounds between checkpoints; 0: none, and no --resume"),
        ("--memory-gb", float, "GB", "for clients in memory; the others lie in files"),
        ("--scored-clients", int, "N", "the first so many clients' own models are scored, saved"),
        ("--faults", float, "SHARE", "of the replies fail, are late, doubled, corrupt or NaN"),
        ("--attackers", float, "SHARE", "of the clients send --attack-factor times their update"),
        ("--attack-factor", float, "FACTOR", "of attackers"),
    ),
    "distillation": (
        ("--refresh-steps", int, "N", "batches in which the mentor learns from the fresh mentee"),
        ("--inference", str, "ROLE", "whose score counts: mentor, mentee or mean, both together"),
    ),
    "training": (
        ("--batch-size", int, "N", "samples a step"),
        ("--lr-mentor", float, "RATE", "learning rate of the mentors"),
        ("--lr-mentee", float, "RATE", "learning rate of the mentee"),
        ("--lr-end", float, "SHARE", "share of the learning rates left in the last round"),
        ("--warmup-steps", int, "N", "first steps of a client, with rising learning rates"),
        ("--clip-norm", float, "NORM", "longest gradient; smaller: steadier and slower"),
        ("--weight-decay", float, "RATE", "pull of matrices towards zero"),
        ("--precision", str, "NAME", "of forward and backward: fp32 or bf16"),
        ("--seed", int, "N", "of everything random; equal seeds give equal runs"),
        ("--threads", int, "N", "of torch's operators; 0: torch's own choice"),
        ("--device", str, "NAME", "of models and their training: cpu, cuda or cuda:N"),
    ),
    "baselines": (
        ("--proximal", float, "MU", "fedprox: pull of clients towards the shared model"),
        ("--bits", int, "N", "fedpaq: of each number sent: 2, 4, 8 or 16"),
        ("--rank", int, "N", "powersgd: of the update of each matrix"),
        ("--top-share", float, "SHARE", "sparseloco: of the entries, the largest, that are sent"),
    ),
    "output": (("--out", Path, "DIR", "run folder to write, else runs/<task>-<method>-s<seed>"),),
}
_SWITCHES: dict[str, tuple[tuple[str, str], ...]] = {
    "distillation": (
        ("--hidden", "match hidden states, where the models have them"),
        ("--attention", "match attention maps, where the models have them"),
        ("--mutual", "let the mentor learn from the mentee too, not from labels alone"),
    ),
    "messages": (("--encrypt", "seal what travels with AES-256-GCM, 46 bytes a frame"),),
    "training": (("--gradient-checkpointing", "take less memory and a third more time"),),
    "output": (
        ("--overwrite", "replace DIR if it exists"),
        ("--tensorboard", "write events for TensorBoard into DIR/events"),
        ("--spectra", "record how fast the singular values of each mean update fall"),
    ),
}


def add_options(parser: Parser) -> None:
    """Add the options in groups; what is not given is not in the result."""
    actions: list[argparse.Action] = []
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        if title == "distillation":
            actions.append(_add_distill(group))
        for flag, kind, metavar, text in options:
            # SUPPRESS: what is not given is not in the result, so the task's default holds.
            actions.append(
                group.add_argument(
                    flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS
                )
            )
        for flag, text in _SWITCHES.get(title, ()):
            # What a task's recipe may turn on can be turned off.
            switch = "store_true" if title == "output" else argparse.BooleanOptionalAction
            actions.append(
                group.add_argument(flag, action=switch, help=text, default=argparse.SUPPRESS)
            )
    parser.before_help = lambda: _complete(actions)


def _add_distill(group: argparse._ArgumentGroup) -> argparse.Action:
    return group.add_argument(
        "--distill",
        dest="distillation",
        action="append",
        type=_distill,
        metavar="KEY=VALUE",
        help="a field of DistillationConfig, several times for several: {distillation}",
        default=argparse.SUPPRESS,
    )


def _distill(text: str) -> tuple[str, object]:
    """Parse one field of `DistillationConfig` by its type, and check it by its own rule."""
    from fedkd_fast.distillation import DistillationConfig

    key, equals, value = text.partition("=")
    known = _distillation_fields()
    if key in ("hidden", "attention"):
        raise argparse.ArgumentTypeError(f"{key} is a switch: give --{key} or --no-{key}")
    if not equals or key not in known:
        raise argparse.ArgumentTypeError(
            f"KEY=VALUE is wanted with KEY one of {', '.join(known)}, got {text!r}"
        )
    try:
        parsed = float(value) if known[key] == "float" else value
    except ValueError:
        raise argparse.ArgumentTypeError(f"{key} must be a number, got {value!r}") from None
    try:
        DistillationConfig(**{key: parsed})  # type: ignore[arg-type]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return key, parsed


def _distillation_fields() -> dict[str, str]:
    """Return the types of the fields that are no switches, as they are written."""
    from fedkd_fast.distillation import DistillationConfig

    fields = dataclasses.fields(DistillationConfig)
    return {field.name: str(field.type) for field in fields if field.type != "bool"}


def _complete(actions: Iterable[argparse.Action]) -> None:
    """Put known names into help texts, and the values that hold where nothing is given."""
    from fedkd_fast.codec.message import CODECS
    from fedkd_fast.config import PRESETS, TrainConfig
    from fedkd_fast.methods import METHODS
    from fedkd_fast.tasks import TASKS, task_defaults

    general = TrainConfig()
    names = {
        "methods": ", ".join(name for name in METHODS if name != general.method),
        "presets": ", ".join(PRESETS),
        "codecs": ", ".join(CODECS),
        "distillation": ", ".join(_distillation_fields()),
    }
    recipes = {task: task_defaults(task, general.method) for task in TASKS}
    for action in actions:
        text = (action.help or "").format(**names)
        tasks_of: dict[str, list[str]] = {}
        for task, recipe in recipes.items():
            value = recipe.get(action.dest, getattr(general, action.dest))
            tasks_of.setdefault(_value_text(value), []).append(task)
        if len(tasks_of) == 1:
            (shown,) = tasks_of
            shown = "" if shown == "no" else shown
        else:
            shown = "; ".join(
                f"{value} for {', '.join(tasks)}" for value, tasks in tasks_of.items() if value
            )
        action.help = f"{text} (default: {shown})" if shown else text


def _value_text(value: object) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" for key, one in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
