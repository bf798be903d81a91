"""Texts from files and from the datasets library, and their score."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedkd_fast.tasks.text import classification_metrics, read_texts
from fedkd_fast.tasks.text_data import Columns, read_cells, read_rows, read_splits


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "line 2: no column 'label'"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text', "line 2: not JSON"),
        ("train.jsonl", "[1, 2]", "line 1: a JSON object is wanted"),
        ("train.jsonl", '{"text": 3, "label": 1}', "line 1: text must be a string, got 3"),
        ("train.jsonl", '{"text": "a", "label": 0.5}', "line 1: label must be .*, got 0.5"),
        ("train.jsonl", "\n", "train.jsonl holds no rows"),
        ("train.tsv", "text\tlabel\na\t1\nb\n", "line 3: 2 columns wanted, .* got 1"),
        ("train.tsv", "sentence\tlabel\na\t1\n", "line 2: no column 'text'"),
        ("train.csv", 'text,label\n"a\nb",1\n"c,1\n', "train.csv, line 4"),
        ("train.jsonl.gz", "this is no gzip", "train.jsonl.gz cannot be read"),
        ("train.json", "{}", "holds no train file: one of train.jsonl, train.jsonl.gz"),
        ("train.jsonl", "\n" + "[" * 100_000, "line 2: not JSON: nested too deeply"),
        ("train.jsonl", '{"text": "\\ud800", "label": 1}', "line 1: text holds half a surrogate"),
        ("train.csv", "text,label,text\na,1,b\n", "line 1: column 'text' occurs twice"),
    ],
)
def test_text_rows_that_cannot_be_read(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_splits(str(tmp_path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_may_be_long(suffix: str, tmp_path: Path) -> None:
    path, text = tmp_path / f"a{suffix}", "word " * 40_000
    path.write_text(f"text\n{text}\n")
    assert read_texts(path) == [text]


@pytest.mark.parametrize("name", ["train.jsonl", "train.tsv", "train.csv.gz"])
def test_bytes_that_are_no_text_are_placed(name: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + 9_000 * b"\n" + b"\xff\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"{name}, line 9001: not UTF-8 text"):
        list(read_rows(tmp_path / name, ()))


def test_text_formats_agree(tmp_path: Path) -> None:
    rows = [("good day", "yes"), ('a "very" bad film', "no")]
    contents = {
        "train.jsonl": "".join(json.dumps({"text": t, "label": c}) + "\n\n" for t, c in rows),
        "train.tsv": "\ufefftext\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in rows),
        "train.csv": "label,text\n" + 'yes,good day\nno,"a ""very"" bad film"\n',
    }
    for number, (name, content) in enumerate(contents.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(content, encoding="utf-8")
        (folder / "test.csv").write_text("text,label\nx,yes\n")
        found = read_splits(str(folder))
        assert [*zip(found["train"].texts, found["train"].labels, strict=True)] == rows
        assert found["test"].labels == ["yes"]


def test_text_data_that_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be a folder or the name of a dataset, got"):
        read_splits(str(tmp_path / "gone"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    for name in ("reviews/nope", "nope/", "./nope", "a/b/c"):
        with pytest.raises(ValueError, match="got '.*': no such folder"):
            read_splits(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("imdb", "owner/imdb"):
        with pytest.raises(ValueError, match="pip install datasets"):
            read_splits(name)


def test_text_from_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "saved")
    assert read_splits(str(tmp_path / "saved"))["train"].labels == ["no", "yes"]
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "half")
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        read_splits(str(tmp_path / "half"))


def test_texts_to_label(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("id\ttext\n1\thello\n")
    assert read_texts(tmp_path / "rows.tsv") == ["hello"]
    lines = ["a\u2028b", "c\x0cd\x85e", "f"]
    content = "\ufeff" + "\r\n".join(lines) + "\n"
    (tmp_path / "lines.txt").write_text(content, encoding="utf-8", newline="")
    assert read_texts(tmp_path / "lines.txt") == lines
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no texts"):
        read_texts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt, line 1: not UTF-8 text"):
        read_texts(tmp_path / "latin.txt")
    (tmp_path / "rows.jsonl").write_text('{"text": null}')
    with pytest.raises(ValueError, match="line 1: text must be a string, got None"):
        read_texts(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"data must be one of \.jsonl, \.tsv, \.csv"):
        read_texts(tmp_path / "rows.parquet")


def test_metrics_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    cases = [
        ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], "binary"),
        ([0, 1, 2, 2], [0, 2, 2, 1], "macro"),
        ([0], [0], "binary"),
    ]
    for truth, guesses, average in cases:
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            truth, guesses, average=average, zero_division=0.0
        )
        wanted = {
            "F1": f1,
            "precision": precision,
            "recall": recall,
            "accuracy": metrics.accuracy_score(truth, guesses),
        }
        classes = 2 if average == "binary" else 3
        found = classification_metrics(np.array(truth), np.array(guesses), classes)
        assert found == pytest.approx(wanted)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("drug,review,side\nx,good day,1\ny,bad,0\n")
    found = read_splits(str(tmp_path), Columns("review", "side"))["train"]
    assert (found.texts, found.labels) == (["good day", "bad"], ["1", "0"])
    assert found.keys == {"drug": ["x", "y"]}
    with pytest.raises(ValueError, match=r"train.csv, line 2: no column 'text'"):
        read_splits(str(tmp_path))


def test_keys_are_columns_that_every_row_has(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "age": 7, "drug": "x"}, {"text": "b", "label": 0, "age": 8}]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    assert read_splits(str(tmp_path))["train"].keys == {"age": ["7", "8"]}


def test_dev_is_read_where_there_is_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\na\t1\n")
    assert set(read_splits(str(tmp_path))) == {"train", "test"}
    (tmp_path / "dev.tsv").write_text("text\tlabel\nb\t1\n")
    assert read_splits(str(tmp_path))["dev"].texts == ["b"]


def test_tables_without_names(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "cells.tsv.gz", "wt", encoding="utf-8") as file:
        file.write('1\t2\t"a\r\n\n3\t4\tb')
    assert [*read_cells(tmp_path / "cells.tsv.gz")] == [
        (1, ["1", "2", '"a']),
        (3, ["3", "4", "b"]),
    ]
    (tmp_path / "cut.tsv.gz").write_bytes((tmp_path / "cells.tsv.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut.tsv.gz cannot be read"):
        list(read_cells(tmp_path / "cut.tsv.gz"))
