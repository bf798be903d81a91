"""Where the fuzzers of the wire codec begin: the golden frames, and one of each other mode.

`python tests/fuzz_corpus.py FOLDER` writes them as inputs of tests/native/fuzz_wire.cpp, whose
first byte says how the rest is treated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from golden_frames import FOLDER
from wire_frames import coded_modes

from fedkd_fast import wire

CONTROLS = {"plain": 2, "mended": 3}  # wire_target.h: 1 mends checksums, 2 passes a schema


def seeds() -> dict[str, bytes]:
    """Frames by name."""
    golden = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.fkd"))}
    coded = {f"coded-{entry.name}": wire.encode([entry], codec="wf1") for entry in coded_modes()}
    return golden | coded


def write_corpus(folder: Path) -> None:
    """Write each seed once plain and once to be mended."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in seeds().items():
        for how, control in CONTROLS.items():
            (folder / f"{name}-{how}").write_bytes(bytes([control]) + frame)


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
