"""Codecs of the baselines: what they keep, what they cost, and their frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from federation import exchange, federation
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.compress import Compressor
from fedkd_fast.config import TrainConfig
from fedkd_fast.legs import PackedLeg
from fedkd_fast.methods import METHODS
from fedkd_fast.methods.fedpaq import StochasticQuantiser
from fedkd_fast.methods.packing import Packing, pack_bits, packed_bytes, unpack_bits
from fedkd_fast.methods.powersgd import SubspaceIteration
from fedkd_fast.methods.sparseloco import CHUNK, ChunkedTop
from fedkd_fast.tensors import digest_of
from fedkd_fast.wire import Base

BITS = (2, 4, 8, 16)
PACKINGS: dict[str, Callable[[], Packing]] = {
    **{f"fedpaq-{bits}": lambda bits=bits: StochasticQuantiser(bits, 0) for bits in BITS},
    "powersgd": lambda: SubspaceIteration(2, 0),
    "sparseloco": lambda: ChunkedTop(0.02),
}
EPSILON = torch.finfo(torch.float32).eps


def update(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        **{"matrix": (40, 33), "convolution": (8, 4, 3, 3), "vector": (37,), "one": (1,)},
        **{"number": (), "large": (70, 150), "small": (2, 2)},
        **{"chunk": (64, 64), "chunks": (128, 64), "none": (0, 3)},
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["half"] = made["matrix"].to(torch.bfloat16)
    made["zero"] = torch.zeros(5, 7)
    return made


@pytest.mark.parametrize("make", PACKINGS.values(), ids=PACKINGS)
def test_layout_and_shapes(make: Callable[[], Packing]) -> None:
    packing, whole = make(), update()
    packed, layout = packing.pack(whole), packing.layout(whole)
    assert list(packed) == list(layout)
    for name, value in packed.items():
        assert (value.shape, value.dtype) == (layout[name].shape, layout[name].dtype)
        assert value.is_contiguous()
    # A receiver has another instance.
    unpacked = make().unpack(packed, whole)
    assert list(unpacked) == list(whole)
    for name, value in unpacked.items():
        assert (value.shape, value.dtype) == (whole[name].shape, whole[name].dtype)
    assert not unpacked["zero"].any()


@pytest.mark.parametrize("make", PACKINGS.values(), ids=PACKINGS)
def test_equal_seeds_pack_alike(make: Callable[[], Packing]) -> None:
    one, two = make(), make()
    for seed in (0, 1):
        first, second = one.pack(update(seed)), two.pack(update(seed))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8, 12, 16])
def test_numbers_of_few_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for count in (0, 1, 3, 8, 1001):
        numbers = torch.randint(2**bits, (count,), generator=generator)
        packed = pack_bits(numbers, bits)
        assert len(packed) == packed_bytes(count, bits) == math.ceil(count * bits / 8)
        assert torch.equal(unpack_bits(packed, bits, count), numbers.int())


def test_low_bits_come_first() -> None:
    assert pack_bits(torch.tensor([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]
    assert pack_bits(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 0b10]


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_within_a_step_and_unbiased(bits: int) -> None:
    quantiser, draws = StochasticQuantiser(bits, 1), 400
    whole = {"x": torch.randn(500, generator=torch.Generator().manual_seed(2))}
    step = float(whole["x"].abs().max()) / (2 ** (bits - 1) - 1)
    total = torch.zeros(500, dtype=torch.float64)
    for _ in range(draws):
        found = quantiser.unpack(quantiser.pack(whole), whole)["x"]
        # The step and the product with it are rounded.
        slack = 4 * EPSILON * float(whole["x"].abs().max())
        assert float((found - whole["x"]).abs().max()) <= step + slack
        total += found.double()
    bias = total / draws - whole["x"].double()
    # A draw varies by step/2 at most: six deviations of its mean.
    assert float(bias.abs().max()) <= 6 * step / 2 / math.sqrt(draws) + 1e-6
    assert abs(float(bias.mean())) <= 6 * step / 2 / math.sqrt(draws * 500) + 1e-6


def test_multiples_of_the_step_are_exact() -> None:
    whole = {"x": torch.arange(-7.0, 8.0)}
    quantiser = StochasticQuantiser(4, 0)
    assert torch.equal(quantiser.unpack(quantiser.pack(whole), whole)["x"], whole["x"])


def test_clients_round_independently() -> None:
    clients, _ = federation("fedpaq", 2)
    packings = [client._up._packing for client in clients]  # type: ignore[attr-defined]
    one, two = (packing.pack(update()) for packing in packings)
    assert not torch.equal(one["matrix/codes"], two["matrix/codes"])


def low_rank(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(40, rank, generator=generator)
    return left @ torch.randn(rank, 30, generator=generator)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrices_of_small_rank_are_exact(rank: int) -> None:
    packing, whole = SubspaceIteration(3, 0), {"x": low_rank(rank)}
    for _ in range(2):
        found = packing.unpack(packing.pack(whole), whole)["x"]
        error = torch.linalg.matrix_norm(found - whole["x"]) / torch.linalg.matrix_norm(whole["x"])
        assert float(error) <= 100 * EPSILON


def test_warm_starts_come_near_the_best_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = low_rank(3) + 0.3 * torch.randn(40, 30, generator=generator)
    best = float(torch.linalg.svdvals(matrix)[3:].square().sum().sqrt())
    packing, whole = SubspaceIteration(3, 0), {"x": matrix}
    errors = []
    for _ in range(8):
        found = packing.unpack(packing.pack(whole), whole)["x"]
        errors.append(float(torch.linalg.matrix_norm(found - matrix)))
    assert errors[-1] <= 1.001 * best < errors[0]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))


def test_factors_only_where_they_are_smaller() -> None:
    packing = SubspaceIteration(4, 0)
    shapes = {"wide": (8, 9), "narrow": (8, 8), "kernel": (16, 4, 3, 3), "vector": (99,)}
    layout = packing.layout({name: torch.zeros(shape) for name, shape in shapes.items()})
    # 4·(8 + 9) = 68 < 72, 4·(8 + 8) = 64.
    wanted = ["wide/left", "wide/right", "narrow", "kernel/left", "kernel/right", "vector"]
    assert list(layout) == wanted
    assert layout["kernel/right"].shape == (36, 4)


def test_the_largest_entries_of_each_chunk_are_kept() -> None:
    whole = {"x": torch.randn(3 * CHUNK // 2, generator=torch.Generator().manual_seed(0))}
    packing = ChunkedTop(0.02)
    found = packing.unpack(packing.pack(whole), whole)["x"]
    for start, size, kept in ((0, CHUNK, 82), (CHUNK, CHUNK // 2, 41)):
        chunk, sent = whole["x"][start : start + size], found[start : start + size]
        largest = chunk.abs().topk(kept).indices
        assert set(sent.nonzero().flatten().tolist()) == set(largest.tolist())
        assert torch.equal(sent[largest].sign(), chunk[largest].sign())
        levels = sent[largest].abs().unique()
        assert len(levels) == 2
        # Independently: two means on both sides of the mean, rounded to 8 bits.
        magnitudes = chunk[largest].abs().double()
        high = magnitudes > magnitudes.mean()
        for level, mean in zip(
            levels, (magnitudes[~high].mean(), magnitudes[high].mean()), strict=True
        ):
            assert abs(float(level - mean)) <= 2**-8 * float(mean)


def test_two_levels_are_exact_and_one_entry_is_sent_at_least() -> None:
    entries = torch.zeros(6, 100)
    entries[0, 0], entries[3, 3], entries[5, 99] = 2.0, -0.5, 2.0
    whole = {"x": entries, "y": torch.tensor([0.0, -3.0, 1.0])}
    packing = ChunkedTop(0.005)
    found = packing.unpack(packing.pack(whole), whole)
    assert torch.equal(found["x"], entries)
    assert torch.equal(found["y"], torch.tensor([0.0, -3.0, 0.0]))


def dense(seed: int = 0) -> dict[str, Tensor]:
    """An update without zeros, which frames leave out."""
    return {name: value for name, value in update(seed).items() if name != "zero"}


def formula(method: str, config: TrainConfig, like: dict[str, Tensor]) -> int:
    """Return the bytes of an update without what frames add."""
    if method == "fedpaq":
        return sum(math.ceil(one.numel() * config.bits / 8) + 4 for one in like.values())
    if method == "powersgd":
        total = 0
        for one in like.values():
            p = one.shape[0] if one.ndim > 1 else 1
            q = math.prod(one.shape[1:]) if one.ndim > 1 else one.numel()
            factors = config.rank * (p + q)
            smaller = one.ndim > 1 and factors < p * q
            total += 4 * factors if smaller else one.numel() * one.itemsize
        return total
    total = 0
    for one in like.values():
        sizes = [min(CHUNK, one.numel() - start) for start in range(0, one.numel(), CHUNK)]
        kept = sum(max(1, round(config.top_share * size)) for size in sizes)
        total += math.ceil(12 * kept / 8) + math.ceil(2 * kept / 8) + 4 * len(sizes)
    return total


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        *(("fedpaq", {"bits": bits}) for bits in BITS),
        *(("powersgd", {"rank": rank}) for rank in (1, 4)),
        *(("sparseloco", {"top_share": share}) for share in (0.01, 0.03, 1.0)),
    ],
)
def test_bytes_of_frames(method: str, fields: dict[str, Any]) -> None:
    config = dataclasses.replace(TrainConfig(), **fields)
    make = METHODS[method].packing
    assert make is not None
    packing, whole = make(config, 0), dense()
    leg = PackedLeg(packing, feedback=False)
    base = {name: torch.zeros_like(value) for name, value in whole.items()}
    frame = leg.encode(whole, base, 1.0)
    entries = wire.inspect(frame, wire_schema(packing, base))
    payload = sum(entry.payload_bytes for entry in entries)
    zeros = sum(entry.dense_bytes for entry in entries if entry.payload_bytes == 0)
    assert payload + zeros == formula(method, config, whole)
    # Names and shapes do not travel: a few bytes an entry, and the header.
    assert len(frame) - payload <= 64 + 8 * len(entries)


def test_places_beyond_the_tensor_are_refused() -> None:
    like, packing = {"x": torch.ones(5)}, ChunkedTop(0.2)
    packed = packing.pack(like) | {"x/places": pack_bits(torch.tensor([5]), 12)}
    with pytest.raises(ValueError, match="places of 'x' must lie within its 5 entries"):
        packing.unpack(packed, like)


def wire_schema(packing: Packing, like: dict[str, Tensor]) -> list[wire.TensorSpec]:
    return [
        wire.TensorSpec(name, str(one.dtype).removeprefix("torch."), tuple(one.shape))
        for name, one in packing.layout(like).items()
    ]


@pytest.mark.parametrize("packing", [SubspaceIteration(2, 0), StochasticQuantiser(8, 0)])
def test_what_overflows_is_refused(packing: Packing) -> None:
    base = {"w": torch.zeros(16, 16)}
    packed = {
        name: torch.full_like(value, torch.finfo(value.dtype).max)
        if value.is_floating_point()
        else torch.full_like(value, 100)
        for name, value in packing.layout(base).items()
    }
    against = Base(digest=digest_of(base))
    frame = Compressor(codec="raw", schema=False).compress(packed, relative_to=against)
    leg = PackedLeg(packing, feedback=False)
    for read in (lambda: leg.mean([frame], base, None), lambda: leg.decode(frame, base)):
        with pytest.raises(wire.WireError, match="tensor 'w' decodes to NaN or Inf"):
            read()


@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_what_a_message_leaves_out_is_added_to_the_next(decay: float) -> None:
    leg = PackedLeg(ChunkedTop(0.1), feedback=True, decay=decay)
    base = {"x": torch.zeros(200)}
    residual, packing = torch.zeros(200), ChunkedTop(0.1)
    for seed in range(4):
        step = {"x": torch.randn(200, generator=torch.Generator().manual_seed(seed))}
        wanted = {"x": step["x"] + decay * residual}
        sent = packing.unpack(packing.pack(wanted), wanted)["x"]
        residual = wanted["x"] - sent
        assert torch.equal(leg.decode(leg.encode(step, base, 1.0), base)["x"], sent)


def test_methods_say_which_legs_have_feedback() -> None:
    wanted = {"fedpaq": (False, 1.0), "powersgd": (True, 1.0), "sparseloco": (True, 0.95)}
    for method, (feedback, decay) in wanted.items():
        for fields, expected in (({}, feedback), ({"feedback": "none"}, False)):
            clients, server = federation(method, 1, **fields)
            for leg in (clients[0]._up, server._down):
                assert isinstance(leg, PackedLeg)
                assert (leg._feedback is not None) == expected
                if leg._feedback is not None:
                    assert leg._feedback.decay == decay


def test_means_of_packed_frames_have_weights() -> None:
    legs = [PackedLeg(StochasticQuantiser(16, seed), feedback=False) for seed in (0, 1)]
    base = {"x": torch.full((50,), 3.0)}
    states = [{"x": base["x"] + value} for value in (1.0, 2.0)]
    frames = [leg.encode(state, base, 1.0) for leg, state in zip(legs, states, strict=True)]
    mean = legs[0].mean(frames, base, [3.0, 1.0])
    assert torch.allclose(mean["x"], torch.full((50,), 1.25), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="base does not match"):
        legs[0].mean(frames, {"x": base["x"] + 1}, None)
    with pytest.raises(ValueError, match="base does not match: the frame was made against None"):
        packed = StochasticQuantiser(16, 0).pack(base)
        legs[0].decode(Compressor(codec="raw", schema=False).compress(packed), base)


def test_another_codec_takes_the_place_of_the_methods_own() -> None:
    clients, server = federation("fedpaq", 2, codec="raw")
    frames, broadcast = exchange(clients, server)
    plain, other = federation("fedavg", 2)
    assert exchange(plain, other) == (frames, broadcast)
