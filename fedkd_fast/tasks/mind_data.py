"""News and impressions in the layout of MIND: ``news.tsv`` and ``behaviors.tsv``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedkd_fast.tasks.partition import Indices
from fedkd_fast.tasks.text_data import read_cells

SOURCE = "https://msnews.github.io"
# What may follow behaviors_ in one folder, or end the name of a folder of each split's own.
_NAMES = {"train": ("train",), "test": ("dev", "valid")}
_NEWS_COLUMNS = ("news", "category", "subcategory", "title")  # further ones are not read
_COLUMNS = ("impression", "user", "time", "history", "candidates")


class News(NamedTuple):
    """A table of news."""

    ids: list[str]
    categories: list[str]
    titles: list[str]
    row_of: dict[str, int]  # by id


class Lists(NamedTuple):
    """Lists of news one after the other, as rows of `News`."""

    values: Indices  # (T,)
    starts: Indices  # (I + 1,), the last entry is T

    def row(self, index: int) -> Indices:
        """Return one list."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def last(self, rows: Indices, width: int) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """Return the last entries of some lists, padded with 0 behind, and what is no padding.

        Both are (N, width).
        """
        ends = self.starts[rows + 1]
        begins = np.maximum(self.starts[rows], ends - width)
        places = begins[:, None] + np.arange(width)
        mask = places < ends[:, None]
        found = np.zeros(places.shape, dtype=np.int64)
        found[mask] = self.values[places[mask]]
        return found, mask


class Behaviors(NamedTuple):
    """Impressions: which news a user was shown after which clicks, and what was clicked."""

    news: News
    impressions: list[str]  # (I,) ids
    users: list[str]  # (I,)
    history: Lists  # clicks before, the latest last; may be empty
    candidates: Lists  # what was shown, at least one
    labels: Indices | None  # (T,) 1 for clicked candidates, 0 for others; None where hidden


def read_mind(data: str) -> dict[str, Behaviors]:
    """Read the training impressions, ``train``, and those to score, ``test``.

    MIND (Wu et al., ACL 2020; https://msnews.github.io) comes as folders ``MINDsmall_train`` and
    ``MINDsmall_dev``, or ``MINDlarge_…``, with ``news.tsv`` and ``behaviors.tsv`` each. What holds
    both folders is read, and so is a folder with ``news.tsv``, ``behaviors_train.tsv`` and
    ``behaviors_dev.tsv`` or ``…_valid.tsv``; all files perhaps with .gz behind. Scored is the dev
    split, for MIND hides the clicks of its test split.

    Raises:
        ValueError: no such data, or a malformed row; names file and line.
        OSError: a file cannot be read.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"data must be a folder of MIND, from {SOURCE}, got {data!r}")
    paths = {split: _behaviors_file(folder, split) for split in _NAMES}
    tables: dict[Path, News] = {}
    found = {}
    for split, path in paths.items():
        news = _file(path.parent, "news.tsv")
        if news is None:
            raise ValueError(f"data folder {path.parent} holds no news.tsv beside {path.name}")
        if news not in tables:
            tables[news] = read_news(news)
        found[split] = read_behaviors(path, tables[news])
        if found[split].labels is None:
            raise ValueError(f"{path} tells no clicks: candidates must end with -0 or -1")
    return found


def _file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _behaviors_file(folder: Path, split: str) -> Path:
    found = [
        path
        for name in _NAMES[split]
        for path in (
            _file(folder, f"behaviors_{name}.tsv"),
            *(
                _file(inner, "behaviors.tsv")
                for inner in sorted(folder.iterdir())
                if inner.name == name or inner.name.endswith(f"_{name}")
            ),
        )
        if path is not None
    ]
    if len(found) != 1:
        what = "no" if not found else "more than one file of"
        names = [f"…_{name}/behaviors.tsv or behaviors_{name}.tsv" for name in _NAMES[split]]
        raise ValueError(
            f"data folder {folder} holds {what} {split} impressions: one of {' or '.join(names)} "
            f"is wanted; MIND comes from {SOURCE}"
        )
    return found[0]


def read_news(path: Path) -> News:
    """Read ``news.tsv``: id, category, subcategory, title, and columns that are not needed.

    Raises:
        ValueError: a malformed row, a repeated id, or no news; names file and line.
        OSError: the file cannot be read.
    """
    news = News([], [], [], {})
    for line, cells in read_cells(path):
        if len(cells) < len(_NEWS_COLUMNS):
            raise ValueError(
                f"{path}, line {line}: at least {len(_NEWS_COLUMNS)} columns wanted "
                f"({', '.join(_NEWS_COLUMNS)}), got {len(cells)}"
            )
        name, category, _, title = cells[: len(_NEWS_COLUMNS)]
        if name in news.row_of:
            raise ValueError(f"{path}, line {line}: news {name!r} occurs twice")
        news.row_of[name] = len(news.ids)
        news.ids.append(name)
        news.categories.append(category)
        news.titles.append(title)
    if not news.ids:
        raise ValueError(f"{path} holds no news")
    return news


def read_behaviors(path: Path, news: News) -> Behaviors:
    """Read ``behaviors.tsv``: impression, user, time, history, and candidates with their labels.

    Raises:
        ValueError: a malformed row, unknown news, or no impressions; names file and line.
        OSError: the file cannot be read.
    """
    impressions: list[str] = []
    users: list[str] = []
    lists = [array("q"), array("q")], [array("q", [0]), array("q", [0])]
    labels = array("q")
    labelled: bool | None = None
    for line, cells in read_cells(path):
        place = f"{path}, line {line}"
        if len(cells) != len(_COLUMNS):
            raise ValueError(
                f"{place}: {len(_COLUMNS)} columns wanted ({', '.join(_COLUMNS)}), got {len(cells)}"
            )
        shown = cells[4].split()
        if not shown:
            raise ValueError(f"{place}: an impression without candidates")
        if labelled is None:
            labelled = shown[0][-2:] in ("-0", "-1")
        if labelled:
            for one in shown:
                name, _, label = one.rpartition("-")
                if not name or label not in ("0", "1"):
                    raise ValueError(f"{place}: candidates must end with -0 or -1, got {one!r}")
                labels.append(int(label))
            shown = [one[:-2] for one in shown]
        for values, starts, names in zip(*lists, (cells[3].split(), shown), strict=True):
            values.extend(_rows(names, news, place))
            starts.append(len(values))
        impressions.append(cells[0])
        users.append(cells[1])
    if not impressions:
        raise ValueError(f"{path} holds no impressions")
    history, candidates = (
        Lists(np.array(values, dtype=np.int64), np.array(starts, dtype=np.int64))
        for values, starts in zip(*lists, strict=True)
    )
    known = np.array(labels, dtype=np.int64) if labelled else None
    return Behaviors(news, impressions, users, history, candidates, known)


def _rows(names: Sequence[str], news: News, place: str) -> list[int]:
    try:
        return [news.row_of[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{place}: news {error.args[0]!r} is not in news.tsv") from error


def popularity_scores(train: Behaviors, shown: Behaviors) -> npt.NDArray[np.float64]:
    """Score candidates by the clicks that they had in training: what needs no model at all.

    Returns:
        (T,) for the candidates of ``shown``.

    Raises:
        ValueError: the clicks of ``train`` are not known.
    """
    if train.labels is None:
        raise ValueError("train must tell clicks, got impressions without labels")
    clicked = train.candidates.values[train.labels == 1]
    counts = np.bincount(clicked, minlength=len(train.news.ids))
    rows = [train.news.row_of.get(name) for name in shown.news.ids]
    clicks = np.array([0 if row is None else counts[row] for row in rows], dtype=np.float64)
    return np.asarray(clicks[shown.candidates.values])
