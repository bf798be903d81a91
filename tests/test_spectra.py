"""Spectra of mean updates: against singular values, and what the server records of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import TinyTask
from torch import Tensor

from fedkd_fast.server import Server
from fedkd_fast.spectra import ENERGIES, energy_ranks, spectra
from fedkd_fast.trainer import train


def by_singular_values(matrix: Tensor) -> list[int]:
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    shares = squares.cumsum(0) / squares.sum()
    return [int((shares < energy).sum()) + 1 for energy in ENERGIES]


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (7, 7), (1, 9)])
def test_ranks_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=generator)
    # Values that fall fast, so that energies differ in rank.
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    falling = (left * 0.7 ** torch.arange(min(shape))) @ right
    for one in (matrix, falling):
        assert energy_ranks(one) == by_singular_values(one)


def test_known_spectrum() -> None:
    # Squares 64, 16, 16, 4: of 100, 50 and 64 need one, 80 two, 90 three, 96 three, 98 four.
    matrix = torch.diag(torch.tensor([4.0, 8.0, 2.0, 4.0]))
    assert energy_ranks(matrix) == [1, 2, 3, 3, 4, 4]
    assert energy_ranks(torch.zeros(3, 4)) == [0] * len(ENERGIES)


def test_only_matrices_have_a_spectrum() -> None:
    update = {
        "convolution": torch.eye(8).reshape(8, 2, 2, 2),
        "bias": torch.ones(8),
        "row": torch.ones(1, 8),
        "counts": torch.ones(8, 8, dtype=torch.int64),
        "empty": torch.zeros(0, 8),
    }
    (record,) = spectra(update)
    assert (record["name"], record["full_rank"]) == ("convolution", 8)
    assert record["ranks"] == {"0.5": 4, "0.8": 7, "0.9": 8, "0.95": 8, "0.98": 8, "0.99": 8}
    json.dumps(record)


def server_rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["client"] is None]


@pytest.mark.parametrize("fields", [{}, {"feedback": "both"}, {"server_optimizer": "adam"}])
def test_spectra_are_of_the_mean_of_the_uploads_and_change_nothing(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(TinyTask(), "fedkd", out=tmp_path / "plain", **fields)
    means: list[dict[str, Tensor]] = []
    step = Server.step

    def watched(self: Server, frames: Any, energy: float, weights: Any = None) -> bytes:
        mean = self._up.mean(frames, self._parameters, weights)
        means.append({name: value.clone() for name, value in mean.items()})
        return step(self, frames, energy, weights)

    monkeypatch.setattr(Server, "step", watched)
    run = train(TinyTask(), "fedkd", out=tmp_path / "run", spectra=True, **fields)
    recorded = [row["spectra"] for row in server_rows(tmp_path / "run")]
    assert [[one["name"] for one in row] for row in recorded] == [["0.weight", "3.weight"]] * 2
    for row, mean in zip(recorded, means, strict=True):
        for one in row:
            assert [*one["ranks"].values()] == by_singular_values(mean[one["name"]])
    assert all("spectra" not in row for row in server_rows(tmp_path / "plain"))
    for key in ("bytes_up", "bytes_down", "score_mentor", "score_mentee"):
        assert run.summary[key] == plain.summary[key]


def test_without_a_server_there_is_nothing_to_record(tmp_path: Path) -> None:
    train(TinyTask(), "local", out=tmp_path / "run", spectra=True)
    assert server_rows(tmp_path / "run") == []
