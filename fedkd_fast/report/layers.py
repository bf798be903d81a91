"""Plots of the report by layer: bytes, kept rank, and spectra of the mean updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedkd_fast.report.plots import byte_unit
from fedkd_fast.report.runs import RunFolder
from fedkd_fast.report.svg import HEAT, INK, MUTED, SERIES, SURFACE, as_svg, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More columns or rows than this are not readable at the page's width.
MAX_HEAT_ROUNDS = 30
_MAX_HEAT_TENSORS = 32
MAX_BARS = 20
_MAX_LABEL, _MAX_TITLE = 48, 32
# Of the ranks that are shown by layer and round, as in Fig. 4c of the paper.
SPECTRUM_ENERGY = 0.95
_MAX_SPECTRA = 8
_SPECTRA_COLUMNS = 4


def bytes_by_layer(run: RunFolder) -> str | None:
    """The tensors that cost most: bytes up and down, and their share of the dense size."""
    totals = run.layer_totals()[:MAX_BARS]
    if not totals:
        return None
    scale, unit = byte_unit(max(max(total.up, total.down) for total in totals))
    shares = [100 * total.up / total.dense_up if total.dense_up else 0.0 for total in totals]
    panels = [
        ([total.up / scale for total in totals], f"{unit} up, per client"),
        ([total.down / scale for total in totals], f"{unit} down, of broadcasts"),
        (shares, "bytes up over dense bytes (%)"),
    ]
    with drawing(10.6, 0.7 + 0.26 * len(totals)) as figure:
        every = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
        for number, (axes, (values, label)) in enumerate(zip(every, panels, strict=True)):
            mark = "%" if values is shares else ""
            _bars(axes, values, [f"{_three_digits(one)}{mark}" for one in values], SERIES[number])
            axes.set_xlabel(label)
        every[0].set_yticks(range(len(totals)), [_short(total.name) for total in totals])
        every[0].invert_yaxis()
        every[0].tick_params(axis="y", labelcolor=INK)
        return as_svg(figure)


def _bars(axes: Axes, values: Sequence[float], labels: Sequence[str], colour: str) -> None:
    bars = axes.barh(range(len(values)), values, 0.7, color=colour)
    axes.bar_label(bars, labels, padding=4, color=MUTED, fontsize=8)
    axes.margins(x=0.12, y=0.02)
    axes.grid(visible=False, axis="y")


def rank_heat_map(run: RunFolder) -> str | None:
    """Kept rank over full rank, matrix by round, mean over the clients' uploads."""
    return _heat_map(run, run.kept_rank())


def spectrum_heat_map(run: RunFolder) -> str | None:
    """Rank at `SPECTRUM_ENERGY` over full rank of the server's mean updates, matrix by round."""
    shares = {
        name: {
            at: one.ranks[SPECTRUM_ENERGY] / one.full_rank
            for at, one in by_round.items()
            if one.full_rank and SPECTRUM_ENERGY in one.ranks
        }
        for name, by_round in run.spectra().items()
    }
    return _heat_map(run, {name: found for name, found in shares.items() if found})


def spectrum_curves(run: RunFolder) -> str | None:
    """Cumulative energy over rank of the mean updates, in the first, a middle and the last round.

    The small multiples are Fig. 4a,b of the paper.
    """
    spectra = run.spectra()
    cost = {total.name: total.up for total in run.layer_totals()}
    chosen = set(sorted(spectra, key=lambda name: -cost.get(name, 0.0))[:_MAX_SPECTRA])
    names = [name for name in spectra if name in chosen]
    if not names:
        return None
    columns = min(_SPECTRA_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    with drawing(10.6, 0.55 + 1.9 * lines) as figure:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, names, strict=False):
            rounds = sorted(spectra[name])
            shown = dict.fromkeys((rounds[0], rounds[len(rounds) // 2], rounds[-1]))
            for number, at in enumerate(shown):
                one = spectra[name][at]
                points = [
                    (0.0, 0.0),
                    *((100 * one.ranks[t] / one.full_rank, 100 * t) for t in sorted(one.ranks)),
                ]
                look = {"color": SERIES[number], "marker": "o", "markersize": 2.5}
                axes.plot(*zip(*points, strict=True), linewidth=1.4, label=f"round {at}", **look)
            axes.set_title(_short(name, _MAX_TITLE), fontsize=8, color=INK, loc="left")
            axes.set_ylim(0, 105)
        for axes in grid[-1]:
            axes.set_xlabel("rank over full rank (%)")
        for axes in grid[:, 0]:
            axes.set_ylabel("energy (%)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, labelcolor=INK)
        return as_svg(figure)


def _heat_map(run: RunFolder, shares: Mapping[str, Mapping[int, float]]) -> str | None:
    if not shares:
        return None
    rounds = heat_rounds(run)
    cost = {total.name: total.up for total in run.layer_totals()}
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


def _short(name: str, most: int = _MAX_LABEL) -> str:
    """The name's last dotted parts that fit a label."""
    if len(name) <= most:
        return name
    tail = name[1 - most :]
    dot = tail.find(".")
    return "…" + (tail[dot + 1 :] if 0 <= dot < len(tail) // 2 else tail)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
