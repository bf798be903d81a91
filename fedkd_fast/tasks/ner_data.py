"""Tagged sentences from CoNLL files, annotated texts, or the datasets library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedkd_fast._files import names_folder
from fedkd_fast.tasks.brat import is_brat, read_brat
from fedkd_fast.tasks.tagging import Mark, Sentence, iob2, read_tag, words_of
from fedkd_fast.tasks.text import read_texts
from fedkd_fast.tasks.text_data import (
    TEXT,
    Columns,
    check_text,
    dataset_splits,
    read_lines,
    read_rows,
)

FORMATS = (".conll", ".txt", ".tsv")
TOKENS = "tokens"
_NAMES = {"train": ("train",), "test": ("test",), "dev": ("dev", "devel", "valid")}
# Stands between the documents of files in CoNLL's format.
_DOCUMENT = "-DOCSTART-"
_SAVED = "dataset_dict.json"

Splits = dict[str, list[Sentence]]


def find_datasets(data: str) -> list[str]:
    """Tell which datasets are meant: one a client, or a single one.

    Args:
        data: a dataset, a folder that holds datasets alone, or datasets joined by commas.

    Raises:
        ValueError: a folder that is no dataset and holds something else.
    """
    folder = Path(data)
    if not folder.exists():
        return [part.strip() for part in data.split(",")]
    if not folder.is_dir() or _is_dataset(folder):
        return [data]
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    other = [path for path in inside if not _is_dataset(path)]
    if other or not inside:
        raise ValueError(
            f"data folder {other[0] if other else folder} holds no {_file_names('train')}, no .ann "
            f"files beside texts, and no {_SAVED}"
        )
    return [str(path) for path in inside]


def _is_dataset(folder: Path) -> bool:
    return (folder / _SAVED).is_file() or bool(_files(folder, "train")) or is_brat(folder)


def read_dataset(data: str, columns: Columns) -> Splits:
    """Read the splits ``train``, ``test`` and, where there is one, ``dev``, of one dataset.

    A folder holds files in CoNLL's format: .conll, .txt or .tsv, each perhaps with .gz behind, with
    a word in the first column and its tag in the last, and an empty line behind each sentence. Or
    it holds texts and annotations, as `read_brat` reads them. Anything that is no folder is taken
    as the name of a dataset of the datasets library, whose ``validation`` is ``dev``, and so is a
    folder of its ``save_to_disk``; ``columns`` are its lists of words and of tags.

    Raises:
        ValueError: no such data, a missing split, a malformed row; names file and line.
        OSError: a file cannot be read.
    """
    folder = Path(data)
    if (folder / _SAVED).is_file():
        splits = _from_datasets(data, columns, saved=True)
    elif folder.is_dir():
        splits = _from_folder(folder)
    elif folder.exists() or names_folder(data):
        what = "no folder" if folder.exists() else "no such folder"
        raise ValueError(f"data must be a folder or the name of a dataset, got {data!r}: {what}")
    else:
        splits = _from_datasets(data, columns, saved=False)
    for split, sentences in splits.items():
        if not sentences:
            raise ValueError(f"data {data} hold no sentences in {split}")
    return splits


def _file_names(split: str) -> str:
    return f"{split} file ({', '.join(FORMATS)}, perhaps with .gz)"


def _files(folder: Path, split: str) -> list[Path]:
    names = [
        f"{name}{suffix}{packed}"
        for name in _NAMES[split]
        for suffix in FORMATS
        for packed in ("", ".gz")
    ]
    return [folder / name for name in names if (folder / name).is_file()]


def _from_folder(folder: Path) -> Splits:
    if not _files(folder, "train") and is_brat(folder):
        return read_brat(folder)
    splits = {}
    for split in _NAMES:
        found = _files(folder, split)
        if not found and split == "dev":
            continue
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise ValueError(f"data folder {folder} holds {what} {_file_names(split)}")
        splits[split] = read_conll(found[0])
    return splits


def read_conll(path: Path) -> list[Sentence]:
    """Read a file in CoNLL's format; columns are apart by tabs, or else by spaces.

    Raises:
        ValueError: a malformed row or tag; names file and line.
        OSError: the file cannot be read.
    """
    found: list[Sentence] = []
    words: list[str] = []
    marks: list[Mark] = []

    def close() -> None:
        if words:
            found.append(Sentence([*words], iob2(marks)))
        words.clear()
        marks.clear()

    for number, line in read_lines(path):
        if not line.strip() or line.startswith(_DOCUMENT):
            close()
            continue
        cells = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if len(cells) < 2 or not cells[0]:
            raise ValueError(f"{path}, line {number}: a word and its tag are wanted, got {line!r}")
        words.append(cells[0])
        marks.append(read_tag(cells[-1].strip(), f"{path}, line {number}"))
    close()
    return found


def _from_datasets(data: str, columns: Columns, *, saved: bool) -> Splits:
    splits = {}
    for split, part, place in dataset_splits(data, columns, saved=saved):
        feature = part.features[columns.label]
        # Its name and kind depend on the release: List, Sequence, or a plain list of one.
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        names = getattr(inner, "names", None)
        splits[split] = [
            _sentence(row[columns.text], row[columns.label], names, f"{place}, row {index}")
            for index, row in enumerate(part)
            if row[columns.text]
        ]
    return splits


def _sentence(words: Any, tags: Any, names: Sequence[str] | None, place: str) -> Sentence:
    checked = _check_words(words, place)
    if not isinstance(tags, list) or len(tags) != len(checked):
        raise ValueError(f"{place}: as many tags as words are wanted, {len(checked)}, got {tags!r}")
    known: dict[Any, str] = dict(enumerate(names or ()))
    marks = []
    for tag in tags:
        name = known.get(tag, tag)
        if not isinstance(name, str):
            raise ValueError(f"{place}: tags must be strings or have names, got {name!r}")
        marks.append(read_tag(name, place))
    return Sentence(checked, iob2(marks))


def _check_words(words: Any, place: str) -> list[str]:
    if not isinstance(words, list):
        raise ValueError(f"{place}: a list of words is wanted, got {words!r}")
    return [check_text(word, place) for word in words]


class Sample(NamedTuple):
    """Something to tag."""

    words: list[str]
    spans: list[tuple[int, int]] | None  # of words in the text; None for what came as words
    content: dict[str, Any]  # what it came as


def as_words(words: list[str]) -> Sample:
    """Make a sample of words."""
    return Sample(words, None, {TOKENS: words})


def _as_text(text: str) -> Sample:
    spans = words_of(text)
    return Sample([text[start:end] for start, end in spans], spans, {TEXT: text})


def read_samples(path: Path) -> list[Sample]:
    """Read what is to be tagged: .jsonl with ``tokens`` or ``text``, or what `read_texts` reads.

    Raises:
        ValueError: a malformed row, or no rows; names file and line.
        OSError: the file cannot be read.
    """
    if path.suffix != ".jsonl":
        return [_as_text(text) for text in read_texts(path)]
    found = []
    for line, row in read_rows(path, ()):
        place = f"{path}, line {line}"
        if TOKENS in row:
            found.append(as_words(_check_words(row[TOKENS], place)))
        elif TEXT in row:
            found.append(_as_text(check_text(row[TEXT], place)))
        else:
            raise ValueError(f"{place}: no column {TOKENS!r} or {TEXT!r}")
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found
