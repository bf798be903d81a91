"""Run folders: how they come to be, what they replace, and how damaged ones are refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import TinyTask
from torch import nn

from fedkd_fast import loop
from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.methods import METHODS
from fedkd_fast.models import build_vit, load_model, save_model
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.runs import evaluate_run, load_run, predict_run
from fedkd_fast.trainer import resume_run, train


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="out must not exist without overwrite"):
        train(TinyTask(), out=str(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(TinyTask(), "fedkd", out=str(out))
    (out / "notes.txt").write_text("mine")
    train(TinyTask(), "fedavg-mentee", out=str(out), overwrite=True)
    assert json.loads((out / "summary.json").read_text())["method"] == "fedavg-mentee"
    assert not (out / "mentors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="out must be a run folder or empty"):
        train(TinyTask(), out=str(other), overwrite=True)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_files_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        train(TinyTask(), out=str(file), overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        train(TinyTask(), out=str(file / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="out cannot be written"):
        train(TinyTask(), out=str(tmp_path / "run"))


def test_nothing_is_written_before_everything_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: TrainConfig, client: Client, method: object) -> None:
        raise ValueError("late check")

    monkeypatch.setattr(loop, "make_server", fail)
    with pytest.raises(ValueError, match="late check"):
        train(TinyTask(), out=str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


class Stop(TinyTask):
    """Fails, or is interrupted, when models are evaluated for the first time."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        raise self.error("stop")


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_failed_leaves_no_trace(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error, match="stop"):
        train(Stop(error), "local", clients=1, out=str(tmp_path / "runs" / "one"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_failed_replaces_nothing(error: type[BaseException], tmp_path: Path) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    before = content(tmp_path)
    with pytest.raises(error, match="stop"):
        train(Stop(error), "local", clients=1, out=str(tmp_path / "run"), overwrite=True)
    assert content(tmp_path) == before


def test_a_run_that_cannot_be_put_into_its_place_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    before = content(tmp_path / "run")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        # The new mentors, when the older run is out of the way and the first files are in place.
        if target == tmp_path / "run" / "config.json" and source.parent.name == "run":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        train(TinyTask(), "local", out=str(tmp_path / "run"), overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path / "run") == before
    # The new one is all there, and takes its place when there is one.
    run = resume_run(tmp_path / "run", task=TinyTask())
    assert run.summary["method"] == "local"
    assert load_run(tmp_path / "run", TinyTask()).summary == run.summary
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def write_another(_: RoundRecord | ClientRecord) -> None:
        if not out.exists():
            train(TinyTask(), "fedkd", out=tmp_path / "other")
            (tmp_path / "other").rename(out)

    with pytest.raises(OSError, match="not empty"):
        train(TinyTask(), "local", out=out, progress=write_another)
    assert load_run(out, TinyTask()).summary["method"] == "fedkd"
    train(TinyTask(), "local", out=out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


def test_metrics_are_on_the_disk_while_training(tmp_path: Path) -> None:
    seen = []

    def look(record: RoundRecord | ClientRecord) -> None:
        if isinstance(record, ClientRecord):
            return
        (metrics,) = tmp_path.glob(".run.partial/run/metrics.jsonl")
        seen.append(len(metrics.read_text().splitlines()))
        assert not (tmp_path / "run").exists()

    train(TinyTask(), "local", out=tmp_path / "run", progress=look)
    assert seen == [3, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_events_lie_in_the_run(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="events need the extra [tensorboard]",
    )
    seen = []

    def look(record: RoundRecord | ClientRecord) -> None:
        if isinstance(record, ClientRecord):
            return
        (events,) = tmp_path.glob(".run.partial/run/events/*")
        seen.append(events.stat().st_size)

    run = train(
        *(TinyTask(), "fedkd"),
        rounds=3,
        out=tmp_path / "run",
        tensorboard=True,
        inference="mean",
        progress=look,
    )
    assert seen == sorted(seen) and seen[0] < seen[-1]
    read = accumulators.EventAccumulator(str(tmp_path / "run" / "events"))
    read.Reload()
    found = {
        tag: {one.step: one.value for one in read.Scalars(tag)} for tag in read.Tags()["scalars"]
    }
    assert found["score_test/mentee"][3] == pytest.approx(run.summary["score_mentee"])
    assert found["score_test/both"][3] == pytest.approx(run.summary["score_mean"])
    assert sum(found["bytes/up"].values()) == pytest.approx(run.summary["bytes_up"])
    assert found["energy"] == pytest.approx({1: 0.95, 2: 0.965, 3: 0.98})
    assert set(found["loss/mentor"]) == {1, 2, 3}
    # A run that replaces another one brings its own events only.
    before = {path.name for path in (tmp_path / "run" / "events").iterdir()}
    train(TinyTask(), "local", out=tmp_path / "run", tensorboard=True, overwrite=True)
    after = {path.name for path in (tmp_path / "run" / "events").iterdir()}
    assert len(after) == 1 and not before & after


def test_events_need_a_folder_and_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="tensorboard needs out, .* got None"):
        train(TinyTask(), tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[tensorboard\]"'):
        train(TinyTask(), tensorboard=True, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_knows_its_environment(tmp_path: Path) -> None:
    train(TinyTask(), "local", out=tmp_path / "run", threads=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["threads"] == 1
    assert config["task_facts"]["shard_sizes"] == [20, 20, 20]


def test_paths_are_kept_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    train(TinyTask(), "local", out="run", data="reviews", mentor="owner/encoder")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["mentor"]) == (str(tmp_path / "reviews"), "owner/encoder")


def test_a_score_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    class Undefined(TinyTask):
        def evaluate(
            self, model: nn.Module, *, split: str = "test", client: int = 0
        ) -> dict[str, float]:
            return {"accuracy": float("nan")}

    with pytest.raises(ValueError, match="must be finite, got accuracy nan of the mentor"):
        train(Undefined(), "local", out=str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


# Adapters of fedlora need models with attention.
@pytest.mark.parametrize("method", [method for method in METHODS if method != "fedlora"])
def test_a_run_is_read_back(method: str, tmp_path: Path) -> None:
    run = train(TinyTask(), method, out=str(tmp_path / "run"))
    loaded = load_run(tmp_path / "run", TinyTask())
    assert loaded.summary == run.summary
    assert len(loaded.mentors) == len(run.mentors)
    pairs = [*zip(run.mentors, loaded.mentors, strict=True)]
    if run.mentee is not None:
        assert loaded.mentee is not None
        pairs.append((run.mentee, loaded.mentee))
    for model, copy in pairs:
        assert not copy.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, copy.state_dict()[name])
    again = evaluate_run(tmp_path / "run", TinyTask())
    for key in ("score_mentor", "score_mentee", "score_mean", "metrics"):
        assert again[key] == run.summary[key]


def test_a_run_that_lost_a_model_is_not_scored(tmp_path: Path) -> None:
    train(TinyTask(), "local", clients=3, out=str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "mentors" / "2")
    with pytest.raises(ValueError, match=r"a mentor for each of the 3 scores in .*, got 2"):
        evaluate_run(tmp_path / "run", TinyTask())


class Digested(TinyTask):
    """Tells what its data hold."""

    def __init__(self, content: object) -> None:
        super().__init__()
        self.content = content


def test_scores_on_other_data_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Digested({"train": "a", "test": "b"}), "local", out=str(tmp_path / "run"))
    evaluate_run(tmp_path / "run", Digested({"train": "c", "test": "b"}))
    assert not caplog.records
    evaluate_run(tmp_path / "run", Digested({"train": "a", "test": "c"}))
    assert "the test data are not those that the run was scored on" in caplog.text


@pytest.mark.parametrize("content", ["abc", {"test": b"abc"}, ["test"]])
def test_digests_that_are_none_are_refused(content: object) -> None:
    with pytest.raises(TypeError, match=r"task\.content must map names of splits to digests, got"):
        train(Digested(content), "local")


def test_reading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a finished run"):
        load_run(tmp_path)
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="run of task 'tiny', which is not built in: pass task="):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json: not JSON: "):
        load_run(tmp_path / "run", TinyTask())


def test_prediction_needs_a_task_that_can(tmp_path: Path) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    with pytest.raises(TypeError, match="task 'tiny' cannot predict"):
        predict_run(tmp_path / "run", task=TinyTask())


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def cut(run: Path) -> None:
    weights = run / "mentee" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def remove_models(run: Path) -> None:
    for name in ("mentee", "mentors"):
        (run / name).rename(run / f"no {name}")


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (put("config.json", "[1]"), "config.json must hold a JSON object, got list"),
    (put("summary.json", "null"), "summary.json must hold a JSON object, got NoneType"),
    (put("summary.json", "[" * 100_000), "summary.json: not JSON: nested too deeply"),
    (put("summary.json", "9" * 10_000), "summary.json: .*integer string conversion"),
    (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json is not UTF-8 .* byte 0"),
    (cut, "mentee.model.safetensors cannot be loaded: .*incomplete"),
    (lambda run: (run / "mentors" / "x").mkdir(), "mentors must hold folders .* got 0, 1, 2, x"),
    (lambda run: (run / "mentors" / "1").rename(run / "1"), "mentors must hold .* got 0, 2"),
    (remove_models, "run holds no models: mentee or mentors is wanted"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_runs_are_refused(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "run", TinyTask())


def test_a_configuration_of_a_run_that_makes_no_sense(tmp_path: Path) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"))
    config = tmp_path / "run" / "config.json"
    for field, value in (("rounds", "many"), ("threads", 200_000), ("method", [])):
        known = json.loads(config.read_text()) | {"task": "digits", field: value}
        (tmp_path / "run" / "config.json").write_text(json.dumps(known))
        with pytest.raises(ValueError, match=r"config.json: "):
            load_run(tmp_path / "run")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_model(nn.Linear(3, 2), tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be loaded: .*size mismatch"):
        load_model(tmp_path / "model", lambda: nn.Linear(3, 3))


def tiny_vit() -> nn.Module:
    return build_vit(
        image_size=8,
        patch_size=(1, 8),
        hidden=8,
        layers=1,
        heads=2,
        intermediate=8,
        classes=3,
        initializer_range=0.1,
        seed=0,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, r"model.safetensors does not fit .* \d+ missing weights"),
        ({"num_hidden_layers": 0}, r"model.safetensors does not fit .* \d+ unexpected weights"),
        ({"hidden_size": 16}, r"model.safetensors does not fit .* \d+ mismatched weights"),
        ({"hidden_size": "x"}, "model cannot be loaded: .*hidden_size"),
        ({"num_attention_heads": 0}, "model cannot be loaded: .*zero"),
        ({"architectures": ["Nope"]}, "config.json names no model of transformers, got 'Nope'"),
        ({"architectures": [1]}, "config.json names no model of transformers, got 1"),
        ({"architectures": ["pipeline"]}, "config.json names no model .*'pipeline'"),
        ({"architectures": None}, "config.json names no model of transformers, got None"),
    ],
)
def test_models_that_do_not_fit_their_configuration(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_model(tiny_vit(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model", tiny_vit)


def test_damaged_models_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_model(tiny_vit(), tmp_path / "model")
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"model cannot be loaded: .*incomplete"):
        load_model(tmp_path / "model", tiny_vit)
    weights.write_bytes(whole)
    assert torch.equal(
        next(load_model(tmp_path / "model", tiny_vit).parameters()), next(tiny_vit().parameters())
    )
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, got list"):
        load_model(tmp_path / "model", tiny_vit)
    config.unlink()
    with pytest.raises(ValueError, match=r"model holds no config.json"):
        load_model(tmp_path / "model", tiny_vit)
