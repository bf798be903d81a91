"""Parts of the page on what went wrong in a run, and on its privacy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fedkd_fast.report.groups import Group
from fedkd_fast.report.log import Fault, Log, LoggedRound
from fedkd_fast.report.runs import RunFolder
from fedkd_fast.report.text import NONE, listed, one_line, seconds, size

MAX_ROUNDS, MAX_FAULTS = 12, 100
_MAX_WORD, _MAX_DETAIL, _MAX_PLACES = 32, 240, 8
# Events as a count of them reads, the gravest first: where not all are shown, these are.
_WORDS = {
    "quorum": "short of the quorum",
    "failed": "failed",
    "refused": "refused",
    "left-out": "left out or scaled down",
    "retry": "asked again",
}


def counted(log: Log) -> str:
    """How often what went wrong, in words; empty where nothing did."""
    counts = log.counts
    found = [f"{counts[event]:,} {words}" for event, words in _WORDS.items() if event in counts]
    if log.given_up:
        found.append(f"{log.given_up:,} more in rounds that were begun again")
    return ", ".join(found)


def account(group: Group) -> str:
    """What went wrong, stops, checkpoints and privacy of a group's first run, a line each.

    Of the other seeds, what went wrong. Empty where there is nothing to say.
    """
    run = group.first
    lines = [("privacy", _privacy(run))]
    if run.log is not None:
        lines = [("faults", _faults(run.log)), ("stops", _ends(run.log)), *lines]
    for other in group.runs[1:]:
        found = "" if other.log is None else counted(other.log)
        lines.append(("faults", found and f"Seed {other.summary.get('seed', '?')}: {found}."))
    lines = [(topic, line) for topic, line in lines if line]
    if not lines:
        return ""
    title = listed(list(dict.fromkeys(topic for topic, _ in lines))).capitalize()
    items = "".join(f"<li>{escape(line)}</li>" for _, line in lines)
    return f'<div class="card account"><h3>{title}</h3><ul>{items}</ul></div>'


def _faults(log: Log) -> str:
    found = counted(log)
    if not found:
        return ""
    asked = sum(one.asked for one in log.rounds)
    accepted = sum(one.accepted for one in log.rounds)
    return f"{asked:,} replies asked for, {accepted:,} accepted; {found}."


def _ends(log: Log) -> str:
    """Stops and resumes; checkpoints alone are nothing to tell."""
    parts = []
    if log.stops:
        places = _places([str(at) for at in log.stops])
        parts.append(f"stopped {_times(len(log.stops))}, within {places}")
    if log.resumes:
        parts.append(f"resumed {_times(len(log.resumes))}, {_resumed(log)}")
    if not parts:
        return ""
    checkpoints = "checkpoint" if log.checkpoints == 1 else "checkpoints"
    text = f"{'; '.join(parts)}; {log.checkpoints:,} {checkpoints}."
    return text[0].upper() + text[1:]


def _resumed(log: Log) -> str:
    """After and within which rounds, whichever came first."""
    found: dict[str, list[str]] = {}
    for after, inside in log.resumes:
        word = "within" if inside else "after"
        found.setdefault(word, []).append(str(after + inside))
    return listed([f"{word} {_places(rounds)}" for word, rounds in found.items()])


def _places(rounds: Sequence[str]) -> str:
    different = list(dict.fromkeys(rounds))
    more = len(different) - _MAX_PLACES
    several = "round" if len(different) == 1 else "rounds"
    rest = [f"{more} more"] if more > 0 else []
    return f"{several} {listed([*different[:_MAX_PLACES], *rest])}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _privacy(run: RunFolder) -> str:
    """(ε, δ) of a run with differential privacy."""
    delta = run.number("delta")
    if delta is None:
        return ""
    return f"Differential privacy of each client: {epsilon(run)} at δ = {delta:g}."


def epsilon(run: RunFolder) -> str:
    """ε of a run with differential privacy."""
    found = run.number("epsilon")
    return f"ε = {found:.3g}" if found is not None else "ε is not bounded"


def round_table(log: Log) -> str:
    """Rounds with what was asked, accepted and refused; of many, those that lost most."""
    if not log.counts or not log.rounds:
        return ""
    worst = sorted(log.rounds, key=lambda one: (-one.lost.total(), -len(one.faults)))[:MAX_ROUNDS]
    rows = [(_round_cells(one), "") for one in sorted(worst, key=lambda one: one.number)]
    some = f", the {MAX_ROUNDS} of {len(log.rounds):,} in which most went wrong"
    note = "bytes of all clients" + (some if len(log.rounds) > MAX_ROUNDS else "")
    heads = dict.fromkeys(("round", "asked", "accepted", "failed"), "") | {"refused": "words"}
    heads |= dict.fromkeys(("asked again", "up", "down", "seconds"), "")
    return _table("Round by round", note, heads, rows, opened=" open")


def _round_cells(one: LoggedRound) -> tuple[str, ...]:
    left = one.count("left-out")
    return (
        f"{one.number}",
        f"{one.asked:,}",
        f"{one.accepted:,}" + (f", {left:,} not in full" if left else ""),
        f"{one.count('failed') or NONE}",
        _by_reason(one.refused) or NONE,
        f"{one.count('retry') or NONE}",
        size(one.bytes_up),
        size(one.bytes_down),
        seconds(one.seconds),
    )


def _by_reason(counts: Mapping[str, int]) -> str:
    """Say how many for which reason, the most frequent first, a few of them."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found = [f"{count:,} {one_line(name, _MAX_WORD)}" for name, count in ordered[:_MAX_PLACES]]
    rest = sum(count for _, count in ordered[_MAX_PLACES:])
    return ", ".join([*found, *([f"{rest:,} for other reasons"] if rest else [])])


def fault_table(log: Log) -> str:
    """The log of what went wrong; of very many, the gravest."""
    if not log.faults:
        return ""
    gravity = list(_WORDS)
    order = sorted(range(len(log.faults)), key=lambda at: gravity.index(log.faults[at].event))
    shown = [log.faults[at] for at in sorted(order[:MAX_FAULTS])]
    rows = [(_fault_cells(fault), "" if fault.counts else "again") for fault in shown]
    note, left = f"{len(log.faults):,} lines", len(log.faults) - MAX_FAULTS
    if left > 0:
        note = f"the gravest {MAX_FAULTS} of {note}; {left:,} more are in journal.jsonl"
    heads = {"round": "", "client": "", "event": "word", "reason": "words", "detail": "words"}
    return _table("Log of faults", note, heads, rows)


def _fault_cells(fault: Fault) -> tuple[str, ...]:
    return (
        f"{fault.round}" if fault.counts else f"{fault.round}, begun again",
        NONE if fault.client is None else f"{fault.client}",
        fault.event,
        one_line(fault.reason, _MAX_WORD) or NONE,
        one_line(fault.detail, _MAX_DETAIL),
    )


def _table(
    title: str,
    note: str,
    heads: Mapping[str, str],
    rows: Sequence[tuple[Sequence[str], str]],
    opened: str = "",
) -> str:
    """Fold a table away; columns and rows with the classes that style them, cells as plain text."""
    marks = [f' class="{kind}"' if kind else "" for kind in heads.values()]

    def row(cells: Iterable[str], tag: str, kind: str = "") -> str:
        pairs = zip(cells, marks, strict=True)
        found = "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in pairs)
        return f'<tr class="{kind}">{found}</tr>' if kind else f"<tr>{found}</tr>"

    body = "".join(row(cells, "td", kind) for cells, kind in rows)
    return (
        f"<details{opened}><summary>{title}<small>{escape(note)}</small></summary>"
        f'<div style="overflow-x:auto"><table class="layers log"><thead>{row(heads, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )
