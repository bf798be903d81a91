"""The subcommands on finished runs: evaluate, predict, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedkd_fast.cli.common import Parser, add_command, check_target, say, stdout, table, visible


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
        help="samples; digits: .npy, .npz or .csv of 8×8 images; text: .jsonl, .tsv, .csv or .txt "
        "(default: the task's test data)",
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
    scores = found["scores_mentor"]
    shown = table("model", f"{found['metric']} on {found['task']}")
    if len(scores) > 1:
        for client, score in enumerate(scores):
            shown.add_row(f"mentor of client {client}", percent(score))
        shown.add_row("mentors, mean", percent(found["score_mentor"]))
    elif scores:
        shown.add_row("mentor", percent(scores[0]))
    if found["score_mentee"] is not None:
        shown.add_row("mentee", percent(found["score_mentee"]))
    stdout().print(shown)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from fedkd_fast.runs import predict_run

    for record in predict_run(args.folder, args.data, client=args.client):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 0


def _report(args: argparse.Namespace) -> int:
    from fedkd_fast.report import write_report

    if args.out is not None:
        check_target(args.out, overwrite=True)
    page = write_report(args.folders, args.out)
    _print_comparison(args.folders)
    say(f"report: {page}")
    return 0


def _print_comparison(folders: Sequence[Path]) -> None:
    from fedkd_fast.report import read_runs
    from fedkd_fast.report.text import COMPARISON_COLUMNS, comparison_rows

    runs = read_runs(folders)
    shown = table("task", *COMPARISON_COLUMNS, left=2)
    for run, row in zip(runs, comparison_rows(runs), strict=True):
        shown.add_row(*map(visible, (run.task, *row)))
    stdout().print(shown)
