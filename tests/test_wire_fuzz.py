"""The wire codec on noise with right checksums: every frame is refused, or is canonical."""

from __future__ import annotations

import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_corpus import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import run
from wire_frames import (
    HEADER_BYTES,
    Line,
    all_modes,
    assert_invariants,
    coded_modes,
    encode_again,
    mend_hash,
    one,
    reseal,
    rows_in_all_modes,
    seal,
    shorts,
)

from fedkd_fast import wire
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base, Mode, WireError

ENTRIES = [*all_modes(), *rows_in_all_modes(), *coded_modes()]
FRAME = wire.encode(ENTRIES, codec="wf1", base=Base(7, 8, bytes(range(16))))
BARE = wire.encode(ENTRIES, schema=False)
FUZZ_FRAMES = 50_000
FUZZ_MAX_BYTES = 4096  # small, so that the bound is hit as well


def mutate(frame: bytes, dice: random.Random) -> bytes:
    """Change a few bytes anywhere but in the magic and the version, keeping the frame's length."""
    data = bytearray(frame)
    for _ in range(dice.randint(1, 3)):
        at = dice.choice((dice.randrange(6, len(data)), dice.randrange(HEADER_BYTES, len(data))))
        kind = dice.randrange(4)
        if kind == 0:
            data[at] = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 127, 128, 255))
        elif kind == 1:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 2:
            data[at] = (data[at] + dice.choice((1, 255))) % 256
        else:
            other = dice.randrange(HEADER_BYTES, len(data))
            data[at], data[other] = data[other], data[at]
    mended = mend_hash(bytes(data)) if data[6] & 4 else bytes(data)
    return reseal(mended)


@pytest.mark.parametrize("embedded", [True, False])
def test_fuzz_with_mended_checksums(embedded: bool) -> None:
    dice = random.Random(20261122)
    lists = [ENTRIES, *([e] for e in ENTRIES if e.mode != Mode.ALIAS)]
    seeds = [(wire.encode(entries, schema=embedded), entries) for entries in lists]
    seeds.append((FRAME if embedded else BARE, ENTRIES))
    accepted = 0
    for _ in range(FUZZ_FRAMES):
        seed, entries = dice.choice(seeds)
        frame = mutate(seed, dice)
        try:
            schema = None if embedded else entries
            decoded = wire.decode(frame, schema=schema, max_bytes=FUZZ_MAX_BYTES)
        except WireError:
            continue
        accepted += 1
        assert_invariants(decoded, FUZZ_MAX_BYTES)
        assert encode_again(decoded) == frame
    assert 0 < accepted < FUZZ_FRAMES  # both sides of the decoder were reached


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=9)), max_size=3),
    st.binary(max_size=60),
    st.integers(0, 1),
    st.booleans(),
)
def test_random_directories_with_right_checksums(
    lines: list[tuple[bytes, bytes]], payload: bytes, tables: int, embedded: bool
) -> None:
    frame = seal([Line(*line) for line in lines], payload, tables=tables, embedded=embedded)
    try:
        decoded = wire.decode(frame)
    except WireError:
        return
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    assert encode_again(decoded) == frame


# Refuses the frames in argv, in hexadecimal, with 64 MiB of address space more than it starts with.
WITH_LITTLE_MEMORY = """
import resource, sys
from fedkd_fast import wire
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    bytearray(2**27)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
for text in sys.argv[1:]:
    try:
        wire.decode(bytes.fromhex(text), max_bytes=2**63 - 1)
    except wire.WireError:
        continue
    sys.exit(f"accepted: {text}")
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="needs /proc and limits")
def test_refusals_allocate_nothing_in_proportion_to_claims() -> None:
    huge = 2**30
    factors = {"rank": huge, "shape": (huge, huge), "tables": 1}
    frames = [
        seal(tail=bytes(21), count=65536),
        seal(tail=bytes(21), count=2**32 - 1, embedded=False),
        seal(directory_bytes=2**62),
        one(name=b"w" * 1024, size=2**62),
        one(mode=Mode.PACKED_FACTORS, rank=huge, shape=(huge, huge)),
        one(mode=Mode.PACKED_DENSE, rank=2**40, shape=(2**40,)),
        one(shorts(0, 0), mode=Mode.CODED_FACTORS, **factors),
        one(shorts(0, 0) + b"\xff", mode=Mode.CODED_HYBRID, **factors),
        one(shorts(0, 0) + b"\6", mode=Mode.CODED_DENSE, rank=2**40, shape=(2**40,), tables=1),
        one(b"\1\0\1", mode=Mode.ROWS, rank=2**40, shape=(2**41, 1)),
        one(b"\1\0" + b"\xff" * 8 + b"\1", mode=Mode.ROWS, rank=2**40, shape=(2**41, 1)),
    ]
    program = [sys.executable, "-c", WITH_LITTLE_MEMORY, *(frame.hex() for frame in frames)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers and setarch")
def test_codec_survives_mutations_under_sanitizers(tmp_path: Path) -> None:
    files = []
    for name, frame in seeds().items():
        files.append(str(tmp_path / name))
        Path(files[-1]).write_bytes(frame)
    done = run("wire_address", "1", "300000", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"300000 mutations, \d{4,} accepted", done.stdout)
