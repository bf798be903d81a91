"""Frames of files that never change: what this release writes, every later one reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from golden_frames import FOLDER, GOLDEN, OUTPUTS, output_of
from wire_frames import encode_again

from fedkd_fast import wire
from fedkd_fast.codec.decode import BACKENDS
from fedkd_fast.wire import Mode


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frame(name: str) -> None:
    frame = (FOLDER / f"{name}.fkd").read_bytes()
    golden = GOLDEN[name]
    decoded = wire.decode(frame, schema=golden.entries)
    assert list(decoded.entries) == golden.entries
    assert decoded.base == golden.how.get("base")
    assert decoded.codec == golden.how.get("codec", "raw")
    assert decoded.schema_embedded == golden.how.get("schema", True)
    assert golden.encode() == frame == encode_again(decoded)


def test_the_example_of_the_specification_is_a_golden_frame() -> None:
    text = (Path(__file__).parent.parent / "docs" / "wire-format.md").read_text()
    lines = re.findall(r"^    ([0-9a-f]{2})  ((?:[0-9a-f]{2} {1,2})+)", text, re.MULTILINE)
    frame = b""
    for at, digits in lines:
        assert int(at, 16) == len(frame)
        frame += bytes.fromhex(digits)
    assert frame == (FOLDER / "rows-of-halves.fkd").read_bytes()


def test_every_golden_file_is_tested() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {OUTPUTS.name, *(f"{name}.fkd" for name in GOLDEN)}


def test_golden_frames_have_every_mode_alone_and_as_rows() -> None:
    entries = [entry for golden in GOLDEN.values() for entry in golden.entries]
    assert {entry.mode for entry in entries} == set(Mode)
    nested = {wire.rows_parts(entry).rows.mode for entry in entries if entry.mode is Mode.ROWS}
    assert nested == set(Mode) - {Mode.ZERO, Mode.ALIAS, Mode.ROWS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_golden_frames_decode_to_the_same_bits(threads: int, backend: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {name: output_of(name, backend) for name in GOLDEN}
    finally:
        torch.set_num_threads(before)
    assert found == json.loads(OUTPUTS.read_text())
