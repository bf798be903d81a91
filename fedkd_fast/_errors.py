"""Ends of a run that are no failures of a call, and words for errors; light to import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class Stopped(RuntimeError):
    """Training ended before its last round, as it was asked to."""


class DiskError(OSError):
    """A run cannot write what is its own: whoever's turn it is, that is no failure of a client."""


def spoken(error: Exception) -> str:
    """Return what an error says; one without words, as of a bare assertion, says its kind."""
    return str(error) or repr(error)


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Tell errors in writing a file of a run from those of its clients.

    Raises:
        DiskError: instead of any other OSError; names the file.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(error.errno, error.strerror, error.filename or str(path)) from error


class QuorumError(RuntimeError):
    """Too few replies of a round count; nothing of the round was applied.

    Args:
        round_number: the round.
        accepted: how many replies count.
        needed: how many would have to.
        asked: how many clients were asked.
        reasons: of each client without a reply that counts.
    """

    def __init__(
        self, round_number: int, accepted: int, needed: int, asked: int, reasons: Sequence[str]
    ) -> None:
        super().__init__(
            f"round {round_number} has {accepted} of {asked} replies, quorum asks for {needed}: "
            + "; ".join(reasons)
        )
