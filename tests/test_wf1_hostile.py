"""Frames of wf1 from strangers, through the whole decoder: refused, or tensors of honest shapes."""

from __future__ import annotations

import io
import platform
import struct
import subprocess
import sys
from dataclasses import replace

import coded_frames
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import FLOATING, floats, mend_hash, one, reseal, shorts, varint

from fedkd_fast import WireError, decompress, decompress_from, wire
from fedkd_fast.codec.decode import BACKENDS, backend_named, decode_entry, decode_parts
from fedkd_fast.wire import Entry, Mode

ENTRIES = [
    coded_frames.factors("f", "float32", (3, 5), -512, [40, 29]),
    coded_frames.dense("d", "bfloat16", (4, 6), -900, 30, [1, 0, 3, 2], 2),
    coded_frames.hybrid("h", "float64", (3, 4), -600, [20], 5, [1, 4, 0], 3),
    Entry("q", "float16", (2, 2), Mode.HALF, 0, shorts(-20) + struct.pack("<4e", 1.5, -2, 0, 9)),
    coded_frames.as_rows(
        coded_frames.dense("rows", "float32", (2, 16), -900, 30, [1, 2], 2), "r", [1, 0], 5
    ),
]
FRAME = wire.encode(ENTRIES, codec="wf1")
MAX_BYTES = 2**16  # so that it is hit as well
BODY = 64


def decoded(frame: bytes, backend: str) -> dict[str, torch.Tensor] | None:
    """Decode a frame with right checksums; None where it is refused.

    No other exception is allowed than those that are documented.
    """
    try:
        tensors = decompress(frame, max_bytes=MAX_BYTES, backend=backend)
    except WireError:
        return None
    except ValueError as error:
        assert "frame is a difference to" in str(error)  # by a flag of the header
        return None
    for info in wire.inspect(frame):
        tensor = tensors[info.name]
        assert tuple(tensor.shape) == info.shape
        assert str(tensor.dtype) == f"torch.{info.dtype}"
        assert info.dtype not in FLOATING or bool(tensor.isfinite().all())
    return tensors


def same(frame: bytes) -> bool:
    """Whether both backends accept a frame; they agree, on its tensors too."""
    ours, truth = (decoded(frame, backend) for backend in BACKENDS)
    assert (ours is None) == (truth is None)
    if ours is None or truth is None:
        return False
    assert list(ours) == list(truth)
    assert all(torch.equal(ours[name], truth[name]) for name in ours)
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_that_take_no_bytes_take_no_work(backend: str) -> None:
    module = backend_named(backend)
    entry = coded_frames.factors("f", "float32", (30, 50), -512, [40, 29, *[-300] * 28])
    left, right = decode_parts(entry, module)
    assert len(left) == len(right) == 2
    whole = torch.cat([left, torch.zeros(28, 30)]), torch.cat([right, torch.zeros(28, 50)])
    assert torch.equal(decode_entry(entry, module), module.reconstruct(*whole))
    payload = wire.coded_factors_payload(0, [-300] * 30, b"")
    nothing = Entry("n", "float32", (30, 50), Mode.CODED_FACTORS, 30, payload)
    assert len(decode_parts(nothing, module)[0]) == 0
    assert torch.equal(decode_entry(nothing, module), torch.zeros(30, 50))
    hybrid = coded_frames.hybrid("h", "float32", (30, 50), -600, [20, -300], 5, [1] * 30, 3)
    assert same(wire.encode([entry, nothing, hybrid], codec="wf1"))


def flipped(bit: int) -> bytes:
    changed = bytearray(FRAME)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def mended(frame: bytes) -> bytes:
    return reseal(mend_hash(frame))


def test_every_flip_of_a_bit_is_refused() -> None:
    assert decoded(FRAME, "native") is not None
    for bit in range(8 * len(FRAME)):
        with pytest.raises(WireError):
            decompress(flipped(bit))


def test_every_truncation_is_refused() -> None:
    for size in range(len(FRAME)):
        with pytest.raises(WireError):
            decompress(FRAME[:size])


def test_flips_with_right_checksums_are_refused_or_harmless() -> None:
    accepted = [decoded(mended(flipped(b)), "native") is not None for b in range(8 * len(FRAME))]
    assert 0.02 < sum(accepted) / len(accepted) < 0.2  # scales, low bits, names, shapes
    for bit in range(0, 8 * len(FRAME), 13):
        assert same(mended(flipped(bit))) == accepted[bit]


def test_files_are_refused_where_frames_are() -> None:
    for bit in range(0, 8 * len(FRAME), 7):
        frame = mended(flipped(bit))
        wanted = decoded(frame, "native")
        try:
            found = dict(decompress_from(io.BytesIO(frame), max_bytes=MAX_BYTES))
        except ValueError:
            assert wanted is None
            continue
        assert wanted is not None and list(found) == list(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in found)


CHANGES = st.tuples(
    st.integers(6, len(FRAME) - 1) | st.integers(BODY, len(FRAME) - 1),
    st.sampled_from([0, 1, 2, 7, 8, 9, 127, 128, 255]) | st.integers(0, 255),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_changes_with_right_checksums_are_refused_or_harmless(
    changes: list[tuple[int, int]],
) -> None:
    changed = bytearray(FRAME)
    for at, byte in changes:
        changed[at] = byte
    same(mended(bytes(changed)))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(ENTRIES[:3]), st.binary(max_size=70))
def test_noise_for_a_stream_is_refused_or_harmless(entry: Entry, noise: bytes) -> None:
    head = bytes(entry.payload).removesuffix(bytes(coded_frames.stream_of(entry)))
    same(wire.encode([replace(entry, payload=head + noise)]))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_shorter_and_longer_payloads_are_refused(entry: Entry) -> None:
    payload = bytes(entry.payload)
    for wrong in [payload[:-1], payload[:-2], payload + b"\0", payload + b"\0\0"]:
        with pytest.raises(WireError):
            decompress(wire.encode([replace(entry, payload=wrong)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stream_of_another_tensor_is_refused(backend: str) -> None:
    coded = ENTRIES[:3]
    for entry in coded:
        stream = bytes(coded_frames.stream_of(entry))
        head = bytes(entry.payload).removesuffix(stream)
        for other in coded:
            if other is entry:
                continue
            swapped = replace(entry, payload=head + bytes(coded_frames.stream_of(other)))
            with pytest.raises(WireError, match=f"tensor '{entry.name}': its stream is corrupt: "):
                decompress(wire.encode([swapped]), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_of_another_stream_are_refused(backend: str) -> None:
    # The level is higher or lower than that of the table that the row was coded with.
    row = coded_frames.dense("d", "float32", (1, 200), 0, 30, [1], 0)
    stream = bytes(coded_frames.stream_of(row))
    for level in [*range(-49, 30), *range(31, 336, 5)]:
        payload = wire.coded_dense_payload(0, level, 0, b"\1", stream)
        with pytest.raises(WireError, match="tensor 'd': its stream is corrupt: "):
            decompress(wire.encode([replace(row, payload=payload)]), backend=backend)


def test_what_overflows_is_refused() -> None:
    # Integers of a million times 2^126: none of the scales is out of range.
    huge = coded_frames.dense("d", "float32", (1, 40), 126 * 256, 320, [1], 0)
    with pytest.raises(WireError, match="tensor 'd' decodes to NaN or Inf"):
        decompress(wire.encode([huge]))
    halves = Entry("q", "float16", (1,), Mode.HALF, 0, shorts(6) + struct.pack("<e", 2048))
    with pytest.raises(WireError, match="tensor 'q' decodes to NaN or Inf"):
        decompress(wire.encode([halves]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_no_stream(backend: str) -> None:
    payload = wire.coded_dense_payload(0, -49, 0, b"\1\1", b"")
    zeros = Entry("z", "float16", (2, 3), Mode.CODED_DENSE, 2, payload)
    found = decompress(wire.encode([zeros]), backend=backend)["z"]
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(WireError, match="it has 0 symbols in 2 bytes"):
        decompress(wire.encode([replace(zeros, payload=payload + b"\0\0")]), backend=backend)


# What `decompress` says to each frame in argv, in hexadecimal, with so much more address space than
# it starts with.
WITH_LITTLE_MEMORY = """
import resource, sys
import torch
from fedkd_fast import WireError, decompress
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for text in sys.argv[2:]:
    try:
        decompress(bytes.fromhex(text), max_bytes=2**63 - 1)
        print("accepted")
    except WireError as error:
        print(error)
"""


def with_little_memory(more: int, *frames: bytes) -> list[str]:
    program = [sys.executable, "-c", WITH_LITTLE_MEMORY, str(more), *(f.hex() for f in frames)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def many_rows(count: int, base: int, stream: bytes = b"") -> bytes:
    """Rows of one element, a few bytes together."""
    head = shorts(0, base) + b"\0"
    shape = (count, 1)
    return one(head + stream, mode=Mode.CODED_DENSE, rank=count, shape=shape, tables=1, dtype=2)


@pytest.mark.skipif(platform.system() != "Linux", reason="needs /proc and limits")
def test_many_rows_of_few_bytes_take_little_memory() -> None:
    count = 4_000_000  # 8 MB of float16
    hybrid = shorts(0, 0) + b"\1" + varint(count) + shorts(-60) + b"\0" + bytes(80)
    said = with_little_memory(
        2**27,
        many_rows(count, 0, b"xx"),
        many_rows(count, -60),
        one(hybrid, mode=Mode.CODED_HYBRID, rank=1, shape=(count, 1), tables=1, dtype=2),
    )
    assert said == [
        "tensor 'w': its stream is corrupt: it has 4000000 symbols in 2 bytes",
        "accepted",
        "tensor 'w': its stream is corrupt: its chunk table does not add up to its size",
    ]


@pytest.mark.skipif(platform.system() != "Linux", reason="needs /proc and limits")
def test_tensors_without_memory_for_them_are_refused() -> None:
    side = 30_000
    square = {"rank": 1, "shape": (side, side)}
    codes = bytes(2 * side // 8)
    said = with_little_memory(
        2**27,
        many_rows(10**8, 0, b"xx"),
        many_rows(4_000_000, -48, bytes(132 * 62)),  # a stream that could hold them
        one(shorts(0, -60) + b"\0", mode=Mode.CODED_DENSE, tables=1, **square),
        one(shorts(0, -1500) + b"\1", mode=Mode.CODED_FACTORS, tables=1, **square),
        one(floats(1) + b"\1\1" + codes, mode=Mode.PACKED_FACTORS, **square),
        one(floats(1) + b"\0", mode=Mode.PACKED_DENSE, **square),
        one(mode=Mode.ZERO, shape=(2**58,)),
    )
    assert len(said) == 7
    assert all(line.endswith("does not fit in memory") for line in said), said
