"""The subcommand train, and the summary at its end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkd_fast.cli.common import NO_REPORT, Parser, add_command, page_of, stdout
from fedkd_fast.cli.options import add_options
from fedkd_fast.cli.progress import progress_bar

_EXAMPLES = """
--task digits --method local --rounds 5 --out runs/local
--task text --data data/reviews --mentor models/minilm --mentee-layers 2
--energy-start 0.9 --energy-end 0.95 --codec factors-fp32 --seed 1
--preset paper --distill temperature=2 --distill loss=joint
--resume --out runs/digits-fedkd-s0""".removeprefix("\n")


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "train",
        _train,
        "train by FedKD or by a method to compare it with",
        _EXAMPLES,
        "Train all clients in this process and write a run folder: models, configuration, metrics, "
        "summary and, with matplotlib, a report. Nothing needs to be given; defaults are those of "
        "method fedkd.",
    )
    add_options(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was stopped or killed on its way to DIR; nothing else needs "
        "to be given. Options must be those it began with, but for --quorum, --retries, "
        "--client-timeout, --checkpoint-every and --memory-gb; with options, it begins where there "
        "is none",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="show neither progress nor the summary"
    )


def _train(args: argparse.Namespace) -> int:
    from fedkd_fast.config import TrainConfig
    from fedkd_fast.runs import SUMMARY
    from fedkd_fast.trainer import resume_run, train
    from fedkd_fast.writer import unfinished_config

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in vars(args).items() if name in names}
    if "distillation" in fields:
        fields["distillation"] = dict(fields["distillation"])
    general = TrainConfig()
    task, method, seed = (
        fields.get(name, getattr(general, name)) for name in ("task", "method", "seed")
    )
    folder = Path(fields.get("out", Path("runs") / f"{task}-{method}-s{seed}"))
    options = fields.keys() - {"out"}
    # Without options there must be a run to go on with.
    resumes = args.resume and (not options or unfinished_config(folder) is not None)
    if folder.exists() and not fields.get("overwrite") and not resumes:
        if args.resume and (folder / SUMMARY).is_file():
            raise ValueError(f"{folder} has a finished run: there is nothing to resume")
        raise ValueError(f"{folder} exists: give --overwrite to replace it, or another --out")
    with progress_bar(args.quiet or bool(args.verbose)) as show, stopping() as stop:
        fields["out"] = str(folder)
        if resumes:
            run = resume_run(progress=show, stop=stop, **fields)
        else:
            run = train(**fields, progress=show, stop=stop, resume=args.resume)
    page = page_of([folder])
    if not args.quiet:
        _print_summary(run.summary, folder, page)
    return 0


def _print_summary(summary: Mapping[str, Any], folder: Path, page: Path | None) -> None:
    from rich.table import Table

    from fedkd_fast.report.text import percent, seconds, size

    shown = Table.grid(padding=(0, 2))
    metric = summary["metric"]
    rows: list[tuple[str, str | None]] = [
        ("method", f"{summary['method']} on {summary['task']}"),
        (f"mentor, {metric}", _or_none(summary["score_mentor"], percent)),
        (f"mentee, {metric}", _or_none(summary["score_mentee"], percent)),
        (f"both together, {metric}", _or_none(summary["score_mean"], percent)),
    ]
    if summary["bytes_up"] or summary["bytes_down"]:
        up, down = size(summary["bytes_up"]), size(summary["bytes_down"])
        rows.append(("traffic per client", f"{up} up, {down} down"))
        rows.append(("saving", f"{percent(summary['saving'])} against FedAvg of the mentor"))
    else:
        rows.append(("traffic per client", "nothing sent"))
    rows += [
        ("seconds", seconds(summary["seconds"])),
        ("privacy", _privacy(summary)),
        ("faults", _faults(summary.get("faults", {}))),
        ("folder", str(folder)),
        ("report", str(page or NO_REPORT)),
    ]
    for name, value in rows:
        if value is not None:
            shown.add_row(name, value)
    stdout().print(shown)


def _privacy(summary: Mapping[str, Any]) -> str | None:
    if "epsilon" not in summary:
        return None
    if summary["epsilon"] is None:
        return "none: without noise nothing is private"
    return f"epsilon {summary['epsilon']:.3g} at delta {summary['delta']:g}, for each client"


def _faults(events: Mapping[str, int]) -> str | None:
    """Say how often what went wrong; the journal has it all."""
    found = [f"{count} {event}" for event, count in events.items()]
    return f"{', '.join(found)}, see journal.jsonl" if found else None


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yield what says whether the run shall stop: after Ctrl-C or SIGTERM.

    The first one lets the running client finish, so that a checkpoint loses nothing; the second one
    ends at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        sys.stderr.write("stopping after the running client; once more: at once\n")

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _or_none(value: float | None, text: Callable[[float | None], str]) -> str | None:
    return None if value is None else text(value)
