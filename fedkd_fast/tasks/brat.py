"""Texts with annotations beside them, as the tool brat writes them and CADEC is given out.

CADEC (Karimi et al. 2015), posts of a forum about drugs, cannot be passed on. Everybody can
download it from https://doi.org/10.4225/08/570FB102BDAD2; its folder ``cadec`` is read as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedkd_fast._files import read_text
from fedkd_fast.tasks.tagging import OUTSIDE, Sentence, words_of
from fedkd_fast.tasks.text_data import read_lines

# Folders of texts and of annotations in CADEC; elsewhere both lie in one.
_TEXTS, _ANNOTATIONS = "text", "original"
_DEV = ("dev", "devel", "valid")
# The split of documents that come in one piece is part of the data: the run's seed is not used.
SPLIT_SEED, TEST_PART, DEV_PART = 2015, 0.2, 0.1
_ENTITY = re.compile(r"T\S*\t(\S+) (\d{1,15} \d{1,15}(?:;\d{1,15} \d{1,15})*)(?:\t.*)?")
_SENTENCE_ENDS = ".!?"

Span = tuple[int, int]


def is_brat(folder: Path) -> bool:
    """Tell whether a folder holds annotated texts, or one folder of them for each split."""
    return _holds_documents(folder) or _holds_documents(folder / "train")


def _holds_documents(folder: Path) -> bool:
    return (folder / _ANNOTATIONS).is_dir() or any(folder.glob("*.ann"))


def read_brat(folder: Path) -> dict[str, list[Sentence]]:
    """Read the splits ``train``, ``test`` and, where there is one, ``dev``.

    A folder of texts is one of ``.txt`` and ``.ann`` files, or has them in ``text`` and
    ``original``. There is one for each split (``train``, ``test``, perhaps ``dev``), or a single
    one, of which a fifth of the documents is for tests and a tenth for choices: always the same.

    An entity in several pieces becomes the shortest one without gaps that covers it, and of
    entities that overlap the longest is kept, as is usual for models of flat entities (Dai et al.
    2020). A sentence ends with its line, or behind ``.``, ``!``, ``?`` and white space.

    Raises:
        ValueError: no such files, or an annotation that makes no sense; names file and line.
        OSError: a file cannot be read.
    """
    if not _holds_documents(folder):
        splits = {"train": folder / "train", "test": folder / "test"}
        for name in (one for one in _DEV if _holds_documents(folder / one)):
            splits["dev"] = folder / name
        for part in splits.values():
            if not _holds_documents(part):
                raise ValueError(f"data folder {folder} holds no annotated texts in {part.name}")
        return {split: _read_all(_documents(part)) for split, part in splits.items()}
    documents = _documents(folder)
    tests, devs = (max(1, round(part * len(documents))) for part in (TEST_PART, DEV_PART))
    if len(documents) < tests + devs + 1:
        raise ValueError(f"data folder {folder} must hold at least 3 texts, got {len(documents)}")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    parts = np.split(order, [tests, tests + devs])
    return {
        split: _read_all([documents[index] for index in np.sort(part)])
        for split, part in zip(("test", "dev", "train"), parts, strict=True)
    }


def _documents(folder: Path) -> list[tuple[Path, Path]]:
    """Pair texts and annotations by name, in sorted order."""
    apart = (folder / _ANNOTATIONS).is_dir()
    texts = folder / _TEXTS if apart else folder
    annotations = folder / _ANNOTATIONS if apart else folder
    names = {path.stem for path in texts.glob("*.txt")}
    alone = names ^ {path.stem for path in annotations.glob("*.ann")}
    if alone:
        raise ValueError(
            f"data folder {folder} must hold a .txt and an .ann file of each text, got only one of "
            f"{min(alone)}"
        )
    return [(texts / f"{name}.txt", annotations / f"{name}.ann") for name in sorted(names)]


def _read_all(documents: list[tuple[Path, Path]]) -> list[Sentence]:
    found: list[Sentence] = []
    for text, beside in documents:
        content = read_text(text)
        found += _sentences(content, read_annotations(beside, len(content)))
    return found


def read_annotations(path: Path, characters: int) -> list[tuple[str, Span]]:
    """Read the entities of a text: type, and (start, end) in characters, gaps included.

    Args:
        path: an .ann file; lines of other things than entities are left out.
        characters: length of the text.

    Raises:
        ValueError: a malformed line, or an entity outside of the text; names file and line.
    """
    found = []
    for number, line in read_lines(path):
        if not line.startswith("T"):
            continue
        match = _ENTITY.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: an entity must be ID, tab, type and positions, "
                f"got {line[:40]!r}"
            )
        pieces = [[int(one) for one in piece.split(" ")] for piece in match[2].split(";")]
        end = max(last for _, last in pieces)
        if end > characters or not all(first < last for first, last in pieces):
            raise ValueError(
                f"{path}, line {number}: positions must lie in 0..{characters}, the length of the "
                f"text, and not be empty or reversed, got {match[2][:40]}"
            )
        found.append((match[1], (min(first for first, _ in pieces), end)))
    return found


def _sentences(text: str, entities: list[tuple[str, Span]]) -> list[Sentence]:
    words = words_of(text)
    tags = [OUTSIDE] * len(words)
    for type_, (start, end) in sorted(entities, key=lambda one: one[1][0] - one[1][1]):
        inside = [i for i, (first, last) in enumerate(words) if first < end and last > start]
        if all(tags[index] == OUTSIDE for index in inside):
            for index in inside:
                tags[index] = f"{'B' if index == inside[0] else 'I'}-{type_}"
    found: list[Sentence] = []
    before = 0
    for (start, end), tag in zip(words, tags, strict=True):
        gap = text[before:start]
        ends = "\n" in gap or (bool(gap) and text[before - 1 : before] in _SENTENCE_ENDS)
        if not found or (ends and not tag.startswith("I-")):
            found.append(Sentence([], []))
        found[-1].words.append(text[start:end])
        found[-1].tags.append(tag)
        before = end
    return found
