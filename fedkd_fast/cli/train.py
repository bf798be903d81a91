"""The subcommand train: options, progress, and the summary at the end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd_fast.cli.common import Parser, add_command, stdout

if TYPE_CHECKING:
    from fedkd_fast.records import RoundRecord

_EXAMPLES = """
--task digits --method local --rounds 5 --out runs/local
--task text --data data/reviews --mentor models/minilm --mentee-layers 2
--energy-start 0.9 --energy-end 0.95 --codec factors-fp32 --seed 1""".removeprefix("\n")

# Group, option, type, name of its value, what it is. Each option is a field of TrainConfig; its
# default is left to the task and to TrainConfig, and looked up there when help is asked for.
_Option = tuple[str, Callable[[str], object], str, str]
_OPTIONS: dict[str, tuple[_Option, ...]] = {
    "what": (
        ("--task", str, "NAME", "digits, or text with --data and --mentor"),
        ("--method", str, "NAME", "fedkd, local, central, fedavg or fedavg-mentee"),
        ("--data", str, "PATH", "where the task's data lie; digits brings its own"),
        ("--mentor", str, "PATH_OR_NAME", "pretrained encoder for the mentor of task text"),
        ("--mentee-layers", int, "N", "layers of the mentee; more: better and costlier"),
        ("--max-length", int, "N", "tokens a text; larger cuts less and takes longer"),
    ),
    "federation": (
        ("--clients", int, "N", "clients that share the training data"),
        ("--rounds", int, "N", "exchanges with the server; more: more bytes"),
        ("--local-epochs", int, "N", "passes over a client's data between two exchanges"),
        ("--energy-start", float, "T", "share of an update's energy sent in the first round"),
        ("--energy-end", float, "T", "and in the last; larger: finer, and more bytes"),
        (
            "--codec",
            str,
            "NAME",
            "wf1 (quantised and coded), wf0 (quantised), factors-fp32 or raw",
        ),
    ),
    "training": (
        ("--batch-size", int, "N", "samples a step"),
        ("--lr-mentor", float, "RATE", "learning rate of the mentors"),
        ("--lr-mentee", float, "RATE", "learning rate of the mentee"),
        ("--lr-end", float, "SHARE", "share of the learning rates left in the last round"),
        ("--weight-decay", float, "RATE", "pull of matrices towards zero"),
        ("--seed", int, "N", "of everything random; equal seeds give equal runs"),
        ("--threads", int, "N", "of torch's operators; 0: torch's own choice"),
        ("--eval-every", int, "N", "rounds between evaluations; larger is faster"),
    ),
}
_SWITCHES: dict[str, tuple[tuple[str, str], ...]] = {
    "federation": (("--feedback", "send what a message left out along with the next"),),
    "training": (
        ("--hidden", "distil hidden states, where the models have them"),
        ("--attention", "distil attention maps, where the models have them"),
    ),
}


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "train",
        _train,
        "train by FedKD or by a method to compare it with",
        _EXAMPLES,
        "Train all clients in this process and write a run folder: models, configuration, metrics, "
        "summary and, with matplotlib, a report. Nothing needs to be given.",
    )
    actions = []
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, kind, metavar, text in options:
            # SUPPRESS: what is not given is not in the result, so the task's default holds.
            actions.append(
                group.add_argument(
                    flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS
                )
            )
        for flag, text in _SWITCHES.get(title, ()):
            actions.append(
                group.add_argument(
                    flag,
                    action=argparse.BooleanOptionalAction,
                    help=text,
                    default=argparse.SUPPRESS,
                )
            )
    parser.before_help = lambda: _add_defaults(actions)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="run folder to write (default: runs/<task>-<method>-s<seed>)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    group.add_argument("--quiet", action="store_true", help="show neither progress nor the summary")


def _add_defaults(actions: list[argparse.Action]) -> None:
    """Append to each option's help the value that holds when it is not given."""
    from fedkd_fast.config import TrainConfig
    from fedkd_fast.tasks import TASKS, task_defaults

    general = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for action in actions:
        values = {
            task: task_defaults(task).get(action.dest, general[action.dest]) for task in TASKS
        }
        texts = {task: _value_text(value) for task, value in values.items()}
        if len(set(texts.values())) > 1:
            shown = ", ".join(f"{text} for {task}" for task, text in texts.items())
        else:
            shown = next(iter(texts.values()))
        if shown:
            action.help = f"{action.help} (default: {shown})"


def _value_text(value: object) -> str:
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _train(args: argparse.Namespace) -> int:
    from fedkd_fast.config import TrainConfig
    from fedkd_fast.trainer import train

    given = vars(args)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in given.items() if name in names}
    general = TrainConfig()
    task, method, seed = (
        fields.get(name, getattr(general, name)) for name in ("task", "method", "seed")
    )
    folder = Path(fields.get("out", Path("runs") / f"{task}-{method}-s{seed}"))
    if folder.exists() and not args.overwrite:
        raise ValueError(f"{folder} exists: give --overwrite to replace it, or another --out")
    with _progress(args.quiet or bool(args.verbose)) as show:
        run = train(**{**fields, "out": str(folder)}, progress=show)
    page = _report(folder)
    if not args.quiet:
        _print_summary(run.summary, folder, page)
    return 0


def _report(folder: Path) -> Path | None:
    """The run's report, where the extra that draws it is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from fedkd_fast.report import write_report

    return write_report([folder])


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[RoundRecord], None] | None]:
    """A bar on stderr that moves with the rounds; None where nobody would see it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if silent or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("first round", total=None)
        up = down = 0.0

        def show(record: RoundRecord) -> None:
            nonlocal up, down
            up += record.bytes_up
            down += record.bytes_down
            text = _round_text(record, up, down)
            bar.update(shown, total=record.rounds, completed=record.round, description=text)

        yield show


def _round_text(record: RoundRecord, up: float, down: float) -> str:
    from fedkd_fast.report.text import percent, size

    parts = [f"round {record.round}/{record.rounds}"]
    loss = record.loss_mentor if record.loss_mentor is not None else record.loss_mentee
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    score = record.score_mentor if record.score_mentor is not None else record.score_mentee
    if score is not None:
        parts.append(f"score {percent(score)}")
    if up or down:
        parts.append(f"{size(up)} up, {size(down)} down")
    return "  ".join(parts)


def _print_summary(summary: Mapping[str, Any], folder: Path, page: Path | None) -> None:
    from rich.table import Table

    from fedkd_fast.report.text import percent, seconds, size

    shown = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str | None]] = [
        ("method", f"{summary['method']} on {summary['task']}"),
        (f"mentor, {summary['metric']}", _or_none(summary["score_mentor"], percent)),
        (f"mentee, {summary['metric']}", _or_none(summary["score_mentee"], percent)),
    ]
    if summary["bytes_up"] or summary["bytes_down"]:
        up, down = size(summary["bytes_up"]), size(summary["bytes_down"])
        rows.append(("traffic per client", f"{up} up, {down} down"))
        rows.append(("saving", f"{percent(summary['saving'])} against FedAvg of the mentor"))
    else:
        rows.append(("traffic per client", "nothing sent"))
    rows += [
        ("seconds", seconds(summary["seconds"])),
        ("folder", str(folder)),
        ("report", str(page) if page else 'needs pip install "fedkd-fast[report]"'),
    ]
    for name, value in rows:
        if value is not None:
            shown.add_row(name, value)
    stdout().print(shown)


def _or_none(value: float | None, text: Callable[[float | None], str]) -> str | None:
    return None if value is None else text(value)
