"""Numbers of the report as text, each with its unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedkd_fast.report.runs import BYTES_PER_MB

NONE = "–"


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}%" if math.isfinite(value) else "not finite"


def megabytes(value: float | None) -> str:
    """Bytes as MB, three significant digits below 100 MB; the unit is left to the caller."""
    if value is None:
        return NONE
    megabytes = value / BYTES_PER_MB
    return f"{megabytes:,.1f}" if megabytes >= 100 else f"{megabytes:.3g}"


def size(count: float) -> str:
    """Bytes with the decimal unit that suits them, three significant digits."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "bytes":
        return f"{value:.0f} {unit}"
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def seconds(value: float | None) -> str:
    """Seconds with one decimal; the unit is left to the caller."""
    return NONE if value is None else f"{value:,.1f}"


def duration(value: float) -> str:
    """Seconds as seconds, minutes or hours, with units."""
    if value < 120:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def one_line(text: str, most: int) -> str:
    """Text that others wrote, in one line of at most so many characters that all can be seen.

    What is invisible could reorder the rest, or not be written at all.
    """
    line = " ".join(text[: 8 * most].split())
    line = "".join(one if one.isprintable() else "\ufffd" for one in line)
    return line if len(line) <= most else line[: most - 1] + "…"


def listed(parts: Sequence[str]) -> str:
    """Several things in a sentence: with commas, and "and" before the last."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of readable name and text."""
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from flat(value, f"{name}, ")
        else:
            yield name, plain(value)


def plain(value: object) -> str:
    """Any JSON value as text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or NONE
    return str(value)
