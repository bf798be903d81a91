"""The result of bench_truncated_svd on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*("-" if cell is None else str(cell) for cell in row))
    return made


def methods(title: str, energies: dict[str, Record]) -> Table:
    columns = ["T", "method", "ms", "over warm", "over hint", "over cold", "over the floor"]
    columns += ["misses", "too wide", "excess rank", "skew", "failed"]
    fields = ["over_floor", "misses", "too_wide", "worst_excess_rank", "worst_skew", "failed"]
    starts = ["warm", "hint", "cold"]
    rows = [
        [energy, name, one["ms"], *map(one["over_ours"].get, starts), *map(one.get, fields)]
        for energy, record in energies.items()
        for name, one in record["methods"].items()
    ]
    return table(title, columns, rows)


def records(title: str, found: list[Record]) -> Table:
    """Show records that have the same fields, by field."""
    return table(title, found[0], (record.values() for record in found))


def floors(title: str, energies: dict[str, Record]) -> Table:
    rows = [
        [energy, part, one["share"], one["giga_per_s"]]
        for energy, record in energies.items()
        for part, one in record["floor"].items()
    ]
    return table(title, ["T", "part", "share of the floor", "10⁹ bytes or operations / s"], rows)


def one_call(title: str, energies: dict[str, Record]) -> Table:
    rows = [
        [energy, start, one["ms"], one["torch.linalg.svd_over_ours"]]
        for energy, record in energies.items()
        for start, one in record["ours_in_one_call"].items()
    ]
    return table(title, ["T", "start", "ms", "torch.linalg.svd over this"], rows)


def show(result: Record) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    for model, record in result["models"].items():
        energies, title = record["energies"], f"{model}, {record['source']} matrices"
        console.print(methods(f"{title}: CPU ms of one thread, one call a matrix", energies))
        console.print(one_call(f"{title}: the model in one call", energies))
        console.print(floors(f"{title}: the floor", energies))
        console.print(records(f"{title}: 2 threads over 1", record["two_threads"]))
        console.print(records(f"{title}: memory beside the matrix", record["memory"]))
        console.print(records(f"{title}: Compressor.compress, one thread", record["compressor"]))
    for record in result["row_sparse"]:
        console.print(methods(f"{record['matrices'][0]}, {record['source']}", record["energies"]))
    for name, packages in result["not_installed"].items():
        console.print(f"{name} left out: not installed: {', '.join(packages)}")
