"""Labelled texts from folders of jsonl, tsv and csv files, or from the datasets library."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from fedkd_fast._files import names_folder, parse_json
from fedkd_fast.models import silent_hub

FORMATS = (".jsonl", ".tsv", ".csv")
TEXT, LABEL = "text", "label"
_LONGEST_CELL = 2**31 - 1  # what fits into a long everywhere
# No characters: what the error handler surrogateescape makes of bytes that are not UTF-8, and what
# JSON can smuggle in.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Rows(NamedTuple):
    """One split."""

    texts: list[str]
    labels: list[str]
    places: list[str]  # where each row came from, for error messages
    keys: dict[str, list[str]]  # the columns that every row has beside these two, as text


class Columns(NamedTuple):
    """What the two columns are called."""

    text: str = TEXT
    label: str = LABEL


def read_splits(data: str, columns: Columns | None = None) -> dict[str, Rows]:
    """Read the splits ``train``, ``test`` and, where there is one, ``dev``.

    A folder holds ``train``, ``test`` and perhaps ``dev`` as .jsonl, .tsv or .csv, each perhaps
    with .gz behind. Every row has a text and a label; in tsv and csv the first line names the
    columns, and tsv knows no quotes. Anything that is no folder is taken as the name of a dataset
    of the datasets library, whose ``validation`` is ``dev``, and so is a folder of its
    ``save_to_disk``.

    Raises:
        ValueError: no such data, a missing split, a malformed row; names file and line.
    """
    columns = columns or Columns()
    folder = Path(data)
    if (folder / "dataset_dict.json").is_file():
        return _from_datasets(data, columns, saved=True)
    if folder.is_dir():
        splits = {split: _read_split(folder, split, columns) for split in ("train", "test")}
        if any((folder / name).is_file() for name in split_files("dev")):
            splits["dev"] = _read_split(folder, "dev", columns)
        return splits
    if folder.exists() or names_folder(data):
        what = "no folder" if folder.exists() else "no such folder"
        raise ValueError(f"data must be a folder or the name of a dataset, got {data!r}: {what}")
    return _from_datasets(data, columns, saved=False)


def split_files(split: str) -> list[str]:
    """Return the names that the file of a split may have."""
    return [f"{split}{suffix}{packed}" for suffix in FORMATS for packed in ("", ".gz")]


def split_file(folder: Path, split: str) -> Path:
    """Find the file of a split.

    Raises:
        ValueError: there is none, or more than one.
    """
    names = split_files(split)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise ValueError(
            f"data folder {folder} holds {what} {split} file: one of {', '.join(names)}"
        )
    return found[0]


def _read_split(folder: Path, split: str, columns: Columns) -> Rows:
    path = split_file(folder, split)
    rows = [(f"{path}, line {line}", row) for line, row in read_rows(path, columns)]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return as_rows(rows, columns)


def as_rows(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Columns) -> Rows:
    """Check rows and turn them into columns.

    Args:
        rows: place, and values by column, of at least one row.
        columns: which of them are text and label.

    Raises:
        ValueError: a text or label of a wrong kind; names its place.
    """
    names = [
        name
        for name in rows[0][1]
        if name not in columns and all(isinstance(row.get(name), (str, int)) for _, row in rows)
    ]
    return Rows(
        [check_text(row[columns.text], place) for place, row in rows],
        [_label(row[columns.label], place) for place, row in rows],
        [place for place, _ in rows],
        {name: [str(row[name]) for _, row in rows] for name in names},
    )


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a jsonl, tsv or csv file row by row, each with at least the named columns.

    Yields:
        Line number (of the last line of a csv row over several lines) and values by column.

    Raises:
        ValueError: a malformed row or file; names file and line.
        OSError: the file cannot be read.
    """
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise ValueError(f"data must be one of {', '.join(FORMATS)}, perhaps with .gz, got {path}")
    try:
        with _open(path) as file:
            lines = _lines(path, file)
            rows = _jsonl(path, lines) if suffix == ".jsonl" else _table(path, lines, suffix)
            for line, row in rows:
                missing = [column for column in columns if column not in row]
                if missing:
                    raise ValueError(f"{path}, line {line}: no column {missing[0]!r}")
                yield line, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Read a tsv file without a line of names, perhaps with .gz behind.

    Yields:
        Line number and cells; empty lines are left out.

    Raises:
        ValueError: the file is damaged; names it.
        OSError: the file cannot be read.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, line.split("\t")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read a file of text, perhaps with .gz behind.

    Yields:
        Line number, and the line without its end.

    Raises:
        ValueError: the file is damaged; names it.
        OSError: the file cannot be read.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(path, file), 1):
                yield number, line.rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[str]:
    # utf-8-sig: spreadsheets put a mark before the first column's name.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if _SURROGATE.search(line):
            raise ValueError(f"{path}, line {number}: not UTF-8 text")
        yield line


def _jsonl(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is wanted, got {line[:40]!r}")
        yield number, row


def _table(path: Path, lines: Iterable[str], suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if suffix == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    # A text may be longer than the 128 KiB that the library allows, to all of a process alike.
    before = csv.field_size_limit(_LONGEST_CELL)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = cells
                # Spreadsheets may leave several columns without a name.
                twice = [name for name, count in Counter(header).items() if name and count > 1]
                if twice:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: column {twice[0]!r} occurs twice"
                    )
            elif len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(header)} columns wanted, as in the "
                    f"first line, got {len(cells)}"
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def check_text(value: object, place: str) -> str:
    """Return a value of the column ``text``.

    Raises:
        ValueError: it is no text; names its place.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {TEXT} must be a string, got {value!r}")
    if _SURROGATE.search(value):
        raise ValueError(f"{place}: {TEXT} holds half a surrogate pair, which is no character")
    return value


def _label(value: object, place: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int):
        return str(int(value))
    raise ValueError(f"{place}: {LABEL} must be a string or an integer, got {value!r}")


def _from_datasets(data: str, columns: Columns, *, saved: bool) -> dict[str, Rows]:
    splits = {}
    for split, part, place in dataset_splits(data, columns, saved=saved):
        names = getattr(part.features[columns.label], "names", None)
        rows = []
        for index, row in enumerate(part):
            value = row[columns.label]
            row = {**row, columns.label: names[value]} if names else row
            rows.append((f"{place}, row {index}", row))
        splits[split] = as_rows(rows, columns)
    return splits


def dataset_splits(data: str, columns: Columns, *, saved: bool) -> Iterator[tuple[str, Any, str]]:
    """Load a dataset of the datasets library.

    Args:
        data: its name, or the folder of its ``save_to_disk``.
        columns: which it must have.
        saved: whether it is such a folder.

    Yields:
        ``train``, ``test`` and perhaps ``dev``; the part of the dataset; what to call it.

    Raises:
        ValueError: no such dataset, split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data must be a folder, got {data!r}; for the name of a dataset: pip install datasets"
        ) from error
    try:
        with silent_hub():
            loaded = datasets.load_from_disk(data) if saved else datasets.load_dataset(data)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data must be a folder or a dataset that datasets can load, got {data!r}: {reason}"
        ) from error
    for split, name in (("train", "train"), ("test", "test"), ("dev", "validation")):
        if name not in loaded:
            if split == "dev":
                continue
            raise ValueError(f"dataset {data!r} has no split {name!r}, only {', '.join(loaded)}")
        part, place = loaded[name], f"dataset {data!r}, split {name}"
        for column in columns:
            if column not in part.column_names:
                raise ValueError(f"{place}: no column {column!r}")
        yield split, part, place
