"""Sequences of tokens in batches: of similar length for training, by length for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.tasks.partition import Indices

# Batches are made of texts of similar length: texts are sorted by length within pools of this many
# batches, drawn at random. Larger pools pad less and mix less.
POOL_BATCHES = 20
EVALUATION_BATCH = 64


def bucketed(
    shard: Indices, tokens: Sequence[Sequence[int]], batch_size: int, seed: int
) -> Iterator[Indices]:
    """Go through a shard once, texts of similar length together, batches in random order.

    Args:
        shard: indices into ``tokens``.
        tokens: of all texts.
        batch_size: the most texts of a batch; those of a pool have nearly equal sizes.
        seed: decides the order.

    Yields:
        The indices of one batch.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(shard)
    parts: list[Indices] = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[start : start + batch_size * POOL_BATCHES]
        lengths = [len(tokens[index]) for index in pool]
        pool = pool[np.argsort(lengths, kind="stable")]
        parts += np.array_split(pool, math.ceil(len(pool) / batch_size))
    for position in generator.permutation(len(parts)):
        yield parts[position]


def by_length(tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Go through all texts from the shortest to the longest, which pads least.

    Yields:
        The indices of at most `EVALUATION_BATCH` texts.
    """
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    for start in range(0, len(order), EVALUATION_BATCH):
        yield order[start : start + EVALUATION_BATCH]


def pad(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Pad rows on the right to the longest: (N, L) int64."""
    padded = torch.full((len(rows), max(map(len, rows))), filler, device="cpu")
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, device="cpu")
    return padded


def model_inputs(tokens: Sequence[Sequence[int]], padding_token: int) -> dict[str, Tensor]:
    """Pad to the longest text: ``input_ids`` and ``attention_mask``, both (N, L)."""
    ones = [[1] * len(text) for text in tokens]
    return {"input_ids": pad(tokens, padding_token), "attention_mask": pad(ones, 0)}
