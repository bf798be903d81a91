"""Plots of the report by round and by traffic: scores, bytes, energy, and the clients' sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fedkd_fast.report.groups import Band, Group
from fedkd_fast.report.log import FAILED, UNHEARD, Log, LoggedRound
from fedkd_fast.report.runs import BYTES_PER_MB, RunFolder
from fedkd_fast.report.svg import INK, MUTED, SERIES, SURFACE, as_svg, drawing
from fedkd_fast.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_BAND = 0.16
_MAX_BAR_ROUNDS = 24
_MAX_BAR_CLIENTS = 40
_MAX_REPLY_BARS = 60
_MAX_REASON = 22
_MOST_ACCEPTED = 0.9
_REFUSED, _NOT_SENT = (SERIES[0], SERIES[1], SERIES[3]), {FAILED: SERIES[4], UNHEARD: SERIES[5]}


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


def _legend(axes: Axes, columns: int = 3) -> None:
    entries = len(axes.get_legend_handles_labels()[0])
    if entries > 1:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=min(columns, entries),
            handlelength=1.8,
            columnspacing=1.4,
            labelcolor=INK,
        )


def score_by_round(groups: Sequence[Group]) -> str | None:
    """Score by round: of one run mentor, mentee and single clients, else one curve a group.

    Diamonds are the final scores on the test data.
    """
    with drawing(5.4, 3.5) as figure:
        axes = figure.add_subplot()
        if len(groups) == 1:
            _one_group_scores(axes, groups[0])
        else:
            for number, group in enumerate(groups):
                band = group.curve(RunFolder.best_scores)
                _band(axes, band.rounds, band, label=group.label, **_look(number))
                _final(axes, _last_round(group), group.score, number)
        if not axes.lines:
            return None
        _whole_rounds(axes)
        axes.set_ylabel(_score_label(groups))
        _legend(axes)
        return as_svg(figure)


def _score_label(groups: Sequence[Group]) -> str:
    splits = dict.fromkeys(run.curve_split for group in groups for run in group.runs)
    return f"{groups[0].first.metric} on {' or '.join(splits)} data (%)"


def _last_round(group: Group) -> float | None:
    ends = [run.rounds()[-1] for run in group.runs if run.rounds()]
    return math.fsum(ends) / len(ends) if ends else None


def _band(axes: Axes, places: Sequence[float], band: Band, **look: Any) -> None:
    """Draw the mean over seeds, and its range where there are several."""
    if not band.rounds:
        return
    axes.plot(places, _percent(band.mean), **look, **_marker(len(places)))
    if band.low != band.high:
        low, high = _percent(band.low), _percent(band.high)
        axes.fill_between(places, low, high, color=look["color"], alpha=_BAND, linewidth=0)


def _final(axes: Axes, place: float | None, score: float | None, number: int) -> None:
    """Mark the final score on the test data."""
    if place is None or score is None:
        return
    colour = SERIES[number % len(SERIES)]
    look: dict[str, Any] = {"color": colour, "markeredgecolor": SURFACE}
    axes.plot([place], [100 * score], marker="D", markersize=7, linestyle="", zorder=4, **look)


def _one_group_scores(axes: Axes, group: Group) -> None:
    run, several = group.first, len(group.runs[0].clients()) > 1
    if len(group.runs) == 1 and several:
        for client in run.clients():
            points = [
                (row.round, 100 * row.score_mentor)
                for row in run.rows
                if row.client == client
                and row.score_mentor is not None
                and (row.split or "test") == run.curve_split
            ]
            if points:
                look: dict[str, Any] = {"color": SERIES[0], "alpha": 0.42, "linewidth": 0.9}
                axes.plot(*zip(*points, strict=True), **look, **_marker(len(points)))
        if axes.lines:
            axes.lines[0].set_label("mentor of each client")
    for number, role in enumerate(("mentor", "mentee")):
        band = group.curve(lambda run, role=role: run.scores(role))  # type: ignore[misc]
        label = f"{role}, mean" if role == "mentor" and several else role
        _band(axes, band.rounds, band, label=label, color=SERIES[number])
        _final(axes, _last_round(group), group.mean(f"score_{role}"), number)


def score_by_traffic(groups: Sequence[Group]) -> str | None:
    """Score by megabytes a client has sent and received so far; level lines without traffic."""
    if not any(group.has_traffic for group in groups):
        return None
    with drawing(5.4, 3.5) as figure:
        axes = figure.add_subplot()
        for number, group in enumerate(groups):
            if not group.has_traffic:
                if group.score is not None:
                    label = f"{group.label} (no traffic)"
                    look = {**_look(number), "linestyle": (0, (2, 2)), "linewidth": 1.4}
                    axes.axhline(100 * group.score, label=label, **look)
                continue
            band, sent = group.curve(RunFolder.best_scores), group.curve(RunFolder.megabytes_so_far)
            megabytes = dict(zip(sent.rounds, sent.mean, strict=True))
            _band(
                axes,
                [megabytes[at] for at in band.rounds],
                band,
                label=group.label,
                **_look(number),
            )
            _final(axes, sent.mean[-1], group.score, number)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _log_ticks(axes)
        axes.set_xlabel("MB sent and received by a client so far (log scale)")
        axes.set_ylabel(_score_label(groups))
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
    scale, unit = byte_unit(
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


def client_sizes(run: RunFolder) -> str | None:
    """Training samples of each client."""
    sizes = run.shard_sizes
    if len(sizes) < 2:
        return None
    with drawing(5.4, 2.7) as figure:
        axes = figure.add_subplot()
        few = len(sizes) <= _MAX_BAR_CLIENTS
        bars = axes.bar(range(len(sizes)), sizes, 0.7 if few else 1.0, color=SERIES[0])
        if len(sizes) <= 12:
            axes.bar_label(
                bars, [f"{size:,}" for size in sizes], padding=2, color=MUTED, fontsize=8
            )
        _whole_rounds(axes)
        axes.set_xlabel("client")
        axes.set_ylabel("training samples")
        return as_svg(figure)


def replies_by_round(log: Log) -> str | None:
    """What became of the clients that were asked, by round; None where all counted in all rounds.

    Of many rounds a bar stands for several, and shows their mean.
    """
    from matplotlib.ticker import MaxNLocator

    kinds = _kinds(log)
    if not kinds:
        return None
    if shows_accepted(log):
        kinds = [("accepted", SERIES[2], lambda one: one.accepted), *kinds]
    wide = bin_width(log)
    bins = [log.rounds[at : at + wide] for at in range(0, len(log.rounds), wide)]
    places = [(one[0].number + one[-1].number) / 2 for one in bins]
    widths = [0.72 * (one[-1].number - one[0].number + 1) for one in bins]
    below = [0.0] * len(bins)
    with drawing(10.6, 2.9) as figure:
        axes = figure.add_subplot()
        for label, colour, value in kinds:
            heights = [sum(map(value, one)) / len(one) for one in bins]
            # Bars of no height would only make the page longer.
            bars = [bar for bar in zip(places, heights, widths, below, strict=True) if bar[1]]
            axes.bar(*zip(*bars, strict=True), color=colour, label=label)
            below = [one + height for one, height in zip(below, heights, strict=True)]
        axes.set_ylim(bottom=0)
        _whole_rounds(axes)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=wide == 1, steps=[1, 2, 5, 10]))
        axes.set_ylabel("clients" if wide == 1 else "clients, mean")
        if len(kinds) == 1:
            axes.set_title(kinds[0][0], fontsize=8.5, color=INK)
        _legend(axes, columns=6)
        return as_svg(figure)


def _kinds(log: Log) -> list[tuple[str, str, Callable[[LoggedRound], int]]]:
    """Name, colour and count in a round of what became of clients whose part does not count."""
    totals: Counter[str] = sum((one.lost for one in log.rounds), Counter())
    reasons = [kind for kind, _ in totals.most_common() if kind not in _NOT_SENT]
    named = [(f"refused: {one_line(reason, _MAX_REASON)}", [reason]) for reason in reasons]
    if len(named) > len(_REFUSED):
        # More than there are colours: the rarer ones are told together.
        rest = len(_REFUSED) - 1
        named[rest:] = [("refused: other reasons", reasons[rest:])]
    coloured = [*zip(named, _REFUSED, strict=False)]
    coloured += [((kind, [kind]), colour) for kind, colour in _NOT_SENT.items() if totals[kind]]
    return [(name, colour, partial(_lost_to, among)) for (name, among), colour in coloured]


def _lost_to(kinds: Sequence[str], one: LoggedRound) -> int:
    return sum(one.lost[kind] for kind in kinds)


def shows_accepted(log: Log) -> bool:
    """Whether `replies_by_round` shows what was accepted, too: beside too much the rest is lost."""
    asked = sum(one.asked for one in log.rounds)
    return sum(one.accepted for one in log.rounds) <= _MOST_ACCEPTED * asked


def bin_width(log: Log) -> int:
    """How many rounds a bar of `replies_by_round` stands for."""
    return max(1, math.ceil(len(log.rounds) / _MAX_REPLY_BARS))


def byte_unit(largest: float) -> tuple[float, str]:
    """Bytes of the unit that suits up to this many, and its name."""
    if largest >= BYTES_PER_MB:
        return BYTES_PER_MB, "MB"
    return (1e3, "kB") if largest >= 1e3 else (1.0, "bytes")
