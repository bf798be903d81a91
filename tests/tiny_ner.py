"""Tagged sentences made on the spot, and a task over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import make_encoder

from fedkd_fast.tasks import TaskOptions
from fedkd_fast.tasks.ner import NerTask

POSITIONS = 32
# Words with their type; two behind each other are one entity. "head ##ache" has two tokens.
DRUGS, ILLNESSES = ["aspirin", "zoloft"], ["headache", "pain"]
PLAIN = ["took", "today", "and", "my", "doctor", "the"]
VOCABULARY = [*DRUGS, "head", "##ache", "pain", *PLAIN]
# Types that words of the two lists are tagged with, by dataset.
DATASETS = {"a": ("Drug", None), "b": (None, "Disease"), "c": ("Drug", "Reaction")}
Rows = list[tuple[list[str], list[str]]]


def make_rows(types: tuple[str | None, str | None], count: int, seed: int) -> Rows:
    """Draw sentences and tag them word by word."""
    generator = np.random.default_rng(seed)
    words = [*DRUGS, *ILLNESSES, *PLAIN]
    kind = {
        **dict.fromkeys(DRUGS, types[0]),
        **dict.fromkeys(ILLNESSES, types[1]),
    }
    rows = []
    for _ in range(count):
        chosen = [words[i] for i in generator.integers(len(words), size=generator.integers(2, 9))]
        tags, before = [], None
        for type_ in map(kind.get, chosen):
            tags.append("O" if type_ is None else f"{'I' if type_ == before else 'B'}-{type_}")
            before = type_
        rows.append((chosen, tags))
    return rows


def write_conll(path: Path, rows: Rows) -> None:
    lines = ["".join(f"{w}\t{t}\n" for w, t in zip(*row, strict=True)) for row in rows]
    path.write_text("\n".join(lines))


def make_dataset(
    folder: Path, types: tuple[str | None, str | None], seed: int, *, dev: bool = False
) -> Path:
    folder.mkdir(parents=True)
    for offset, split in enumerate(("train", "test", "dev")[: 3 if dev else 2]):
        write_conll(folder / f"{split}.conll", make_rows(types, 30, seed + offset))
    return folder


def ner_task(data: Path | str, encoder: str, **options: Any) -> NerTask:
    given = {"max_length": 16} | options
    return NerTask(TaskOptions(data=str(data), mentor=encoder, **given))


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities by the rules of CoNLL's evaluation, written word by word."""
    found, start = set(), None
    for index, tag in enumerate([*tags, "O"]):
        goes_on = start is not None and tag == f"I-{tags[start][2:]}"
        if start is not None and not goes_on:
            found.add((tags[start][2:], start, index))
            start = None
        if tag != "O" and not goes_on:
            start = index
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"), VOCABULARY, POSITIONS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three datasets with different tags, of which two have equally many."""
    for seed, (name, types) in enumerate(DATASETS.items()):
        make_dataset(tmp_path / "data" / name, types, 10 * seed)
    return tmp_path / "data"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "single", ("Drug", "Reaction"), 7, dev=True)
