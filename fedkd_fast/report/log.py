"""The journal of a run as data: what became of rounds, what went wrong, where it was resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkd_fast.journal import FAULTS, read_journal
from fedkd_fast.report.rows import MOST, number, whole

# Replies beside the one that counts, or to another round: they cost the round nothing.
_BESIDE = {"stranger", "late", "early", "duplicate"}
_BESIDE |= {"sealed-replayed", "sealed-reordered", "sealed-other-round"}
FAILED, UNHEARD = "failed", "no reply"


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong."""

    event: str  # of `journal.FAULTS`
    round: int
    client: int | None  # None of a round that fell short of the quorum
    reason: str  # a word, of what was refused
    detail: str
    counts: bool  # False in a round that was later begun again


@dataclass(frozen=True)
class LoggedRound:
    """One round that was finished."""

    number: int
    asked: int
    accepted: int
    bytes_up: float  # of all clients
    bytes_down: float
    seconds: float
    faults: tuple[Fault, ...]

    def count(self, event: str) -> int:
        """How often something went wrong."""
        return sum(fault.event == event for fault in self.faults)

    @property
    def refused(self) -> Counter[str]:
        """Refused replies by reason, also those that cost nothing."""
        return Counter(fault.reason for fault in self.faults if fault.event == "refused")

    @cached_property
    def lost(self) -> Counter[str]:
        """Clients whose part does not count, by what became of it; with `accepted`, all asked."""
        last = {
            fault.client: fault
            for fault in self.faults
            if fault.event in ("failed", "refused", "retry") and fault.reason not in _BESIDE
        }
        found = Counter(
            FAILED if fault.event == "failed" else fault.reason
            for fault in last.values()
            if fault.event != "retry"  # what came then counts, or nothing came
        )
        unheard = self.asked - self.accepted - found.total()
        return found + Counter({UNHEARD: max(0, unheard)})


@dataclass(frozen=True)
class Log:
    """The journal of one run."""

    rounds: tuple[LoggedRound, ...]
    faults: tuple[Fault, ...]
    stops: tuple[int, ...]  # rounds within which it was told to stop
    resumes: tuple[tuple[int, bool], ...]  # after which round, and whether within the next one
    checkpoints: int

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often what went wrong, by event; not in rounds that were begun again."""
        found = Counter(fault.event for fault in self.faults if fault.counts)
        return {event: found[event] for event in FAULTS if found[event]}

    @property
    def given_up(self) -> int:
        """How many faults lie in rounds that were begun again."""
        return sum(not fault.counts for fault in self.faults)


def read_log(path: Path) -> Log:
    """Read the journal of a finished run.

    Raises:
        ValueError: a line breaks the format; names file and line.
        OSError: it cannot be read.
    """
    lines: list[Mapping[str, Any]] = []
    counts: list[bool] = []
    stops, resumes, checkpoints = [], [], 0
    finished: dict[int, LoggedRound] = {}
    for at, line in enumerate(read_journal(path), start=1):
        where = f"{path}:{at}"
        event = line.get("event")
        if not isinstance(event, str):
            raise ValueError(f"{where}: event must be a name, got {event!r}")
        if event == "resume":
            after, inside = _count(line, "round", where), bool(line.get("inside"))
            resumes.append((after, inside))
            counts = _still_counting(lines, counts, after, inside)
        elif event == "round":
            one = _round(line, where)
            finished[one.number] = one
        elif event == "stop":
            stops.append(_count(line, "round", where))
        elif event == "checkpoint":
            checkpoints += 1
        if event in FAULTS or event == "stop":
            lines.append({**line, "round": _count(line, "round", where), "where": where})
            counts.append(True)
    faults = tuple(
        _fault(line, counted)
        for line, counted in zip(lines, counts, strict=True)
        if line["event"] != "stop"
    )
    return Log(_with_faults(finished, faults), faults, tuple(stops), tuple(resumes), checkpoints)


def _still_counting(
    lines: Sequence[Mapping[str, Any]], counts: Sequence[bool], after: int, inside: bool
) -> list[bool]:
    """Say which lines a process goes on with that resumes after a round, or within the next one.

    There it goes on from where the last stop was; what came after that is done once more.
    """
    stops = (
        at
        for at, line in enumerate(lines)
        if inside and line["event"] == "stop" and line["round"] == after + 1
    )
    last = max(stops, default=-1)
    return [
        counted and (line["round"] <= after or at <= last)
        for at, (line, counted) in enumerate(zip(lines, counts, strict=True))
    ]


def _with_faults(
    finished: Mapping[int, LoggedRound], faults: Sequence[Fault]
) -> tuple[LoggedRound, ...]:
    by_round: dict[int, list[Fault]] = {}
    for fault in faults:
        if fault.counts:
            by_round.setdefault(fault.round, []).append(fault)
    return tuple(
        replace(one, faults=tuple(by_round.get(at, ()))) for at, one in sorted(finished.items())
    )


def _round(line: Mapping[str, Any], where: str) -> LoggedRound:
    up, down, seconds = (_amount(line, key, where) for key in ("bytes_up", "bytes_down", "seconds"))
    at, asked, accepted = (_count(line, key, where) for key in ("round", "asked", "accepted"))
    return LoggedRound(at, asked, accepted, up, down, seconds, ())


def _fault(line: Mapping[str, Any], counted: bool) -> Fault:
    event, where = line["event"], line["where"]
    client = None if event == "quorum" else _count(line, "client", where)
    if event == "quorum":
        accepted, needed = (_count(line, key, where) for key in ("accepted", "needed"))
        reason, detail = "", f"{accepted} replies count, {needed} are needed"
    elif event == "failed":
        # What it failed with is a sentence.
        reason, detail = "", _text(line, "reason", where)
    elif event == "retry":
        reason, detail = "", f"asked to send it again, attempt {_count(line, 'attempt', where)}"
    else:
        reason = _text(line, "reason", where) if event == "refused" else ""
        detail = _text(line, "detail", where)
    return Fault(event, line["round"], client, reason, detail, counted)


def _count(line: Mapping[str, Any], key: str, where: str) -> int:
    found = whole(line, key, where)
    if not 0 <= found <= MOST:
        raise ValueError(f"{where}: {key} must lie between 0 and 2^53, got {found}")
    return found


def _amount(line: Mapping[str, Any], key: str, where: str) -> float:
    found = number(line, key, where) or 0.0
    if found < 0.0:
        raise ValueError(f"{where}: {key} must be at least 0, got {found}")
    return found


def _text(line: Mapping[str, Any], key: str, where: str) -> str:
    found = line.get(key)
    if not isinstance(found, str):
        raise ValueError(f"{where}: {key} must be text, got {found!r}")
    return found
