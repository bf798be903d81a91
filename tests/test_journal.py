"""The log of a run: lines that are whole, and counts of what went wrong."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from fedkd_fast.journal import FAULTS, Journal, read_journal


def test_lines_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    before = datetime.datetime.now(datetime.timezone.utc)
    journal = Journal(path)
    assert not path.exists() and journal.faults() == {}
    journal.add("start")
    journal.add("refused", round=1, client=2, reason="ß\n")
    journal.add("failed", round=1, client=0)
    journal.add("refused", round=2, client=2)
    first, *others = read_journal(path)
    assert list(first) == ["time", "event"]
    moment = datetime.datetime.fromisoformat(first["time"])
    assert abs(moment - before) < datetime.timedelta(minutes=1) and moment.utcoffset() is not None
    assert [line["event"] for line in others] == ["refused", "failed", "refused"]
    assert others[0]["reason"] == "ß\n" and len(path.read_bytes().splitlines()) == 4
    # In the order of `FAULTS`, and of these alone.
    assert list(journal.faults().items()) == [("failed", 1), ("refused", 2)]
    assert set(journal.faults()) <= set(FAULTS)


def test_a_log_without_a_file_counts(tmp_path: Path) -> None:
    journal = Journal(None)
    journal.add("retry", round=1)
    assert journal.faults() == {"retry": 1}


@pytest.mark.parametrize("rest", [b"", b"{", b'{"time": "x", "event": "round"}', b"\x00\xff"])
def test_a_torn_last_line_is_cut(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add("start")
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    journal = Journal(path)
    assert path.read_bytes() == whole
    assert journal.faults() == {}  # what the checkpoint says, not the file
    journal.add("resume")
    assert [line["event"] for line in read_journal(path)] == ["start", "resume"]
    # Of a single line nothing is left where it is torn.
    path.write_bytes(rest)
    Journal(path)
    assert path.read_bytes() == b""


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    """Other readers of JSON would not know it; and no torn line is left."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.add("round", seconds=float("nan"))
    assert not path.exists()


@pytest.mark.parametrize(
    ("line", "words"), [("[1]", "must be a JSON object, got list"), ("{", "not JSON")]
)
def test_damaged_lines_are_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"event": "start"}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"{path}:2: {words}"):
        list(read_journal(path))
    with pytest.raises(OSError):
        list(read_journal(tmp_path / "no"))
