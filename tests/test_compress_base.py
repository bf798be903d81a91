"""Differences to a base, and schemas: what must match, and when it is checked."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from updates import model, powerlaw, relative_error

import fedkd_fast
from fedkd_fast import Compressor, decompress
from fedkd_fast.tensors import digest_of
from fedkd_fast.wire import Base, Mode


def test_difference_to_a_base() -> None:
    base = model()
    update = {
        name: value + 0.01 * powerlaw(*value.shape)
        if name.endswith("query.weight")
        else value.clone()
        for name, value in base.items()
    }
    update["counter"] = torch.tensor([8, 8])
    frame = Compressor(0.95).compress(update, base)
    decoded = decompress(frame, base=base)
    assert torch.equal(decoded["counter"], update["counter"])
    for name in ("head.weight", "frozen", "flags"):
        assert torch.equal(decoded[name], update[name])
    name = "encoder.0.query.weight"
    assert relative_error(update[name] - base[name], decoded[name] - base[name]) <= 0.0501
    with pytest.raises(ValueError, match="frame is a difference to base .*: pass base="):
        decompress(frame)
    other = {name: value.clone() for name, value in base.items()}
    other["head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="base does not match: the frame was made against"):
        decompress(frame, base=other)
    with pytest.raises(ValueError, match="not a difference"):
        decompress(Compressor().compress(update), base=base)


def test_tied_update_of_an_untied_base_is_not_tied() -> None:
    weight = powerlaw(20, 20)
    base = {"a": torch.zeros(20, 20), "b": torch.ones(20, 20)}
    decoded = decompress(Compressor(1.0).compress({"a": weight, "b": weight}, base), base=base)
    assert torch.equal(decoded["a"], weight)
    # weight - 1 + 1 is rounded twice.
    assert float((decoded["b"] - weight).abs().max()) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scalar"), "match: 'scalar' not in it"),
        (lambda t: t.update(more=torch.zeros(1)), "match: 'more' only in it"),
        (lambda t: t.update(scalar=torch.zeros(2)), r"'scalar' is .* has \(2,\) float32"),
        (lambda t: t.update(scalar=torch.tensor(1.0).double()), r"has \(\) float64"),
    ],
)
def test_base_and_schema_must_match(change, message: str) -> None:  # type: ignore[no-untyped-def]
    update = model()
    other = dict(update)
    change(other)
    with pytest.raises(ValueError, match=message):
        Compressor().compress(update, base=other)
    with pytest.raises(ValueError, match=message):
        decompress(Compressor().compress(update), schema=other)
    assert decompress(Compressor().compress(update), schema=update)


def test_ties_of_differences_follow_the_base() -> None:
    difference = torch.full((4,), 0.5)
    base = {"a": torch.zeros(4), "b": torch.full((4,), 100.0)}
    frame = Compressor(codec="raw").compress(
        {"a": difference, "b": difference}, relative_to=Base(digest=digest_of(base))
    )
    decoded = decompress(frame, base=base)
    assert decoded["a"].tolist() == [0.5] * 4 and decoded["b"].tolist() == [100.5] * 4


def test_base_plus_difference_may_not_overflow() -> None:
    base = {"w": torch.full((2, 300), 65000.0).half()}
    frame = Compressor(codec="raw").compress(
        {"w": torch.full((2, 300), 1000.0).half()}, relative_to=Base(digest=digest_of(base))
    )
    with pytest.raises(ValueError, match="base\\['w'\\] \\+ difference overflows float16"):
        decompress(frame, base=base)
    with pytest.raises(ValueError, match="overflows float16"):
        Compressor().compress(base, {"w": -base["w"]})


def test_schema_is_checked_before_anything_is_decoded() -> None:
    # 2^31 zeros in 80 bytes: decoding them would take 8 GiB.
    entry = fedkd_fast.wire.Entry("w", "float32", (2**15, 2**15), Mode.ZERO)
    frame = fedkd_fast.wire.encode([entry])
    with pytest.raises(ValueError, match="schema does not match"):
        decompress(frame, schema={"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="base does not match"):
        decompress(frame, base={"w": torch.zeros(2)})


def test_names_of_a_base_that_no_bytes_stand_for_are_named() -> None:
    update = {"w\ud800": torch.ones(3)}
    with pytest.raises(ValueError, match=r"^base must have names of utf-8, got 'w\\ud800'$"):
        Compressor().compress(update, base=update)


class Fresh(dict[str, torch.Tensor]):
    """Values that are made anew whenever somebody asks, often where the last one lay."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name) * 1.0

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


def test_values_that_come_and_go_are_not_taken_for_ties() -> None:
    update = Fresh({name: torch.randn(50, 40) for name in "abcdef"})
    decoded = decompress(Compressor(0.99).compress(update))
    for name in update:
        assert relative_error(update[name], decoded[name]) <= 0.01
    same = torch.ones(50, 40)
    difference = Compressor(codec="raw").compress(
        dict.fromkeys("abcdef", same), relative_to=Base(digest=digest_of(update))
    )
    for name, value in decompress(difference, base=update).items():
        assert torch.equal(value, update[name] + 1.0)


def test_float16_that_factors_would_overflow_travels_raw() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 2, generator=generator), torch.randn(2, 200, generator=generator)
    exact = ((left @ right).clamp(-1, 1) * 65504).half()
    decoded = decompress(Compressor(0.8, "factors-fp32").compress({"w": exact}))["w"]
    assert relative_error(exact.float(), decoded.float()) <= 0.2


@pytest.mark.parametrize("scale", [3e-7, 1e-6, 1e-3])
def test_float16_that_rounds_factors_too_coarsely_travels_raw(scale: float) -> None:
    column, row = (torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    exact = torch.outer(column, row)
    exact = (exact / exact.abs().max() * scale).half()
    for energy in (0.9, 0.99, 0.999, 0.99999):
        decoded = decompress(Compressor(energy, "factors-fp32").compress({"w": exact}))["w"]
        wanted = exact.double() / scale
        assert relative_error(wanted, decoded.double() / scale) <= 1 - energy


@pytest.mark.parametrize(
    "other", [torch.zeros(1, 40), torch.zeros(40, 40, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_a_base_of_another_kind_is_refused(other: torch.Tensor) -> None:
    # The frame names its base by its round alone.
    version = Base(run=1, round=2)
    frame = Compressor().compress({"w": powerlaw(40, 40)}, relative_to=version)
    with pytest.raises(ValueError, match="base"):
        decompress(frame, base={"w": other}, relative_to=version)
    with pytest.raises(ValueError, match="base"):
        list(fedkd_fast.decompress_from(io.BytesIO(frame), base={"w": other}, relative_to=version))


@pytest.mark.parametrize("where", ["update", "base"])
def test_whoever_brings_nan_is_named(where: str) -> None:
    tensors = {"update": {"a": torch.ones(4, 20)}, "base": {"a": torch.zeros(4, 20)}}
    tensors[where]["a"][2, 3] = float("nan")
    with pytest.raises(ValueError, match=rf"^{where}\['a'\] holds NaN or Inf$"):
        Compressor().compress(tensors["update"], base=tensors["base"])
