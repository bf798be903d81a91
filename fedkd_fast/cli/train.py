"""The subcommand train, and the summary at its end."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedkd_fast.cli.common import NO_REPORT, Parser, add_command, page_of, stdout
from fedkd_fast.cli.options import add_options
from fedkd_fast.cli.progress import progress_bar

_EXAMPLES = """
--task digits --method local --rounds 5 --out runs/local
--task text --data data/reviews --mentor models/minilm --mentee-layers 2
--energy-start 0.9 --energy-end 0.95 --codec factors-fp32 --seed 1
--preset paper --distill temperature=2 --distill loss=joint""".removeprefix("\n")


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
        "--quiet", action="store_true", help="show neither progress nor the summary"
    )


def _train(args: argparse.Namespace) -> int:
    from fedkd_fast.config import TrainConfig
    from fedkd_fast.trainer import train

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in vars(args).items() if name in names}
    if "distillation" in fields:
        fields["distillation"] = dict(fields["distillation"])
    general = TrainConfig()
    task, method, seed = (
        fields.get(name, getattr(general, name)) for name in ("task", "method", "seed")
    )
    folder = Path(fields.get("out", Path("runs") / f"{task}-{method}-s{seed}"))
    if folder.exists() and not fields.get("overwrite"):
        raise ValueError(f"{folder} exists: give --overwrite to replace it, or another --out")
    with progress_bar(args.quiet or bool(args.verbose)) as show:
        run = train(**{**fields, "out": str(folder)}, progress=show)
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
        ("folder", str(folder)),
        ("report", str(page or NO_REPORT)),
    ]
    for name, value in rows:
        if value is not None:
            shown.add_row(name, value)
    stdout().print(shown)


def _or_none(value: float | None, text: Callable[[float | None], str]) -> str | None:
    return None if value is None else text(value)
