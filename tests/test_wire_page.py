"""docs/wire-format.md against what it describes: its examples, and the hash of its tables."""

from __future__ import annotations

import hashlib
import re
import struct
from fractions import Fraction
from pathlib import Path

import coded_frames
import numpy as np
import torch
from golden_frames import FOLDER

from fedkd_fast import _C, decompress, wire
from fedkd_fast.reference_rans import ESCAPE, REACH, REST, table

PAGE = (Path(__file__).parent.parent / "docs" / "wire-format.md").read_text()


def section(title: str) -> str:
    """Text under a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def hex_block(title: str) -> bytes:
    """The bytes that a section lists; each line says how many came before."""
    lines = re.findall(
        r"^    ([0-9a-f]{2})  ((?:[0-9a-f]{2} {1,2})+)", section(title) + "\n", re.MULTILINE
    )
    found = b""
    for at, digits in lines:
        assert int(at, 16) == len(found)
        found += bytes.fromhex(digits)
    return found


def test_the_example_of_a_frame_is_a_golden_frame() -> None:
    assert hex_block("Example") == (FOLDER / "rows-of-halves.fkd").read_bytes()


def test_the_hash_of_the_tables_is_right() -> None:
    tables = b"".join(struct.pack("<33H", *stored) for stored in _C.gaussian_tables)
    assert len(tables) == 6336
    (said,) = re.findall(r"^    ([0-9a-f]{64})$", section("Entropy-coded streams"), re.MULTILINE)
    assert said == hashlib.sha256(tables).hexdigest()


def test_the_example_of_a_stream_is_a_golden_frame() -> None:
    frame = (FOLDER / "stream-example.fkd").read_bytes()
    (entry,) = wire.decode(frame).entries
    assert hex_block("Example of a stream") == bytes(entry.payload)
    assert f"The payload, {len(entry.payload)} bytes:" in section("Example of a stream")
    assert coded_frames.levels_of(entry) == [52, 0]
    rows = re.findall(
        r"^    ((?:-?\d{1,2} ){6}-?\d+)$", section("Example of a stream"), re.MULTILINE
    )
    assert [list(map(int, row.split())) for row in rows] == coded_frames.EXAMPLE_INTEGERS
    assert torch.equal(decompress(frame)["w"], 0.5 * torch.tensor(coded_frames.EXAMPLE_INTEGERS))


def steps(chunk: bytes) -> list[list[str]]:
    """Decode the chunk of the example as the page says, and tell what the page tells."""
    states = list(struct.unpack_from("<4I", chunk))
    words = iter(struct.unpack_from(f"<{(len(chunk) - 16) // 2}H", chunk, 16))
    lines: list[list[str]] = []
    for row, tables in enumerate((table(36), table(0))):
        for lanes in (range(4), range(3)):
            group = []
            for lane in lanes:
                x = states[lane]
                slot = x % 4096
                symbol = int(tables.symbol[slot])
                f, c = int(tables.frequency[symbol]), int(tables.before[symbol])
                states[lane] = f * (x // 4096) + slot - c
                name = "escape" if symbol == ESCAPE else str(symbol - REACH)
                numbers = [row, lane, f"{x:08x}", slot, name, f, c, f"{states[lane]:08x}"]
                group.append([*map(str, numbers), ""])
            for lane in lanes:
                if states[lane] < REST:
                    word = next(words)
                    states[lane] = states[lane] * 2**16 + word
                    group[lane][-1] = f"{word:04x} into the state: {states[lane]:08x}"
            for lane in lanes:
                if group[lane][4] == "escape":
                    z = next(words)
                    assert z % 2 == 0 and z < 2**15  # the example has no others
                    said = [group[lane][-1]] * bool(group[lane][-1])
                    group[lane][-1] = "; ".join([*said, f"{z:04x}: h = {z // 2}"])
            lines += group
    assert states == [REST] * 4 and not list(words)
    return lines


def test_the_steps_of_the_example_are_right() -> None:
    rows = re.findall(r"^\| (\d .*?) *\|$", section("Example of a stream"), re.MULTILINE)
    said = [[cell.strip() for cell in f"{row} ".split(" |")] for row in rows]
    assert said == steps(hex_block("Example of a stream")[11:])


def nearest(exact: Fraction) -> np.float32:
    """Round to float32 once, ties to even; `exact` is not near the ends of the range."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
    places = [near, *around]
    odd = {place: int(place.view(np.int32)) % 2 for place in places}
    return min(places, key=lambda place: (abs(Fraction(float(place)) - exact), odd[place]))


def exp2_of_page(e: int) -> float:
    """2^(e / 256) with the constants that the page lists."""
    constants = re.findall(r"0x1\.[0-9a-f]{13}p\+0", section("Reconstruction"))
    assert len(constants) == 8
    product = 1.0
    for bit, constant in zip(range(7, -1, -1), constants, strict=True):
        if e >> bit & 1:
            product *= float.fromhex(constant)
    return product * 2.0 ** (e >> 8)


def test_reconstruction_is_what_the_page_says() -> None:
    entry = coded_frames.HYBRID[0]
    parts = wire.coded_hybrid_parts(entry)
    count = len(parts.levels)
    rows, cols = entry.shape
    lengths = [rows] * 2 + [cols] * 2 + [rows * cols // 3] * 3
    q = [
        coded_frames.integers(f"{entry.name}{row}", parts.levels[row], lengths[row])
        for row in range(count)
    ]
    left, right = q[:2], q[2:4]
    rest = [value for row in q[4:] for value in row]
    b = Fraction(float(np.float32(exp2_of_page(parts.step))))
    a = [Fraction(float(np.float32(exp2_of_page(2 * parts.step - 16 * s)))) for s in parts.sigmas]
    wanted = []
    for place in range(rows * cols):
        i, j = divmod(place, cols)
        x = np.float32(0)
        for k in range(2):
            term = Fraction(float(nearest(a[k] * left[k][i])))
            x = nearest(term * right[k][j] + Fraction(float(x)))
        wanted.append(nearest(Fraction(float(x)) + Fraction(float(nearest(b * rest[place])))))
    found = decompress(wire.encode([entry]))[entry.name]
    assert found.flatten().tolist() == [float(x) for x in wanted]
