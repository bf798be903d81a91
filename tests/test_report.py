"""The report: run folders in, one self-contained page out."""

from __future__ import annotations

import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_runs import TENSORS, make_run

from fedkd_fast.report import build_page, read_runs, write_report
from fedkd_fast.report.groups import group_runs
from fedkd_fast.report.layers import MAX_HEAT_ROUNDS, heat_rounds
from fedkd_fast.report.runs import read_run
from fedkd_fast.report.tables import comparison_rows
from fedkd_fast.report.text import duration, megabytes, percent, size

pytest.importorskip("matplotlib", reason="the report's plots need the extra [report]")

# Pictures of a page of one FedKD run: score by round and by traffic, traffic, energy, sizes of
# clients, layers, rank.
FEDKD_PLOTS = 7
# Without compression there is neither an energy schedule nor a kept rank.
PLAIN_PLOTS = 5


class _Reader(HTMLParser):
    """Collects what a browser would load, the ids, and whether the tags nest."""

    _VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self._VOID:
            self.open.append(tag)
        self._collect(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._collect(attrs)

    def _collect(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data", "action"}:
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def _summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FedKD run whose report was written."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", rounds=3)
    assert write_report([folder]) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


def test_one_run_is_a_self_contained_page(page: str) -> None:
    reader = _read(page)
    assert reader.tags.count("svg") == FEDKD_PLOTS
    assert all(link.startswith("#") for link in reader.links)
    assert len(reader.ids) == len(set(reader.ids))
    assert "script" not in reader.tags
    assert "http" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page


def test_page_says_what_the_summary_says(written: Path, page: str) -> None:
    summary = _summary(written)
    assert f"FedKD on digits: {percent(summary['score_mentor'])} accuracy" in page
    assert f"{percent(summary['saving'])} fewer bytes than FedAvg of the mentor" in page
    assert f"<b>{size(summary['bytes_up'] + summary['bytes_down'])}</b>" in page
    assert "wf0" in page
    assert all(name in page for name in TENSORS)


def test_local_references_of_a_picture_stay_in_the_page(page: str) -> None:
    reader = _read(page)
    used = {link[1:] for link in reader.links} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(reader.ids)


def test_same_runs_give_the_same_page(written: Path, page: str) -> None:
    assert build_page(read_runs([written])) == page


def test_comparison_has_a_row_for_each_run(tmp_path: Path) -> None:
    methods = ("local", "central", "fedavg", "fedavg-mentee", "fedkd")
    folders = [make_run(tmp_path / method, method, rounds=2) for method in methods]
    out = tmp_path / "page.html"
    assert write_report(folders, out) == out
    page = out.read_text(encoding="utf-8")
    reader = _read(page)
    assert reader.tags.count("table") >= 1
    rows = comparison_rows(group_runs(read_runs(folders)))
    assert [row[0] for row in rows] == list(methods)
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row[3:])
        assert cells in page
    summary = _summary(folders[-1])
    assert rows[-1] == (
        "fedkd",
        "1",
        percent(summary["score_mentor"]),
        percent(summary["score_mentee"]),
        percent(summary["score_mean"]),
        megabytes(summary["bytes_up"]),
        megabytes(summary["bytes_down"]),
        percent(summary["saving"]),
        "42.7",
    )
    assert "<h1>FedKD on digits" in page
    assert page.count('class="run"') == len(methods)


def test_runs_of_several_tasks_are_compared_task_by_task(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / task, "local", task=task, rounds=2) for task in ("digits", "text")
    ]
    page = build_page(read_runs(folders))
    assert "Comparison on digits" in page
    assert "Comparison on text" in page


@pytest.mark.parametrize("method", ["local", "central"])
def test_method_without_traffic(tmp_path: Path, method: str) -> None:
    page = build_page(read_runs([make_run(tmp_path / "run", method, clients=1)]))
    assert "nothing sent" in page
    assert _read(page).tags.count("svg") == 1
    assert "saving against" not in page


def test_uncompressed_method_has_no_rank(tmp_path: Path) -> None:
    page = build_page(read_runs([make_run(tmp_path / "run", "fedavg")]))
    assert _read(page).tags.count("svg") == PLAIN_PLOTS
    assert "Kept rank by" not in page


def test_one_round_and_one_client(tmp_path: Path) -> None:
    page = build_page(read_runs([make_run(tmp_path / "run", rounds=1, clients=1)]))
    assert _read(page).tags.count("svg") == FEDKD_PLOTS - 1


def test_many_rounds_are_thinned_in_the_heat_map(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rounds=70, clients=1))
    shown = heat_rounds(run)
    assert len(shown) <= MAX_HEAT_ROUNDS
    assert shown[-1] == 70
    assert len({after - before for before, after in itertools.pairwise(shown)}) == 1


def test_optional_fields_may_be_missing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "summary.json").write_text('{"method": "fedkd", "task": "digits"}')
    (folder / "metrics.jsonl").write_text('{"round": 1, "client": 0}\n\n')
    page = build_page(read_runs([folder]))
    assert "FedKD on digits: no score" in page
    _read(page)


def test_inflation_is_called_inflation(tmp_path: Path) -> None:
    page = build_page(read_runs([make_run(tmp_path / "run", "fedavg", rounds=1, saving=-0.25)]))
    assert "25.0% more bytes than FedAvg of the mentor" in page
    assert "not smaller" in page


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "local", task="<b>&", metric="a<b")
    page = build_page(read_runs([folder]))
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    _read(page)


def test_kept_rank_is_the_mean_over_clients(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", clients=2, rounds=2))
    name = "classifier.weight"
    ranks = [
        layer.rank / layer.full_rank
        for row in run.rows
        if row.client is not None and row.round == 1
        for layer in row.layers
        if layer.name == name
    ]
    assert run.kept_rank()[name][1] == sum(ranks) / 2
    assert "classifier.bias" not in run.kept_rank()


def test_layer_totals_add_up_to_the_payloads(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", clients=2, rounds=3))
    up = sum(layer.bytes for row in run.rows if row.client is not None for layer in row.layers)
    down = sum(layer.bytes for row in run.rows if row.client is None for layer in row.layers)
    assert sum(total.up for total in run.layer_totals()) * 2 == up
    assert sum(total.down for total in run.layer_totals()) == down


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
def test_unfinished_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"run has no {name}: it is not the folder of a finished"):
        write_report([folder])
    assert not (folder / "report.html").exists()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run folder .*nowhere does not exist"):
        write_report([tmp_path / "nowhere"])


def test_no_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="folders must name at least one run folder"):
        write_report([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"round": 1,', r"metrics\.jsonl:2: not JSON"),
        ("[1]", r"metrics\.jsonl:2: must be a JSON object, got list"),
        ('{"client": 0}', r"metrics\.jsonl:2: round must be a whole number, got None"),
        (f'{{"round": {10**400}}}', r"metrics\.jsonl:2: round must lie within ±2\^53"),
        (f'{{"round": 1, "bytes_up": {10**400}}}', r"bytes_up must lie within ±2\^53"),
        ('{"round": 1, "seconds": NaN}', r"metrics\.jsonl:2: seconds must lie within .*, got nan"),
        ('{"round": 1, "score_mentor": 1e308}', r"score_mentor must lie within ±1e\+300, got 1e"),
        ('{"round": 1, "client": "a"}', r"metrics\.jsonl:2: client must be a whole number"),
        ('{"round": 1, "score_mentor": "x"}', r"metrics\.jsonl:2: score_mentor must be a number"),
        ('{"round": 1, "layers": 3}', r"metrics\.jsonl:2: layers must be a list"),
        ('{"round": 1, "layers": [{}]}', r"metrics\.jsonl:2: an entry of layers must be an obj"),
        (
            '{"round": 1, "layers": [{"name": "w", "shape": "3"}]}',
            r"metrics\.jsonl:2: shape of w must be a list of whole numbers",
        ),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_run(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n\n,", r"summary\.json: not JSON: .* at character 3"),
        ("[]", r"summary\.json must hold a JSON object, got list"),
        ('{"task": "digits"}', r"summary\.json: method must be a name"),
        ('{"task": 3, "method": "fedkd"}', r"summary\.json: task must be a name"),
    ],
)
def test_malformed_summary_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(folder)


@pytest.mark.parametrize("change", [{"clients": 10**400}, {"shard_sizes": [1, 10**19]}])
def test_counts_that_are_none_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = make_run(tmp_path / "run") / "config.json"
    config = json.loads(path.read_text())
    config |= change if "clients" in change else {"task_facts": change}
    path.write_text(json.dumps(config))
    (name,) = change
    with pytest.raises(ValueError, match=rf"config\.json: {name} must lie within ±2\^53"):
        write_report([path.parent])


@pytest.mark.parametrize("score", [10**400, float("nan"), True, "high"])
def test_scores_that_are_none_are_named(tmp_path: Path, score: object) -> None:
    folder = make_run(tmp_path / "run", scores_mentor=[0.5, score])
    with pytest.raises(ValueError, match=r"summary\.json: scores_mentor must "):
        write_report([folder])


def test_what_a_link_in_a_run_points_to_is_kept(tmp_path: Path) -> None:
    """Run folders come from others, and nobody named what is written there."""
    folder, mine = make_run(tmp_path / "run"), tmp_path / "mine"
    mine.write_text("precious")
    (folder / "report.html").symlink_to(mine)
    assert write_report([folder]) == folder / "report.html"
    assert mine.read_text() == "precious" and not (folder / "report.html").is_symlink()


def test_text_number_in_the_summary_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", score_mentor="high")
    with pytest.raises(ValueError, match=r"summary\.json: score_mentor must be a number or null"):
        write_report([folder])


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json is not UTF-8 text"):
        read_run(folder)


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[report\]"'):
        write_report([folder])
    assert not (folder / "report.html").exists()


def test_existing_page_survives_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", "local")
    page = folder / "report.html"
    page.write_text("before")

    def fail(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([folder])
    monkeypatch.undo()
    assert page.read_text() == "before"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "metrics.jsonl", "report.html", "summary.json"]
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5 s"), (42.71, "42.7 s"), (200.0, "3 min 20 s"), (7320.0, "2 h 2 min")],
)
def test_duration(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (60_900, "60.9 kB"),
        (999_600, "1.00 MB"),
        (2_050_000_000, "2.05 GB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
