"""Plots of the report: scores, traffic, energy, and what each layer cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedkd_fast.report.runs import BYTES_PER_MB, RunFolder, run_labels
from fedkd_fast.report.svg import HEAT, INK, MUTED, SERIES, SURFACE, as_svg, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))

# More columns or rows than this are not readable at the page's width.
MAX_HEAT_ROUNDS = 30
_MAX_HEAT_TENSORS = 32
_MAX_BAR_ROUNDS = 24
MAX_BARS = 20
_MAX_LABEL = 48


def _look(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "linestyle": _DASHES[(number // len(SERIES)) % len(_DASHES)],
    }


def _percent(values: Sequence[float]) -> list[float]:
    return [100.0 * value for value in values]


def _whole_rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    low, high = axes.get_xlim()
    if high - low < 1:  # a single round
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def _marker(points: int) -> dict[str, Any]:
    """Markers where single rounds can be told apart."""
    return {"marker": "o", "markersize": 3.5} if points <= 30 else {}


def _legend(axes: Axes) -> None:
    entries = len(axes.get_legend_handles_labels()[0])
    if entries > 1:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=min(3, entries),
            handlelength=1.8,
            columnspacing=1.4,
            labelcolor=INK,
        )


def _scores(run: RunFolder, model: str) -> tuple[list[int], list[float]]:
    rounds, values = run.by_round(lambda row: getattr(row, f"score_{model}"))
    return rounds, _percent(values)


def score_by_round(runs: Sequence[RunFolder]) -> str | None:
    """Score on the test split by round: mentors solid, mentees dashed when there is one run."""
    with drawing(5.4, 3.5) as figure:
        axes = figure.add_subplot()
        if len(runs) == 1:
            _one_run_scores(axes, runs[0])
        else:
            for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
                rounds, values = _best_scores(run)
                if rounds:
                    axes.plot(rounds, values, label=label, **_look(number), **_marker(len(rounds)))
        if not axes.lines:
            return None
        _whole_rounds(axes)
        axes.set_ylabel(f"{runs[0].metric} on the test split (%)")
        _legend(axes)
        return as_svg(figure)


def _best_scores(run: RunFolder) -> tuple[list[int], list[float]]:
    rounds, values = _scores(run, "mentor")
    return (rounds, values) if rounds else _scores(run, "mentee")


def _one_run_scores(axes: Axes, run: RunFolder) -> None:
    clients = run.clients()
    if len(clients) > 1:
        for client in clients:
            rows = [row for row in run.rows if row.client == client]
            points = [
                (row.round, 100 * row.score_mentor) for row in rows if row.score_mentor is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=SERIES[0],
                    alpha=0.42,
                    linewidth=0.9,
                    **_marker(len(points)),
                )
        if axes.lines:
            axes.lines[0].set_label("mentor of each client")
    for number, model in enumerate(("mentor", "mentee")):
        rounds, values = _scores(run, model)
        if rounds:
            label = f"{model}, mean" if model == "mentor" and len(clients) > 1 else model
            axes.plot(rounds, values, color=SERIES[number], label=label, **_marker(len(rounds)))


def score_by_traffic(runs: Sequence[RunFolder]) -> str | None:
    """Score by megabytes a client has sent and received so far; runs without traffic as lines."""
    if not any(run.has_traffic for run in runs):
        return None
    with drawing(5.4, 3.5) as figure:
        axes = figure.add_subplot()
        for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
            if not run.has_traffic:
                score = run.score
                if score is not None:
                    label = f"{label} (no traffic)"
                    look = {**_look(number), "linestyle": (0, (2, 2)), "linewidth": 1.4}
                    axes.axhline(100 * score, label=label, **look)
                continue
            megabytes = dict(_cumulative_megabytes(run))
            points = [
                (megabytes[at], score)
                for at, score in zip(*_best_scores(run), strict=True)
                if megabytes.get(at, 0.0) > 0
            ]
            if points:
                marker = _marker(len(points))
                axes.plot(*zip(*points, strict=True), label=label, **_look(number), **marker)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _log_ticks(axes)
        axes.set_xlabel("MB sent and received by a client so far (log scale)")
        axes.set_ylabel(f"{runs[0].metric} on the test split (%)")
        _legend(axes)
        return as_svg(figure)


def _log_ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade where the axis spans few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_xlim()
    narrow = math.log10(high / low) < 2.2
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _cumulative_megabytes(run: RunFolder) -> list[tuple[int, float]]:
    up = dict(zip(*run.traffic_by_round("bytes_up"), strict=True))
    down = dict(zip(*run.traffic_by_round("bytes_down"), strict=True))
    total = 0.0
    points = []
    for at in run.rounds():
        total += (up.get(at, 0.0) + down.get(at, 0.0)) / BYTES_PER_MB
        points.append((at, total))
    return points


def energy_by_round(run: RunFolder) -> str | None:
    """The share of squared singular values that every matrix had to keep, by round."""
    rounds, values = run.by_round(lambda row: row.energy)
    if not rounds or run.summary.get("codec") == "raw":
        return None
    with drawing(5.4, 2.7) as figure:
        axes = figure.add_subplot()
        axes.plot(rounds, values, color=SERIES[0], **_marker(len(rounds)))
        _whole_rounds(axes)
        axes.set_ylabel("energy kept, T(t)")
        axes.margins(y=0.15)
        return as_svg(figure)


def traffic_by_round(run: RunFolder) -> str | None:
    """Bytes a client sent and received, by round."""
    if not run.has_traffic:
        return None
    scale, unit = _byte_unit(
        max(*run.traffic_by_round("bytes_up")[1], *run.traffic_by_round("bytes_down")[1])
    )
    with drawing(5.4, 2.7) as figure:
        axes = figure.add_subplot()
        for side, (key, label) in enumerate((("bytes_up", "up"), ("bytes_down", "down"))):
            rounds, values = run.traffic_by_round(key)
            heights = [value / scale for value in values]
            if len(rounds) <= _MAX_BAR_ROUNDS:
                places = [number + (side - 0.5) * 0.4 for number in rounds]
                axes.bar(places, heights, 0.36, color=SERIES[side], label=label)
            else:
                axes.plot(rounds, heights, color=SERIES[side], label=label)
        axes.set_ylim(bottom=0)
        _whole_rounds(axes)
        axes.set_ylabel(f"{unit} per client")
        _legend(axes)
        return as_svg(figure)


def bytes_by_layer(run: RunFolder) -> str | None:
    """The tensors that cost most: bytes sent, and their share of the dense size."""
    totals = run.layer_totals()[:MAX_BARS]
    if not totals:
        return None
    scale, unit = _byte_unit(totals[0].bytes)
    sent = [total.bytes / scale for total in totals]
    shares = [
        100 * total.bytes / total.dense_bytes if total.dense_bytes else 0.0 for total in totals
    ]
    with drawing(10.6, 0.7 + 0.26 * len(totals)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _bars(left, sent, [_three_digits(value) for value in sent], SERIES[0])
        _bars(right, shares, [f"{_three_digits(value)}%" for value in shares], SERIES[2])
        left.set_yticks(range(len(totals)), [_short(total.name) for total in totals])
        left.invert_yaxis()
        left.tick_params(axis="y", labelcolor=INK)
        left.set_xlabel(f"{unit} uploaded per client over all rounds")
        right.set_xlabel("bytes sent over dense bytes (%)")
        return as_svg(figure)


def _bars(axes: Axes, values: Sequence[float], labels: Sequence[str], colour: str) -> None:
    bars = axes.barh(range(len(values)), values, 0.7, color=colour)
    axes.bar_label(bars, labels, padding=4, color=MUTED, fontsize=8)
    axes.margins(x=0.12, y=0.02)
    axes.grid(visible=False, axis="y")


def rank_heat_map(run: RunFolder) -> str | None:
    """Kept rank over full rank, matrix by round, mean over the clients' uploads."""
    shares = run.kept_rank()
    if not shares:
        return None
    rounds = heat_rounds(run)
    cost = {total.name: total.bytes for total in run.layer_totals()}
    dearest = sorted(shares, key=lambda name: -cost.get(name, 0.0))[:_MAX_HEAT_TENSORS]
    names = [name for name in shares if name in set(dearest)]
    highest = max(shares[name].get(at, 0.0) for name in names for at in rounds)
    top = max(0.1, math.ceil(highest * 10) / 10)
    with drawing(10.6, 1.0 + 0.27 * len(names)) as figure:
        axes = figure.add_subplot()
        for row, name in enumerate(names):
            for column, at in enumerate(rounds):
                share = shares[name].get(at)
                if share is not None:
                    _heat_cell(axes, column, row, share, share / top, len(rounds))
        axes.set_xlim(-0.5, len(rounds) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xticks(range(len(rounds)), [str(at) for at in rounds])
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("round")
        return as_svg(figure)


def heat_rounds(run: RunFolder) -> list[int]:
    """The rounds that the heat map shows: all, or evenly spaced ones including the last."""
    rounds = run.rounds()
    step = math.ceil(len(rounds) / MAX_HEAT_ROUNDS)
    return rounds[::-1][::step][::-1]


def _heat_cell(
    axes: Axes, column: int, row: int, share: float, strength: float, columns: int
) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    alpha = 0.06 + 0.94 * strength
    axes.add_patch(
        Rectangle(corner, 1, 1, facecolor=HEAT, alpha=alpha, edgecolor=SURFACE, linewidth=1.2)
    )
    narrow = columns > 15
    digits = 1 if share < 0.1 and not narrow else 0
    text = f"{100 * share:.{digits}f}" + ("" if narrow else "%")
    shown = axes.text(column, row, text, ha="center", va="center", color=INK, fontsize=7.5)
    # It lies inside the axes; measuring hundreds of texts would take longer than drawing them.
    shown.set_in_layout(False)


def _byte_unit(largest: float) -> tuple[float, str]:
    if largest >= BYTES_PER_MB:
        return BYTES_PER_MB, "MB"
    return (1e3, "kB") if largest >= 1e3 else (1.0, "bytes")


def _short(name: str) -> str:
    """The name's last dotted parts that fit a label."""
    if len(name) <= _MAX_LABEL:
        return name
    tail = name[1 - _MAX_LABEL :]
    dot = tail.find(".")
    return "…" + (tail[dot + 1 :] if 0 <= dot < len(tail) // 2 else tail)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
