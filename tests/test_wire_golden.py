"""Frames of files that never change: what this release writes, every later one reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden_frames import FOLDER, GOLDEN
from wire_frames import encode_again

from fedkd_fast import wire


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
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.fkd" for name in GOLDEN}


def test_golden_frames_have_every_mode_without_entropy_coding() -> None:
    modes = {entry.mode for golden in GOLDEN.values() for entry in golden.entries}
    assert modes >= set(wire.Mode) - {
        wire.Mode.CODED_FACTORS,
        wire.Mode.CODED_DENSE,
        wire.Mode.CODED_HYBRID,
    }
