"""wf1: what was asked for is met and used, in every mode, with the smallest of them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import model, powerlaw, relative_error

from fedkd_fast import Compressor, WireError, decompress, decompress_from, inspect, ops
from fedkd_fast.codec import wf1
from fedkd_fast.codec.coding import NOISE, ROUNDING, scales_of
from fedkd_fast.codec.common import raw_entry
from fedkd_fast.codec.curves import at_error
from fedkd_fast.codec.targets import MESSAGE_CAP
from fedkd_fast.wire import Base, Mode

# What is promised of the relative error, as a share of the target: no more, and not much less.
USED = 0.95


def matrices() -> dict[str, torch.Tensor]:
    noise = torch.randn(120, 90, generator=torch.Generator().manual_seed(5))
    return {
        "steep": powerlaw(200, 100, 1.2),
        "usual": powerlaw(128, 256, 0.8, seed=1),
        "flat": powerlaw(96, 96, 0.3, seed=2),
        "noise": noise,
        "tall": powerlaw(700, 40, 0.7, seed=3),
        "conv": powerlaw(64, 27 * 9, 0.9, seed=4).reshape(64, 27, 3, 3),
    }


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.98, 0.995, 0.9999, 0.999999])
def test_the_error_is_met_and_used(energy: float) -> None:
    update = matrices()
    frame = Compressor(energy).compress(update)
    decoded = decompress(frame)
    for info in inspect(frame):
        share = relative_error(update[info.name], decoded[info.name]) / (1 - energy)
        assert USED**2 <= share <= 1.0, info
        assert info.mode in {Mode.CODED_FACTORS, Mode.CODED_DENSE, Mode.CODED_HYBRID}


def test_error_is_another_word_for_energy() -> None:
    update = matrices()
    assert Compressor(error=0.5).compress(update) == Compressor(0.75).compress(update)
    exact = Compressor(error=0.0).compress(update)
    assert all(torch.equal(value, update[name]) for name, value in decompress(exact).items())


def test_every_mode_is_chosen_somewhere() -> None:
    modes = set()
    for energy in (0.9, 0.98, 0.9999):
        modes |= {info.mode for info in inspect(Compressor(energy).compress(matrices()))}
    assert modes == {Mode.CODED_FACTORS, Mode.CODED_DENSE, Mode.CODED_HYBRID}


@pytest.mark.parametrize("energy", [0.9, 0.97, 0.995])
def test_never_larger_than_the_best_single_mode(energy: float) -> None:
    for name, exact in matrices().items():
        raw = raw_entry(name, exact)
        matrix = exact.reshape(exact.shape[0], -1)
        (factors,) = ops.truncated_svd_list([matrix], energy=1 - (1 - energy) * 0.35)
        item = wf1.Item(raw, exact, vector=False, factors=factors, backend=ops)
        alone = []
        for curve in item.curves(0.5 * (1 - energy)):
            if at_error(curve, (1 - energy) * item.total) is None:
                continue
            found = wf1.meeting(item, curve, 1 - energy, wf1.Biases(), ops)
            assert found is not None
            (stream,) = wf1.streams([(0, found)], ops)
            alone.append(len(found.payload(stream, 0)))
        assert len(alone) >= 2
        (coded,) = wf1.encode([item], [1 - energy], ops)
        assert coded.entry is not None
        assert len(coded.entry.payload) <= min(alone)
        assert 0.9 * (1 - energy) * item.total <= coded.error <= (1 - energy) * item.total


def blocks(side: int, count: int, value: float) -> torch.Tensor:
    """Blocks of one number along the diagonal, which all round alike, signs and order drawn."""
    generator = torch.Generator().manual_seed(7)
    whole = torch.zeros(side, side)
    for part in torch.arange(side).chunk(count):
        whole[part[0] : part[-1] + 1, part[0] : part[-1] + 1] = value
    signs = torch.randint(0, 2, (2, side), generator=generator) * 2.0 - 1.0
    order = torch.randperm(side, generator=generator)
    return (whole * signs[0] * signs[1][:, None])[order]


SOURCES = {
    # As flat as this, singular vectors are not found to the last digit.
    **{f"{p}x{q}": powerlaw(p, q, 0.45, seed=6) for p, q in [(256, 256), (400, 200), (60, 60)]},
    "200x400": powerlaw(200, 400, 0.45, seed=6),
    "alike": blocks(768, 100, 1.0039),
    "alike and small": blocks(768, 100, 3e-4),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("energy", [0.65, 0.8, 0.9, 0.98])
def test_factors_say_what_error_they_have(name: str, energy: float) -> None:
    exact = SOURCES[name]
    (factors,) = ops.truncated_svd_list([exact], energy=1 - 0.35 * (1 - energy))
    item = wf1.Item(raw_entry("w", exact), exact, vector=False, factors=factors, backend=ops)
    (curve,) = (c for c in item.curves(1e-3) if c.mode is Mode.CODED_FACTORS)
    found = wf1.meeting(item, curve, 1 - energy, wf1.Biases(), ops)
    assert found is not None
    left, right = (segment.double() for segment in found.segments)
    scales = scales_of(found.mode, found.step, found.sigmas)[0].double()
    error = (exact.double() - (left * scales[:, None]).T @ right).square().sum().item()
    assert error <= found.error <= (1 + 1.2 * NOISE) * error + 2 * ROUNDING * item.total


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numbers_next_to_the_largest_of_float16(energy: float, backend: str) -> None:
    # Some codings overflow.
    signs = torch.sign(torch.randn(64, 64, generator=torch.Generator().manual_seed(8)))
    ramp = torch.linspace(0.9, 1.0, 64)[:, None]
    update = {"same": (signs * 65504).half(), "ramp": (signs * ramp * 65000).half()}
    decoded = decompress(Compressor(energy, backend=backend).compress(update))
    for name, exact in update.items():
        assert relative_error(exact, decoded[name]) <= 1 - energy


def test_sums_of_few_values_are_exact_enough() -> None:
    # In float32, a row of 30,000 terms of three sizes is off by what little may be lost.
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 3, (64, 30000), generator=generator).float() - 0.7
    long = torch.randn(20000, 20, generator=generator)
    update = {"few": few, "view": long.T}
    decoded = decompress(Compressor(0.999).compress(update))
    for name, exact in update.items():
        assert relative_error(exact, decoded[name]) <= 1e-3


@pytest.mark.parametrize("energy", [0.9, 0.95])
def test_how_numbers_lie_in_memory_does_not_matter(energy: float) -> None:
    exact = powerlaw(128, 1000, 0.8, seed=2)
    padded = torch.zeros(128, 1003)[:, :1000].copy_(exact)
    strided = torch.zeros(128, 2000)[:, ::2].copy_(exact)
    frames = [
        Compressor(energy).compress({"w": value})
        for value in (exact, exact.T.contiguous().T, padded, strided)
    ]
    assert len(set(frames)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("energy", [0.95, 0.999])
def test_the_rounding_of_the_dtype_counts(dtype: torch.dtype, energy: float) -> None:
    update = {name: value.to(dtype) for name, value in matrices().items()}
    decoded = decompress(Compressor(energy).compress(update))
    for name, exact in update.items():
        assert decoded[name].dtype == dtype
        assert relative_error(exact, decoded[name]) <= 1 - energy


def test_what_is_low_rank_already_is_sent_as_it_is() -> None:
    # peft's LoRA: A (r, in) and B (out, r). A factorisation of either would have full rank.
    generator = torch.Generator().manual_seed(0)
    update = {
        "q.lora_A.weight": torch.randn(8, 512, generator=generator),
        "q.lora_B.weight": torch.randn(512, 8, generator=generator),
    }
    frame = Compressor(0.95).compress(update)
    assert {info.mode for info in inspect(frame)} == {Mode.CODED_DENSE}
    # The rate of a Gaussian at this error, and what a uniform quantiser and the coder lose on it.
    bits = (0.5 * math.log2(1 / 0.05) + 0.26) * 1.01 * 2 * 8 * 512
    assert sum(info.payload_bytes for info in inspect(frame)) * 8 <= bits + 2 * 8 * 40
    for name, value in decompress(frame).items():
        assert relative_error(update[name], value) <= 0.05


# ---- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["tensor", "message"])
@pytest.mark.parametrize("budget", [3000, 8000, 20000, 60000])
def test_a_budget_is_kept_and_used(budget: int, scope: str) -> None:
    update = matrices()
    frame = Compressor(budget_bytes=budget, scope=scope).compress(update)
    assert 0.98 * budget <= len(frame) <= budget
    decoded = decompress(frame)
    errors = [relative_error(exact, decoded[name]) for name, exact in update.items()]
    assert max(errors) < 1.0
    if scope == "tensor":
        # Everyone loses about the same.
        assert min(errors) >= USED**4 * max(errors)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
def test_large_budgets_are_used_too(share: float) -> None:
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    for exact in (noise, powerlaw(128, 128, 1.5)):
        budget = int(share * exact.nbytes)
        frame = Compressor(budget_bytes=budget).compress({"w": exact})
        assert len(frame) <= budget
        # Beyond this the integers are finer than float32 itself.
        assert len(frame) >= 0.98 * budget or relative_error(exact, decompress(frame)["w"]) < 1e-12


def test_bits_per_param() -> None:
    update = matrices()
    count = sum(value.numel() for value in update.values())
    frame = Compressor(bits_per_param=1.5).compress(update)
    assert 0.98 * 1.5 <= 8 * len(frame) / count <= 1.5


def test_a_budget_that_holds_everything_loses_nothing() -> None:
    update = matrices()
    frame = Compressor(budget_bytes=10**7).compress(update)
    assert all(torch.equal(value, update[name]) for name, value in decompress(frame).items())


def test_a_budget_that_is_too_small_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"at least about \d+ bytes, got a limit of 50"):
        Compressor(budget_bytes=50).compress(matrices())


def test_a_message_as_a_whole_is_smaller() -> None:
    # Tensors of unlike norms: what is lost of the small ones hardly counts.
    update = {name: value * 4.0**-i for i, (name, value) in enumerate(matrices().items())}
    energy = 0.95
    each, whole = (
        Compressor(energy, scope=scope).compress(update) for scope in ("tensor", "message")
    )
    assert len(whole) < 0.9 * len(each)
    decoded = decompress(whole)
    total = sum(float(value.double().square().sum()) for value in update.values())
    errors = {name: relative_error(exact, decoded[name]) for name, exact in update.items()}
    lost = sum(
        errors[name] * float(exact.double().square().sum()) for name, exact in update.items()
    )
    assert lost <= (1 - energy) * total
    assert 0.5 * (1 - energy) < max(errors.values()) <= MESSAGE_CAP * (1 - energy)


# ---- the same everywhere -------------------------------------------------------------------------


def test_frames_and_decodings_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    update, results = model(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            frame = Compressor(0.97).compress(update)
            results.append((frame, decompress(frame)))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name])


def test_the_reference_decodes_to_the_same_bits() -> None:
    for energy in (0.9, 0.98, 0.9999):
        frame = Compressor(energy).compress(matrices())
        slow = decompress(frame, backend="reference")
        for name, value in decompress(frame).items():
            assert torch.equal(value, slow[name])


def test_many_threads_at_once() -> None:
    updates = [{"w": powerlaw(60, 50, seed=seed)} for seed in range(8)]
    alone = [Compressor(0.95).compress(update) for update in updates]
    shared = Compressor(0.95)
    with ThreadPoolExecutor(4) as pool:
        frames = list(pool.map(shared.compress, updates))
        decoded = list(pool.map(decompress, frames))
    assert frames == alone
    for update, values in zip(updates, decoded, strict=True):
        assert relative_error(update["w"], values["w"]) <= 0.05


# ---- files ---------------------------------------------------------------------------------------


class Lazy(dict[str, torch.Tensor]):
    """Values that exist only while somebody looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2

    def __contains__(self, name: object) -> bool:
        return name in ("a", "b")

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return powerlaw(50, 40, seed=ord(name))


@pytest.mark.parametrize("codec", ["wf1", "dense", "wf0", "factors-fp32", "raw"])
def test_a_file_holds_the_frame(codec: str) -> None:
    update = model()
    update["tied"] = update["head.weight"]
    file = io.BytesIO(b"before")
    file.seek(6)
    length = Compressor(0.95, codec).compress_to(file, update)
    found = file.getvalue()
    frame = Compressor(0.95, codec).compress(update)
    assert found[:6] == b"before" and length == len(found) - 6
    file.seek(6)
    decoded = dict(decompress_from(file))
    for name, value in decompress(found[6:]).items():
        assert torch.equal(value, decoded[name])
    if codec not in ("wf1", "dense"):
        # What these learn of their own predictions from one tensor serves the next one.
        assert found[6:] == frame
    assert abs(length - len(frame)) <= 0.01 * len(frame)


def test_a_file_with_a_base() -> None:
    base = {"a": torch.ones(50, 40), "b": torch.ones(50, 40)}
    lazy = Lazy()
    file = io.BytesIO()
    version = Base(run=5, round=2)
    Compressor(0.95).compress_to(file, lazy, base, relative_to=version)
    assert lazy.asked == ["a", "b"]
    file.seek(0)
    for name, value in decompress_from(file, base=base, relative_to=version):
        exact = powerlaw(50, 40, seed=ord(name)) - 1.0
        assert relative_error(exact, value - 1.0) <= 0.0501
    file.seek(0)
    with pytest.raises(ValueError, match="pass relative_to="):
        next(decompress_from(file, base=base))
    with pytest.raises(ValueError, match="base does not match"):
        Compressor().compress_to(io.BytesIO(), lazy, {"a": base["a"]})


def test_a_damaged_file_gives_nothing() -> None:
    file = io.BytesIO()
    Compressor(0.95).compress_to(file, model())
    data = bytearray(file.getvalue())
    data[100] ^= 1
    with pytest.raises(WireError, match="checksum"):
        next(decompress_from(io.BytesIO(bytes(data))))


def test_budgets_need_the_whole_update() -> None:
    for compressor in (Compressor(budget_bytes=9999), Compressor(scope="message")):
        with pytest.raises(ValueError, match="not a budget"):
            compressor.compress_to(io.BytesIO(), model())


def test_frames_without_a_schema() -> None:
    update = model()
    bare, whole = (Compressor(0.95, schema=schema).compress(update) for schema in (False, True))
    names = sum(len(name) for name in update)
    assert len(bare) <= len(whole) - names // 2
    for name, value in decompress(bare, schema=update).items():
        assert torch.equal(value, decompress(whole)[name])
    with pytest.raises(WireError, match="pass schema="):
        decompress(bare)
    other = dict(update)
    other["scalar"] = torch.zeros(2)
    with pytest.raises(ValueError, match="schema"):
        decompress(bare, schema=other)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.floats(0.0, 2.0),
    st.floats(0.02, 0.99999),
    st.integers(-60, 60),
    st.integers(0, 2**31),
)
def test_any_matrix(
    rows: int, cols: int, power: float, energy: float, exponent: int, seed: int
) -> None:
    exact = powerlaw(rows, cols, power, seed) * 2.0**exponent
    frame = Compressor(energy).compress({"w": exact})
    assert relative_error(exact, decompress(frame)["w"]) <= 1 - energy


def test_a_message_that_one_tensor_rules() -> None:
    # Most of the squared norm lies in one matrix of few columns, which has to lose less than its
    # share so that others may lose more; and what factors cannot do some other mode does.
    update = {"ruler": 30.0 * powerlaw(128, 96, 2.5), **matrices()}
    for energy in (0.6, 0.95, 0.99):
        frame = Compressor(energy, scope="message").compress(update)
        infos = inspect(frame)
        assert {info.mode for info in infos} <= {
            Mode.CODED_FACTORS,
            Mode.CODED_DENSE,
            Mode.CODED_HYBRID,
        }
        assert len(frame) < len(Compressor(energy).compress(update))
