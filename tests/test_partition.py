"""How samples are dealt to clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_task import TinyTask

from fedkd_fast.tasks.partition import Indices, check_partition, deal
from fedkd_fast.trainer import configure

SAMPLES = 200
LABELS = np.arange(SAMPLES) % 4
# The most frequent first: 80, 60, 40, 20 samples.
DRUGS = ["a"] * 80 + ["b"] * 60 + ["c"] * 40 + ["d"] * 20
KEYS = {"drug": DRUGS, "number": list(range(SAMPLES))}


def dealt(partition: str, clients: int, seed: int = 0) -> list[Indices]:
    return deal(partition, clients, seed, samples=SAMPLES, labels=LABELS, keys=KEYS)


@pytest.mark.parametrize("clients", [1, 3, SAMPLES])
@pytest.mark.parametrize(
    "partition", ["iid", "dirichlet:0.01", "dirichlet:1e-300", "dirichlet:1000", "key:number"]
)
def test_every_sample_goes_to_one_client_and_none_goes_without(
    partition: str, clients: int
) -> None:
    shards = dealt(partition, clients)
    assert len(shards) == clients
    assert all(len(shard) for shard in shards)
    assert sorted(np.concatenate(shards).tolist()) == list(range(SAMPLES))


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5"])
def test_the_seed_decides(partition: str) -> None:
    one, same, other = (dealt(partition, 4, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_is_nearly_equal_and_mixed() -> None:
    shards = dealt("iid", 3)
    assert sorted(len(shard) for shard in shards) == [66, 67, 67]
    assert all(len(np.unique(LABELS[shard])) == 4 for shard in shards)


def skew(partition: str) -> float:
    """Return the mean share of a client's most frequent class."""
    counts = [np.bincount(LABELS[shard], minlength=4) for shard in dealt(partition, 4, seed=3)]
    return float(np.mean([count.max() / count.sum() for count in counts]))


def test_a_larger_concentration_makes_clients_alike() -> None:
    assert skew("dirichlet:0.05") > 0.7 > skew("dirichlet:1") > skew("dirichlet:1000")
    assert skew("dirichlet:1000") < 0.35


def test_a_value_of_a_key_stays_together_and_sizes_are_levelled() -> None:
    shards = dealt("key:drug", 2)
    values = [{DRUGS[index] for index in shard} for shard in shards]
    # a, then b, then c to the smaller b, then d to the smaller a.
    assert values == [{"a", "d"}, {"b", "c"}]
    assert [len(shard) for shard in shards] == [100, 100]
    assert [len(shard) for shard in dealt("key:drug", 4)] == [80, 60, 40, 20]
    assert all(
        np.array_equal(one, two)
        for one, two in zip(dealt("key:drug", 3, 1), dealt("key:drug", 3, 2), strict=True)
    )


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        ("iid", 201, "clients must be at most 200, the training samples, got 201"),
        ("key:drug", 5, "clients must be at most 4, the values of key:drug, got 5"),
        ("key:doctor", 2, r"key of the data \(drug, number\), got 'key:doctor'"),
        ("file", 2, "partition 'file' needs data in several files, one a client"),
        ("random", 2, "partition must be iid, .* or file, got 'random'"),
    ],
)
def test_what_cannot_be_dealt(partition: str, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dealt(partition, clients)


def test_data_without_keys() -> None:
    with pytest.raises(ValueError, match=r"a key of the data \(none\), got 'key:drug'"):
        deal("key:drug", 1, 0, samples=3, labels=[0, 1, 2], keys={})


@pytest.mark.parametrize("value", ["iid", "file", "key:a", "key:a:b", "dirichlet:.5"])
def test_partitions(value: str) -> None:
    check_partition(value)


@pytest.mark.parametrize(
    "value",
    [
        *("", "iid:1", "file:a", "key", "key:", "dirichlet", "dirichlet:", "dirichlet:x"),
        *(
            "dirichlet:0",
            "dirichlet:-1",
            "dirichlet:nan",
            "dirichlet:inf",
            "dirichlet:1e308",
            3,
            True,
        ),
    ],
)
def test_no_partitions(value: Any) -> None:
    message = "partition must be iid, dirichlet:CONCENTRATION, key:COLUMN or file, got"
    with pytest.raises(ValueError, match=message):
        configure(TinyTask(), "fedkd", {"partition": value})
