"""Codecs that know no rank: what they do is written here from their papers' equations.

Sizes called ideal are empirical entropies: what no real coder of the same model goes below, tables
free of charge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from rate_case import SCALE_BYTES, Case, Coded, Peer, by_step
from torch import Tensor

CHUNK, INDEX_BITS = 4096, 12
HALF_BYTES = 2
SEED = 0
OCTAVE_CLASSES = 2  # contexts of a scale for each doubling


def entropy_bytes(symbols: Tensor, contexts: Tensor | None = None) -> float:
    """Return the empirical entropy of all symbols, given their contexts if there are any."""
    symbols = symbols.flatten().long()
    symbols = symbols - symbols.min()
    if contexts is None:
        return _bits(symbols.bincount()) / 8
    contexts = contexts.flatten().long()
    contexts = contexts - contexts.min()
    width = int(symbols.max()) + 1
    together = _bits((contexts * width + symbols).bincount())
    return (together - _bits(contexts.bincount())) / 8


def _bits(counts: Tensor) -> float:
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


# ---- uniform quantisers --------------------------------------------------------------------------


class Uniform(NamedTuple):
    """A matrix in whole steps."""

    codes: Tensor
    step: float
    decoded: Tensor


def uniform(case: Case, allowed: float) -> Uniform | None:
    """Round to the coarsest step that meets the target; several coders share the result.

    Values are decoded towards zero from the middle of their step, as far as loses least.
    """
    key = ("uniform", allowed)
    if key not in case.shared:
        found: list[Uniform] = []

        def attempt(step: float) -> tuple[Tensor, Callable[[], Coded]]:
            codes = (case.matrix / step).round()
            signs = codes.sign()
            away = ((codes - case.matrix / step) * signs).sum() / signs.abs().sum().clamp(min=1)
            decoded = step * (codes - signs * away)

            def keep() -> Coded:
                found.append(Uniform(codes.to(torch.int32), step, decoded))
                return Coded(0, decoded)

            return decoded, keep

        by_step(case, allowed, attempt)
        case.shared[key] = found[0] if found else None
    result: Uniform | None = case.shared[key]
    return result


def ecsq(case: Case, allowed: float) -> Coded | None:
    """Code the steps at their entropy."""
    found = uniform(case, allowed)
    return found and Coded(entropy_bytes(found.codes), found.decoded)


def ecsq_contexts(case: Case, allowed: float, columns: bool) -> Coded | None:
    """Code the steps at their entropy given the scales of rows, and perhaps of columns."""
    found = uniform(case, allowed)
    if found is None:
        return None
    squares = case.matrix.double().square()
    scales = [squares.mean(1, keepdim=True).sqrt()]
    if columns:
        scales.append(squares.mean(0, keepdim=True).sqrt() / squares.mean().sqrt())
    classes = [
        (OCTAVE_CLASSES * scale.clamp(min=1e-3 * found.step).log2()).round() for scale in scales
    ]
    side = sum(entropy_bytes(one) for one in classes)
    total = classes[0] + classes[1] if columns else classes[0]
    contexts = total.expand_as(case.matrix)
    return Coded(side + entropy_bytes(found.codes, contexts), found.decoded)


def qsgd(case: Case, allowed: float) -> Coded | None:
    """Round at random to whole steps, without bias (Alistarh et al. 2017), at the entropy."""
    noise = torch.rand(case.matrix.shape, generator=torch.Generator().manual_seed(SEED))

    def attempt(step: float) -> tuple[Tensor, Callable[[], Coded]]:
        codes = (case.matrix / step + noise).floor()
        decoded = step * codes
        return decoded, lambda: Coded(entropy_bytes(codes) + SCALE_BYTES, decoded)

    return by_step(case, allowed, attempt)


# ---- few values, few bits ------------------------------------------------------------------------


def sign(case: Case) -> Coded:
    """Send signs and one scale."""
    count = case.matrix.numel()
    signs = torch.where(case.matrix < 0, -1.0, 1.0)
    return Coded(-(-count // 8) + SCALE_BYTES, signs * case.matrix.abs().mean())


class Ranked(NamedTuple):
    """Chunks of a matrix, each by falling size."""

    chunks: Tensor  # (C, CHUNK), padded with zeros
    order: Tensor
    held: Tensor  # share of the squared norm in the first k of all chunks


def ranked(case: Case) -> Ranked:
    if "ranked" not in case.shared:
        flat = case.matrix.flatten()
        chunks = torch.nn.functional.pad(flat, (0, -len(flat) % CHUNK)).view(-1, CHUNK)
        order = chunks.abs().argsort(1, descending=True)
        held = chunks.gather(1, order).double().square().sum(0).cumsum(0) / case.total
        case.shared["ranked"] = Ranked(chunks, order, held)
    found: Ranked = case.shared["ranked"]
    return found


def index_bytes(chunks: int, count: int) -> float:
    """Price the places of `count` values in each chunk: 12 bits each, or all ways to choose."""
    ways = math.lgamma(CHUNK + 1) - math.lgamma(count + 1) - math.lgamma(CHUNK - count + 1)
    return chunks * min(INDEX_BITS * count, ways / math.log(2)) / 8


def only(case: Case, count: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    """Decode a matrix of which the largest of each chunk were sent."""
    chunks, order, _ = ranked(case)
    top = order[:, :count]
    sent = torch.zeros_like(chunks).scatter(1, top, values(chunks.gather(1, top)))
    return sent.flatten()[: case.matrix.numel()].view_as(case.matrix)


def four_levels(values: Tensor) -> Tensor:
    """Round to two sizes of either sign, the best for these values (Lloyd 1982)."""
    sizes, signs = values.abs(), values.sign()
    low, high = sizes.mean() * 0.7, sizes.mean() * 1.6
    for _ in range(30):
        upper = sizes > (low + high) / 2
        low, high = sizes[~upper].mean(), sizes[upper].mean()
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            return signs * sizes.mean()
    return signs * torch.where(sizes > (low + high) / 2, high, low)


def topk_two_bits(case: Case, count: int) -> Coded:
    """Send the largest of each chunk in two bits: SparseLoCo's message (arXiv 2508.15706)."""
    chunks = len(ranked(case).chunks)
    size = index_bytes(chunks, count) + chunks * count / 4 + 2 * SCALE_BYTES
    return Coded(size, only(case, count, four_levels))


def topk_half(case: Case, allowed: float) -> Coded | None:
    """Send as many of the largest of each chunk as the target takes, in float16."""
    scale = float(case.matrix.abs().max())
    chunks, _, held = ranked(case)
    count = 1 + int((held < 1 - allowed).sum())
    for more in range(count, CHUNK + 1):
        decoded = only(case, more, lambda values: (values / scale).half().float() * scale)
        if case.share(decoded) <= allowed:
            size = index_bytes(len(chunks), more) + HALF_BYTES * len(chunks) * more + SCALE_BYTES
            return Coded(size, decoded)
    return None


DENSE_CODECS = {
    "dense ECSQ, ideal entropy": Peer(ecsq),
    "dense ECSQ, ideal entropy by row": Peer(partial(ecsq_contexts, columns=False)),
    "dense ECSQ, ideal entropy by row and column": Peer(partial(ecsq_contexts, columns=True)),
    "QSGD, ideal entropy": Peer(qsgd),
    "chunked top-k, fp16, ideal indices": Peer(topk_half),
}
DENSE_POINTS = {
    "sign and scale": Peer(sign),
    **{
        f"chunked top-k, 2 bits, {count} of {CHUNK}": Peer(partial(topk_two_bits, count=count))
        for count in (64, 128, 1024)
    },
}
