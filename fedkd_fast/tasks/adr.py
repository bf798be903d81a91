"""Adverse drug reactions in short texts: the paper's ADR scenario, precision, recall and F1.

The paper's data are tweets, the third shared task of SMM4H 2018, which may not be passed on:
https://healthlanguageprocessing.org/smm4h18 says how to get them. PsyTAR (Zolnoori et al. 2019,
CC BY 4.0) asks the same of reviews on a public forum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedkd_fast.tasks.text import TextTask
from fedkd_fast.tasks.text_data import (
    Columns,
    Rows,
    as_rows,
    read_cells,
    split_file,
    split_files,
)

# Columns of the official files, which have no line of names.
_OFFICIAL = ("tweet", "user", "label", "text")


class AdrTask(TextTask):
    """Does a text mention an adverse drug reaction? Scored by the class that does.

    Data are a folder with ``train``, ``test`` and perhaps ``dev``: tables with the columns ``text``
    and ``label`` (0 or 1), as for task text, of which others (``drug``) can be keys of a partition;
    or the official files of SMM4H as ``.tsv`` without a line of names: tweet, user, class, text.
    By default the training texts are dealt to clients at random, as in the paper.
    """

    name = "adr"
    METHOD_DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {**TextTask.METHOD_DEFAULTS}

    def _read(self, data: str) -> dict[str, Rows]:
        folder = Path(data)
        if folder.is_dir() and not (folder / "dataset_dict.json").is_file():
            path = split_file(folder, "train")
            if path.with_suffix("").suffix == ".tsv" or path.suffix == ".tsv":
                first = next(read_cells(path), (0, []))[1]
                if len(first) == len(_OFFICIAL) and first[2] in ("0", "1"):
                    return _official(folder)
        return super()._read(data)

    @property
    def labels(self) -> list[str]:
        """Names of the classes: 1 is a reaction."""
        found = super().labels
        if found != ["0", "1"]:
            raise ValueError(f"data of task adr must have the labels 0 and 1, got {found}")
        return found


def _official(folder: Path) -> dict[str, Rows]:
    columns = Columns()
    splits = {}
    for split in ("train", "test", "dev"):
        if split == "dev" and not any((folder / name).is_file() for name in split_files(split)):
            continue
        path = split_file(folder, split)
        rows = []
        for line, cells in read_cells(path):
            if len(cells) != len(_OFFICIAL):
                raise ValueError(
                    f"{path}, line {line}: {len(_OFFICIAL)} columns wanted ({', '.join(_OFFICIAL)})"
                    f", got {len(cells)}"
                )
            rows.append((f"{path}, line {line}", dict(zip(_OFFICIAL, cells, strict=True))))
        if not rows:
            raise ValueError(f"{path} holds no rows")
        splits[split] = as_rows(rows, columns)
    return splits
