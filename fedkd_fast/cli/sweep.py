"""The subcommand sweep: many runs from one file, and their comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd_fast._errors import QuorumError
from fedkd_fast.cli.common import (
    NO_REPORT,
    Parser,
    add_command,
    page_of,
    say,
    stdout,
    table,
    write_bytes,
)
from fedkd_fast.cli.progress import progress_bar
from fedkd_fast.cli.runs import print_comparison
from fedkd_fast.cli.train import stopping

if TYPE_CHECKING:
    from fedkd_fast.sweep import PlannedRun


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        "train what a YAML file lists, and compare it over seeds",
        "sweep.yaml --dry-run\nsweep.yaml --out runs/sweep",
        "Train all runs that a YAML file lists, one after the other, and write their comparison. "
        "Finished ones are skipped, so that a sweep that was stopped goes on where it was.",
    )
    parser.epilog = f"{_FILE}\n\n{parser.epilog}"
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="what to train, see below")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run folders <name>-s<seed> and of comparison.md, comparison.csv and "
        "report.html (default: runs/FILE)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the file and list its runs")
    parser.add_argument("--quiet", action="store_true", help="show neither progress nor the table")


_FILE = """the file; options are fields of TrainConfig, as train has them, with _ instead of -:
  common: {task: digits, rounds: 20}   # of all runs
  methods: [local, fedavg, fedkd]      # or with options: {local: {}, fedkd: {codec: wf0}}
  runs:                                # or any runs, by name
    fedkd-paper: {method: fedkd, preset: paper}
  settings:                            # each run under each of them
    few: {clients: 2}
    many: {clients: [8, 16]}           # a list makes several: many-8, many-16
  seeds: [0, 1, 2]"""


def _sweep(args: argparse.Namespace) -> int:
    from fedkd_fast.sweep import plan_sweep

    out: Path = args.out or Path("runs") / args.file.stem
    planned = plan_sweep(args.file, out)
    if args.dry_run:
        _list(planned)
        return 0
    done, failures = [], []
    for number, run in enumerate(planned, 1):
        label = f"{number}/{len(planned)} {run.folder.name}"
        try:
            if not run.finished:
                bar = progress_bar(args.quiet or bool(args.verbose), label)
                with bar as show, stopping() as stop:
                    summary = run.train(show, stop).summary
                if not args.quiet:
                    _say_finished(label, summary["seconds"])
        except (ValueError, QuorumError) as error:
            # One that diverges would do so again: the others are worth having.
            failures.append(f"{run.folder.name}: {error}")
        else:
            done.append(run)
    if done:
        _compare(done, out, quiet=args.quiet)
    if failures:
        raise ValueError("; ".join(failures))
    return 0


def _list(planned: Sequence[PlannedRun]) -> None:
    shown = table("run", "task", "method", "seed", "", left=5)
    for run in planned:
        config = run.config
        state = "finished" if run.finished else "to do"
        shown.add_row(run.folder.name, config.task, config.method, str(config.seed), state)
    stdout().print(shown)


def _say_finished(label: str, spent: float) -> None:
    from fedkd_fast.report.text import duration

    say(f"{label}: {duration(spent)}")


def _compare(planned: Sequence[PlannedRun], out: Path, *, quiet: bool) -> None:
    """Write the comparison as Markdown, CSV and, with matplotlib, the page."""
    from fedkd_fast.report import group_runs, read_runs
    from fedkd_fast.report.tables import csv_table, markdown

    folders, names = [run.folder for run in planned], [run.name for run in planned]
    groups = group_runs(read_runs(folders, names))
    write_bytes(out / "comparison.md", markdown(groups).encode())
    write_bytes(out / "comparison.csv", csv_table(groups).encode())
    page = page_of(folders, out / "report.html", names)
    if not quiet:
        print_comparison(groups)
        say(f"tables: {out / 'comparison.md'}, {out / 'comparison.csv'}")
        say(f"report: {page or NO_REPORT}")
