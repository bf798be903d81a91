"""The command line on runs: train, evaluate, predict, and their errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_support import Refusal, refused

from fedkd_fast.__main__ import main
from fedkd_fast.report.text import percent, size
from fedkd_fast.tasks import task_defaults

pytest.importorskip("transformers", reason="training needs the extra [train]")
pytest.importorskip("sklearn", reason="training needs the extra [train]")

__all__ = ["refused"]
SHORT = ["--rounds", "1", "--local-epochs", "1", "--clients", "2"]
# The test split of the digits.
SAMPLES = 359


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    assert main(["train", *SHORT, "--inference", "mean", "--out", str(folder), "--quiet"]) == 0
    return folder


def _summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def test_train_writes_a_run_and_its_report(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["method"]) == ("digits", "fedkd")
    assert (config["rounds"], config["local_epochs"], config["clients"]) == (1, 1, 2)
    # What was not given is the task's choice.
    assert config["batch_size"] == task_defaults("digits")["batch_size"]
    assert _summary(run)["score_mentor"] is not None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (run / "report.html").exists()
    else:
        assert "FedKD on digits" in (run / "report.html").read_text(encoding="utf-8")


def test_train_prints_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SHORT, "--method", "local", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    folder = Path("runs") / "digits-local-s3"
    summary = _summary(folder)
    assert re.search(r"^method\s+local on digits", captured.out, re.MULTILINE)
    score = re.escape(percent(summary["score_mentor"]))
    assert re.search(rf"^mentor, accuracy\s+{score}", captured.out, re.MULTILINE)
    assert re.search(r"^traffic per client\s+nothing sent", captured.out, re.MULTILINE)
    assert re.search(rf"^folder\s+{folder}", captured.out, re.MULTILINE)
    assert "mentee" not in captured.out
    # No terminal, no progress bar.
    assert captured.err == ""


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *SHORT, "--method", "fedavg-mentee", "--out", str(out), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert main(["train", *SHORT, "--out", str(out), "--overwrite"]) == 0
    text = capsys.readouterr().out
    summary = _summary(out)
    assert summary["method"] == "fedkd"
    assert f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down" in text
    assert f"{percent(summary['saving'])} against FedAvg of the mentor" in text


def test_evaluate_repeats_the_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    text = capsys.readouterr().out
    summary = _summary(run)
    assert re.search(rf"^mentors, mean\s+{percent(summary['score_mentor'])}$", text, re.MULTILINE)
    assert re.search(rf"^mentee\s+{percent(summary['score_mentee'])}$", text, re.MULTILINE)
    assert re.search(rf"^both together\s+{percent(summary['score_mean'])}$", text, re.MULTILINE)
    for client, score in enumerate(summary["scores_mentor"]):
        assert re.search(rf"^mentor of client {client}\s+{percent(score)}$", text, re.MULTILINE)


def test_predict_prints_one_object_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), "--client", "1"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == SAMPLES
    right = sum(record["label"] == record["truth"] for record in records)
    assert percent(right / SAMPLES) == percent(_summary(run)["scores_mentor"][1])


def test_predict_reads_a_file(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "images.csv"
    data.write_text((",".join(["0"] * 64) + "\n") * 3)
    assert main(["predict", str(run), "--data", str(data)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2]


def test_reader_that_goes_away_is_no_error() -> None:
    # More lines than a pipe holds, from a stand-in, so that the write itself fails.
    program = (
        "import sys, types; runs = types.ModuleType('fedkd_fast.runs'); "
        "runs.predict_run = lambda *a, **k: ({'index': n} for n in range(100_000)); "
        "sys.modules['fedkd_fast.runs'] = runs; "
        "from fedkd_fast.__main__ import main; sys.exit(main(['predict', 'run']))"
    )
    line = f'{sys.executable} -c "{program}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout == '{"index": 0}\n'
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "nope"], "task must be one of digits, .*got 'nope'"),
        (["--method", "nope"], "method must be one of fedkd, .*got 'nope'"),
        (["--codec", "nope"], "codec must be one of wf1, dense, wf0, .*got 'nope'"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--rounds", "two"], "argument --rounds: invalid int value: 'two'"),
        (["--energy-start", "1.5"], r"energy_start must lie in \(0, 1\], got 1.5"),
        (["--energy-end", "0"], r"energy_end must lie in \(0, 1\], got 0"),
        (["--threads", "99999999999"], "threads must be at most 1024, got 99999999999"),
        (["--method", "local", "--lr-mentor", "1e30", *SHORT], "training diverged: .* client 0"),
        (["--lr-mentor", "nan"], "lr_mentor must be positive and finite, got nan"),
        (["--clients", "5000"], "clients must be at most 1438, the training samples, got 5000"),
        (["--mentee-layers", "40"], "mentee_layers must lie in 1"),
        (["--data", "somewhere"], "data must be left out for task digits"),
        (["--task", "text"], "data must name a folder of texts"),
    ],
)
def test_train_refuses(tmp_path: Path, refused: Refusal, options: list[str], message: str) -> None:
    assert re.search(message, refused("train", "--out", tmp_path / "run", *options))


def test_train_keeps_an_existing_folder(run: Path, tmp_path: Path, refused: Refusal) -> None:
    assert f"{run} exists: give --overwrite" in refused("train", "--out", run)
    done = f"{run} has a finished run: there is nothing to resume"
    assert done in refused("train", "--out", run, "--rounds", "2", "--resume")
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    line = refused("train", "--out", other, "--overwrite")
    assert "must be a run folder or empty" in line


def test_train_refuses_an_unwritable_folder(tmp_path: Path, refused: Refusal) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "is a file" in refused("train", "--out", blocked / "run")


def test_folders_that_are_missing_are_no_names_on_a_hub(
    tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "reviews").mkdir()
    for split in ("train", "test"):
        (tmp_path / "reviews" / f"{split}.csv").write_text("text,label\na,0\nb,1\n")
    line = refused("train", "--task", "text", "--data", "reviews/nope", "--mentor", "models")
    assert "got 'reviews/nope': no such folder" in line
    line = refused(
        "train", "--task", "text", "--data", "reviews", "--mentor", "models/nope", "--clients", 2
    )
    assert "got 'models/nope': no such folder" in line


def test_malformed_row_names_file_and_line(tmp_path: Path, refused: Refusal) -> None:
    data = tmp_path / "data"
    data.mkdir()
    good = json.dumps({"text": "fine", "label": 0}) + "\n"
    (data / "train.jsonl").write_text(good + '{"text": \n')
    (data / "test.jsonl").write_text(good)
    options = ["--task", "text", "--data", data, "--mentor", tmp_path]
    line = refused("train", "--out", tmp_path / "run", *options)
    assert re.search(r"train\.jsonl, line 2", line)


def test_a_report_replaces_pages_alone(run: Path, tmp_path: Path, refused: Refusal) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra [report]")
    for kept in (run / "summary.json", run / "mentee" / "config.json"):
        before = kept.read_bytes()
        assert f"{kept} is what is read" in refused("report", run, "-o", kept)
        assert kept.read_bytes() == before
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    for _ in range(2):
        assert main(["report", str(run), "-o", str(link)]) == 0
        assert link.is_symlink() and "FedKD on digits" in page.read_text(encoding="utf-8")


def test_diverged_training_is_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *SHORT, "--lr-mentee", "1e30", "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert re.match(r"fedkd-fast: error: .*diverged.*\n$", line)
    assert list(tmp_path.iterdir()) == []
    assert main(["report", str(out)]) == 2


def test_interrupted_training_is_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedkd_fast.loop.Loop.run", interrupt)
    assert main(["train", *SHORT, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "fedkd-fast: interrupted\n"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_missing_run(tmp_path: Path, refused: Refusal, command: str) -> None:
    assert "no folder of a finished run" in refused(command, tmp_path / "nowhere")


def test_predict_refuses(run: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "client must lie in 0..1, got 9" in refused("predict", run, "--client", "9")
    assert "nowhere.csv: No such file" in refused("predict", run, "--data", "nowhere.csv")
    data = tmp_path / "images.csv"
    data.write_text("1,2\n")
    assert f"{data}, line 1: 64 pixels wanted" in refused("predict", run, "--data", data)


def test_damaged_runs_take_one_line(run: Path, tmp_path: Path, refused: Refusal) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "mentee" / "config.json").unlink()
    assert "mentee holds no config.json" in refused("evaluate", copy)
    shutil.copy(run / "mentors" / "0" / "config.json", copy / "mentee")
    assert "mentee/model.safetensors does not fit config.json" in refused("evaluate", copy)
    (copy / "config.json").write_text("[1]")
    assert "config.json must hold a JSON object" in refused("predict", copy)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04")
    assert f"{broken} cannot be read as images" in refused("predict", run, "--data", broken)


def test_missing_extra_is_named(
    tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr("fedkd_fast.trainer.train", missing)
    line = refused("train", "--out", tmp_path / "run")
    assert 'transformers is not installed: pip install "fedkd-fast[train]"' in line
