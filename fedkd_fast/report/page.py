"""Run folders -> one self-contained HTML page: scores, traffic, kept rank and configuration.

The page needs no network, no script and no second file. The same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from fedkd_fast._files import replacing
from fedkd_fast.report import faults, layers, plots
from fedkd_fast.report.groups import Group, featured, group_runs
from fedkd_fast.report.runs import RunFolder, read_run
from fedkd_fast.report.sections import comparison, headline, lead, run_tables, tiles
from fedkd_fast.report.style import STYLE
from fedkd_fast.report.svg import require_matplotlib, with_own_ids
from fedkd_fast.report.tables import percents


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Read runs and write their page.

    Args:
        folders: run folders, at least one.
        out: file to write; None means ``report.html`` in the run's folder, or in the working
            directory where there are several runs. An existing page is replaced.
        names: what to call the runs, one name a folder; those of one name are seeds of one thing.
            None: by method, and seeds are what differs in nothing else.

    Returns:
        The page's path.

    Raises:
        ValueError: no folder is given, or one is not a finished run, or a file in it is malformed.
        ImportError: matplotlib is not installed.
        OSError: the page cannot be written.
    """
    runs = read_runs(folders, names)
    if out is None:
        target = (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    else:
        target = Path(out)
    page = build_page(runs)
    with replacing(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def read_runs(folders: Sequence[str | Path], names: Sequence[str] | None = None) -> list[RunFolder]:
    """Read several run folders, in the order given, perhaps with names for them.

    Raises:
        ValueError: no folder is given, or one is not a finished run, or a file in it is malformed.
    """
    if not folders:
        raise ValueError("folders must name at least one run folder, got none")
    given = [None] * len(folders) if names is None else names
    return [read_run(folder, name) for folder, name in zip(folders, given, strict=True)]


def build_page(runs: Sequence[RunFolder]) -> str:
    """The page as text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    builder, groups = _Page(), group_runs(runs)
    shown = featured(groups)
    parts = [lead(groups, shown), tiles(shown)]
    tasks = list(dict.fromkeys((group.first.task, group.first.metric) for group in groups))
    for task, metric in tasks:
        same = [
            group for group in groups if (group.first.task, group.first.metric) == (task, metric)
        ]
        if len(runs) > 1:
            parts.append(f"<h2>Comparison on {escape(task)}</h2>")
            parts.append(comparison(same))
        parts.append(builder.pair(_score_figures(same)))
    if len(groups) > 1:
        parts.append("<h2>One by one</h2>")
        for group in groups:
            opened = " open" if group is shown else ""
            facts = [group.first.task, f"{group.first.metric} {percents(_scores(group))}"]
            facts += [_which(group)] if len(group.runs) > 1 else []
            parts.append(
                f'<details class="run"{opened}><summary>{escape(group.label)}'
                f"<small>{escape(', '.join(facts))}</small></summary>"
                f"{''.join(_run_parts(builder, group))}</details>"
            )
    else:
        if len(runs) > 1:
            parts.append(f"<h2>Details<small>{escape(_which(shown))}</small></h2>")
        parts.extend(_run_parts(builder, shown))
    title = escape(headline(shown))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n{_footer(runs)}\n</main>\n</body>\n</html>\n"
    )


def _scores(group: Group) -> list[float]:
    return group.values(lambda run: run.score)


def _which(group: Group) -> str:
    seed = group.first.summary.get("seed", "?")
    return f"details of seed {seed}, one of {len(group.runs)} seeds"


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
            f'<div class="plot">{picture}</div></figure>'
        )

    def pair(self, figures: Sequence[tuple[str | None, str, str]]) -> str:
        framed = "".join(self.figure(*figure) for figure in figures)
        return f'<div class="pair">{framed}</div>' if framed else ""


def _score_figures(groups: Sequence[Group]) -> list[tuple[str | None, str, str]]:
    seeds = any(len(group.runs) > 1 for group in groups)
    band = " Mean over seeds; bands from the least to the largest." if seeds else ""
    if len(groups) > 1:
        by_round = "Mentors, mean over clients; the mentee where it infers or is alone."
        by_traffic = (
            "Left and up is better. Methods that send nothing are level lines at their final score."
        )
    else:
        by_round = "Mean over clients" + ("." if seeds else "; thin lines are single clients.")
        by_traffic = "Mentors, or the mentee where it infers or is alone; one point is one round."
    final = " Diamonds: final score on the test data."
    return [
        (plots.score_by_round(groups), "Score by round", by_round + band + final),
        (plots.score_by_traffic(groups), "Score by traffic", by_traffic + band + final),
    ]


def _run_parts(builder: _Page, group: Group) -> Iterator[str]:
    run = group.first
    yield builder.pair(
        [
            (
                plots.traffic_by_round(run),
                "Traffic by round",
                "Bytes of the frames that were sent and received, over all clients, also those "
                "that did not take part.",
            ),
            (
                plots.energy_by_round(run),
                "Energy schedule",
                "Share of the squared singular values that every matrix must keep.",
            ),
            (
                plots.client_sizes(run),
                "Data of the clients",
                "Training samples that each client has.",
            ),
        ]
    )
    yield from _fault_parts(builder, group)
    few = len(run.layer_totals()) <= layers.MAX_BARS
    shown = "every tensor" if few else f"the {layers.MAX_BARS} most expensive tensors"
    yield builder.figure(
        layers.bytes_by_layer(run),
        "Bytes by tensor",
        f"Over all rounds, {shown}: uploads of one client, mean over clients, and one broadcast a "
        "round, without what clients are sent to catch up.",
        wide=True,
    )
    skipped = "" if len(layers.heat_rounds(run)) == len(run.rounds()) else " Not every round shown."
    yield builder.figure(
        layers.rank_heat_map(run),
        "Kept rank by layer and round",
        "Kept rank over full rank, mean over the clients' uploads. Matrices that travelled as "
        f"factors at least once; where one was sent whole that counts as 100%.{skipped}",
        wide=True,
    )
    yield builder.figure(
        layers.spectrum_curves(run),
        "Cumulative energy of the mean updates",
        "Share of the squared singular values that the largest of them hold, of what the server "
        "averaged, before it is sent. The steeper, the fewer are needed.",
        wide=True,
    )
    yield builder.figure(
        layers.spectrum_heat_map(run),
        f"Rank at {layers.SPECTRUM_ENERGY:.0%} energy by layer and round",
        f"Singular values that hold this share of the mean update, over all of them.{skipped}",
        wide=True,
    )
    yield from run_tables(run)


def _fault_parts(builder: _Page, group: Group) -> Iterator[str]:
    yield faults.account(group)
    log = group.first.log
    if log is None:
        return
    wide, all_of_them = plots.bin_width(log), plots.shows_accepted(log)
    yield builder.figure(
        plots.replies_by_round(log),
        "Replies by round" if all_of_them else "Replies that do not count by round",
        "What became of the clients that were asked"
        + (". " if all_of_them else ", without those whose reply was accepted. ")
        + "No reply: nothing came before the round ended."
        + (f" A bar is the mean of {wide} rounds." if wide > 1 else ""),
        wide=True,
    )
    yield faults.round_table(log)
    yield faults.fault_table(log)


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
