"""What the frames in tests/golden hold. A golden file never changes: it is what readers will read.

`python tests/golden_frames.py` writes the files that are missing, and no others. `outputs.json` has
a digest of what each frame decodes to, which never changes either.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import coded_frames
from wire_frames import all_modes, coded_modes, floats, rows_in_all_modes, rows_payload

from fedkd_fast import wire
from fedkd_fast.decompression import decode_frame
from fedkd_fast.tensors import digest_of
from fedkd_fast.wire import Base, Entry, Mode

FOLDER = Path(__file__).parent / "golden"
OUTPUTS = FOLDER / "outputs.json"
DIGEST = bytes(range(16))


class Golden(NamedTuple):
    """Arguments of the encoder."""

    entries: list[Entry]
    how: dict[str, Any]

    def encode(self) -> bytes:
        return wire.encode(self.entries, **self.how)


def _only(mode: Mode) -> list[Entry]:
    return [e for e in (*all_modes(), *coded_modes()) if e.mode == mode]


def _packed_dense() -> Entry:
    payload = floats(1, 0.5) + bytes([2, 0]) + b"\xe4"
    return Entry("decoder.bias", "float32", (2, 4), Mode.PACKED_DENSE, 2, payload)


def _double() -> Entry:
    return Entry("pi", "float64", (1,), Mode.RAW, 0, struct.pack("<d", 3.141592653589793))


GOLDEN: dict[str, Golden] = {
    "nothing": Golden([], {}),
    "zero": Golden(_only(Mode.ZERO), {}),
    "raw": Golden([*_only(Mode.RAW), _double()], {}),
    "alias": Golden(all_modes()[:3], {}),
    "factors": Golden(_only(Mode.FACTORS), {"codec": "factors-fp32"}),
    "packed-factors": Golden(_only(Mode.PACKED_FACTORS), {"codec": "wf0"}),
    "packed-dense": Golden([*_only(Mode.PACKED_DENSE), _packed_dense()], {"codec": "wf0"}),
    "rows": Golden(rows_in_all_modes(), {"codec": "wf0"}),
    "half": Golden(_only(Mode.HALF), {"codec": "wf1"}),
    "rows-of-halves": Golden(
        [
            Entry(
                "emb",
                "bfloat16",
                (200, 2),
                Mode.ROWS,
                1,
                rows_payload(10, 0, [130], struct.pack("<h2e", -3, 1.5, -0.25)),
            )
        ],
        {"codec": "wf1"},
    ),
    "coded-factors": Golden(coded_frames.FACTORS, {"codec": "wf1"}),
    "coded-dense": Golden(coded_frames.DENSE, {"codec": "wf1"}),
    "coded-hybrid": Golden(coded_frames.HYBRID, {"codec": "wf1"}),
    "rows-of-coded": Golden(coded_frames.ROWS, {"codec": "wf1"}),
    "coded-tiles": Golden(coded_frames.TILES, {"codec": "wf1"}),
    "coded-lanes": Golden(coded_frames.LANES, {"codec": "wf1"}),
    "stream-example": Golden([coded_frames.EXAMPLE], {"codec": "wf1"}),
    "base-digest": Golden(all_modes(), {"codec": "wf0", "base": Base(digest=DIGEST)}),
    "base-version": Golden(all_modes(), {"codec": "wf0", "base": Base(2**40 + 5, 70_000)}),
    "base-both": Golden(all_modes(), {"codec": "wf0", "base": Base(3, 4, DIGEST)}),
    "no-schema": Golden(all_modes(), {"codec": "wf0", "base": Base(3, 4), "schema": False}),
}


def output_of(name: str, backend: str = "native") -> str:
    """Digest of names, dtypes, shapes and elements that a golden file decodes to."""
    schema = {entry.name: entry for entry in GOLDEN[name].entries}
    frame = (FOLDER / f"{name}.fkd").read_bytes()
    return digest_of(decode_frame(frame, schema, backend=backend)[0]).hex()


def write_missing() -> None:
    """Write the files and the digests that are not there."""
    FOLDER.mkdir(exist_ok=True)
    outputs = json.loads(OUTPUTS.read_text()) if OUTPUTS.exists() else {}
    for name, golden in GOLDEN.items():
        path = FOLDER / f"{name}.fkd"
        if not path.exists():
            path.write_bytes(golden.encode())
        if name not in outputs:
            outputs[name] = output_of(name)
    OUTPUTS.write_text(json.dumps(outputs, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_missing()
