"""Run folders -> one self-contained HTML page: scores, traffic, kept rank and configuration.

The page needs no network, no script and no second file. The same runs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedkd_fast._files import replacing
from fedkd_fast.report import plots
from fedkd_fast.report.runs import RunFolder, read_run, run_labels
from fedkd_fast.report.style import STYLE
from fedkd_fast.report.svg import require_matplotlib, series_colour, with_own_ids
from fedkd_fast.report.text import (
    COMPARISON_COLUMNS,
    NONE,
    comparison_rows,
    duration,
    flat,
    percent,
    size,
)

_TITLES = {
    "fedkd": "FedKD",
    "fedavg": "FedAvg",
    "fedavg-mentee": "FedAvg of the mentee",
    "local": "Local training",
    "central": "Central training",
}


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Read runs and write their page.

    Args:
        folders: run folders, at least one.
        out: file to write; None means ``report.html`` in the run's folder, or in the working
            directory where there are several runs. An existing page is replaced.

    Returns:
        The page's path.

    Raises:
        ValueError: no folder is given, or one is not a finished run, or a file in it is malformed.
        ImportError: matplotlib is not installed.
        OSError: the page cannot be written.
    """
    runs = read_runs(folders)
    if out is None:
        target = (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    else:
        target = Path(out)
    page = build_page(runs)
    with replacing(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def read_runs(folders: Sequence[str | Path]) -> list[RunFolder]:
    """Read several run folders, in the order given.

    Raises:
        ValueError: no folder is given, or one is not a finished run, or a file in it is malformed.
    """
    if not folders:
        raise ValueError("folders must name at least one run folder, got none")
    return [read_run(folder) for folder in folders]


def build_page(runs: Sequence[RunFolder]) -> str:
    """The page as text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    builder = _Page()
    featured = _featured(runs)
    parts = [_head(runs, featured), _tiles(featured)]
    tasks = list(dict.fromkeys((run.task, run.metric) for run in runs))
    for task, metric in tasks:
        group = [run for run in runs if (run.task, run.metric) == (task, metric)]
        if len(runs) > 1:
            parts.append(f"<h2>Comparison on {escape(task)}</h2>")
            parts.append(_comparison(group))
        parts.append(builder.pair(_score_figures(group)))
    if len(runs) > 1:
        parts.append("<h2>Run by run</h2>")
        for run, label in zip(runs, run_labels(runs), strict=True):
            opened = " open" if run is featured else ""
            score = f"{run.metric} {percent(run.score)}"
            parts.append(
                f'<details class="run"{opened}><summary>{escape(label)}'
                f"<small>{escape(run.task)}, {escape(score)}</small></summary>"
                f"{''.join(_run_parts(builder, run))}</details>"
            )
    else:
        parts.extend(_run_parts(builder, runs[0]))
    title = escape(_headline(featured))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n{_footer(runs)}\n</main>\n</body>\n</html>\n"
    )


class _Page:
    """Frames for plots; counts them, so that ids of different pictures never meet."""

    def __init__(self) -> None:
        self._figures = 0

    def figure(self, svg: str | None, title: str, note: str, wide: bool = False) -> str:
        if svg is None:
            return ""
        self._figures += 1
        picture = with_own_ids(svg, f"plot{self._figures}")
        picture = picture.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
        kind = ' class="wide"' if wide else ""
        return (
            f"<figure{kind}><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>"
            f"{picture}</figure>"
        )

    def pair(self, figures: Sequence[tuple[str | None, str, str]]) -> str:
        framed = "".join(self.figure(*figure) for figure in figures)
        return f'<div class="pair">{framed}</div>' if framed else ""


def _featured(runs: Sequence[RunFolder]) -> RunFolder:
    """The run of the headline: the first FedKD run, else the one with the best score."""
    for run in runs:
        if run.method == "fedkd":
            return run
    return max(runs, key=lambda run: -math.inf if run.score is None else run.score)


def _headline(run: RunFolder) -> str:
    method = _TITLES.get(run.method, run.method)
    score = "no score" if run.score is None else f"{percent(run.score)} {run.metric}"
    return f"{method} on {run.task}: {score}, {_saving_phrase(run)}"


def _saving_phrase(run: RunFolder) -> str:
    saving = run.number("saving")
    if not run.has_traffic:
        return "nothing sent"
    if saving is None:
        total = (run.number("bytes_up") or 0.0) + (run.number("bytes_down") or 0.0)
        return f"{size(total)} per client"
    if abs(saving) < 0.0005:
        return "as many bytes as FedAvg of the mentor"
    if saving < 0:
        return f"{percent(-saving)} more bytes than FedAvg of the mentor"
    return f"{percent(saving)} fewer bytes than FedAvg of the mentor"


def _head(runs: Sequence[RunFolder], featured: RunFolder) -> str:
    facts = []
    for key, one, many in (("clients", "client", "clients"), ("rounds", "round", "rounds")):
        value = featured.number(key)
        if value is not None:
            facts.append(f"{value:.0f} {one if value == 1 else many}")
    if featured.summary.get("seed") is not None:
        facts.append(f"seed {featured.summary['seed']}")
    lossy = bool(featured.by_round(lambda row: row.energy)[0])
    if lossy and featured.summary.get("codec"):
        facts.append(f"codec {featured.summary['codec']}")
    if len(runs) > 1:
        others = f"{len(runs) - 1} other run{'s' if len(runs) > 2 else ''}"
        facts.append(f"compared below with {others}")
    lead = ", ".join(facts)
    return (
        '<p class="eyebrow">fedkd_fast, training report</p>'
        f'<h1>{escape(_headline(featured))}</h1><p class="lead">{escape(lead)}</p>'
    )


def _tiles(run: RunFolder) -> str:
    tiles: list[tuple[str, str, str]] = []
    mentor, mentee = run.number("score_mentor"), run.number("score_mentee")
    if mentor is not None:
        tiles.append((percent(mentor), f"mentor, {run.metric}", _spread(run)))
    if mentee is not None:
        tiles.append((percent(mentee), f"mentee, {run.metric}", "the shared model"))
    if run.has_traffic:
        up, down = run.number("bytes_up") or 0.0, run.number("bytes_down") or 0.0
        both = f"{size(up)} up, {size(down)} down, all rounds"
        tiles.append((size(up + down), "traffic per client", both))
    saving = run.number("saving")
    if saving is not None and saving < 1:
        fewer = f"{1 / (1 - saving):,.3g}× fewer bytes" if saving > 0 else "not smaller"
        tiles.append((percent(saving), "saving against FedAvg", fewer))
    seconds = run.number("seconds")
    if seconds is not None:
        codec = run.number("seconds_codec")
        share = f"{duration(codec)} of it packing and unpacking" if codec else "whole run"
        tiles.append((duration(seconds), "time", share))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for value, name, note in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _spread(run: RunFolder) -> str:
    scores = run.summary.get("scores_mentor")
    if not isinstance(scores, list):
        return "used at test time"
    values = [float(score) for score in scores if isinstance(score, (int, float))]
    if len(values) < 2:
        return "used at test time"
    if min(values) == max(values):
        return f"the same on all {len(values)} clients"
    return f"mean of {len(values)} clients, {percent(min(values))} to {percent(max(values))}"


def _comparison(runs: Sequence[RunFolder]) -> str:
    heads = list(COMPARISON_COLUMNS)
    heads[1], heads[2] = f"mentor {runs[0].metric}", f"mentee {runs[0].metric}"
    scores = [run.number("score_mentor") for run in runs]
    best = max((score for score in scores if score is not None), default=None)
    body = []
    for number, (run, row) in enumerate(zip(runs, comparison_rows(runs), strict=True)):
        swatch = f'<span class="swatch" style="background:{series_colour(number)}"></span>'
        cells = [f"<td>{swatch}{escape(row[0])}</td>"]
        for column, text in enumerate(row[1:], start=1):
            mark = column == 1 and best is not None and run.number("score_mentor") == best
            cells.append(f"<td{' class=best' if mark else ''}>{escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return (
        f'<div class="card"><table class="comparison"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _score_figures(runs: Sequence[RunFolder]) -> list[tuple[str | None, str, str]]:
    one = len(runs) == 1
    by_round = (
        "Mean over clients; thin lines are single clients."
        if one
        else ("Mentors, mean over clients; the mentee where a method trains no mentor.")
    )
    by_traffic = (
        "Mentors, mean over clients, or the mentee where it is alone; one point is one round."
        if one
        else ("Left and up is better. Methods that send nothing are level lines.")
    )
    return [
        (plots.score_by_round(runs), "Score by round", by_round),
        (plots.score_by_traffic(runs), "Score by traffic", by_traffic),
    ]


def _run_parts(builder: _Page, run: RunFolder) -> Iterator[str]:
    yield builder.pair(
        [
            (
                plots.traffic_by_round(run),
                "Traffic by round",
                "Bytes of the frames one client sent and received, mean over clients.",
            ),
            (
                plots.energy_by_round(run),
                "Energy schedule",
                "Share of the squared singular values that every matrix must keep.",
            ),
        ]
    )
    totals = run.layer_totals()
    few = len(totals) <= plots.MAX_BARS
    shown = "every tensor" if few else f"the {plots.MAX_BARS} most expensive tensors"
    yield builder.figure(
        plots.bytes_by_layer(run),
        "Bytes by layer",
        f"Uploads of one client over all rounds, {shown}, mean over clients.",
        wide=True,
    )
    skipped = "" if len(plots.heat_rounds(run)) == len(run.rounds()) else " Not every round shown."
    yield builder.figure(
        plots.rank_heat_map(run),
        "Kept rank by layer and round",
        "Kept rank over full rank, mean over the clients' uploads. Matrices that travelled as "
        f"factors at least once; where one was sent whole that counts as 100%.{skipped}",
        wide=True,
    )
    if totals:
        yield _layer_table(run)
    yield _settings("Configuration", run.config)
    yield _settings("Results and facts", {**run.summary, "folder": run.path.name})


def _layer_table(run: RunFolder) -> str:
    rows = []
    for total in run.layer_totals():
        shape = " × ".join(str(extent) for extent in total.shape) or "scalar"
        factored = "factors" in total.mode.lower()
        rank = f"{total.rank:.1f} of {total.full_rank}" if factored else NONE
        cells = (
            f"<code>{escape(total.name)}</code>",
            shape,
            escape(total.mode.lower().replace("_", " ")),
            rank,
            f"{total.bytes:,.0f}",
            f"{total.dense_bytes:,.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("tensor", "shape", "last mode", "last rank", "bytes up", "dense bytes")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return (
        f"<details><summary>All {len(rows)} tensors<small>bytes per client over all rounds"
        '</small></summary><div style="overflow-x:auto"><table class="layers">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _settings(title: str, values: Mapping[str, Any]) -> str:
    pairs = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in flat(values)
    )
    return f"<details><summary>{title}</summary><dl>{pairs}</dl></details>" if pairs else ""


def _footer(runs: Sequence[RunFolder]) -> str:
    versions = sorted({str(run.summary["version"]) for run in runs if run.summary.get("version")})
    written = f" Trained with fedkd_fast {', '.join(versions)}." if versions else ""
    return (
        "<footer><p>The mentor is the private model of each client, used at test time; the mentee "
        "is the small model that travels. Traffic is the length of the frames one client sent and "
        "received, 1 MB = 1,000,000 bytes.</p><p>Saving compares with FedAvg of the mentor in as "
        "many rounds: one raw float32 frame of its trainable parameters up and one down a round."
        f"{escape(written)}</p></footer>"
    )
