"""Digests of data: what changes them, and that all built-in tasks have them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_ner import make_dataset
from tiny_news import write_news

from fedkd_fast.tasks import TaskOptions, build_task
from fedkd_fast.tasks.content import changed_splits, content_digest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("seqeval", reason="seqeval is not installed")


def test_every_part_counts() -> None:
    given: list[tuple[object, ...]] = [
        (),
        ([],),
        ([], []),
        (["a", "b"],),
        (["a b"],),
        (["a"], ["b"]),
        (["b"], ["a"]),
        ([["a"], ["b"]],),
        (None,),
        (np.arange(6),),
        (np.arange(6).reshape(2, 3),),
        (np.arange(6.0),),
        (np.arange(3), np.arange(3)),
        (["ä", "\ud800"],),
    ]
    assert len({content_digest(*parts) for parts in given}) == len(given)


def test_digests_are_the_same_everywhere() -> None:
    """In processes with other hash seeds, for other strides and byte orders."""
    code = "from fedkd_fast.tasks.content import *; print(content_digest(['ä'], [1, None]))"
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    assert found == content_digest(["ä"], [1, None]) == "79c8388d9c0d6a5dc5142c38ee3099e8"
    numbers = np.arange(12, dtype=np.int64).reshape(3, 4)
    wanted = content_digest(numbers)
    assert content_digest(np.asfortranarray(numbers)) == wanted
    assert content_digest(numbers.astype(">i8")) == wanted


@pytest.mark.parametrize("began", [None, 3, {"train": "a", "dev": "b"}])
def test_what_changed(began: object) -> None:
    known = isinstance(began, dict)
    assert changed_splits(began, {"train": "a", "test": "c"}) == (["dev", "test"] if known else [])
    assert changed_splits(began, began) == []
    assert changed_splits(began, None) == []


def content(name: str, data: Path | None, **options: Any) -> Mapping[str, str]:
    given = {} if data is None else {"data": str(data), "mentor": "none"}
    found: Mapping[str, str] = build_task(name, TaskOptions(**given, **options)).content  # type: ignore[attr-defined,arg-type]
    return found


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "test", "dev"):
        (folder / f"{split}.csv").write_text(f"text,label,drug\n{split},0,x\nother,1,y\n")
    return folder


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("text", "test.csv", "other", "others"),
        ("text", "dev.csv", "other,1", "other,0"),
        ("adr", "test.csv", "other,1", "other,0"),
        ("ner", "test.conll", "B-Drug", "B-Thing"),
        ("ner", "dev.conll", "took", "takes"),
        ("mind", "MINDsmall_dev/behaviors.tsv", "-1", "-0"),
        ("mind", "MINDsmall_dev/behaviors.tsv", "\tU", "\tV"),
    ],
)
def test_what_models_are_scored_on_counts(
    name: str, file: str, old: str, new: str, tmp_path: Path
) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        if name == "ner":
            make_dataset(folder, ("Drug", None), 0, dev=True)
        elif name == "mind":
            write_news(folder, official=True)
        else:
            write_texts(folder)
    before = content(name, tmp_path / "one")
    # Where data lie, and how they are dealt, are no part of them.
    assert content(name, tmp_path / "two", seed=3, partition="dirichlet:1") == before
    path = tmp_path / "two" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    changed = "test" if name == "mind" else path.stem
    assert changed_splits(before, content(name, tmp_path / "two")) == [changed]


def test_a_key_counts_where_clients_are_dealt_by_it(tmp_path: Path) -> None:
    one, two = write_texts(tmp_path / "one"), write_texts(tmp_path / "two")
    path = two / "train.csv"
    path.write_text(path.read_text().replace(",x", ",y"))
    assert content("text", one) == content("text", two)
    by_key = [content("text", folder, partition="key:drug") for folder in (one, two)]
    assert changed_splits(*by_key) == ["train"]


def test_digits_are_the_same_whatever_the_seed() -> None:
    found = content("digits", None)
    assert set(found) == {"train", "test"}
    assert content("digits", None, seed=3, samples_per_client=5) == found
