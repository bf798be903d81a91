"""What a frame is relative to, and which tensors it holds: bases and schemas."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from wire_frames import all_modes, hash_of, record, seal

from fedkd_fast import wire
from fedkd_fast.wire import Base, Mode, TensorSpec, WireError


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"run": 1}, "both run and round or neither"),
        ({"round": 1}, "both run and round or neither"),
        (
            {"run": -1, "round": 0},
            r"run of the base must lie in \[0, 18446744073709551615\], got -1",
        ),
        ({"run": 0, "round": 2**32}, r"round of the base must lie in \[0, 4294967295\]"),
        ({"digest": b"four"}, "digest of the base must have 16 bytes, got 4"),
    ],
)
def test_base_refuses(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(WireError, match=match):
        Base(**fields)


@pytest.mark.parametrize("value", [1.5, 2.0, "1", torch.tensor(1.5), np.array([1, 2])])
def test_base_is_named_by_integers(value: Any) -> None:
    said = re.escape(repr(value))
    with pytest.raises(TypeError, match=f"run of the base must be an int, got {said}"):
        Base(value, 2)
    with pytest.raises(TypeError, match=f"round of the base must be an int, got {said}"):
        Base(1, value)
    assert wire.header(wire.encode([], base=Base(np.int64(1), np.int32(2)))).base == Base(1, 2)


@pytest.mark.parametrize("value", [5, "x" * 16, list(range(16))])
def test_digests_are_bytes(value: Any) -> None:
    with pytest.raises(TypeError, match="digest of the base must be bytes, got "):
        Base(digest=value)


# --- schemas --------------------------------------------------------------------------------------


def test_a_frame_without_schema_needs_one() -> None:
    frame = wire.encode(all_modes(), schema=False)
    specs = [TensorSpec(e.name, e.dtype, e.shape) for e in all_modes()]
    embedded = wire.encode(all_modes())
    assert len(frame) < len(embedded) - sum(len(e.name) for e in all_modes()[3:])
    assert wire.decode(frame, schema=specs).entries == wire.decode(embedded).entries
    assert wire.inspect(frame, schema=specs) == wire.inspect(embedded)
    for call in (wire.decode, wire.inspect):
        with pytest.raises(WireError, match="frame carries no schema: pass schema="):
            call(frame)  # type: ignore[operator]


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda specs: specs[::-1],
        lambda specs: specs[:-1],
        lambda specs: [*specs, TensorSpec("more", "bool", ())],
        lambda specs: [specs[0]._replace(name="other"), *specs[1:]],
        lambda specs: [specs[0]._replace(dtype="int32"), *specs[1:]],
        lambda specs: [specs[0]._replace(shape=(3, 2)), *specs[1:]],
    ],
)
def test_another_schema_is_refused(embedded: bool, change: Callable[..., Any]) -> None:
    specs = [TensorSpec(e.name, e.dtype, e.shape) for e in all_modes()]
    frame = wire.encode(all_modes(), schema=embedded)
    with pytest.raises(WireError, match="schema= does not match the frame: its hash is"):
        wire.decode(frame, schema=change(specs))


def test_a_frame_has_as_many_entries_as_the_schema_that_it_names() -> None:
    lines = [record(b"a", mode=Mode.ZERO), record(b"b", mode=Mode.ZERO)]
    frame = seal(lines, embedded=False, schema_hash=hash_of(lines[:1]))
    with pytest.raises(WireError, match="entry count must be that of the schema, 1, got 2"):
        wire.decode(frame, schema=[TensorSpec("a", "float32", ())])


def test_a_schema_of_a_kind_that_no_frame_has() -> None:
    with pytest.raises(WireError, match='entry 0: unknown dtype "complex64"'):
        wire.schema_hash([TensorSpec("w", "complex64", ())])
    with pytest.raises(WireError, match='name "w" must be unique'):
        wire.schema_hash([TensorSpec("w", "bool", ())] * 2)


@pytest.mark.parametrize("size", [*range(50, 70), 119, 120, 127, 128, 1000])
def test_schema_hash_is_sha256(size: int) -> None:
    line = record(b"w" * size, dtype=9)
    assert wire.schema_hash([TensorSpec("w" * size, "bool", ())]) == hash_of([line])
