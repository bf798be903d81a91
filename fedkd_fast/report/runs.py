"""Run folders as data: what `train` left on disk, read and checked for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkd_fast._files import parse_json, read_json_object, read_text
from fedkd_fast.report.log import Log, read_log
from fedkd_fast.report.rows import Layer, RoundRow, Spectrum, counted, number, round_row

# A megabyte of traffic is 10^6 bytes, the unit in which the FedKD paper counts.
BYTES_PER_MB = 1_000_000
# Models that are scored: their names in a summary, and here.
ROLES = {"mentor": "mentor", "mentee": "mentee", "mean": "both together"}


@dataclass(frozen=True)
class LayerTotal:
    """One tensor over a whole run: bytes per client, summed over rounds."""

    name: str
    shape: tuple[int, ...]
    mode: str  # of the last round
    rank: float  # of the last round, mean over clients
    full_rank: int
    up: float  # in all uploads
    down: float  # in one broadcast a round; catching up is not told apart by tensor
    dense_up: float  # what the uploads would take as they are in memory


@dataclass(frozen=True)
class RunFolder:
    """A finished run: what ``config.json``, ``summary.json`` and the logs of one folder say."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[RoundRow, ...]
    name: str | None = None  # what to call it, instead of its method
    log: Log | None = None  # older runs have none

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
        return number(self.summary, key, str(self.path / "summary.json"))

    def numbers(self, key: str) -> list[float]:
        """Numbers of a list of the summary; empty where the run has none."""
        values, where = self.summary.get(key), str(self.path / "summary.json")
        if not isinstance(values, list):
            return []
        found = (number({key: value}, key, where) for value in values)
        return [value for value in found if value is not None]

    @property
    def client_count(self) -> int:
        """Number of clients, whether or not all took part in each round; one for central."""
        count = 1 if self.method == "central" else self.config.get("clients")
        if not isinstance(count, int) or count < 1:
            return max(1, len(self.clients()))
        return counted(count, "clients", str(self.path / "config.json"))

    @property
    def shard_sizes(self) -> list[int]:
        """Training samples of each client, empty where the run does not tell."""
        facts = self.config.get("task_facts")
        sizes = facts.get("shard_sizes") if isinstance(facts, dict) else None
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            return []
        where = str(self.path / "config.json")
        return [counted(size, "shard_sizes", where) for size in sizes]

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means of all metrics on the test data, by role; empty roles are left out."""
        found = self.summary.get("metrics")
        if not isinstance(found, dict):
            scores = {role: self.number(f"score_{role}") for role in ROLES}
            return {role: {self.metric: one} for role, one in scores.items() if one is not None}
        where = f"{self.path / 'summary.json'}, metrics"
        tables = {}
        for role in ROLES:
            table = found.get(role) or {}
            if not isinstance(table, dict):
                raise ValueError(f"{where}: {role} must be an object, got {table!r}")
            values = {name: number(table, name, f"{where}, {role}") for name in table}
            known = {name: value for name, value in values.items() if value is not None}
            if known:
                tables[role] = known
        return tables

    @property
    def score(self) -> float | None:
        """The score a user of the run gets: that of the model it was told to infer with.

        Runs that do not tell have the mentor's, or the mentee's where it is alone.
        """
        found = map(self.number, ("score", "score_mentor", "score_mentee"))
        return next((score for score in found if score is not None), None)

    @property
    def has_traffic(self) -> bool:
        """Whether anything was sent."""
        return any(self.traffic_by_round("bytes_up")[1]) or any(
            self.traffic_by_round("bytes_down")[1]
        )

    @cached_property
    def _rows_by_round(self) -> list[tuple[int, list[RoundRow]]]:
        rounds: dict[int, list[RoundRow]] = {}
        for row in self.rows:
            rounds.setdefault(row.round, []).append(row)
        return sorted(rounds.items())

    def by_round(self, value: Callable[[RoundRow], float | None]) -> tuple[list[int], list[float]]:
        """Mean over clients of ``value`` by round; rounds without a value are left out."""
        rounds: list[int] = []
        means: list[float] = []
        for at, rows in self._rows_by_round:
            clients = [row for row in rows if row.client is not None] or rows
            values = [found for row in clients if (found := value(row)) is not None]
            if values:
                rounds.append(at)
                means.append(math.fsum(values) / len(values))
        return rounds, means

    def traffic_by_round(self, key: str) -> tuple[list[int], list[float]]:
        """Bytes per client by round, ``key`` being ``bytes_up`` or ``bytes_down``.

        All clients count, also those that did not take part.
        """
        sums = [
            (at, math.fsum(float(getattr(row, key)) for row in rows if row.client is not None))
            for at, rows in self._rows_by_round
        ]
        return [at for at, _ in sums], [total / self.client_count for _, total in sums]

    def megabytes_so_far(self) -> dict[int, float]:
        """Megabytes that a client has sent and received by the end of each round."""
        up, down = self.traffic_by_round("bytes_up"), self.traffic_by_round("bytes_down")[1]
        total, found = 0.0, {}
        for at, sent, received in zip(*up, down, strict=True):
            total += (sent + received) / BYTES_PER_MB
            found[at] = total
        return found

    @property
    def curve_split(self) -> str:
        """The data on which rounds were scored: dev where there are such, else test."""
        return "dev" if any(row.split == "dev" for row in self.rows) else "test"

    def scores(self, role: str) -> dict[int, float]:
        """Mean score over clients by round, of mentor or mentee, on the data of `curve_split`."""
        found = {}
        for at, rows in self._rows_by_round:
            values = {
                row.client: value
                for row in rows
                if (row.split or "test") == self.curve_split
                and (value := getattr(row, f"score_{role}")) is not None
            }
            # The server's row knows also those that did not take part.
            chosen = [values[None]] if None in values else list(values.values())
            if chosen:
                found[at] = math.fsum(chosen) / len(chosen)
        return found

    def best_scores(self) -> dict[int, float]:
        """Scores of the mentors, or of the mentee where it is alone or what infers."""
        roles = ("mentor", "mentee")
        first, second = roles[::-1] if self.summary.get("inference") == "mentee" else roles
        return self.scores(first) or self.scores(second)

    def clients(self) -> list[int]:
        """Numbers of the clients that reported."""
        return sorted({row.client for row in self.rows if row.client is not None})

    def rounds(self) -> list[int]:
        """Numbers of the rounds that were reported."""
        return sorted({row.round for row in self.rows})

    def layer_totals(self) -> list[LayerTotal]:
        """Every tensor that was sent, the most expensive first."""
        found: dict[str, list[tuple[int, Layer]]] = {}
        down: dict[str, int] = Counter()
        for row in self.rows:
            for layer in row.layers:
                if row.client is None:
                    down[layer.name] += layer.bytes
                else:
                    found.setdefault(layer.name, []).append((row.round, layer))
        totals = []
        for name, layers in found.items():
            last_round = max(at for at, _ in layers)
            last = [layer for at, layer in layers if at == last_round]
            totals.append(
                LayerTotal(
                    name=name,
                    shape=last[-1].shape,
                    mode=last[-1].mode,
                    rank=sum(layer.rank for layer in last) / len(last),
                    full_rank=last[-1].full_rank,
                    up=sum(layer.bytes for _, layer in layers) / self.client_count,
                    down=float(down[name]),
                    dense_up=sum(layer.dense_bytes for _, layer in layers) / self.client_count,
                )
            )
        return sorted(totals, key=lambda total: (-total.up - total.down, total.name))

    def spectra(self) -> dict[str, dict[int, Spectrum]]:
        """Spectra of the server's mean updates, matrix by round; empty if not recorded."""
        found: dict[str, dict[int, Spectrum]] = {}
        for row in self.rows:
            for spectrum in row.spectra:
                found.setdefault(spectrum.name, {})[row.round] = spectrum
        return found

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


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}: it is not the folder of a finished run"
        )
    return path


def _rows(path: Path) -> Iterable[RoundRow]:
    for at, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}:{at}"
            yield round_row(parse_json(line, where), where)


def read_run(folder: str | Path, name: str | None = None) -> RunFolder:
    """Read and check one run folder.

    Args:
        folder: a folder with ``config.json``, ``summary.json`` and ``metrics.jsonl``, and perhaps
            ``journal.jsonl``.
        name: what to call the run, whatever its seed; None lets its method tell.

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
    rows, journal = tuple(_rows(_present(path / "metrics.jsonl"))), path / "journal.jsonl"
    log = read_log(journal) if journal.is_file() else None
    return RunFolder(path, config, summary, rows, name, log)
