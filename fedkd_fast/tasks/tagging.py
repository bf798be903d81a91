"""Sentences of tagged words: tags of every common scheme become those of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLU])-(.*\S)")
# Marks of words that begin an entity in any case, and of those that end one.
_FIRST, _LAST = "BSU", "ESLU"
_WORD = re.compile(r"\w+|[^\w\s]")


class Sentence(NamedTuple):
    """Words and as many tags: ``O``, or ``B-TYPE`` and ``I-TYPE``, as in IOB2."""

    words: list[str]
    tags: list[str]


class Mark(NamedTuple):
    """A tag in its two parts."""

    kind: str  # one of OBIESLU
    type: str  # empty outside of entities


def read_tag(tag: str, place: str) -> Mark:
    """Take a tag of IOB1, IOB2, IOBES or BILOU apart.

    Raises:
        ValueError: it is something else; names its place.
    """
    if tag == OUTSIDE:
        return Mark(OUTSIDE, "")
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(
            f"{place}: a tag must be O, or one of B, I, E, S, L, U with - and a type behind it, "
            f"got {tag!r}"
        )
    return Mark(match[1], match[2])


def iob2(marks: Iterable[Mark]) -> list[str]:
    """Return the tags of one sentence in IOB2: each entity begins with B, whatever came before."""
    found, inside = [], ""
    for kind, type_ in marks:
        if kind == OUTSIDE:
            found.append(OUTSIDE)
        else:
            first = kind in _FIRST or type_ != inside
            found.append(f"{'B' if first else 'I'}-{type_}")
        inside = "" if kind in _LAST else type_
    return found


def tag_set(sentences: Sequence[Sentence]) -> list[str]:
    """Return O, and the tags of all types that occur, in sorted order."""
    types = sorted({tag[2:] for one in sentences for tag in one.tags if tag != OUTSIDE})
    return [OUTSIDE, *(f"{kind}-{type_}" for type_ in types for kind in "BI")]


def first_type(tags: Sequence[str]) -> str:
    """Return the type of a sentence's first entity, or nothing where there is none."""
    return next((tag[2:] for tag in tags if tag != OUTSIDE), "")


def words_of(text: str) -> list[tuple[int, int]]:
    """Split a text into words and punctuation: (start, end) of each, in characters."""
    return [match.span() for match in _WORD.finditer(text)]
