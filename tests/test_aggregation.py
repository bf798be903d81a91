"""aggregate: weighted means of frames, and the broadcast made of them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from updates import relative_error

from fedkd_fast import Compressor, WireError, aggregate, decompress, inspect, wire
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.wire import Base, Entry, Mode

RAW = Compressor(codec="raw")
ROUNDING = torch.finfo(torch.float32).eps


def updates(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(20, 12, generator=generator),
            "h": torch.randn(5, generator=generator).half(),
            "n": torch.tensor([index, 10 * index]),
            "f": torch.tensor([index > 0, False]),
        }
        for index in range(count)
    ]


def test_mean_of_raw_frames() -> None:
    parts = updates()
    mean = aggregate(RAW.compress(part) for part in parts)
    exact = sum(part["w"].double() for part in parts) / 3
    assert float((mean["w"] - exact).abs().max()) <= ROUNDING * float(exact.abs().max())
    assert mean["w"].dtype == torch.float32 and mean["h"].dtype == torch.float16
    assert mean["n"].tolist() == [1, 10] and mean["f"].tolist() == [True, False]


def test_weights_are_normalised() -> None:
    frames = [RAW.compress(part) for part in updates(2)]
    mean = aggregate(frames, weights=[30, 10])
    exact = 0.75 * updates(2)[0]["w"].double() + 0.25 * updates(2)[1]["w"].double()
    assert float((mean["w"] - exact).abs().max()) <= ROUNDING * float(exact.abs().max())
    only = aggregate(frames, weights=[0, 1])
    assert torch.equal(only["w"], updates(2)[1]["w"])


def test_weights_may_be_by_name() -> None:
    frames = [RAW.compress(part) for part in updates(2)]
    wanted = aggregate(frames, weights=[30, 10])
    for keys in ((7, 9), (1, 0), ("a", "b")):
        named = dict(zip(keys, frames, strict=True))
        mean = aggregate(named, weights={keys[1]: 10, keys[0]: 30})
        assert all(torch.equal(mean[name], wanted[name]) for name in wanted)
    assert torch.equal(aggregate(iter(frames), weights={1: 10, 0: 30})["w"], wanted["w"])
    with pytest.raises(ValueError, match="weights must have an entry for each frame, 'b' has none"):
        aggregate({"a": frames[0], "b": frames[1]}, weights={"a": 1})
    with pytest.raises(ValueError, match="weights must be of frames, there is none of 'c'"):
        aggregate({"a": frames[0]}, weights={"a": 1, "c": 2})


def test_order_of_frames_does_not_matter_for_equal_weights() -> None:
    frames = [RAW.compress(part) for part in updates(2)]
    assert torch.equal(aggregate(frames)["w"], aggregate(frames[::-1])["w"])


def test_recompress_keeps_base_and_ties() -> None:
    base = {"w": torch.ones(16, 8), "tied": torch.ones(16, 8)}
    base["tied"] = base["w"]
    frames = []
    for part in updates(2):
        moved = base["w"] + part["w"][:16, :8]
        frames.append(Compressor(0.9).compress({"w": moved, "tied": moved}, base))
    mean = aggregate(frames)
    assert mean["w"].data_ptr() == mean["tied"].data_ptr()
    broadcast = mean.recompress(Compressor(1.0))
    applied = decompress(broadcast, base=base)
    assert torch.equal(applied["w"], base["w"] + mean["w"])
    with pytest.raises(ValueError, match="pass base="):
        decompress(broadcast)


def test_lossy_frames_average_to_the_mean_of_their_decodings() -> None:
    frames = [Compressor(0.8).compress({"w": part["w"]}) for part in updates()]
    exact = sum(decompress(frame)["w"].double() for frame in frames) / 3
    mean = aggregate(frames)["w"]
    assert float((mean - exact).abs().max()) <= ROUNDING * float(exact.abs().max())


def test_one_frame_cannot_tie_what_the_others_send() -> None:
    values = {"a": torch.ones(4), "b": torch.full((4,), 3.0)}
    tied = {"a": values["a"], "b": values["a"]}
    frames = [RAW.compress(tied), *(RAW.compress(values) for _ in range(3))]
    for order in (frames, frames[::-1]):
        mean = aggregate(order)
        assert mean["a"].tolist() == [1.0] * 4 and mean["b"].tolist() == [2.5] * 4


@pytest.mark.parametrize("count", range(2, 31, 2))
def test_half_of_the_booleans_is_true(count: int) -> None:
    frames = [RAW.compress({"f": torch.tensor([index % 2 == 0])}) for index in range(count)]
    assert bool(aggregate(frames)["f"])
    assert not bool(aggregate([*frames, frames[1]])["f"])


def test_integers_are_exact_or_refused() -> None:
    value = torch.tensor([2**53, -(2**53), 7])
    assert torch.equal(aggregate([RAW.compress({"n": value})] * 3)["n"], value)
    with pytest.raises(ValueError, match="frame 0: 'n' holds integers beyond 2\\^53"):
        aggregate([RAW.compress({"n": torch.tensor([2**53 + 1])})], strict=True)


def test_huge_weights() -> None:
    frames = [RAW.compress({"w": torch.tensor([value])}) for value in (1.0, 3.0)]
    assert aggregate(frames, weights=[1e308, 1e308])["w"].item() == 2.0


def test_refusals() -> None:
    frames = [RAW.compress(part) for part in updates(2)]
    with pytest.raises(ValueError, match="at least one frame"):
        aggregate([])
    with pytest.raises(ValueError, match="2 frames, got 3"):
        aggregate(frames, weights=[1, 2, 3])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and >= 0"):
            aggregate(frames, weights=[1.0, bad])
    with pytest.raises(ValueError, match="not all be zero"):
        aggregate(frames, weights=[0, 0])
    with pytest.raises(ValueError, match="first frame of frame 1 does not match"):
        aggregate([frames[0], RAW.compress({"w": torch.ones(2)})], strict=True)
    with pytest.raises(ValueError, match="schema of frame 0 does not match"):
        aggregate(frames, schema={"w": torch.ones(2)}, strict=True)
    with pytest.raises(ValueError, match="got none: .*schema of frame 1 does not match"):
        aggregate(frames, schema={"w": torch.ones(2)})
    part = {"w": torch.ones(3)}
    other = [RAW.compress(part, base={"w": torch.full((3,), value)}) for value in (0.0, 2.0)]
    with pytest.raises(ValueError, match="frame 1 was made against another base"):
        aggregate(other, strict=True)
    with pytest.raises(WireError):
        aggregate([frames[0], frames[1][:-1]], strict=True)
    odd: list[Any] = [frames[0], None]
    assert aggregate(odd).refused == {1: "frame 1 must be bytes, got NoneType"}
    like: list[Any] = [bytearray(frames[0]), np.frombuffer(frames[1], np.uint8)]
    assert torch.equal(aggregate(like)["w"], aggregate(frames)["w"])
    single: list[Any] = [frames[0], np.frombuffer(frames[0], np.uint8), "frames"]
    for one in single:
        with pytest.raises(TypeError, match="frames must be several, one a sender, got a single"):
            aggregate(one)
    without: list[Any] = [None, 5]
    for one in without:
        with pytest.raises(TypeError, match=f"frames must be an iterable or a mapping .* {one}"):
            aggregate(one)
    numbers: list[Any] = [3.0, ["1", "2"], [1, None], {0: 1, 1: [2]}]
    for one in numbers:
        with pytest.raises(TypeError, match="weights must be .*numbers, got "):
            aggregate(frames, one)


def low_rank(seed: int, rank: int = 3, shape: tuple[int, int] = (60, 40)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    return left @ right.T


@pytest.mark.parametrize("count", [2, 4, 12])
def test_factors_are_added_as_factors_and_written_out_when_they_are_many(count: int) -> None:
    frames = [Compressor(0.99).compress({"w": low_rank(seed)}) for seed in range(count)]
    weights = [1.0 + seed for seed in range(count)]
    exact = sum(
        weight * decompress(frame)["w"].double()
        for frame, weight in zip(frames, weights, strict=True)
    ) / sum(weights)
    mean = aggregate(frames, weights)
    # Sums of up to `count` float32 numbers of this size.
    assert float((mean["w"] - exact).abs().max()) <= 8 * count * ROUNDING * float(exact.abs().max())
    assert mean["w"] is mean["w"]


def test_recompress_takes_the_mean_as_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    update = {"w": low_rank(0, 2, (96, 80)), "tied": torch.zeros(1), "b": torch.randn(50)}
    update["tied"] = update["w"]
    frames = [Compressor(0.99).compress(update) for _ in range(2)]
    mean = aggregate(frames)
    exact = {name: mean[name].clone() for name in mean}
    again = aggregate(frames)
    # Nothing is written out: the dense tensor is never asked for.
    monkeypatch.setattr(LowRank, "dense", lambda _: pytest.fail("was written out"))
    frame = again.recompress(Compressor(0.95))
    monkeypatch.undo()
    infos = {info.name: info for info in inspect(frame)}
    assert infos["w"].mode is Mode.CODED_FACTORS and infos["tied"].mode is Mode.ALIAS
    assert list(infos) == list(update)
    decoded = decompress(frame)
    for name, allowed in (("w", 0.05), ("b", 0.05 / 16)):
        assert relative_error(exact[name], decoded[name]) <= allowed
    # With residuals it is, and for other codecs.
    for other in (Compressor(0.95, feedback=True), Compressor(0.95, "wf0"), Compressor(0.99999)):
        decoded = decompress(aggregate(frames).recompress(other))
        assert relative_error(exact["w"], decoded["w"]) <= 0.05


@pytest.mark.parametrize("exact", ["w", "running_var"])
def test_recompress_loses_nothing_of_what_is_exact(exact: str) -> None:
    name = f"layer.{exact}"
    mean = aggregate([Compressor(0.99, exact=()).compress({name: low_rank(0, 9, (96, 80))})])
    assert isinstance(mean._values[name], LowRank)
    compressor = Compressor(0.9, exact=(exact,))
    assert torch.equal(decompress(mean.recompress(compressor))[name], mean[name])


def test_a_mean_that_was_changed_in_place_is_sent_as_it_is_now() -> None:
    parts = [{"w": low_rank(seed), "b": torch.ones(60)} for seed in range(3)]
    mean = aggregate(Compressor(0.99).compress(part) for part in parts)
    unread = mean.recompress(Compressor(1 - 1e-6))
    before = {name: value.clone() for name, value in mean.items()}
    assert mean.recompress(Compressor(1 - 1e-6)) == unread, "reading changes nothing"
    for value in mean.values():
        value.mul_(2.0)
    with torch.inference_mode():
        quiet = aggregate(Compressor(0.99).compress(part) for part in parts)
        assert torch.equal(quiet["w"], before["w"]) and quiet.recompress(Compressor(1 - 1e-6))
    decoded = decompress(mean.recompress(Compressor(1 - 1e-6)))
    for name, value in before.items():
        assert relative_error(2.0 * value, decoded[name]) < 2e-3


def test_frames_that_do_not_fit_are_left_out_by_name() -> None:
    part = {"w": torch.ones(3, 4)}
    base, other = {"w": torch.zeros(3, 4)}, {"w": torch.ones(3, 4)}
    good = RAW.compress({"w": torch.full((3, 4), 2.0)}, base=base)
    frames = {
        "north": RAW.compress(part, base=base),
        "shape": RAW.compress({"w": torch.ones(3)}, base={"w": torch.zeros(3)}),
        "base": RAW.compress(part, base=other),
        "damaged": good[:-1] + b"!",
        "south": good,
    }
    mean = aggregate(frames, weights=[1, 100, 100, 100, 3])
    assert list(mean.refused) == ["shape", "base", "damaged"]
    assert "does not match" in mean.refused["shape"]
    assert "another base" in mean.refused["base"]
    assert "checksum" in mean.refused["damaged"]
    assert mean["w"].tolist() == [[1.75] * 4] * 3
    with pytest.raises(ValueError, match="another base than is wanted"):
        aggregate({"a": good}, relative_to=Base(run=1, round=2), strict=True)


def test_versions_of_bases() -> None:
    part = {"w": torch.ones(3, 4)}
    frames = [RAW.compress(part, relative_to=Base(run=7, round=number)) for number in (3, 3, 4)]
    mean = aggregate(frames, relative_to=Base(run=7, round=3))
    assert list(mean.refused) == [2] and mean.relative_to == Base(run=7, round=3)
    broadcast = mean.recompress(RAW)
    now = {"w": torch.zeros(3, 4)}
    applied = decompress(broadcast, base=now, relative_to=Base(run=7, round=3))
    assert torch.equal(applied["w"], part["w"])
    with pytest.raises(ValueError, match="made against run 7 round 3, the receiver is at run 7 r"):
        decompress(broadcast, base=now, relative_to=Base(run=7, round=4))
    with pytest.raises(ValueError, match="difference to run 7 round 3: pass relative_to="):
        decompress(broadcast, base=now)
    with pytest.raises(ValueError, match="not a difference"):
        decompress(RAW.compress(part), relative_to=Base(run=7, round=3))


def test_sums_are_as_exact_as_what_travels() -> None:
    rows = torch.zeros(100, 20, dtype=torch.int64)
    rows[3] = 2**40 + 1
    assert torch.equal(aggregate([RAW.compress({"n": rows})] * 2)["n"], rows)
    few = torch.zeros(100, 20, dtype=torch.float64)
    few[3], few[5] = 1e300, 1 + 1e-12
    assert torch.equal(aggregate([RAW.compress({"x": few})] * 2)["x"], few)
    value = torch.tensor([2**40 + 1, 3])
    frames = [RAW.compress({"a": value, "b": b}) for b in (value, value.clone())]
    assert torch.equal(aggregate(frames)["b"], value)


def large(value: float, form: str) -> bytes:
    """Return a frame of so large values, in a form that adds up in float32 unless it is raw."""
    if form == "float64":
        return RAW.compress({"w": torch.full((4, 4), value * 2.0**896, dtype=torch.float64)})
    if form == "raw":
        return RAW.compress({"w": torch.full((4, 4), value)})
    if form == "half":
        halves = torch.full((16,), value / 2.0**112).half().numpy().tobytes()
        payload = wire.half_payload(112, halves)
        return wire.encode([Entry("w", "float32", (4, 4), Mode.HALF, 0, payload)], codec="wf1")
    payload = struct.pack("<9f", 1.0, *[value / 2.0**100] * 4, *[2.0**100] * 4)
    entry = Entry("w", "float32", (4, 4), Mode.FACTORS, 1, payload)
    return wire.encode([entry], codec="factors-fp32")


@pytest.mark.parametrize("form", ["raw", "half", "factors", "float64"])
@pytest.mark.parametrize("signs", [(1, 1, 1), (1, 1, -1, -1), (-1, -1, -1, 1)])
def test_sums_stay_within_the_range_whoever_comes_first(form: str, signs: tuple[int, ...]) -> None:
    most = 3e38
    frames = [large(sign * most, form) for sign in signs]
    ones = RAW.compress({"w": decompress(frames[0])["w"].new_ones(4, 4)})
    factor = most if form != "float64" else most * 2.0**896
    for order in ([*frames, ones, ones], [ones, *frames, ones], [ones, ones, *frames]):
        mean = aggregate(order)
        assert not mean.refused
        wanted = sum(signs) / len(order) * factor
        assert float(mean["w"][0, 0]) == pytest.approx(wanted, rel=1e-3, abs=1e-6 * factor)
    mean = aggregate([*frames, ones], weights=[1e-6] * len(frames) + [1])
    wanted = sum(signs) * (factor * 1e-6)
    assert float(mean["w"][0, 0]) == pytest.approx(wanted, rel=1e-3, abs=1e-12 * factor)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 3), (3, 5, 11), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize(
    "value", [0.1, torch.finfo(torch.float64).max, 2**53 - 1], ids=["tenth", "largest", "integer"]
)
def test_a_mean_of_what_is_the_same_is_no_larger(value: float, weights: tuple[float, ...]) -> None:
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    same = torch.tensor([value, -value], dtype=dtype)
    mean = aggregate([RAW.compress({"w": same})] * 3, weights)["w"]
    assert bool((mean.abs() <= same.abs()).all())
    assert torch.allclose(mean, same, rtol=1e-15, atol=0)


def test_weights_of_what_does_not_count_have_no_say() -> None:
    good = Compressor(0.9).compress({"w": low_rank(0)})
    exact = decompress(good)["w"]
    for weight in (1e46, 1e300):
        mean = aggregate([b"damaged", good, good], weights=[weight, 1, 1])
        assert float((mean["w"] - exact).abs().max()) <= 8 * ROUNDING * float(exact.abs().max())
        assert list(mean.refused) == [0]
        # And of what does, the larger ones.
        late = aggregate([good, RAW.compress({"w": torch.ones(60, 40)})], weights=[1, weight])
        assert torch.allclose(late["w"], torch.ones(60, 40))
    other = RAW.compress({"x": torch.ones(3)})
    mean = aggregate([other, good], weights=[0, 2])
    assert list(mean) == ["w"] and mean.refused == {}


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**-40, 1.0, 2.0**40, 2.0**64])
@pytest.mark.parametrize("left", [1.0, 0.3, 0.01, 0.001])
def test_recompress_keeps_its_promise_where_clients_disagree(left: float, scale: float) -> None:
    for seed in range(5):
        one = low_rank(seed, 3, (96, 80)) * scale
        other = -one + left * scale * low_rank(seed + 100, 3, (96, 80))
        frames = [Compressor(0.9999, "factors-fp32").compress({"w": x}) for x in (one, other)]
        mean = aggregate(frames)
        broadcast = aggregate(frames).recompress(Compressor(0.95))
        # Differences of factors are only as good as float32 of their terms.
        assert relative_error(mean["w"], decompress(broadcast)["w"]) <= 0.05 * (1 + 1e-3)
