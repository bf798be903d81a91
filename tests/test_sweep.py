"""Sweeps: what a file expands to, what is refused, what is skipped, and the tables at the end."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
from cli_support import Refusal, refused

from fedkd_fast.__main__ import main
from fedkd_fast.sweep import PlannedRun, plan_sweep

pytest.importorskip("yaml", reason="sweeps need the extra [train]")
pytest.importorskip("sklearn", reason="training needs the extra [train]")

__all__ = ["refused"]
SHORT = """
common: {rounds: 1, clients: 2, local_steps: 1, threads: 1}
methods: [local, fedkd]
seeds: [0, 3]
"""


def plan(folder: Path, text: str) -> list[PlannedRun]:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return plan_sweep(file, folder / "out")


def test_methods_runs_settings_and_seeds_multiply(tmp_path: Path) -> None:
    runs = plan(
        tmp_path,
        """
        common: {rounds: 7, lr_mentor: 1e-3, distillation: {temperature: 2}}
        methods: {local: , fedkd: {codec: wf0, rounds: 9}}
        runs:
          paper: {method: fedkd, preset: paper}
        settings:
          few: {clients: 2}
          many: {clients: [8, 16], weighting: samples}
        seeds: [1, 2]
        """,
    )
    names = [
        f"{run}-{setting}"
        for run in ("local", "fedkd", "paper")
        for setting in ("few", "many-8", "many-16")
    ]
    assert [run.folder.name for run in runs] == [f"{n}-s{seed}" for n in names for seed in (1, 2)]
    assert [run.name for run in runs] == [name for name in names for _ in range(2)]
    by_name = {run.folder.name: run.config for run in runs}
    config = by_name["fedkd-many-16-s2"]
    assert (config.method, config.codec, config.clients) == ("fedkd", "wf0", 16)
    assert (config.weighting, config.seed, config.rounds) == ("samples", 2, 9)
    assert by_name["local-few-s1"].rounds == 7
    # As a number, which YAML 1.1 does not take it for.
    assert config.lr_mentor == 1e-3
    assert by_name["paper-few-s1"].preset == "paper"
    # What nobody says is the task's choice.
    assert config.weight_decay == 0.3
    assert all(run.config.distillation == {"temperature": 2} for run in runs)
    assert not any(run.finished for run in runs)


def test_parts_of_a_file_can_be_shared(tmp_path: Path) -> None:
    text = """
    runs:
      one: &one {method: fedkd, rounds: 3}
      two: {<<: *one, codec: raw}
    """
    one, two = plan(tmp_path, text)
    assert (one.config.rounds, two.config.rounds, two.config.codec) == (3, 3, "raw")


def test_what_is_merged_in_can_be_shared_again(tmp_path: Path) -> None:
    text = """
    runs:
      one: &one
        method: fedkd
        rounds: 3
      two: &two
        <<: *one
        rounds: 4
      three:
        <<: *two
        codec: raw
    common:
      <<: *two
    """
    configs = [run.config for run in plan(tmp_path, text)]
    assert [config.rounds for config in configs] == [3, 4, 4]
    assert configs[2].codec == "raw"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [fedkd]\nround: 3", r"sweep.yaml: parts are common, .* got 'round'"),
        ("common: {rounds: 3}", "methods or runs must name at least one run"),
        ("[1]", "sweep.yaml must hold a mapping"),
        ("methods: [fedkd\n", "sweep.yaml is no YAML: .*line 2"),
        ("methods: [fedkd, nope]", "sweep.yaml, nope-s0: method must be one of .* got 'nope'"),
        ("methods: fedkd", "methods: names with options are wanted, got 'fedkd'"),
        ("methods: {fedkd: 3}", "sweep.yaml, fedkd: options must be a mapping, got 3"),
        ("methods: {fedkd: {speed: 3}}", "sweep.yaml, fedkd: 'speed' is no field of TrainConfig"),
        ("methods: {fedkd: {seed: 3}}", "seed is no option of a sweep: list it under seeds"),
        ("common: {out: x}\nmethods: [fedkd]", "common: out is no option of a sweep"),
        ("methods: {fedkd: {rounds: 0}}", "sweep.yaml, fedkd-s0: rounds must be at least 1, got 0"),
        ("methods: {fedkd: {rounds: x}}", "fedkd-s0: rounds must be an integer, got 'x'"),
        ("methods: {fedkd: {rounds: [1, 2]}}", "fedkd-s0: rounds must be an integer, got"),
        ("runs: {a b: {}}", "runs: a name must be letters, .* got 'a b'"),
        ("runs: {../a: {}}", "runs: a name must be letters, .* got '../a'"),
        ("runs: {a: {}}\nsettings: {}", "settings: names with options are wanted, got {}"),
        ("runs: {a: {}}\nsettings: {x: {data: [a/b]}}", "settings, x: a name must be letters"),
        ("runs: {a: {}, a: {}}", "key 'a' occurs twice from line 1 on"),
        ("runs: {a: {partition: 2020-13-45}}", "sweep.yaml is no YAML: month must be in 1..12"),
        ("[" * 10_000, "sweep.yaml is no YAML: maximum recursion depth"),
        ("runs: {a: {task: }}", "a-s0: task must be a name or an object .* got None"),
        ("runs: {a: {data: 2018}}", "a-s0: data must be text, got 2018"),
        ("runs: {a: {data: 2020-01-01}}", "a-s0: data must be text, got datetime.date"),
        ("runs: {a: {}}\nsettings: {x: {clients: []}}", "x: clients must list at least one value"),
        ("runs: {a: {}}\nseeds: [0, x]", "seeds: a list of integers is wanted"),
        ("runs: {a: {}}\nseeds: [0, 0]", "two runs would have the name a-s0"),
        ("runs: {fedkd: {}}\nmethods: [fedkd]", "two runs would have the name fedkd-s0"),
    ],
)
def test_files_that_make_no_sense(
    tmp_path: Path, refused: Refusal, text: str, message: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    line = refused("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert re.search(message, line)


def test_dry_run_lists_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(SHORT)
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for name in ("local-s0", "local-s3", "fedkd-s0", "fedkd-s3"):
        assert re.search(
            rf"^{name}\s+digits\s+{name[:-3]}\s+{name[-1]}\s+to do", text, re.MULTILINE
        )
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_sweep_is_trained_compared_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refusal
) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(SHORT)
    command = ["sweep", str(file), "--out", str(out)]
    # What was trained by itself counts as well.
    options = "--rounds 1 --clients 2 --local-steps 1 --threads 1 --method local --seed 3 --quiet"
    assert main(["train", "--out", str(out / "local-s3"), *options.split()]) == 0
    before = (out / "local-s3" / "summary.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "local-s3" / "summary.json").stat().st_mtime_ns == before
    text = capsys.readouterr().out
    assert "1/4 local-s0: " in text and "2/4" not in text
    scores = [
        json.loads((out / f"fedkd-s{seed}" / "summary.json").read_text())["score_mentee"]
        for seed in (0, 3)
    ]
    with (out / "comparison.csv").open() as lines:
        rows = {row["name"]: row for row in csv.DictReader(lines)}
    assert list(rows) == ["local", "fedkd"]
    assert float(rows["fedkd"]["mentee accuracy"]) == pytest.approx(sum(scores) / 2)
    assert rows["local"]["mentee accuracy"] == ""
    assert re.search(r"^\| fedkd \| 2 \| [0-9.]+ ± ", (out / "comparison.md").read_text(), re.M)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (out / "report.html").exists()
    else:
        assert "FedKD on digits" in (out / "report.html").read_text(encoding="utf-8")
    # A second time there is nothing to train, and the same tables come out.
    tables = (out / "comparison.csv").read_bytes()
    assert main([*command, "--quiet"]) == 0
    assert (out / "comparison.csv").read_bytes() == tables
    # A file that asks for something else must not pass off these runs as its own.
    file.write_text(SHORT.replace("rounds: 1", "rounds: 2"))
    line = refused(*command)
    assert f"{out / 'local-s0'} holds a run with rounds 1, where the file asks for 2" in line
    file.write_text(SHORT)
    (out / "fedkd-s0" / "summary.json").unlink()
    assert f"{out / 'fedkd-s0'} exists and is no finished run" in refused(*command)


def test_a_run_that_fails_does_not_keep_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    bad = "{method: local, lr_mentor: 1e30, local_steps: 3}"
    file.write_text(f"{SHORT}runs: {{bad: {bad}}}\n")
    command = ["sweep", str(file), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "bad-s0: training diverged" in said and "bad-s3: training diverged" in said
    done = ["fedkd-s0", "fedkd-s3", "local-s0", "local-s3"]
    folders = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert sorted(folders) == done
    assert "| local" in (tmp_path / "out" / "comparison.md").read_text()
    assert [run.finished for run in plan_sweep(file, tmp_path / "out")] == [True] * 4 + [False] * 2


def test_runs_whose_data_are_gone_stay_finished(tmp_path: Path) -> None:
    folder, run = tmp_path / "data", tmp_path / "out" / "local-s0"
    text = f"common: {{task: text, data: {folder}, mentor: m}}\nmethods: [local]\n"
    (planned,) = plan(tmp_path, text)
    run.mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    config = dataclasses.asdict(planned.config) | {"task_facts": {"content": {"test": "0"}}}
    (run / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path, text)[0].finished
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no train file"):
        plan(tmp_path, text)


def test_paths_take_names_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("common: {task: text, data: $WHERE/reviews, mentor: m}\nmethods: [local]\n")
    with pytest.raises(ValueError, match=r"local-s0: data names \$WHERE, which the environment"):
        plan_sweep(file, tmp_path / "out")
    monkeypatch.setenv("WHERE", "/somewhere")
    (run,) = plan_sweep(file, tmp_path / "out")
    assert run.config.data == "/somewhere/reviews"
