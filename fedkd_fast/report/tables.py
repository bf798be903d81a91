"""Tables over groups of runs: for the page, the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence

from fedkd_fast.report.groups import Group, spread
from fedkd_fast.report.runs import BYTES_PER_MB, ROLES
from fedkd_fast.report.text import NONE, megabytes, percent, seconds

COMPARISON_COLUMNS = (
    "method",
    "seeds",
    "mentor",
    "mentee",
    "both together",
    "MB up",
    "MB down",
    "saving",
    "seconds",
)


def comparison_rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """One row of text for each group, under `COMPARISON_COLUMNS`: means ± deviations over seeds."""
    rows = []
    for group in groups:
        sent = group.has_traffic
        rows.append(
            (
                group.label,
                str(len(group.runs)),
                *(percents(group.numbers(f"score_{role}")) for role in ROLES),
                *(
                    megabytes(group.mean(key)) if sent else NONE
                    for key in ("bytes_up", "bytes_down")
                ),
                percents(group.numbers("saving")),
                seconds(group.mean("seconds")),
            )
        )
    return rows


def percents(values: Sequence[float]) -> str:
    """Mean of shares as percent, with ± the deviation where there are several."""
    if not values:
        return NONE
    mean, deviation = percent(statistics.fmean(values)), spread(values)
    return mean if deviation is None else f"{mean[:-1]} ± {100 * deviation:.1f}%"


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Names of all metrics that models of the groups have, the one that counts first."""
    names = [group.first.metric for group in groups[:1]]
    for group in groups:
        for table in group.metrics().values():
            names += [name for name in table if name not in names]
    return names


def metric_rows(groups: Sequence[Group]) -> Iterator[tuple[str, ...]]:
    """Label, model, and all metrics, under `metric_names`."""
    names = metric_names(groups)
    for group in groups:
        for role, table in group.metrics().items():
            yield (group.label, ROLES[role], *(percents(table.get(name, [])) for name in names))


def markdown(groups: Sequence[Group]) -> str:
    """The comparison and all metrics, a table each for every task."""
    parts = []
    for task in dict.fromkeys(group.first.task for group in groups):
        chosen = [group for group in groups if group.first.task == task]
        parts.append(f"## {_cell(task)}: {_cell(chosen[0].first.metric)} on the test data\n")
        parts.append(_markdown_table(COMPARISON_COLUMNS, comparison_rows(chosen), text=1))
        if len(metric_names(chosen)) > 1:
            heads = ("method", "model", *metric_names(chosen))
            parts.append(_markdown_table(heads, metric_rows(chosen), text=2))
    parts.append(
        "Means over seeds ± standard deviation (n - 1). MB: what one client sent and received in "
        "all rounds, 1 MB = 1,000,000 bytes. Saving: against FedAvg of the mentor in float32.\n"
    )
    return "\n".join(parts)


def _markdown_table(
    heads: Sequence[str], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]], text: int
) -> str:
    lines = [heads, ["---" if at < text else "--:" for at in range(len(heads))], *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv_table(groups: Sequence[Group]) -> str:
    """One line a group: means and deviations of all metrics and costs, as plain numbers."""
    lines: list[dict[str, object]] = []
    for group in groups:
        run = group.first
        line: dict[str, object] = {
            "task": run.task,
            "name": group.label,
            "method": run.method,
            "seeds": len(group.runs),
        }
        figures = {
            f"{ROLES[role]} {name}": values
            for role, table in group.metrics().items()
            for name, values in table.items()
        }
        for key in ("bytes_up", "bytes_down"):
            figures[key.replace("bytes_", "MB ")] = [
                value / BYTES_PER_MB for value in group.numbers(key)
            ]
        figures |= {key: group.numbers(key) for key in ("saving", "seconds")}
        for name, values in figures.items():
            if values:
                line[name] = statistics.fmean(values)
                deviation = spread(values)
                line[f"{name} std"] = "" if deviation is None else deviation
        lines.append(line)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
