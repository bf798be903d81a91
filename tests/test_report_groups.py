"""The report over seeds: groups, spreads, tables, dev and test data, partial participation."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run
from tiny_task import TinyTask

from fedkd_fast.methods import METHODS
from fedkd_fast.report import build_page, read_runs
from fedkd_fast.report.groups import Group, group_runs
from fedkd_fast.report.layers import spectrum_curves, spectrum_heat_map
from fedkd_fast.report.runs import read_run
from fedkd_fast.report.sections import headline
from fedkd_fast.report.tables import comparison_rows, csv_table, markdown, metric_rows
from fedkd_fast.trainer import train

pytest.importorskip("matplotlib", reason="the report's plots need the extra [report]")

METRICS = ("F1", "precision", "recall")


def _groups(*folders: Path, names: list[str] | None = None) -> list[Group]:
    return group_runs(read_runs(folders, names))


def _change(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Two methods with three seeds each."""
    return [
        make_run(tmp_path / f"{method}-s{seed}", method, seed=seed, rounds=3, metrics=METRICS)
        for method in ("fedkd", "local")
        for seed in range(3)
    ]


def test_runs_that_differ_in_the_seed_are_one_group(seeds: list[Path]) -> None:
    groups = _groups(*seeds)
    assert [group.label for group in groups] == ["fedkd", "local"]
    assert [[run.path for run in group.runs] for group in groups] == [seeds[:3], seeds[3:]]


def test_other_differences_keep_runs_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"{name}-s{seed}", seed=seed) for seed, name in enumerate("ab")]
    _change(folders[1], "config.json", batch_size=64)
    assert [group.label for group in _groups(*folders)] == ["fedkd, a", "fedkd, b"]
    # Where it was written, with what, and what it found there, is no difference.
    _change(folders[1], "config.json", batch_size=32, out="elsewhere", environment={}, version="9")
    assert len(_groups(*folders)) == 1


def test_runs_on_other_data_are_no_seeds_of_one_thing(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"{name}-s{seed}", seed=seed) for seed, name in enumerate("abc")]
    for folder, digest in zip(folders, "12", strict=False):
        _change(folder, "config.json", task_facts={"content": {"train": "0", "test": digest}})
    groups = _groups(*folders)
    # What does not tell, as runs of older versions, may be on any data.
    assert [group.runs for group in groups] == [
        tuple(read_runs([folders[0], folders[2]])),
        tuple(read_runs([folders[1]])),
    ]
    assert len(_groups(*folders, names=["one"] * 3)) == 1


@pytest.mark.parametrize("inference", ["mentor", "mentee", "mean"])
def test_the_score_is_that_of_the_model_that_infers(inference: str, tmp_path: Path) -> None:
    run = train(TinyTask(), "fedkd", inference=inference, out=str(tmp_path / "run"))
    (group,) = _groups(tmp_path / "run")
    assert group.score == run.summary["score"] == run.summary[f"score_{inference}"]
    curve = "mentee" if inference == "mentee" else "mentor"
    assert group.first.best_scores()[2] == pytest.approx(run.summary[f"score_{curve}"])
    scores = {run.summary[f"score_{role}"] for role in ("mentor", "mentee", "mean")}
    assert len(scores) > 1, "the roles cannot be told apart"


def test_the_same_seed_twice_is_no_spread(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("d", "e")]
    assert [group.label for group in _groups(*folders)] == ["fedkd, d", "fedkd, e"]


def test_names_decide_what_belongs_together(seeds: list[Path]) -> None:
    groups = _groups(*seeds[:3], names=["one", "two", "two"])
    assert [(group.label, len(group.runs)) for group in groups] == [("one", 1), ("two", 2)]


def test_means_and_deviations(seeds: list[Path]) -> None:
    scores = [json.loads((f / "summary.json").read_text())["score_mentor"] for f in seeds[:3]]
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    row = comparison_rows(_groups(*seeds))[0]
    assert row[:3] == ("fedkd", "3", f"{100 * mean:.1f} ± {100 * deviation:.1f}%")
    (line,) = csv.DictReader(io.StringIO(csv_table(_groups(*seeds[:3]))))
    assert float(line["mentor F1"]) == pytest.approx(mean)
    assert float(line["mentor F1 std"]) == pytest.approx(deviation)
    assert line["seeds"] == "3"


def test_all_metrics_of_all_models_are_in_the_tables(seeds: list[Path]) -> None:
    groups = _groups(*seeds)
    rows = [*metric_rows(groups)]
    assert [row[:2] for row in rows] == [
        ("fedkd", "mentor"),
        ("fedkd", "mentee"),
        ("fedkd", "both together"),
        ("local", "mentor"),
    ]
    text, page = markdown(groups), build_page(read_runs(seeds))
    for row in rows:
        assert f"| {' | '.join(row)} |" in text
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert page.count("details of seed 0, one of 3 seeds") == 2


def test_the_curve_of_a_group_has_its_range(seeds: list[Path]) -> None:
    (group,) = _groups(*seeds[:3])
    band = group.curve(lambda run: run.scores("mentor"))
    assert band.rounds == [1, 2, 3]
    for at, low, mean, high in zip(*vars(band).values(), strict=True):
        values = [run.scores("mentor")[at] for run in group.runs]
        assert (low, mean, high) == (statistics.fmean(values), min(values), max(values))


def test_dev_and_test_are_called_by_their_names(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", dev=True, rounds=4)
    run = read_run(folder)
    assert run.curve_split == "dev"
    # The last round was scored on test data, which is no point of the curve.
    assert [*run.scores("mentor")] == [1, 2, 3]
    page = build_page([run])
    assert "accuracy on dev data (%)" in page
    assert "final score on the test data" in page
    assert "accuracy on test data (%)" in build_page(read_runs([make_run(tmp_path / "other")]))


def test_traffic_counts_clients_that_did_not_take_part(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", clients=4, rounds=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["client"] in (None, 0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    run = read_run(folder)
    sent = [line["bytes_up"] for line in kept if line["client"] is not None and line["round"] == 1]
    assert run.traffic_by_round("bytes_up")[1][0] == sum(sent) / 4
    received = sum(line["bytes_down"] for line in kept if line["client"] is not None)
    megabytes = sum(line["bytes_up"] for line in kept) + received
    assert run.megabytes_so_far()[2] == pytest.approx(megabytes / 4 / 1e6)
    # The server's row knows the mean over all, also over those without a row of their own.
    server = next(line for line in kept if line["client"] is None)
    assert run.scores("mentor")[1] == server["score_mentor"]


@pytest.mark.parametrize("method", ["fedkd", "fedavg", "local"])
def test_a_page_counts_what_the_run_counted(method: str, tmp_path: Path) -> None:
    fields = {"clients": 5, "participation": 0.4, "rounds": 4, "spectra": True}
    done = train(TinyTask(), method, out=tmp_path / "run", **fields)
    run = read_run(tmp_path / "run")
    for key in ("bytes_up", "bytes_down"):
        assert sum(run.traffic_by_round(key)[1]) == pytest.approx(done.summary[key])
    assert run.shard_sizes == [12] * 5
    assert bool(run.spectra()) == (method != "local")
    # Scored on test data in each round: the last point is the final score.
    role = "mentee" if method == "fedkd" else "mentor"
    assert run.scores(role)[4] == pytest.approx(done.summary[f"score_{role}"])
    assert "environment" in run.config and build_page([run])


def test_spectra_become_pictures(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", spectra=True, rounds=3))
    spectra = run.spectra()
    assert spectra["classifier.weight"][3].ranks == {
        0.5: 4,
        0.8: 5,
        0.9: 6,
        0.95: 7,
        0.98: 8,
        0.99: 9,
    }
    curves, heat = spectrum_curves(run), spectrum_heat_map(run)
    assert curves is not None and "round 1" in curves and "round 3" in curves
    # Rank 5 of 10 in the first round.
    assert heat is not None and "50%" in heat
    page = build_page([run])
    assert "Cumulative energy of the mean updates" in page
    assert "Rank at 95% energy by layer and round" in page
    without = read_run(make_run(tmp_path / "without", rounds=3))
    assert spectrum_curves(without) is None and spectrum_heat_map(without) is None
    assert "Cumulative energy" not in build_page([without])


def test_one_page_shows_environment_and_clients(tmp_path: Path) -> None:
    page = build_page([read_run(make_run(tmp_path / "run"))])
    assert "<summary>Environment</summary><dl><div><dt>python</dt><dd>3.11.7</dd></div>" in page
    assert "Data of the clients" in page
    assert "shard sizes" not in page


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_title(method: str, tmp_path: Path) -> None:
    folder = _change(make_run(tmp_path / "run"), "summary.json", method=method)
    assert not headline(_groups(folder)[0]).startswith(method)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"split": "train"}, "split must be dev, test or null, got 'train'"),
        ({"spectra": 3}, "spectra must be a list"),
        ({"spectra": [{}]}, "an entry of spectra must be an object with a name"),
        ({"spectra": [{"name": "w"}]}, "ranks of w must be whole numbers by energy"),
        ({"spectra": [{"name": "w", "ranks": {"x": 1}}]}, "ranks of w must be whole numbers"),
        ({"spectra": [{"name": "w", "ranks": {}}]}, "full_rank must be a whole number, got None"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"round": 2, **line}))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:6: .*{message}"):
        read_run(folder)


def test_malformed_metrics_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", metrics=("F1",))
    _change(folder, "summary.json", metrics={"mentor": {"F1": "good"}})
    with pytest.raises(ValueError, match=r"summary\.json, metrics, mentor: F1 must be a number"):
        read_run(folder).metrics()
