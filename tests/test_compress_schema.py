"""Frames without a schema of their own, by the calls that take a schema or a base."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkd_fast import aggregate, decompress, decompress_from, wire
from fedkd_fast.compress import Compressor
from fedkd_fast.wire import WireError

TENSORS = {
    "weight": torch.arange(600.0).reshape(20, 30),
    "bias": torch.ones(30, dtype=torch.float16),
    "steps": torch.tensor(3),
}


def bare(frame: bytes) -> bytes:
    """The same frame, its schema left out."""
    found = wire.decode(frame)
    return wire.encode(found.entries, codec=found.codec, base=found.base, schema=False)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_frame_without_schema_needs_that_of_the_receiver() -> None:
    frame = Compressor(0.9).compress(TENSORS)
    short = bare(frame)
    assert len(short) < len(frame)
    assert_equal(decompress(short, TENSORS), decompress(frame))
    assert_equal(aggregate([short, short], schema=TENSORS), decompress(frame))
    with pytest.raises(WireError, match="frame carries no schema: pass schema="):
        decompress(short)
    reordered = dict(reversed(TENSORS.items()))
    with pytest.raises(WireError, match="schema= does not match the frame"):
        decompress(short, reordered)


def test_a_base_is_a_schema() -> None:
    base = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    frame = Compressor(0.9).compress(TENSORS, base)
    assert_equal(decompress(bare(frame), base=base), decompress(frame, base=base))


def test_the_order_of_a_schema_counts_only_where_it_is_needed() -> None:
    reordered = dict(reversed(TENSORS.items()))
    frame = Compressor(0.9).compress(TENSORS)
    assert_equal(decompress(frame, reordered), decompress(frame))


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize(
    "schema",
    [
        None,
        TENSORS,
        dict(reversed(TENSORS.items())),
        TENSORS | {"bias": torch.ones(31, dtype=torch.float16)},
        TENSORS | {"bias": torch.ones(30)},
        TENSORS | {"more": torch.ones(1)},
        {"bias": TENSORS["bias"]},
    ],
    ids=["none", "same", "order", "shape", "dtype", "more", "fewer"],
)
def test_files_take_a_schema_as_frames_in_memory_do(
    schema: dict[str, Tensor] | None, embedded: bool
) -> None:
    frame = Compressor(0.9).compress(TENSORS)
    frame = frame if embedded else bare(frame)
    file = io.BytesIO(b"before" + frame)
    file.seek(6)
    try:
        expected = decompress(frame, schema)
    except ValueError as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            next(decompress_from(file, schema))
    else:
        assert_equal(dict(decompress_from(file, schema)), expected)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (["bias"], "schema must be a mapping of names to tensors, got list"),
        (dict.fromkeys(TENSORS), r"schema\['.*'\] must have a shape and a dtype, got None"),
        (dict.fromkeys(TENSORS, 5), r"schema\['.*'\] must have a shape and a dtype, got 5"),
    ],
)
@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_no_schema_is_named(schema: Any, words: str, embedded: bool) -> None:
    frame = Compressor(0.9).compress(TENSORS)
    frame = frame if embedded else bare(frame)
    with pytest.raises(TypeError, match=words):
        decompress(frame, schema)
    with pytest.raises(TypeError, match=words):
        next(decompress_from(io.BytesIO(frame), schema))
    with pytest.raises(TypeError, match=words):
        aggregate([frame], schema=schema)


@pytest.mark.parametrize("codec", ["raw", "factors-fp32", "wf0"])
def test_frames_name_their_codec(codec: str) -> None:
    assert wire.header(Compressor(0.9, codec).compress(TENSORS)).codec == codec
