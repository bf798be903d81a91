"""Frames -> named tensors: the inverse of `compress`, for bytes that may come from a stranger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import BinaryIO

from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.codec.common import DTYPES, TORCH_DTYPES, all_finite
from fedkd_fast.codec.decode import Parts, backend_named, decode_parts, written_out
from fedkd_fast.tensors import (
    Shaped,
    as_mapping,
    as_tensors,
    check_same_names,
    check_same_tensors,
    check_schema,
    digest_of,
    specs_of,
    tied_names,
)
from fedkd_fast.updates import surely_finite
from fedkd_fast.wire import (
    DEFAULT_MAX_BYTES,
    Base,
    Entry,
    Frame,
    Header,
    Mode,
    TensorSpec,
    WireError,
)


class NotFiniteError(WireError):
    """A frame holds NaN or Inf: no honest sender sends these, and one would poison a mean."""


def decode_frame(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None = None,
    *,
    schema_name: str = "schema",
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
    finite: bool = True,
) -> tuple[dict[str, Tensor], Base | None]:
    """Decode a frame without applying it to a base; also return what it is relative to.

    The schema is compared before anything is decoded, so that a frame costs no more than what the
    receiver expects. `schema_name` is what messages call it. Without `finite`, the caller looks for
    NaN and Inf in what it makes of the tensors.
    """
    module = backend_named(backend)
    parsed = _parsed(frame, schema, schema_name, max_bytes)
    tensors: dict[str, Tensor] = {}
    order: list[Tensor] = []
    for entry in parsed.entries:
        if entry.mode is Mode.ALIAS:
            order.append(order[entry.rank])
        else:
            order.append(_decoded(entry, module, finite=finite))
        tensors[entry.name] = order[-1]
    return tensors, parsed.base


def decode_frame_parts(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None,
    *,
    schema_name: str,
    max_bytes: int,
    module: ModuleType,
) -> tuple[list[tuple[Entry, Parts]], Base | None]:
    """Decode a frame but for the products of factors; tied tensors have the same parts."""
    parsed = _parsed(frame, schema, schema_name, max_bytes)
    found: list[tuple[Entry, Parts]] = []
    for entry in parsed.entries:
        if entry.mode is Mode.ALIAS:
            found.append((entry, found[entry.rank][1]))
            continue
        with _naming(entry):
            parts = decode_parts(entry, module)
        if not surely_finite(parts, TORCH_DTYPES[entry.dtype]):
            _written(entry, parts, module)
        found.append((entry, parts))
    return found, parsed.base


def _parsed(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None,
    schema_name: str,
    max_bytes: int,
) -> Frame:
    needed = None if schema is None else _needed(wire.header(frame), schema)
    parsed = wire.decode(frame, schema=needed, max_bytes=max_bytes)
    if schema is not None:
        check_same_tensors({entry.name: entry for entry in parsed.entries}, schema, schema_name)
    return parsed


def _needed(header: Header, schema: Mapping[str, Shaped]) -> list[TensorSpec] | None:
    """Return what of a schema the wire needs: of a frame without its own all of it, in its order.

    Any other frame is compared with it afterwards, by names, so that messages say what differs.
    """
    check_schema(schema)
    return None if header.schema_embedded else specs_of(schema)


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Name the tensor that memory did not suffice for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no error of its own for this. Its C interface, which the ops call, does not even
        # say what failed; of what they ask of it here, only memory can be missing.
        words = ("allocate", "API call failed")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        raise WireError(f"tensor {entry.name!r} {entry.shape} does not fit in memory") from None


def _written(entry: Entry, parts: Parts, module: ModuleType, *, finite: bool = True) -> Tensor:
    """Return the tensor that parts stand for."""
    with _naming(entry):
        tensor = written_out(entry, parts, module)
    if finite:
        _check_finite(entry.name, tensor)
    return tensor


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        raise NotFiniteError(f"tensor {name!r} decodes to NaN or Inf")


def _decoded(entry: Entry, module: ModuleType, *, finite: bool) -> Tensor:
    with _naming(entry):
        parts = decode_parts(entry, module)
    return _written(entry, parts, module, finite=finite)


def decompress(
    frame: bytes | bytearray | memoryview,
    schema: Mapping[str, Shaped] | None = None,
    base: Mapping[str, object] | None = None,
    *,
    relative_to: Base | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> dict[str, Tensor]:
    """Decode a frame into CPU tensors.

    Args:
        frame: what `Compressor.compress` returned; any contiguous bytes-like object.
        schema: expected tensors; names, shapes and dtypes must be equal. Anything with `.shape` and
            `.dtype` serves as a value, for instance the model's own state dict. Frames without a
            schema of their own need it, in the sender's order.
        base: the tensors that the frame is a difference to; the result is then base + difference.
        relative_to: run and round of that base, where the frame names it so.
        max_bytes: refuse frames that would decode to more; decoding may take some four times that
            for a moment, where tensors have 16 bits, and 50 times that where a matrix lists nearly
            all of its rows of one byte, or codes each element as a row. No encoder of ours makes
            such rows, but a small frame may hold many.
        backend: as in `Compressor`.

    Returns:
        Tensors by name, in the order they were sent; tied tensors share their memory.

    Raises:
        TypeError: a schema, base or bound that is none.
        WireError: anything wrong with the bytes: truncated, corrupted, newer, too large.
        ValueError: a schema or base that does not match, or a missing or unneeded base.
    """
    # Once each: of values that are loaded when asked for, one may lie where another one lay.
    base = None if base is None else dict(as_mapping(base, "base").items())
    bases = None if base is None else as_tensors(base, "base", finite=False)
    wanted, name = (bases, "base") if schema is None else (schema, "schema")
    tensors, made_against = decode_frame(
        frame,
        wanted,
        schema_name=name,
        max_bytes=max_bytes,
        backend=backend,
        finite=base is None,
    )
    _check_base(made_against, base, relative_to)
    if base is None or bases is None:
        return tensors
    check_same_tensors(tensors, bases, "base")
    # Tied differences give tied results only where the base is tied as well.
    base_ties = tied_names(base)
    applied: dict[tuple[int, str], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        key = id(value), base_ties.get(name, name)
        if key not in applied:
            applied[key] = _applied(name, bases[name], value)
        result[name] = applied[key]
    return result


def decompress_from(
    file: BinaryIO,
    schema: Mapping[str, Shaped] | None = None,
    base: Mapping[str, object] | None = None,
    *,
    relative_to: Base | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str = "native",
) -> Iterator[tuple[str, Tensor]]:
    """Decode a frame in a file, one tensor in memory at a time.

    The file is gone through once before the first tensor comes, so that a damaged frame gives none.
    Arguments and errors are those of `decompress`; `file` is open for reading bytes, seekable, and
    stands where the frame begins. Tied tensors are decoded once each.

    Yields:
        Name and tensor, in the order they were sent.
    """
    module = backend_named(backend)
    needed = None if schema is None else _needed(wire.file_header(file), schema)
    reader = wire.FrameReader(file, schema=needed, max_bytes=max_bytes)
    if schema is not None:
        check_same_tensors({info.name: info for info in reader.entries}, schema, "schema")
    _check_base(reader.header.base, base, relative_to)
    if base is not None:
        check_same_names({info.name: info for info in reader.entries}, base, "base")
    for index, info in enumerate(reader.entries):
        entry = reader.read(info.rank if info.mode is Mode.ALIAS else index)
        tensor = _decoded(entry, module, finite=base is None)
        if base is not None:
            before = as_tensors({info.name: base[info.name]}, "base", finite=False)
            check_same_tensors({info.name: tensor}, before, "base")
            tensor = _applied(info.name, before[info.name], tensor)
        yield info.name, tensor


def _applied(name: str, base: Tensor, difference: Tensor) -> Tensor:
    if not difference.is_floating_point():
        return difference
    result = base + difference
    if not all_finite(result):
        # It is so wherever one of the two is not finite.
        as_tensors({name: base}, "base")
        _check_finite(name, difference)
        raise ValueError(f"base[{name!r}] + difference overflows {DTYPES[result.dtype]}")
    return result


def _check_base(
    made_against: Base | None, base: Mapping[str, object] | None, relative_to: Base | None
) -> None:
    """Refuse a frame whose base is another one than the receiver's."""
    if made_against is None:
        if base is not None or relative_to is not None:
            raise ValueError("base was given, but the frame is not a difference: decode it without")
        return
    version, digest = (made_against.run, made_against.round), made_against.digest
    if made_against.run is not None:
        if relative_to is None:
            raise ValueError(
                f"frame is a difference to run {version[0]} round {version[1]}: pass relative_to="
            )
        if (relative_to.run, relative_to.round) != version:
            raise ValueError(
                f"base does not match: the frame was made against run {version[0]} round "
                f"{version[1]}, the receiver is at run {relative_to.run} round {relative_to.round}"
            )
    if digest is None:
        return
    if base is None:
        raise ValueError(f"frame is a difference to base {digest.hex()}: pass base=")
    own = digest_of(base)
    if own != digest:
        raise ValueError(
            f"base does not match: the frame was made against {digest.hex()}, "
            f"this base is {own.hex()}"
        )
