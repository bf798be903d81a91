"""Parts of the page that are no pictures: headline, tiles, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fedkd_fast.report.faults import epsilon
from fedkd_fast.report.groups import Group, spread
from fedkd_fast.report.runs import RunFolder
from fedkd_fast.report.svg import series_colour
from fedkd_fast.report.tables import (
    COMPARISON_COLUMNS,
    comparison_rows,
    metric_names,
    metric_rows,
    percents,
)
from fedkd_fast.report.text import NONE, duration, flat, percent, size

_TITLES = {
    "fedkd": "FedKD",
    "fedavg": "FedAvg",
    "fedavg-mentee": "FedAvg of the mentee",
    "fedlora": "Federated LoRA",
    "fedpaq": "FedPAQ",
    "fedprox": "FedProx",
    "powersgd": "PowerSGD",
    "scaffold": "SCAFFOLD",
    "sparseloco": "SparseLoCo",
    "local": "Local training",
    "central": "Central training",
}
# What has a place of its own on the page.
_SHOWN = ("environment", "task_facts", "metrics", "shard_sizes")


def headline(group: Group) -> str:
    """What the page says first: method, task, score, saving."""
    run = group.first
    method = _TITLES.get(run.name or run.method, run.name or run.method)
    scores = group.values(lambda run: run.score)
    score = f"{percents(scores)} {run.metric}" if scores else "no score"
    return f"{method} on {run.task}: {score}, {_saving_phrase(group)}"


def _saving_phrase(group: Group) -> str:
    saving = group.mean("saving")
    if not group.has_traffic:
        return "nothing sent"
    if saving is None:
        total = (group.mean("bytes_up") or 0.0) + (group.mean("bytes_down") or 0.0)
        return f"{size(total)} per client"
    if abs(saving) < 0.0005:
        return "as many bytes as FedAvg of the mentor"
    if saving < 0:
        return f"{percent(-saving)} more bytes than FedAvg of the mentor"
    return f"{percent(saving)} fewer bytes than FedAvg of the mentor"


def lead(groups: Sequence[Group], shown: Group) -> str:
    """The headline and the facts below it."""
    facts, run = [], shown.first
    for key, one, many in (("clients", "client", "clients"), ("rounds", "round", "rounds")):
        value = run.number(key)
        if value is not None:
            facts.append(f"{value:.0f} {one if value == 1 else many}")
    seeds = [str(one.summary["seed"]) for one in shown.runs if one.summary.get("seed") is not None]
    if seeds:
        facts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    lossy = bool(run.by_round(lambda row: row.energy)[0])
    if lossy and run.summary.get("codec"):
        facts.append(f"codec {run.summary['codec']}")
    if len(groups) > 1:
        others = f"{len(groups) - 1} other{'s' if len(groups) > 2 else ''}"
        facts.append(f"compared below with {others}")
    return (
        '<p class="eyebrow">fedkd_fast, training report</p>'
        f'<h1>{escape(headline(shown))}</h1><p class="lead">{escape(", ".join(facts))}</p>'
    )


def tiles(group: Group) -> str:
    """The numbers that matter most."""
    found: list[tuple[str, str, str]] = []
    run, metric = group.first, group.first.metric
    seeds = f"mean of {len(group.runs)} seeds"
    notes = {
        "mentor": _spread(group),
        "mentee": "the shared model",
        "mean": "mean of probabilities",
    }
    names = {"mentor": "mentor", "mentee": "mentee", "mean": "both together"}
    for role, name in names.items():
        score, deviation = group.mean(f"score_{role}"), spread(group.numbers(f"score_{role}"))
        if score is not None:
            note = f"± {percent(deviation)}, {seeds}" if deviation is not None else notes[role]
            found.append((percent(score), f"{name}, {metric}", note))
    if group.has_traffic:
        up, down = group.mean("bytes_up") or 0.0, group.mean("bytes_down") or 0.0
        both = f"{size(up)} up, {size(down)} down, all rounds"
        found.append((size(up + down), "traffic per client", both))
    saving = group.mean("saving")
    if saving is not None and saving < 1:
        fewer = f"{1 / (1 - saving):,.3g}× fewer bytes" if saving > 0 else "not smaller"
        found.append((percent(saving), "saving against FedAvg", fewer))
    if run.number("delta") is not None:
        delta = f"of each client, δ = {run.number('delta'):g}"
        found.append((epsilon(run), "differential privacy", delta))
    seconds = group.mean("seconds")
    if seconds is not None:
        codec = group.mean("seconds_codec")
        share = f"{duration(codec)} of it packing and unpacking" if codec else "whole run"
        found.append((duration(seconds), "time", share))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for value, name, note in found
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _spread(group: Group) -> str:
    scores = group.first.numbers("scores_mentor")
    if len(scores) < 2:
        return "used at test time"
    if min(scores) == max(scores):
        return f"the same on all {len(scores)} clients"
    return f"mean of {len(scores)} clients, {percent(min(scores))} to {percent(max(scores))}"


def comparison(groups: Sequence[Group]) -> str:
    """The table of groups, and that of all metrics where there are more than one."""
    scores = [group.mean("score_mentor") for group in groups]
    best = max((score for score in scores if score is not None), default=None)
    column = COMPARISON_COLUMNS.index("mentor")
    body = []
    for number, row in enumerate(comparison_rows(groups)):
        swatch = f'<span class="swatch" style="background:{series_colour(number)}"></span>'
        cells = [f"<td>{swatch}{escape(row[0])}</td>"]
        for at, text in enumerate(row[1:], start=1):
            mark = at == column and best is not None and scores[number] == best
            cells.append(f"<td{' class=best' if mark else ''}>{escape(text)}</td>")
        body.append("".join(cells))
    metric = groups[0].first.metric
    heads = [
        f"{head}, {metric}" if head in ("mentor", "mentee", "both together") else head
        for head in COMPARISON_COLUMNS
    ]
    return _card(heads, body, "comparison") + _metrics(groups)


def _card(heads: Sequence[str], rows: Sequence[str], kind: str) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="card"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _metrics(groups: Sequence[Group]) -> str:
    """All metrics on the test data; nothing where the one that counts is the only one."""
    names = metric_names(groups)
    if len(names) < 2:
        return ""
    heads = ["method", "model", *names]
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in metric_rows(groups)]
    return _card(heads, rows, "metrics")


def run_tables(run: RunFolder) -> Iterator[str]:
    """All metrics, all tensors, and the settings of a run."""
    yield _metrics([Group(run.name or run.method, (run,))])
    if run.layer_totals():
        yield _layer_table(run)
    facts = run.config.get("task_facts")
    yield _settings("Configuration", _without(run.config, _SHOWN))
    yield _settings("Data and models", _without(facts, _SHOWN) if isinstance(facts, dict) else {})
    environment = run.config.get("environment")
    yield _settings("Environment", environment if isinstance(environment, dict) else {})
    yield _settings("Results", {**_without(run.summary, _SHOWN), "folder": run.path.name})


def _without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


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
            f"{total.up:,.0f}",
            f"{total.down:,.0f}",
            f"{total.dense_up:,.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("tensor", "shape", "last mode", "last rank", "bytes up", "bytes down", "dense bytes")
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
