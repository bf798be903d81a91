"""Lines of ``metrics.jsonl``, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Whole numbers that a float holds exactly: more than any count of a run.
MOST = 2**53
_LARGEST = 1e300  # up to there, sums and percents are finite


@dataclass(frozen=True)
class Layer:
    """One tensor of a frame: how it was sent and what it cost."""

    name: str
    shape: tuple[int, ...]
    mode: str
    rank: int
    full_rank: int
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Spectrum:
    """How fast the singular values of a matrix fall: the smallest rank at each energy."""

    name: str
    full_rank: int
    ranks: Mapping[float, int]


@dataclass(frozen=True)
class RoundRow:
    """One line of ``metrics.jsonl``: a client's round, or the server's when ``client`` is None."""

    round: int
    client: int | None
    energy: float | None
    loss_mentor: float | None
    loss_mentee: float | None
    score_mentor: float | None
    score_mentee: float | None
    split: str | None  # the data of the scores
    bytes_up: float
    bytes_down: float
    seconds: float | None
    seconds_codec: float | None
    layers: tuple[Layer, ...]
    spectra: tuple[Spectrum, ...]


def round_row(record: object, where: str) -> RoundRow:
    """Check a line.

    Raises:
        ValueError: it breaks the format; names the place.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
    client, split = record.get("client"), record.get("split")
    if split is not None and split not in ("dev", "test"):
        raise ValueError(f"{where}: split must be dev, test or null, got {split!r}")
    return RoundRow(
        round=whole(record, "round", where),
        client=None if client is None else whole(record, "client", where),
        energy=number(record, "energy", where),
        loss_mentor=number(record, "loss_mentor", where),
        loss_mentee=number(record, "loss_mentee", where),
        score_mentor=number(record, "score_mentor", where),
        score_mentee=number(record, "score_mentee", where),
        split=split,
        bytes_up=number(record, "bytes_up", where) or 0.0,
        bytes_down=number(record, "bytes_down", where) or 0.0,
        seconds=number(record, "seconds", where),
        seconds_codec=number(record, "seconds_codec", where),
        layers=tuple(_layer(one, where) for one in _entries(record, "layers", where)),
        spectra=tuple(_spectrum(one, where) for one in _entries(record, "spectra", where)),
    )


def number(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """Return a number of a record, None where it has none.

    Raises:
        ValueError: it is something else.
    """
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {key} must be a number or null, got {value!r}")
    if isinstance(value, int):
        return float(counted(value, key, where))
    if not abs(value) <= _LARGEST:  # so no NaN either
        raise ValueError(f"{where}: {key} must lie within ±{_LARGEST:g}, got {value}")
    return value


def whole(record: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """Return a whole number of a record.

    Raises:
        ValueError: it is something else.
    """
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} must be a whole number, got {value!r}")
    return counted(value, key, where)


def counted(value: int, key: str, where: str) -> int:
    """Return a whole number that is no more than a count can be.

    Raises:
        ValueError: it is more.
    """
    if abs(value) > MOST:
        raise ValueError(f"{where}: {key} must lie within ±2^53")
    return value


def _entries(record: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = record.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"{where}: {key} must be a list")
    for entry in found:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{where}: an entry of {key} must be an object with a name")
    return found


def _layer(record: dict[str, Any], where: str) -> Layer:
    shape = record.get("shape", [])
    if not isinstance(shape, list) or not all(isinstance(extent, int) for extent in shape):
        raise ValueError(f"{where}: shape of {record['name']} must be a list of whole numbers")
    return Layer(
        name=record["name"],
        shape=tuple(shape),
        mode=str(record.get("mode", "")),
        rank=whole(record, "rank", where, 0),
        full_rank=whole(record, "full_rank", where, 0),
        bytes=whole(record, "bytes", where, 0),
        dense_bytes=whole(record, "dense_bytes", where, 0),
    )


def _spectrum(record: dict[str, Any], where: str) -> Spectrum:
    ranks = record.get("ranks")
    try:
        if not isinstance(ranks, dict):
            raise ValueError
        found = {float(energy): whole(ranks, energy, where) for energy in ranks}
    except ValueError:
        raise ValueError(
            f"{where}: ranks of {record['name']} must be whole numbers by energy"
        ) from None
    return Spectrum(record["name"], whole(record, "full_rank", where), found)
