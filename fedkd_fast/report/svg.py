"""The drawing board of the report: inline SVG whose colours follow the page's theme.

matplotlib writes fixed colours. Every plot is drawn with the stand-ins below and the SVG text then
gets CSS variables in their place, so one picture serves light and dark; text stays text, in the
page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedkd_fast._extras import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
HEAT = "#0a0b04"
SURFACE = "#0a0b05"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 7))
_TOKENS = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    HEAT: "--heat",
    SURFACE: "--surface",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedkd_fast",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def require_matplotlib() -> None:
    """Check that the plots can be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    needed("matplotlib", "the report", "matplotlib", "report")


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of ``width`` by ``height`` inches, in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element with themed colours."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    for colour, token in _TOKENS.items():
        text = text.replace(colour, f"var({token})")
    return text.strip()


def with_own_ids(svg: str, prefix: str) -> str:
    """Rename every id: several pictures share one page and their ids must not meet."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def series_colour(number: int) -> str:
    """CSS colour of the run at this place, the same in tables and plots."""
    return f"var({_TOKENS[SERIES[number % len(SERIES)]]})"
