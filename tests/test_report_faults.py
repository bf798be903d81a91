"""The report on runs in which something went wrong: the journal read, counted and shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run, refused_line, round_line, write_journal
from tiny_task import TinyTask

from fedkd_fast.__main__ import main
from fedkd_fast.faults import Faults
from fedkd_fast.journal import FAULTS, read_journal
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.replies import Refused
from fedkd_fast.report import build_page, read_runs
from fedkd_fast.report.faults import MAX_FAULTS, MAX_ROUNDS, counted, fault_table, round_table
from fedkd_fast.report.log import Log, read_log
from fedkd_fast.report.plots import bin_width, replies_by_round
from fedkd_fast.report.runs import read_run
from fedkd_fast.report.text import listed, one_line
from fedkd_fast.trainer import Stopped, resume_run, train

pytest.importorskip("matplotlib", reason="the report's plots need the extra [report]")

START: dict[str, Any] = {"event": "start", "environment": {}}
FAULTY: dict[str, Any] = {"clients": 8, "rounds": 5, "faults": 0.5, "quorum": 0.05}


def failed(number: int, client: int, reason: str = "gone") -> dict[str, Any]:
    return {"event": "failed", "round": number, "client": client, "reason": reason}


def retry(number: int, client: int) -> dict[str, Any]:
    return {"event": "retry", "round": number, "client": client, "attempt": 1}


def resumed(after: int, inside: bool = False) -> dict[str, Any]:
    return {"event": "resume", "round": after, "inside": inside}


def stop(number: int) -> dict[str, Any]:
    return {"event": "stop", "round": number, "clients": 1}


def checkpoint(after: int) -> dict[str, Any]:
    return {"event": "checkpoint", "round": after, "sha256": "00" * 32, "seconds": 0.1}


def log_of(tmp_path: Path, *lines: dict[str, Any]) -> Log:
    return read_log(write_journal(tmp_path, [START, *lines]) / "journal.jsonl")


def page_of(folder: Path, *lines: dict[str, Any]) -> str:
    make_run(folder)
    return build_page(read_runs([write_journal(folder, [START, *lines])]))


def rows_of(table: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)][
        1:
    ]


@pytest.mark.parametrize("encrypt", [False, True])
def test_rounds_say_what_was_done_to_them(encrypt: bool, tmp_path: Path) -> None:
    """Faults are known beforehand, so what becomes of each client is too."""
    run = train(TinyTask(), "fedkd", out=tmp_path / "run", encrypt=encrypt, **FAULTY)
    log = read_run(tmp_path / "run").log
    assert log is not None and log.counts == run.summary["faults"]
    faults = Faults(0.5, 0.0, 1.0, 8, seed=0)
    words = {"fail": "failed", "late": "no reply", "not-finite": "not-finite"}
    for one in log.rounds:
        kinds = [faults.kind(client, one.number) for client in range(8)]
        known = Counter(words[kind] for kind in kinds if kind in words)
        assert {kind: one.lost[kind] for kind in known} == known
        # What is corrupt is refused for one thing or another.
        others = one.lost - known
        assert others.total() == kinds.count("corrupt")
        assert all(kind.startswith("sealed-" if encrypt else "damaged") for kind in others)
        assert one.accepted + one.lost.total() == one.asked == 8
    assert sum(one.bytes_up for one in log.rounds) / 8 == pytest.approx(run.summary["bytes_up"])
    page = build_page(read_runs([tmp_path / "run"]))
    assert f"40 replies asked for, {sum(one.accepted for one in log.rounds)} accepted" in page
    assert counted(log) in page


def test_what_was_done_twice_is_counted_once(tmp_path: Path) -> None:
    """Stopped within round 2, killed in round 4, resumed: the summary's counts are those kept."""
    out = tmp_path / "run"
    turns = 0

    def after_twelve() -> bool:
        nonlocal turns
        turns += 1
        return turns == 12

    def die(record: RoundRecord | ClientRecord) -> None:
        if isinstance(record, ClientRecord) and (record.round, record.done) == (4, 6):
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="stopped in round 2 of 5"):
        train(TinyTask(), "fedkd", out=out, stop=after_twelve, **FAULTY)
    with pytest.raises(KeyboardInterrupt):
        resume_run(out, task=TinyTask(), progress=die)
    run = resume_run(out, task=TinyTask())
    log = read_run(out).log
    assert log is not None and log.counts == run.summary["faults"]
    assert log.stops == (2,) and log.resumes == ((1, True), (3, False))
    again = [fault for fault in log.faults if not fault.counts]
    assert again and {fault.round for fault in again} == {4}
    # The second attempt went as the first did.
    kept = [fault for fault in log.faults if fault.counts and fault.round == 4]
    assert [(f.event, f.client, f.detail) for f in again] == [
        (f.event, f.client, f.detail) for f in kept[: len(again)]
    ]
    page = build_page(read_runs([out]))
    assert "Stopped once, within round 2; resumed 2 times, within round 2 and after round 3" in page
    assert f"{len(again)} more in rounds that were begun again" in page
    assert page.count("4, begun again") == len(again)


def test_lines_after_the_stop_are_given_up_where_that_is_resumed_twice(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        failed(1, 0),
        round_line(1),
        checkpoint(1),
        failed(2, 1),
        stop(2),
        checkpoint(1),
        resumed(1, inside=True),
        failed(2, 2),
        resumed(1, inside=True),
        failed(2, 2),
        round_line(2, accepted=6),
        checkpoint(2),
        # A stop whose checkpoint could not be written.
        failed(3, 4),
        stop(3),
        resumed(2),
        round_line(3),
    )
    found = [(fault.round, fault.client, fault.counts) for fault in log.faults]
    assert found == [(1, 0, True), (2, 1, True), (2, 2, False), (2, 2, True), (3, 4, False)]
    assert log.counts == {"failed": 3} and log.given_up == 2 and log.checkpoints == 3
    assert [one.lost for one in log.rounds] == [{"failed": 1}, {"failed": 2}, {}]


def test_replies_beside_the_one_that_counts_cost_nothing(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        refused_line(1, 0, "late"),
        refused_line(1, 0, "damaged"),
        retry(1, 0),  # and then it came whole
        refused_line(1, 1, "duplicate"),
        refused_line(1, 9, "stranger"),
        refused_line(1, 2, "late"),
        refused_line(1, 2, "damaged"),
        retry(1, 2),
        refused_line(1, 2, "damaged"),
        refused_line(1, 3, "norm"),
        {"event": "left-out", "round": 1, "client": 4, "detail": "left out by krum:1"},
        round_line(1, accepted=5),
    )
    (one,) = log.rounds
    assert one.lost == {"damaged": 1, "norm": 1, "no reply": 1}
    assert one.refused == {"damaged": 3, "late": 2, "duplicate": 1, "stranger": 1, "norm": 1}
    (row,) = rows_of(round_table(log))
    refused = "3 damaged, 2 late, 1 duplicate, 1 norm, 1 stranger"
    assert row == ["1", "8", "5, 1 not in full", "–", refused, "2", "6.00 kB", "5.00 kB", "1.5"]


def test_a_round_without_quorum_stands_in_the_log(tmp_path: Path) -> None:
    quorum = {"event": "quorum", "round": 2, "accepted": 1, "needed": 4}
    log = log_of(tmp_path, round_line(1), failed(2, 3), quorum, resumed(1), round_line(2))
    assert log.counts == {} and counted(log) == "2 more in rounds that were begun again"
    assert rows_of(fault_table(log)) == [
        ["2, begun again", "3", "failed", "–", "gone"],
        ["2, begun again", "–", "quorum", "–", "1 replies count, 4 are needed"],
    ]


def test_text_of_others_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&\u202egnp.\x00\ud800\n<b>"
    reason = "<i>&\u202e"
    page = page_of(
        tmp_path / "run",
        refused_line(1, 1, reason, hostile),
        failed(1, 2, hostile + "x" * 5000),
        round_line(1, accepted=6),
    )
    assert "<script" not in page and "<b>x" not in page and "<i>" not in page
    assert not set("\u202e\x00\ud800") & set(page)
    shown = "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;\ufffdgnp.\ufffd\ufffd &lt;b&gt;"
    assert f'<td class="words">{shown}</td>' in page
    assert "xxx…</td>" in page and "x" * 300 not in page
    # Also in the legend of the picture.
    assert escape("refused: <i>&\ufffd") in page
    page.encode()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\n two\u2028three ", "one two three"),
        ("a\u200bb\x1b[31m", "a\ufffdb\ufffd[31m"),
        ("x" * 21, "x" * 19 + "…"),
        ("x" * 20, "x" * 20),
        ("наименование", "наименование"),
        ("", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text, 20) == line


def test_listed() -> None:
    assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_long_logs_keep_the_gravest_lines(tmp_path: Path) -> None:
    scaled = [
        {"event": "left-out", "round": at, "client": 1, "detail": "scaled"} for at in range(1, 301)
    ]
    rounds = [round_line(at, accepted=7 if at in (7, 205) else 8) for at in range(1, 301)]
    log = log_of(tmp_path, *scaled, refused_line(205, 2, "norm"), failed(7, 3), *rounds)
    table = fault_table(log)
    rows = rows_of(table)
    assert len(rows) == MAX_FAULTS
    assert f"the gravest {MAX_FAULTS} of 302 lines; 202 more are in journal.jsonl" in table
    # In the order of the journal.
    assert [row[2] for row in rows if row[2] != "left-out"] == ["refused", "failed"]
    shown = [int(row[0]) for row in rows_of(round_table(log))]
    assert len(shown) == MAX_ROUNDS and {7, 205} <= set(shown) and shown == sorted(shown)
    assert f"the {MAX_ROUNDS} of 300 in which most went wrong" in round_table(log)


def test_a_bar_stands_for_several_of_many_rounds(tmp_path: Path) -> None:
    lines = [
        line
        for at in range(1, 1001)
        for line in (*(refused_line(at, c, reason) for c, reason in enumerate("abcde", 1)),
                     failed(at, 6), round_line(at, accepted=1))
    ]  # fmt: skip
    log = log_of(tmp_path, *lines)
    assert bin_width(log) == 17
    picture = replies_by_round(log)
    assert picture is not None and len(picture) < 150_000
    for word in (
        "accepted",
        "refused: a",
        "refused: b",
        "refused: other reasons",
        "failed",
        "no reply",
    ):
        assert f">{word}<" in picture
    assert "refused: c" not in picture
    few = log_of(tmp_path, failed(1, 6), round_line(1, accepted=6), round_line(2, accepted=8))
    one = replies_by_round(few)
    assert bin_width(few) == 1 and one is not None and len(one) < len(picture) / 3


@pytest.mark.parametrize("accepted", [90, 91])
def test_what_was_accepted_does_not_hide_the_rest(accepted: int, tmp_path: Path) -> None:
    gone = [failed(1, client) for client in range(100 - accepted)]
    page = page_of(tmp_path / "run", *gone, round_line(1, asked=100, accepted=accepted))
    assert ("<h3>Replies by round" in page) == (accepted == 90)
    assert ("<h3>Replies that do not count by round" in page) == (accepted == 91)
    picture = replies_by_round(read_log(tmp_path / "run" / "journal.jsonl"))
    assert picture is not None and (">accepted<" in picture) == (accepted == 90)
    assert ">failed<" in picture and ">no reply<" not in picture


def test_nothing_is_said_where_nothing_happened(tmp_path: Path) -> None:
    plain = build_page(read_runs([make_run(tmp_path / "run")]))
    quiet = [round_line(at) for at in range(1, 9)]
    write_journal(tmp_path / "run", [START, *quiet, checkpoint(1), {"event": "finish", "round": 8}])
    assert build_page(read_runs([tmp_path / "run"])) == plain
    # An event of a newer version is none of ours.
    write_journal(tmp_path / "run", [{"event": "moon", "phase": "full"}, *quiet])
    assert build_page(read_runs([tmp_path / "run"])) == plain


def test_same_journal_gives_the_same_page(tmp_path: Path) -> None:
    lines = [refused_line(1, 1, "norm"), round_line(1, accepted=5), resumed(1), round_line(2)]
    page = page_of(tmp_path / "run", *lines)
    assert build_page(read_runs([tmp_path / "run"])) == page
    assert "Replies by round" in page and "Resumed once, after round 1; 0 checkpoints." in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "round"', "not JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "event must be a name, got None"),
        ('{"event": "failed", "client": 1, "reason": "x"}', "round must be a whole number"),
        (
            '{"event": "failed", "round": -1, "client": 1, "reason": "x"}',
            "round must lie between 0",
        ),
        ('{"event": "failed", "round": 1, "reason": "x"}', "client must be a whole number"),
        ('{"event": "failed", "round": 1, "client": 1}', "reason must be text, got None"),
        ('{"event": "refused", "round": 1, "client": 1, "reason": "x"}', "detail must be text"),
        ('{"event": "round", "round": 1, "asked": 1.5}', "asked must be a whole number, got 1.5"),
        ('{"event": "resume", "round": "x"}', "round must be a whole number, got 'x'"),
        (
            '{"event": "round", "round": 1, "asked": 1, "accepted": 1, "seconds": NaN}',
            "seconds must lie within ±1e.300, got nan",
        ),
        (
            '{"event": "round", "round": 1, "asked": 1, "accepted": 1, "seconds": -1}',
            "seconds must be at least 0, got -1.0",
        ),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    folder = write_journal(make_run(tmp_path / "run"), [START, round_line(1)])
    with (folder / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"run/journal\.jsonl:3: .*{message}"):
        read_run(folder)


def test_a_journal_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"\xff{}\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl is not UTF-8 text"):
        list(read_journal(tmp_path / "journal.jsonl"))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epsilon": 3.2109, "delta": 1e-5}, "ε = 3.21 at δ = 1e-05"),
        ({"epsilon": None, "delta": 1e-6}, "ε is not bounded at δ = 1e-06"),
    ],
)
def test_privacy_is_said_once_in_a_tile_and_once_below(
    values: dict[str, Any], text: str, tmp_path: Path
) -> None:
    page = build_page(read_runs([make_run(tmp_path / "run", **values)]))
    assert f"<h3>Privacy</h3><ul><li>Differential privacy of each client: {text}.</li></ul>" in page
    assert page.count("differential privacy</span>") == 1
    assert "ifferential privacy" not in build_page(read_runs([make_run(tmp_path / "other")]))


def test_other_seeds_say_what_went_wrong_with_them(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run-s{seed}", seed=seed, rounds=2) for seed in range(3)]
    for folder, client in zip(folders[:2], (1, 2), strict=True):
        lines = [failed(1, at) for at in range(client)]
        write_journal(folder, [START, *lines, round_line(1, accepted=8 - client)])
    page = build_page(read_runs(folders))
    assert "8 replies asked for, 7 accepted; 1 failed." in page
    assert "<li>Seed 1: 2 failed.</li>" in page and "Seed 2" not in page


def test_the_command_prints_a_line_for_each_run_with_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / name, method, rounds=1) for name, method in
               (("a", "fedkd"), ("b", "fedavg"))]  # fmt: skip
    out = ["-o", str(tmp_path / "page.html")]
    assert main(["report", *map(str, folders), *out]) == 0
    before = capsys.readouterr().out
    write_journal(folders[1], [failed(1, 1), refused_line(1, 2, "norm"), round_line(1, accepted=6)])
    assert main(["report", *map(str, folders), *out]) == 0
    after = capsys.readouterr().out
    line = f"faults of {folders[1]}: 1 failed, 1 refused; see the page\n"
    assert line in after and after.replace(line, "") == before
    assert main(["report", str(folders[1]), *out]) == 0
    assert "\nfaults: 1 failed, 1 refused; see the page\n" in capsys.readouterr().out


def test_the_page_on_operations_names_every_event_and_reason() -> None:
    """Its examples are lines of a journal, and its table has the reasons that the code gives."""
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    block = re.findall(r"```json\n(.*?)```", text, re.DOTALL)[-1]
    events = {json.loads(line)["event"] for line in block.splitlines()}
    others = {"start", "resume", "stop", "finish", "round", "checkpoint"}
    assert events == {*FAULTS, *others}
    for reason in re.findall(r"``([a-z-]+)``", Refused.__doc__ or ""):
        assert f"`{reason}`" in text, reason
