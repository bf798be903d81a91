"""Shards that clients draw: thousands of them, alike each time, and nothing kept of the idle."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd_fast.config import TrainConfig
from fedkd_fast.runs import load_run
from fedkd_fast.tasks import TASKS, TaskOptions, build_task
from fedkd_fast.tasks.drawn import DrawnShard, DrawnShards, put_together
from fedkd_fast.trainer import train

SIZE, CLIENTS = 20, 10_000
# What an idle client may cost: an object, a tuple and a number.
IDLE_BYTES = 250
# Methods that learn from all clients, with and without an exchange.
POOLED = ("fedavg", "central")
# Sums of some float32 products.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def digits() -> Any:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return build_task("digits", TaskOptions(samples_per_client=SIZE, batch_size=8))


def samples(task: Any, shard: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a shard in an order that does not depend on the seed."""
    batches = list(task.batches(shard, seed))
    images = torch.cat([batch.inputs["pixel_values"] for batch in batches]).flatten(1)
    labels = torch.cat([batch.labels for batch in batches])
    order = np.lexsort(images.numpy().T)
    return images[order], labels[order]


# ---- shards --------------------------------------------------------------------------------------


def test_shards_are_a_sequence() -> None:
    shards = DrawnShards(CLIENTS, 7, SIZE)
    assert len(shards) == CLIENTS
    assert shards[3] == shards[np.int64(3)] == DrawnShard((3,), 7, SIZE)
    assert shards[-1].clients == (CLIENTS - 1,)
    assert [shard.clients for shard in shards[2:4]] == [(2,), (3,)]
    assert len(shards[0]) == SIZE
    assert sum(map(len, shards)) == CLIENTS * SIZE
    with pytest.raises(IndexError):
        _ = shards[CLIENTS]


def test_seed_and_client_decide() -> None:
    shards, other = DrawnShards(3, 1, 50), DrawnShards(2, 2, 50)
    first, again = shards[0].draw(1000, 4), DrawnShards(99, 1, 50)[0].draw(1000, 4)
    assert all(map(np.array_equal, first, again))
    for differs in (shards[1].draw(1000, 4), other[0].draw(1000, 4)):
        assert not np.array_equal(first.indices, differs.indices)
        assert not np.array_equal(first.moves, differs.moves)


def test_draws_are_uniform_with_replacement() -> None:
    drawn = put_together(DrawnShards(500, 3, SIZE)).draw(10, 4)
    assert drawn.indices.shape == (500 * SIZE,)
    assert drawn.moves.shape == (4, 500 * SIZE)
    counts = np.bincount(drawn.indices, minlength=10)
    # 1,000 of each are expected, with a standard deviation of 30.
    assert len(counts) == 10 and abs(counts - 1000).max() < 150
    assert np.abs(drawn.moves).max() <= 1.0
    # Uniform within [-1, 1]: mean 0 ± 0.006, mean square 1/3 ± 0.003.
    assert np.abs(drawn.moves.mean(1)).max() < 0.03
    assert np.abs((drawn.moves**2).mean(1) - 1 / 3).max() < 0.015


def test_shards_put_together_hold_what_each_held() -> None:
    shards = DrawnShards(3, 5, SIZE)
    whole = put_together([shards[2], put_together(shards[:2])])
    assert len(whole) == 3 * SIZE
    drawn, parts = whole.draw(100, 4), [shards[n].draw(100, 4) for n in (2, 0, 1)]
    assert np.array_equal(drawn.indices, np.concatenate([part.indices for part in parts]))
    assert np.array_equal(drawn.moves, np.concatenate([part.moves for part in parts], axis=1))


@pytest.mark.parametrize("size", [SIZE, 100 * SIZE])
def test_an_idle_client_costs_next_to_nothing(digits: Any, size: int) -> None:
    task = build_task("digits", TaskOptions(samples_per_client=size))
    tracemalloc.start()
    try:
        shards = task.shards(CLIENTS, 0)
        assert tracemalloc.get_traced_memory()[0] < IDLE_BYTES * 10
        kept = list(shards)
        assert tracemalloc.get_traced_memory()[0] < IDLE_BYTES * CLIENTS
        # Some have trained: numpy's and torch's own memory does not count as theirs.
        list(task.batches(kept[0], 0))
        before = tracemalloc.get_traced_memory()[0]
        for shard in kept[:20]:
            for batch in task.batches(shard, 0):
                del batch
        assert tracemalloc.get_traced_memory()[0] - before < IDLE_BYTES * 20
    finally:
        tracemalloc.stop()


# ---- images --------------------------------------------------------------------------------------


def test_a_client_has_the_same_images_in_each_epoch(digits: Any) -> None:
    shard = digits.shards(CLIENTS, 0)[1234]
    one, two, three = (list(digits.batches(shard, seed)) for seed in (0, 0, 1))
    assert [len(batch.labels) for batch in one] == [7, 7, 6]
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])
    # Another epoch: another order of the same images.
    assert not torch.equal(one[0].inputs["pixel_values"], three[0].inputs["pixel_values"])
    for seed in (1, 2):
        assert all(map(torch.equal, samples(digits, shard), samples(digits, shard, seed)))


def test_clients_differ(digits: Any) -> None:
    shards = digits.shards(CLIENTS, 0)
    images = [samples(digits, shards[client])[0] for client in (0, 1, CLIENTS - 1)]
    everything = torch.cat(images)
    assert len(torch.unique(everything, dim=0)) == 3 * SIZE
    # Also in the images that two of them have both drawn: these were moved otherwise.
    wide = [DrawnShard((client,), 0, 500) for client in (0, 1)]
    one, two = (shard.draw(1438, 4) for shard in wide)
    common = np.intersect1d(one.indices, two.indices)
    assert len(common) > 50
    assert not np.isin(one.moves[:, np.isin(one.indices, common)], two.moves).any()


def test_images_are_moved_within_the_stated_ranges() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from fedkd_fast.tasks import digits

    drawn = put_together(DrawnShards(200, 0, 10)).draw(100, digits.MOVES)
    moves = torch.from_numpy(drawn.moves)
    # Of an image whose pixels are their own coordinates, bilinear sampling shows where it went.
    across = torch.arange(digits.SIDE).float() - (digits.SIDE - 1) / 2
    ramps = (
        across.expand(digits.SIDE, digits.SIDE),
        across[:, None].expand(digits.SIDE, digits.SIDE),
    )
    went = torch.stack(
        [
            digits._moved(ramp.expand(moves.shape[1], 1, -1, -1).clone(), moves)[:, 0, 3:5, 3:5]
            for ramp in ramps
        ],
        1,
    ).flatten(2)  # (N, 2, 4): where the four pixels in the middle came from
    inner = across[3:5]
    places = torch.stack([inner.repeat(2), inner.repeat_interleave(2), torch.ones(4)])  # (3, 4)
    maps = went @ torch.linalg.pinv(places)  # (N, 2, 3)
    assert torch.allclose(maps @ places, went, atol=TOLERANCE)
    turns = torch.atan2(maps[:, 1, 0] - maps[:, 0, 1], maps[:, 0, 0] + maps[:, 1, 1])
    scales = torch.linalg.det(maps[:, :, :2]).sqrt()
    for found, centre, largest in (
        (torch.rad2deg(turns), 0.0, 10.0),
        (scales, 1.0, 0.1),
        (maps[:, 0, 2], 0.0, 0.5),
        (maps[:, 1, 2], 0.0, 0.5),
    ):
        away = (found - centre).abs().max()
        # So many draws come close to the bound.
        assert 0.98 * largest < float(away) <= largest * (1 + 1e-4)
    # A turn and a scaling: no shear, no mirror.
    square = maps[:, :, :2] @ maps[:, :, :2].mT
    assert torch.allclose(square, torch.eye(2) * scales[:, None, None] ** 2, atol=TOLERANCE)


def test_dealt_shards_are_augmented_as_before(digits: Any) -> None:
    """Of a generator, first the order, then the moves of each batch."""
    task = build_task("digits", TaskOptions(batch_size=16))
    shard: Any = task.shards(4, 0)[0]
    generator = np.random.default_rng(5)
    order = generator.permutation(shard)
    for batch, part in zip(
        task.batches(shard, 5), np.array_split(order, -(-len(order) // 16)), strict=True
    ):
        from fedkd_fast.tasks.digits import _moved

        moves = torch.from_numpy(generator.uniform(-1.0, 1.0, size=(4, len(part)))).float()
        images: Tensor = task._images[torch.from_numpy(part)]  # type: ignore[attr-defined]
        assert torch.equal(batch.inputs["pixel_values"], _moved(images, moves))


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_of_drawn_shards(digits: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "clients": 6,
        "samples_per_client": 12,
        "participation": 0.3,
        "rounds": 2,
    }
    run = train("digits", "fedkd", out=str(tmp_path / "run"), **fields)
    again = train("digits", "fedkd", **fields)
    same = ("score_mentor", "score_mentee", "bytes_up", "bytes_down")
    assert [run.summary[name] for name in same] == [again.summary[name] for name in same]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    facts = config["task_facts"]
    assert config["samples_per_client"] == 12 and facts["shard_sizes"] == [12] * 6
    assert re.match(r"12 draws with replacement, each turned by up to 10°", facts["shards"])
    # Nothing was dealt: numbers and seed are all there is to know.
    assert not (tmp_path / "run" / "partition.json").exists()
    assert load_run(tmp_path / "run").task.describe()["shards"] == facts["shards"]


def test_drawn_images_teach(digits: Any) -> None:
    """Six clients with sixty images each learn far more than guessing, which scores 0.1."""
    fields: dict[str, Any] = {
        "clients": 6,
        "samples_per_client": 60,
        "rounds": 3,
        "local_epochs": 3,
    }
    scores = {name: train("digits", name, **fields).summary["score"] for name in POOLED}
    assert min(scores.values()) > 0.5, scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_client": 0}, "samples_per_client must be at least 1, got 0"),
        *(
            (
                {"samples_per_client": 5, "partition": partition},
                f"partition must be left out, or iid, with samples_per_client.* got '{partition}'",
            )
            for partition in ("dirichlet:1", "key:doctor", "file")
        ),
    ],
)
def test_options_that_make_no_sense(digits: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task("digits", TaskOptions(**options))


def test_iid_is_what_drawing_is(digits: Any) -> None:
    task = build_task("digits", TaskOptions(samples_per_client=5, partition="iid"))
    assert len(task.shards(3000, 0)[2999]) == 5


@pytest.mark.parametrize("task", [task for task in TASKS if task != "digits"])
def test_other_tasks_deal(task: str) -> None:
    message = f"samples_per_client must be left out for task {task}, .* got 7"
    with pytest.raises(ValueError, match=message):
        build_task(task, TaskOptions(samples_per_client=7))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "samples_per_client must be at least 1, got 0"),
        (1.5, TypeError, "samples_per_client must be an integer, got 1.5"),
        (True, TypeError, "samples_per_client must be an integer, got True"),
    ],
)
def test_counts(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(samples_per_client=value)
