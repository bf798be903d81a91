"""The subcommands on finished runs: evaluate, predict, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd_fast.cli.common import Parser, add_command, check_target, say, stdout, table, visible

if TYPE_CHECKING:
    from fedkd_fast.report.groups import Group
    from fedkd_fast.report.runs import RunFolder


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the three subcommands."""
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score the models of a run again on the task's test data",
        "runs/digits-fedkd-s0",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="run folder")

    parser = add_command(
        commands,
        "predict",
        _predict,
        "label samples with a model of a run, one JSON object a line",
        "runs/digits-fedkd-s0 --data images.csv\nruns/digits-fedkd-s0 --client 0",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="samples; digits: .npy, .npz or .csv of 8×8 images; text, adr, ner: .jsonl, .tsv, "
        ".csv or .txt; mind: .tsv like behaviors.tsv (default: the task's test data)",
    )
    parser.add_argument(
        "--client",
        type=int,
        metavar="N",
        help="use the mentor of this client (default: the mentee, or the first mentor where the "
        "method has no mentee)",
    )

    parser = add_command(
        commands,
        "report",
        _report,
        "write one HTML page about runs, and print their comparison",
        "runs/digits-fedkd-s0\n"
        "runs/digits-fedkd-s0 runs/digits-local-s0 runs/digits-fedavg-s0 -o comparison.html",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folders")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="PAGE.html",
        help="page to write, replaced if it exists (default: report.html in the run's folder, or "
        "in the working directory for several runs)",
    )


def _evaluate(args: argparse.Namespace) -> int:
    from fedkd_fast.report.text import percent
    from fedkd_fast.runs import evaluate_run

    found = evaluate_run(args.folder)
    metric, tables = found["metric"], found["metrics"]
    others = [name for name in next(filter(None, tables.values())) if name != metric]
    shown = table("model", f"{metric} on {found['task']}", *others)
    scores = found["scores_mentor"]
    if len(scores) > 1:
        for client, score in enumerate(scores):
            shown.add_row(f"mentor of client {client}", percent(score))
    mentor = "mentors, mean" if len(scores) > 1 else "mentor"
    for role, name in (("mentor", mentor), ("mentee", "mentee"), ("mean", "both together")):
        if tables[role]:
            shown.add_row(name, *(percent(tables[role][one]) for one in (metric, *others)))
    stdout().print(shown)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from fedkd_fast.runs import predict_run

    for record in predict_run(args.folder, args.data, client=args.client):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 0


def _report(args: argparse.Namespace) -> int:
    from fedkd_fast.report import group_runs, read_runs, write_report

    out = args.out
    if out is not None:
        # A page may be replaced, what runs left may not.
        kept = (path for folder in args.folders for path in folder.rglob("*") if path.is_file())
        kept = (path for path in kept if path.suffix != ".html")
        out = check_target(out, True, *(kept if out.exists() else ()))
    page = write_report(args.folders, out)
    runs = read_runs(args.folders)
    print_comparison(group_runs(runs))
    _print_faults(runs)
    say(f"report: {page}")
    return 0


def _print_faults(runs: Sequence[RunFolder]) -> None:
    """Print a line for each run in which something went wrong."""
    from fedkd_fast.report.faults import counted

    for run in runs:
        found = "" if run.log is None else counted(run.log)
        if found:
            place = f" of {visible(str(run.path))}" if len(runs) > 1 else ""
            say(f"faults{place}: {found}; see the page")


def print_comparison(groups: Sequence[Group]) -> None:
    """Print the table of groups of runs."""
    from fedkd_fast.report.tables import COMPARISON_COLUMNS, comparison_rows

    shown = table("task", *COMPARISON_COLUMNS, left=2)
    for group, row in zip(groups, comparison_rows(groups), strict=True):
        shown.add_row(*map(visible, (group.first.task, *row)))
    stdout().print(shown)
