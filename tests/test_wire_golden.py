"""Frames of files that never change: what this release writes, every later one reads."""

from __future__ import annotations

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


def test_every_golden_file_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.fkd" for name in GOLDEN}


def test_golden_frames_have_every_mode_without_entropy_coding() -> None:
    modes = {entry.mode for golden in GOLDEN.values() for entry in golden.entries}
    assert modes >= set(wire.Mode) - {
        wire.Mode.CODED_FACTORS,
        wire.Mode.CODED_DENSE,
        wire.Mode.CODED_HYBRID,
    }
