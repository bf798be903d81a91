"""The wire codec on what honest people send: round trips, golden bytes, refusals of encode()."""

from __future__ import annotations

import importlib.util
import math
import mmap
import pickle
import shutil
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import (
    FLOATING,
    INFINITY,
    ITEMSIZE,
    NAN,
    all_modes,
    assert_invariants,
    code_bytes,
    encode_again,
    floats,
    hash_of,
    record,
    rows_payload,
    seal,
)

import fedkd_fast._C as _C
from fedkd_fast import wire
from fedkd_fast.wire import (
    CODECS,
    DEFAULT_MAX_BYTES,
    DTYPES,
    Base,
    Entry,
    Header,
    Mode,
    WireError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST = bytes(range(16))

FRAME = wire.encode(all_modes(), base=Base(digest=DIGEST))

# --- round trips ----------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=40)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
DIMS = st.integers(1, 9)


def payload_of(draw: st.DrawFn, mode: Mode, shape: tuple[int, ...], rank: int) -> bytes:
    numel = math.prod(shape)

    def codes(length: int, bits: bytes) -> bytes:
        rows = [(draw(st.integers(0, 2 ** (length * b) - 1)), bytes([b])) for b in bits]
        return b"".join(row.to_bytes(code_bytes(length, b), "little") for row, b in rows)

    def scales(count: int) -> bytes:
        return floats(*draw(st.lists(FINITE, min_size=count, max_size=count)))

    def widths(least: int) -> bytes:
        return bytes(draw(st.lists(st.integers(least, 16), min_size=rank, max_size=rank)))

    if mode == Mode.FACTORS:
        return scales(rank * (1 + shape[0] + numel // shape[0]))
    if mode == Mode.PACKED_FACTORS:
        left, right = widths(1), widths(1)
        both = codes(shape[0], left) + codes(numel // shape[0], right)
        return scales(rank) + left + right + both
    bits = widths(0)
    return scales(rank) + bits + codes(numel // rank, bits)


DIGESTS = st.binary(min_size=16, max_size=16)
VERSIONS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
BASES = (
    st.none()
    | DIGESTS.map(lambda digest: Base(digest=digest))
    | st.builds(lambda version, digest: Base(*version, digest), VERSIONS, st.none() | DIGESTS)
)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    entries: list[Entry] = []
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        mode = draw(st.sampled_from(list(Mode)[: Mode.ROWS + 1]))  # test_wire_coded has the others
        targets = [i for i, e in enumerate(entries) if e.mode != Mode.ALIAS]
        if mode == Mode.ALIAS and targets:
            index = draw(st.sampled_from(targets))
            entries.append(Entry(name, entries[index].dtype, entries[index].shape, mode, index))
        elif mode == Mode.ROWS:
            count, width = draw(st.integers(1, 5)), draw(DIMS)
            inner = draw(st.sampled_from([Mode.FACTORS, Mode.PACKED_FACTORS, Mode.PACKED_DENSE]))
            gaps = draw(st.lists(st.integers(0, 300), min_size=count, max_size=count))
            height = sum(gaps) + count + draw(st.integers(not any(gaps), 300))
            rank = 1 if inner == Mode.PACKED_DENSE else draw(st.integers(1, min(count, width)))
            payload = payload_of(draw, inner, (count, width), rank)
            payload = rows_payload(inner, rank, gaps, payload)
            dtype = draw(st.sampled_from(FLOATING))
            entries.append(Entry(name, dtype, (height, width), mode, count, payload))
        elif mode in (Mode.FACTORS, Mode.PACKED_FACTORS, Mode.PACKED_DENSE):
            least = 0 if mode == Mode.PACKED_DENSE else 2
            shape = tuple(draw(st.lists(DIMS, min_size=least, max_size=3)))
            numel = math.prod(shape)
            if mode == Mode.PACKED_DENSE:
                rank = draw(st.sampled_from([n for n in range(1, numel + 1) if numel % n == 0]))
            else:
                rank = draw(st.integers(1, min(shape[0], numel // shape[0])))
            payload = payload_of(draw, mode, shape, rank)
            entries.append(Entry(name, draw(st.sampled_from(FLOATING)), shape, mode, rank, payload))
        else:
            mode = Mode.ZERO if mode == Mode.ALIAS else mode
            dtype = draw(st.sampled_from(DTYPES))
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
            size = math.prod(shape) * ITEMSIZE[dtype] if mode == Mode.RAW else 0
            payload = draw(st.binary(min_size=size, max_size=size))
            if dtype == "bool":
                payload = bytes(byte & 1 for byte in payload)
            entries.append(Entry(name, dtype, shape, mode, 0, payload))
    return entries


@settings(max_examples=150, deadline=None)
@given(entry_lists(), BASES, st.sampled_from(CODECS), st.booleans())
def test_what_goes_in_comes_out(
    entries: list[Entry], base: Base | None, codec: str, embedded: bool
) -> None:
    frame = wire.encode(entries, codec=codec, base=base, schema=embedded)
    decoded = wire.decode(frame, schema=entries)
    assert list(decoded.entries) == entries
    assert (decoded.base, decoded.codec, decoded.frame_bytes) == (base, codec, len(frame))
    assert encode_again(decoded) == frame
    assert_invariants(decoded, DEFAULT_MAX_BYTES)
    dense = sum(info.dense_bytes for info in wire.inspect(frame, entries))
    assert wire.decode(frame, schema=entries, max_bytes=dense) == decoded


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, {}),
        (Base(digest=DIGEST), {"digest": DIGEST}),
        (Base(2**64 - 1, 2**32 - 2), {"run": 2**64 - 1, "round_": 2**32 - 2}),
        (Base(0, 0, DIGEST), {"run": 0, "digest": DIGEST}),
    ],
)
def test_second_encoder_writes_the_same_bytes(
    base: Base | None, said: dict[str, Any], embedded: bool
) -> None:
    entries = [
        Entry("layer.weight", "uint8", (3,), Mode.RAW, 0, b"abc"),
        Entry("layer.bias", "float16", (200, 2), Mode.ZERO),
    ]
    lines = [
        record(b"layer.weight", dtype=8, shape=(3,), size=3),
        record(b"bias", prefix=6, dtype=2, mode=Mode.ZERO, shape=(200, 2)),
    ]
    frame = seal(lines, b"abc", codec=2, embedded=embedded, **said)
    assert wire.encode(entries, codec="wf0", base=base, schema=embedded) == frame
    decoded = wire.decode(frame, schema=entries)
    assert (decoded.base, decoded.codec, decoded.schema_embedded) == (base, "wf0", embedded)
    assert list(decoded.entries) == entries
    assert decoded.schema_hash == wire.schema_hash(entries) == hash_of(lines)
    assert wire.header(frame) == Header("wf0", base, embedded, hash_of(lines), len(frame))


def test_a_base_that_says_nothing_is_none() -> None:
    frame = wire.encode(all_modes(), base=Base())
    assert frame == wire.encode(all_modes())
    assert wire.decode(frame).base is None


def test_frame_without_entries() -> None:
    frame = wire.encode([])
    assert frame == seal()
    assert wire.decode(frame, max_bytes=0).entries == ()


def test_special_floats_are_allowed_in_raw_tensors() -> None:
    payload = floats(NAN, INFINITY, -0.0)
    frame = wire.encode([Entry("w", "float32", (3,), Mode.RAW, 0, payload)])
    assert wire.decode(frame).entries[0].payload == payload


@pytest.mark.parametrize(
    "buffer",
    [FRAME, bytearray(FRAME), memoryview(b"x" + FRAME)[1:], array("B", FRAME)],
    ids=["bytes", "bytearray", "memoryview", "array"],
)
def test_decode_takes_any_contiguous_buffer(buffer: Buffer) -> None:
    decoded = wire.decode(buffer)
    assert list(decoded.entries) == all_modes()
    assert decoded.frame_bytes == len(FRAME)


def test_decode_takes_buffers_of_words() -> None:
    entry = Entry("w", "uint8", (3,), Mode.RAW, 0, b"abc")
    words = array("I", wire.encode([entry]))
    decoded = wire.decode(words)
    assert decoded.entries == (entry,)
    assert decoded.frame_bytes == words.itemsize * len(words)


def test_decode_takes_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    path.write_bytes(FRAME)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        decoded = wire.decode(mapped)
        assert list(decoded.entries) == all_modes()
        del decoded  # its views keep the mapping open


def test_payloads_are_read_only_views_into_the_frame() -> None:
    frame = bytearray(FRAME)
    payload = wire.decode(frame).entries[0].payload
    assert isinstance(payload, memoryview)
    assert payload.readonly and payload.obj is frame


def test_inspect_lists_every_entry() -> None:
    lines = wire.inspect(FRAME)
    assert [(i.name, i.dtype, i.shape, i.mode, i.rank) for i in lines] == [
        (e.name, e.dtype, e.shape, e.mode, e.rank) for e in all_modes()
    ]
    assert [i.payload_bytes for i in lines] == [len(e.payload) for e in all_modes()]
    assert [i.dense_bytes for i in lines] == [24, 1200, 24, 8, 30, 96, 2, 0, 8]


def test_inspect_needs_no_bound() -> None:
    frame = wire.encode([Entry("w", "float32", (2**60,), Mode.ZERO)])
    assert wire.inspect(frame)[0].dense_bytes == 2**62


# --- sections of a payload ------------------------------------------------------------------------


def test_sections_of_each_compressed_mode() -> None:
    by_mode = {e.mode: e for e in wire.decode(FRAME).entries}
    assert [bytes(part) for part in wire.factors_parts(by_mode[Mode.FACTORS])] == [
        floats(0.5),
        floats(1, 2),
        floats(3, 4),
    ]
    packed = wire.packed_factors_parts(by_mode[Mode.PACKED_FACTORS])
    assert [bytes(part) for part in packed] == [
        floats(0.25, -2),
        bytes([4, 1]),
        bytes([4, 1]),
        bytes([0, 1, 2]),
        bytes([3, 4, 5, 6]),
    ]
    assert [bytes(part) for part in wire.packed_dense_parts(by_mode[Mode.PACKED_DENSE])] == [
        floats(1, 0, 3),
        bytes([16, 0, 3]),
        bytes(range(10)),
    ]


SPLITTERS = {
    Mode.FACTORS: wire.factors_parts,
    Mode.PACKED_FACTORS: wire.packed_factors_parts,
    Mode.PACKED_DENSE: wire.packed_dense_parts,
}


@pytest.mark.parametrize("mode", SPLITTERS)
def test_sections_refuse_other_entries(mode: Mode) -> None:
    entry = next(e for e in all_modes() if e.mode == mode)
    with pytest.raises(ValueError, match=f"must be {mode.name}, got <Mode.RAW: 1>"):
        SPLITTERS[mode](replace(entry, mode=Mode.RAW))
    with pytest.raises(WireError, match=r"must take .* bytes, got"):
        SPLITTERS[mode](replace(entry, payload=bytes(entry.payload) + b"x"))
    with pytest.raises(WireError, match=r"must take .* bytes, got"):
        SPLITTERS[mode](replace(entry, payload=b""))
    with pytest.raises(WireError, match=r"must divide its 5|must have 2 dimensions"):
        SPLITTERS[mode](replace(entry, shape=(5,), rank=2))


# --- what encode() refuses ------------------------------------------------------------------------

OK = Entry("w", "float32", (2, 3), Mode.FACTORS, 1, floats(1, 1, 2, 1, 2, 3))


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (replace(OK, name=""), "name must have 1 to 1024 bytes, got 0"),
        (replace(OK, name="é" * 513), "name must have 1 to 1024 bytes, got 1026"),
        (replace(OK, name="\ud800"), "must be utf-8 without control characters"),
        (replace(OK, name="a\x1b[2J"), "must be utf-8 without control characters"),
        (replace(OK, dtype="complex64"), 'unknown dtype "complex64"'),
        (replace(OK, mode=11), "unknown mode 11"),  # type: ignore[arg-type]
        (replace(OK, mode=256), "unknown mode 256"),  # type: ignore[arg-type]
        (replace(OK, shape=(-1, 3)), r"shape must lie in \[0, 2\*\*63\), got -1"),
        (replace(OK, shape=(2**64, 3)), r"shape must lie in \[0, 2\*\*63\)"),
        (replace(OK, shape=(1,) * 17), "at most 16 dimensions, got 17"),
        (replace(OK, rank=-1), r"rank must lie in \[0, 2\*\*63\), got -1"),
        (replace(OK, rank=3), r"rank must lie in \[1, min\(P, Q\)\] = \[1, 2\], got 3"),
        (replace(OK, payload=b""), "payload must take 24 bytes, got 0"),
        (replace(OK, payload=floats(1, 1, 2, 1, 2, NAN)), "factors must be finite"),
    ],
)
def test_encode_refuses(entry: Entry, match: str) -> None:
    with pytest.raises(WireError, match=match):
        wire.encode([entry])


def test_encode_refuses_twins_and_crowds() -> None:
    with pytest.raises(WireError, match='name "w" must be unique'):
        wire.encode([OK, replace(OK, name="v"), OK])
    crowd = [Entry(str(i), "bool", (), Mode.ZERO) for i in range(65537)]
    with pytest.raises(WireError, match="at most 65536 entries, got 65537"):
        wire.encode(crowd)
    assert len(wire.decode(wire.encode(crowd[1:])).entries) == 65536


def test_encode_refuses_an_unknown_codec() -> None:
    with pytest.raises(ValueError, match="codec must be one of .*'wf0'.*, got 'zip'"):
        wire.encode([OK], codec="zip")


def test_encode_refuses_wrong_types() -> None:
    with pytest.raises(TypeError, match="payload must be a contiguous bytes-like object, got str"):
        wire.encode([replace(OK, payload="text")])  # type: ignore[arg-type]
    strided = memoryview(bytes(48))[::2]
    with pytest.raises(TypeError, match="got memoryview with strides"):
        wire.encode([replace(OK, payload=strided)])
    with pytest.raises(TypeError, match="name must be a str, got bytes"):
        wire.encode([replace(OK, name=b"w")])  # type: ignore[arg-type]


def test_decode_refuses_wrong_arguments() -> None:
    doubled = bytes(byte for byte in FRAME for _ in range(2))
    with pytest.raises(TypeError, match="got memoryview with strides"):
        wire.decode(memoryview(doubled)[::2])
    with pytest.raises(TypeError, match="bytes-like object is required, not 'str'"):
        wire.decode("frame")  # type: ignore[arg-type]
    for bound in (-1, 2**63):
        with pytest.raises(ValueError, match=r"max_bytes must lie in \[0, 2\*\*63\), got"):
            wire.decode(FRAME, max_bytes=bound)


# --- the module -----------------------------------------------------------------------------------


def test_wire_error_is_a_value_error_that_pickles() -> None:
    assert issubclass(WireError, ValueError)
    error = pickle.loads(pickle.dumps(WireError("text")))
    assert type(error) is WireError and error.args == ("text",)


def test_build_facts() -> None:
    assert isinstance(_C.version, str) and _C.version[0].isdigit()
    assert isinstance(_C.has_cuda, bool) and isinstance(_C.cuda_archs, str)
    assert bool(_C.cuda_archs) == bool(_C.cuda_version) == _C.has_cuda
    assert any(character.isdigit() for character in _C.compiler)


def test_extension_loads_without_torch() -> None:
    spec = importlib.util.find_spec("fedkd_fast._C")
    assert spec is not None and spec.origin is not None
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('fedkd_fast._C', {spec.origin!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.decode(bytes.fromhex('{FRAME.hex()}'), None, {DEFAULT_MAX_BYTES})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_extension_names_the_command(tmp_path: Path) -> None:
    package = tmp_path / "fedkd_fast"
    shutil.copytree(Path(wire.__file__).parent, package / "wire")
    (package / "__init__.py").touch()
    # -S: without site, no editable install can offer the missing file.
    program = [sys.executable, "-S", "-c", "import fedkd_fast.wire"]
    run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: fedkd_fast._C is not built" in run.stderr
    assert "pip install -e . --no-build-isolation" in run.stderr
