"""The result of rate_distortion as Markdown: means over seeds, and the least and most of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KIB = 1024
UNREACHABLE = "–"

Record = dict[str, Any]


def spread(values: list[float], digits: int) -> str:
    """Write a mean, and how far the seeds go where there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(columns)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def groups(result: Record) -> dict[str, list[Record]]:
    """Put the seeds of a set together."""
    found: dict[str, list[Record]] = {}
    for one in result["sets"].values():
        found.setdefault(", ".join(filter(None, (one["model"], one["optimizer"]))), []).append(one)
    return found


def sizes(records: list[Record]) -> str:
    """Write KiB and the gain over the paper's payload."""
    if any("bytes" not in record for record in records):
        return UNREACHABLE
    kib = spread([record["bytes"] / KIB for record in records], 1)
    gain = spread([record["fp32_factors_over_this"] for record in records], 2)
    missed = sum(record["missed"] for record in records)
    return f"{kib} KiB, {gain}×" + (f", {missed} missed" if missed else "")


def target_table(sets: list[Record]) -> list[str]:
    targets = list(sets[0]["targets"])
    rows = []
    for name in sets[0]["targets"][targets[0]]:
        cells = [sizes([one["targets"][target][name] for one in sets]) for target in targets]
        rows.append([name, *cells])
    heads = [f"T = {target}, error {(1 - float(target)) ** 0.5:.4f}" for target in targets]
    return markdown(["codec", *heads], rows)


def point_table(sets: list[Record]) -> list[str]:
    mine = list(next(iter(sets[0]["points"].values()))["ours"]) if sets[0]["points"] else []
    rows = []
    for name in sets[0]["points"]:
        records = [one["points"][name] for one in sets]
        row = [name, spread([r["error"] for r in records], 4)]
        row.append(spread([r["bytes"] / KIB for r in records], 1))
        for codec in mine:
            found = [r["ours"][codec] for r in records]
            kib = spread([one["bytes"] / KIB for one in found], 1)
            row.append(f"{kib}, {spread([one['point_over_this'] for one in found], 2)}×")
        rows.append(row)
    heads = ["codec", "error", "KiB", *(f"{codec}: KiB, × smaller" for codec in mine)]
    return markdown(heads, rows)


def show(result: Record) -> None:
    """Print a table for each kind of update; × is how many times smaller than fp32 factors."""
    for title, sets in groups(result).items():
        first = sets[0]
        seeds = f"{len(sets)} seed{'s' if len(sets) > 1 else ''}"
        dense = first["dense_bytes"] / KIB
        print(f"\n### {title}: {first['matrices']} matrices, {dense:.0f} KiB in float32, {seeds}\n")
        print("\n".join(target_table(sets)))
        if first["points"]:
            print("\nCodecs without a knob, and ours at the same error:\n")
            print("\n".join(point_table(sets)))
    for name, packages in result["not_installed"].items():
        print(f"\n{name} left out: not installed: {', '.join(packages)}")
