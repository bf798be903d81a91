"""Run folders as data: what `train` left on disk, read and checked for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_fast._files import parse_json, read_json_object, read_text

# A megabyte of traffic is 10^6 bytes, the unit in which the FedKD paper counts.
BYTES_PER_MB = 1_000_000


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
class RoundRow:
    """One line of ``metrics.jsonl``: a client's round, or the server's when ``client`` is None."""

    round: int
    client: int | None
    energy: float | None
    loss_mentor: float | None
    loss_mentee: float | None
    score_mentor: float | None
    score_mentee: float | None
    bytes_up: float
    bytes_down: float
    seconds: float | None
    seconds_codec: float | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class LayerTotal:
    """One tensor over a whole run: bytes per client, summed over rounds, uploads only."""

    name: str
    shape: tuple[int, ...]
    mode: str  # of the last round
    rank: float  # of the last round, mean over clients
    full_rank: int
    bytes: float
    dense_bytes: float


@dataclass(frozen=True)
class RunFolder:
    """A finished run: ``config.json``, ``summary.json`` and ``metrics.jsonl`` of one folder."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[RoundRow, ...]

    @property
    def method(self) -> str:
        """Name of the training method."""
        return str(self.summary["method"])

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.summary["task"])

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return str(self.summary.get("metric") or "score")

    def number(self, key: str) -> float | None:
        """A number of the summary, None where the run has none."""
        return _number(self.summary, key, str(self.path / "summary.json"))

    @property
    def score(self) -> float | None:
        """The score a user of the run gets: the mentor's, or the mentee's where it is alone."""
        mentor = self.number("score_mentor")
        return mentor if mentor is not None else self.number("score_mentee")

    @property
    def has_traffic(self) -> bool:
        """Whether anything was sent."""
        return any(self.traffic_by_round("bytes_up")[1]) or any(
            self.traffic_by_round("bytes_down")[1]
        )

    def _rows_by_round(self) -> list[tuple[int, list[RoundRow]]]:
        """The clients' rows of each round; the server's where a round has no client row."""
        rounds: dict[int, list[RoundRow]] = {}
        for row in self.rows:
            rounds.setdefault(row.round, []).append(row)
        return [
            (number, [row for row in rows if row.client is not None] or rows)
            for number, rows in sorted(rounds.items())
        ]

    def by_round(self, value: Callable[[RoundRow], float | None]) -> tuple[list[int], list[float]]:
        """Mean over clients of ``value`` by round; rounds without a value are left out."""
        rounds: list[int] = []
        means: list[float] = []
        for number, rows in self._rows_by_round():
            values = [found for row in rows if (found := value(row)) is not None]
            if values:
                rounds.append(number)
                means.append(math.fsum(values) / len(values))
        return rounds, means

    def traffic_by_round(self, key: str) -> tuple[list[int], list[float]]:
        """Mean bytes per client by round, ``key`` being ``bytes_up`` or ``bytes_down``."""
        return self.by_round(lambda row: float(getattr(row, key)))

    def clients(self) -> list[int]:
        """Numbers of the clients that reported."""
        return sorted({row.client for row in self.rows if row.client is not None})

    def rounds(self) -> list[int]:
        """Numbers of the rounds that were reported."""
        return sorted({row.round for row in self.rows})

    def layer_totals(self) -> list[LayerTotal]:
        """Every tensor that was uploaded, the most expensive first."""
        uploads = [row for row in self.rows if row.client is not None and row.layers]
        if not uploads:
            return []
        clients = len({row.client for row in uploads})
        last_round = max(row.round for row in uploads)
        found: dict[str, list[tuple[int, Layer]]] = {}
        for row in uploads:
            for layer in row.layers:
                found.setdefault(layer.name, []).append((row.round, layer))
        totals = []
        for name, layers in found.items():
            last = [layer for number, layer in layers if number == last_round]
            newest = (last or [layer for _, layer in layers])[-1]
            totals.append(
                LayerTotal(
                    name=name,
                    shape=newest.shape,
                    mode=newest.mode,
                    rank=sum(layer.rank for layer in last) / len(last) if last else newest.rank,
                    full_rank=newest.full_rank,
                    bytes=sum(layer.bytes for _, layer in layers) / clients,
                    dense_bytes=sum(layer.dense_bytes for _, layer in layers) / clients,
                )
            )
        return sorted(totals, key=lambda total: (-total.bytes, total.name))

    def kept_rank(self) -> dict[str, dict[int, float]]:
        """Share of the full rank that was kept, tensor by round: mean over the clients' uploads.

        Only tensors that were sent as factors at least once; where such a tensor was sent dense
        instead the whole rank was kept (1), where it was zero nothing was (0).
        """
        shares: dict[str, dict[int, list[float]]] = {}
        factored: set[str] = set()
        for row in self.rows:
            if row.client is None:
                continue
            for layer in row.layers:
                mode = layer.mode.lower()
                if layer.full_rank < 1 or "alias" in mode:
                    continue
                share = layer.rank / layer.full_rank if "factors" in mode else 1.0
                if "factors" in mode:
                    factored.add(layer.name)
                elif "zero" in mode:
                    share = 0.0
                shares.setdefault(layer.name, {}).setdefault(row.round, []).append(share)
        return {
            name: {number: sum(values) / len(values) for number, values in rounds.items()}
            for name, rounds in shares.items()
            if name in factored
        }


def _number(record: Mapping[str, Any], key: str, where: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {key} must be a number or null, got {value!r}")
    return float(value)


def _whole(record: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} must be a whole number, got {value!r}")
    return value


def _layer(record: object, where: str) -> Layer:
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise ValueError(f"{where}: an entry of layers must be an object with a name")
    shape = record.get("shape", [])
    if not isinstance(shape, list) or not all(isinstance(extent, int) for extent in shape):
        raise ValueError(f"{where}: shape of {record['name']} must be a list of whole numbers")
    return Layer(
        name=record["name"],
        shape=tuple(shape),
        mode=str(record.get("mode", "")),
        rank=_whole(record, "rank", where, 0),
        full_rank=_whole(record, "full_rank", where, 0),
        bytes=_whole(record, "bytes", where, 0),
        dense_bytes=_whole(record, "dense_bytes", where, 0),
    )


def _round_row(record: object, where: str) -> RoundRow:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
    layers = record.get("layers") or []
    if not isinstance(layers, list):
        raise ValueError(f"{where}: layers must be a list")
    client = record.get("client")
    return RoundRow(
        round=_whole(record, "round", where),
        client=None if client is None else _whole(record, "client", where),
        energy=_number(record, "energy", where),
        loss_mentor=_number(record, "loss_mentor", where),
        loss_mentee=_number(record, "loss_mentee", where),
        score_mentor=_number(record, "score_mentor", where),
        score_mentee=_number(record, "score_mentee", where),
        bytes_up=_number(record, "bytes_up", where) or 0.0,
        bytes_down=_number(record, "bytes_down", where) or 0.0,
        seconds=_number(record, "seconds", where),
        seconds_codec=_number(record, "seconds_codec", where),
        layers=tuple(_layer(layer, where) for layer in layers),
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}: it is not the folder of a finished run"
        )
    return path


def _rows(path: Path) -> Iterable[RoundRow]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _round_row(parse_json(line, where), where)


def read_run(folder: str | Path) -> RunFolder:
    """Read and check one run folder.

    Args:
        folder: a folder with ``config.json``, ``summary.json`` and ``metrics.jsonl``.

    Returns:
        The run.

    Raises:
        ValueError: the folder or one of its files is missing, or a file breaks the format; the
            message names the file and, where there is one, the line.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"run folder {path} does not exist")
    summary = read_json_object(_present(path / "summary.json"))
    config = read_json_object(_present(path / "config.json"))
    for key in ("method", "task"):
        if not isinstance(summary.get(key), str) or not summary[key]:
            raise ValueError(f"{path / 'summary.json'}: {key} must be a name")
    return RunFolder(path, config, summary, tuple(_rows(_present(path / "metrics.jsonl"))))


def run_labels(runs: Sequence[RunFolder]) -> list[str]:
    """Shortest labels that tell a task's runs apart: method, then seed, then the folder's name."""
    labels = [run.method for run in runs]
    for details in (
        [f"seed {run.summary.get('seed', '?')}" for run in runs],
        [run.path.name for run in runs],
        [str(run.path) for run in runs],
    ):
        seen = Counter((run.task, label) for run, label in zip(runs, labels, strict=True))
        labels = [
            f"{run.method}, {detail}" if seen[run.task, label] > 1 else label
            for run, label, detail in zip(runs, labels, details, strict=True)
        ]
    return labels
