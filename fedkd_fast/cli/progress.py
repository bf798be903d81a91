"""The bar that moves with clients and rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkd_fast.records import ClientRecord, RoundRecord

Show = Callable[["RoundRecord | ClientRecord"], None]
# The time left follows from all that was seen: a client may take minutes.
_WINDOW_S = 1e9


class Status:
    """What the bar says, from the records so far."""

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self._place = "first client"
        self._loss = self._score = ""
        self._up = self._down = 0.0

    def take(self, record: RoundRecord | ClientRecord) -> None:
        """Take in what a client or a round was like."""
        from fedkd_fast.records import ClientRecord
        from fedkd_fast.report.text import percent

        self._place = f"round {record.round}/{record.rounds}"
        loss = record.loss_mentor if record.loss_mentor is not None else record.loss_mentee
        if loss is not None:
            self._loss = f"loss {loss:.3f}"
        if isinstance(record, ClientRecord):
            self._place += f"  client {record.done}/{record.clients}"
            self.total = record.rounds * record.clients
            self.done = (record.round - 1) * record.clients + record.done
            return
        score = record.score_mentor if record.score_mentor is not None else record.score_mentee
        if score is not None:
            self._score = f"{record.split} {percent(score)}"
        self._up += record.bytes_up
        self._down += record.bytes_down

    @property
    def text(self) -> str:
        """Place, loss, last score with its split, and what a client sent and received so far."""
        from fedkd_fast.report.text import size

        sent = f"{size(self._up)} up, {size(self._down)} down" if self._up or self._down else ""
        return "  ".join(filter(None, (self._place, self._loss, self._score, sent)))


@contextmanager
def progress_bar(silent: bool, label: str = "") -> Iterator[Show | None]:
    """Show a bar on stderr while the body runs; None where nobody would see it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True, highlight=False, emoji=False)
    if silent or not console.is_terminal:
        yield None
        return
    # A narrow terminal cuts the text, and nothing else.
    flexible = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", table_column=flexible)
    columns = (BarColumn(bar_width=10), TimeRemainingColumn(), TextColumn("left"), text)
    with Progress(
        *([TextColumn(label, markup=False)] if label else []),
        *columns,
        console=console,
        transient=True,
        expand=True,
        speed_estimate_period=_WINDOW_S,
    ) as bar:
        status = Status()
        shown = bar.add_task(status.text, total=None)

        def show(record: RoundRecord | ClientRecord) -> None:
            status.take(record)
            bar.update(shown, total=status.total, completed=status.done, description=status.text)

        yield show
