"""The built-in tasks: digits, and text with an encoder made on the spot."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import make_encoder

from fedkd_fast.models import load_model, parameter_count, run_model, trainable_parameters
from fedkd_fast.runs import evaluate_run, load_run, predict_run
from fedkd_fast.tasks import PredictingTask, TaskOptions, build_task, task_defaults
from fedkd_fast.trainer import train

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fedkd_fast.tasks.digits import CLASSES, DigitsTask, read_images
from fedkd_fast.tasks.text import TextTask, classification_metrics

# The mentee must not be so small that its savings are trivial.
SMALLEST_SHARE = 1 / 6
# Correlation of two augmented copies of an image.
STILL_ALIKE = 0.5
WORDS = ["good", "fine", "nice", "bad", "poor", "awful", "very", "day", "film", "book"]
POSITIVE = set(WORDS[:3])
# Of the encoder: just enough for the default length of texts.
POSITIONS = TaskOptions().max_length

DataMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def digits() -> DigitsTask:
    return DigitsTask()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of three tiny layers with random weights and a vocabulary of ten words."""
    return make_encoder(tmp_path_factory.mktemp("encoder"), WORDS, POSITIONS)


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [WORDS[i] for i in generator.integers(len(WORDS), size=generator.integers(2, 9))]
        rows.append({"text": " ".join(words), "label": int(bool(POSITIVE & set(words)))})
    return rows


@pytest.fixture
def make_data(tmp_path: Path) -> DataMaker:
    def make(name: str = "data", count: int = 40) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for seed, split in enumerate(("train", "test")):
            with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in sentences(count, seed))
        return folder

    return make


def text_task(data: Path, encoder: str, **options: Any) -> TextTask:
    return TextTask(TaskOptions(data=str(data), mentor=encoder, **options))


# Digits


def test_digits_split_is_fixed_and_stratified(digits: DigitsTask) -> None:
    facts, again = digits.describe(), DigitsTask(TaskOptions(seed=5))
    assert facts["samples_train"] + facts["samples_test"] == 1797
    assert facts["samples_test"] == 359
    truth = [record["truth"] for record in digits.predict(digits.build_mentee(), None)]
    assert truth == [record["truth"] for record in again.predict(again.build_mentee(), None)]
    assert min(np.bincount(truth)) >= 34


@pytest.mark.parametrize("clients", [1, 4, 400])
def test_digits_shards_are_a_partition(digits: DigitsTask, clients: int) -> None:
    shards = digits.shards(clients, 1)
    assert len(shards) == clients
    assert all(len(shard) for shard in shards)
    everything = digits.merge(shards)
    assert len(np.unique(everything)) == len(everything) == digits.describe()["samples_train"]
    again = digits.shards(clients, 1)
    assert all(np.array_equal(one, two) for one, two in zip(shards, again, strict=True))
    if clients > 1:
        other = digits.shards(clients, 2)
        assert not all(np.array_equal(one, two) for one, two in zip(shards, other, strict=True))


def test_digits_too_many_clients(digits: DigitsTask) -> None:
    with pytest.raises(ValueError, match="clients must be at most 1438, .* got 1439"):
        digits.shards(1439, 0)


def test_digits_batches_cover_a_shard(digits: DigitsTask) -> None:
    shard = digits.shards(4, 0)[0]
    epoch, again, other = (list(digits.batches(shard, seed)) for seed in (0, 0, 1))
    assert sum(len(batch.labels) for batch in epoch) == len(shard)
    assert epoch[0].inputs["pixel_values"].shape[1:] == (1, 8, 8)
    assert torch.equal(epoch[0].labels, again[0].labels)
    assert not torch.equal(epoch[0].labels, other[0].labels)


def test_digits_models(digits: DigitsTask) -> None:
    mentor, mentee = digits.build_mentor(), digits.build_mentee()
    share = parameter_count(mentee) / parameter_count(mentor)
    assert SMALLEST_SHARE <= share < 1
    twin = digits.build_mentor()
    assert all(
        torch.equal(a, b) for a, b in zip(mentor.parameters(), twin.parameters(), strict=True)
    )
    # The mentee begins as the first layers of the mentor, head included.
    weights = mentor.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in mentee.state_dict().items())
    images = next(iter(digits.batches(digits.shards(4, 0)[0], 0))).inputs
    outputs = run_model(mentee, images, layers=True)
    assert outputs.logits.shape[1] == CLASSES
    assert outputs.attentions is not None
    assert outputs.hidden_states is not None
    assert len(outputs.hidden_states) == len(outputs.attentions) + 1
    mentor.train()
    scores = digits.evaluate(mentor)
    assert [*scores] == [digits.metric]
    assert 0.0 <= scores[digits.metric] <= 1.0
    assert mentor.training


def test_digits_are_augmented_a_little(digits: DigitsTask) -> None:
    shard = digits.shards(4, 0)[0][:1]
    (first,), (again,), (other,) = (list(digits.batches(shard, seed)) for seed in (0, 0, 1))
    images = [batch.inputs["pixel_values"] for batch in (first, again, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    # Still the same digit on the same background.
    assert float(images[0].min()) == pytest.approx(float(images[2].min()))
    both = torch.stack([image.flatten() for image in (images[0], images[2])])
    assert float(torch.corrcoef(both)[0, 1]) > STILL_ALIKE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x"}, "data must be left out for task digits, .* got 'x'"),
        ({"mentor": "x"}, "mentor must be left out for task digits, .* got 'x'"),
        ({"mentee": "x"}, "mentee must be left out for task digits, .* got 'x'"),
        ({"mentee_layers": 9}, r"mentee_layers must lie in 1\.\.\d, .* got 9"),
    ],
)
def test_digits_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task("digits", TaskOptions(**options))


def test_digits_concentration() -> None:
    with pytest.raises(ValueError, match="concentration must be positive, got 0.0"):
        DigitsTask(concentration=0.0)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_digits_are_read_from_files(digits: DigitsTask, suffix: str, tmp_path: Path) -> None:
    images = np.arange(2 * 64).reshape(2, 8, 8) % 17
    path = tmp_path / f"images{suffix}"
    if suffix == ".npy":
        np.save(path, images)
    elif suffix == ".npz":
        np.savez(path, images=images)
    else:
        np.savetxt(path, images.reshape(2, 64), delimiter=",", fmt="%d")
    assert np.array_equal(read_images(str(path)), images.reshape(2, 64))
    records = list(digits.predict(digits.build_mentee(), str(path)))
    assert [record["index"] for record in records] == [0, 1]
    assert all(0 <= record["label"] < CLASSES for record in records)
    assert all(1 / CLASSES <= record["probability"] <= 1 for record in records)


def test_one_digit_is_a_file_too(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((8, 8)))
    assert read_images(str(tmp_path / "one.npy")).shape == (1, 64)


def test_digits_files_that_hold_something_else(tmp_path: Path) -> None:
    def refuse(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_images(str(tmp_path / name))

    np.save(tmp_path / "wide.npy", np.zeros((3, 9, 9)))
    refuse("wide.npy", r"must hold 8×8 images, .* got \(3, 9, 9\)")
    np.save(tmp_path / "bright.npy", np.full((1, 64), 255))
    refuse("bright.npy", r"must hold pixels within 0\.\.16, got 255")
    np.save(tmp_path / "nan.npy", np.full((1, 64), np.nan))
    refuse("nan.npy", "must hold pixels within")
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    refuse("code.npy", "cannot be read as images")
    np.savez(tmp_path / "two.npz", a=np.zeros(64), b=np.zeros(64))
    refuse("two.npz", "one array is expected, got a, b")
    for name in ("cut.npz", "cut.npy"):
        np.savez_compressed(tmp_path / "cut.npz", np.zeros((9, 64)))
        np.save(tmp_path / "cut.npy", np.zeros((9, 64)))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
        refuse(name, f"{name} cannot be read as images")
    np.save(tmp_path / "complex.npy", np.zeros((1, 64), dtype=complex))
    refuse("complex.npy", "pixels must be real numbers, got dtype complex128")
    np.save(tmp_path / "fields.npy", np.zeros(64, dtype=[("a", "f4"), ("b", "f4")]))
    refuse("fields.npy", "pixels must be real numbers, got dtype")
    (tmp_path / "latin.csv").write_bytes(b"0," * 50 + b"\xff")
    refuse("latin.csv", r"latin.csv is not UTF-8 text: .* at byte 100")
    (tmp_path / "long.csv").write_text("1" * 200_000)
    refuse("long.csv", "long.csv, line 1: field larger than field limit")
    (tmp_path / "short.csv").write_text("\n" + "0," * 63 + "0\n1,2,3\n")
    refuse("short.csv", "short.csv, line 3: 64 pixels wanted, got 3")
    (tmp_path / "words.csv").write_text("a,b\n")
    refuse("words.csv", "words.csv, line 1: could not convert")
    (tmp_path / "empty.csv").write_text("")
    refuse("empty.csv", "holds no images")
    refuse("images.png", "data must be a .npy, .npz or .csv file of 8×8 images")


def test_digits_end_to_end(tmp_path: Path) -> None:
    run = train("digits", "fedkd", rounds=1, local_epochs=1, clients=2, out=str(tmp_path / "run"))
    assert run.config.threads == task_defaults("digits")["threads"]
    assert evaluate_run(tmp_path / "run")["score_mentor"] == run.summary["score_mentor"]
    records = list(predict_run(tmp_path / "run"))
    right = [record["label"] == record["truth"] for record in records]
    assert np.mean(right) == pytest.approx(run.summary["score_mentee"])
    assert len(list(predict_run(tmp_path / "run", client=1))) == len(records)
    with pytest.raises(ValueError, match=r"client must lie in 0\.\.1, got 2"):
        predict_run(tmp_path / "run", client=2)


# Text


def test_text_models_share_what_is_frozen(make_data: DataMaker, encoder: str) -> None:
    task = text_task(make_data(), encoder)
    assert isinstance(task, PredictingTask)
    mentor, mentee = task.build_mentor(), task.build_mentee()
    counts = [len(model.bert.encoder.layer) for model in (mentor, mentee)]  # type: ignore[union-attr,arg-type]
    assert counts == [3, 1]
    assert not [name for name in trainable_parameters(mentee) if "embeddings" in name]
    states = mentor.state_dict()
    # The first layer, the frozen embeddings and the new head are the same in both.
    for name, value in mentee.state_dict().items():
        assert torch.equal(value, states[name]), name
    assert all(
        torch.equal(a, b)
        for a, b in zip(mentor.parameters(), task.build_mentor().parameters(), strict=True)
    )


def test_text_batches(make_data: DataMaker, encoder: str) -> None:
    task = text_task(make_data(count=50), encoder, batch_size=8, max_length=6)
    shards = task.shards(3, 0)
    assert sorted(task.merge(shards)) == list(range(50))
    epoch, again = list(task.batches(shards[0], 4)), list(task.batches(shards[0], 4))
    assert sum(len(batch.labels) for batch in epoch) == len(shards[0])
    for batch, twin in zip(epoch, again, strict=True):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert torch.equal(ids, twin.inputs["input_ids"])
        assert ids.shape == mask.shape
        assert ids.shape[1] <= 6
        assert bool((mask.sum(1) == (ids != 0).sum(1)).all())
        assert int(mask.sum(1).max()) == ids.shape[1]
    with pytest.raises(
        ValueError, match="clients must be at most 50, the training samples, got 51"
    ):
        task.shards(51, 0)


def test_text_predictions_keep_their_order(make_data: DataMaker, encoder: str) -> None:
    task = text_task(make_data(), encoder)
    model = task.build_mentee()
    records = list(task.predict(model, None))
    assert [record["text"] for record in records] == [row["text"] for row in sentences(40, 1)]
    found = np.array([int(record["label"]) for record in records])
    truth = np.array([int(record["truth"]) for record in records])
    assert classification_metrics(truth, found, 2) == task.evaluate(model)


def test_text_dev_data_are_another_split(make_data: DataMaker, encoder: str) -> None:
    folder = make_data()
    assert not text_task(folder, encoder).has_dev
    rows = [{"text": "good", "label": label} for label in (1, 1, 0)]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = text_task(folder, encoder)
    assert task.has_dev and task.describe()["samples_dev"] == 3
    # One text, so one guess: the accuracy tells which split was scored.
    scores = task.evaluate(task.build_mentee(), split="dev")
    assert scores["accuracy"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert set(scores) == {"F1", "precision", "recall", "accuracy"}


@pytest.mark.parametrize("method", ["fedkd", "fedavg"])
def test_text_end_to_end(
    method: str, make_data: DataMaker, encoder: str, tmp_path: Path, capfd: Any
) -> None:
    data = make_data()
    fields = {"data": str(data), "mentor": encoder, "mentee_layers": 2, "clients": 2, "rounds": 1}
    run = train("text", method, out=str(tmp_path / "run"), **fields)
    assert capfd.readouterr() == ("", "")
    assert run.summary["metric"] == "F1"
    assert run.summary["parameters_shared"] < run.summary["parameters_mentor"]
    assert evaluate_run(tmp_path / "run")["score_mentor"] == run.summary["score_mentor"]
    texts = tmp_path / "texts.txt"
    texts.write_text("good day\n\nawful film\n")
    # A run must be usable where neither its data nor its pretrained encoder are.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config | {"data": "/gone", "mentor": "/gone"})
    )
    records = list(predict_run(tmp_path / "run", str(texts)))
    assert [record["text"] for record in records] == ["good day", "awful film"]
    assert {record["label"] for record in records} <= {"0", "1"}


def test_text_models_are_ordinary_transformers_folders(
    make_data: DataMaker, encoder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    fields = {"data": str(make_data()), "mentor": encoder, "clients": 2, "rounds": 1}
    train("text", "fedkd", out=str(tmp_path / "run"), **fields)
    folder = tmp_path / "run" / "mentors" / "1"
    mine = load_model(folder, lambda: pytest.fail("a model of transformers needs no builder"))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert AutoTokenizer.from_pretrained(folder)("good")["input_ids"]
    assert len(load_run(tmp_path / "run").mentors) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "data must name a folder of texts for task text, got None"),
        ({"mentor": None}, "mentor must name a pretrained encoder for task text, got None"),
        ({"mentor": "/nowhere"}, "mentor must be a folder or name .* got '/nowhere'"),
        ({"mentee_layers": 4}, r"mentee_layers must lie in 1\.\.3, .* got 4"),
        ({"max_length": 2}, "max_length must be at least 3, got 2"),
        ({"max_length": POSITIONS + 1}, f"max_length must be at most {POSITIONS}, .* got"),
        ({"mentor": "./nope"}, "mentor must be a folder or name .*: no such folder"),
    ],
)
def test_text_options(
    options: dict[str, Any], message: str, make_data: DataMaker, encoder: str, tmp_path: Path
) -> None:
    fields = {"data": str(make_data()), "mentor": encoder, "rounds": 1} | options
    with pytest.raises(ValueError, match=message):
        train("text", "fedkd", out=str(tmp_path / "run"), **fields)
    assert not (tmp_path / "run").exists()


def test_text_labels(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,9\nc,10\n")
    (tmp_path / "test.csv").write_text("text,label\na,10\nb,8\n")
    task = text_task(tmp_path, encoder)
    assert task.labels == ["9", "10"]
    with pytest.raises(ValueError, match=r"test.csv, line 3: label '8' never occurs in training"):
        task.evaluate(task.build_mentee())
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,--1\nc,9\n")
    assert text_task(tmp_path, encoder).labels == ["--1", "10", "9"]
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,01\nc,-2\n")
    assert text_task(tmp_path, encoder).labels == ["-2", "01", "1"]
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,1\n")
    with pytest.raises(ValueError, match=r"at least two classes, got \['1'\]"):
        _ = text_task(tmp_path, encoder).labels


def test_text_models_are_not_scored_on_other_labels(tmp_path: Path, encoder: str) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,no\nb,yes\n")
    run = tmp_path / "run"
    train("text", "local", data=str(tmp_path), mentor=encoder, clients=1, rounds=1, out=run)
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,zebra\nb,yes\n")
    wanted = r"labels are not those of the run: \['yes', 'zebra'\], the model has \['no', 'yes'\]"
    with pytest.raises(ValueError, match=wanted):
        evaluate_run(run)


def test_a_name_on_a_hub_is_looked_up_here_first(
    make_data: DataMaker, encoder: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from transformers import AutoConfig

    asked = []

    def load(source: str, **options: Any) -> Any:
        asked.append(options)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying")
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", load)
    with pytest.raises(ValueError, match="got 'owner/encoder': We couldn't connect$"):
        text_task(make_data(), "owner/encoder").build_mentee()
    assert asked == [{"local_files_only": True}, {}]
    with pytest.raises(ValueError, match="We couldn't connect"):
        text_task(make_data("more"), encoder).build_mentee()
    assert asked[2:] == [{"local_files_only": True}]
    assert capfd.readouterr() == ("", "")
