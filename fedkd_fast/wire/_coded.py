"""The sections of payloads of the modes CODED_FACTORS, CODED_DENSE, CODED_HYBRID and HALF.

Logarithms are to base 2 and travel as integers: `step` in 1/256 octave, sigmas and levels in 1/16
octave. The level of a row is that of its root mean square over the step; rows of zeros have
ZERO_ROW instead. What the streams hold is the business of their coder.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from fedkd_fast.wire._entries import Entry, Mode, WireError, entry_fields
from fedkd_fast.wire._native import _C
from fedkd_fast.wire._parts import require_mode, varint

if TYPE_CHECKING:
    from typing_extensions import Buffer

ZERO_ROW = -(2**15)
_HALF_BYTES = 2


class CodedFactorsParts(NamedTuple):
    """Sections of a CODED_FACTORS payload of rank K."""

    step: int
    top: int  # the first sigma
    sigmas: array[int]  # (K,) int16, falling
    levels: array[int]  # (2K,) int16, of the rows in the stream: left, then right
    stream: memoryview


class CodedDenseParts(NamedTuple):
    """Sections of a CODED_DENSE payload of R = rank rows."""

    step: int
    base: int
    width: int  # bits of a code
    codes: bytes  # (R,), 0 for a row of zeros, c for the level base - 4(c - 1)
    levels: array[int]  # (R,) int16
    stream: memoryview


class CodedHybridParts(NamedTuple):
    """Sections of a CODED_HYBRID payload: factors of rank K and a residual of R rows."""

    step: int
    top: int
    sigmas: array[int]  # (K,) int16, falling
    base: int
    width: int
    codes: bytes  # (R,), as in CodedDenseParts
    levels: array[int]  # (2K + R,) int16: left, right, residual
    stream: memoryview


class HalfParts(NamedTuple):
    """Sections of a HALF payload."""

    exponent: int
    halves: memoryview  # (numel,) little-endian float16; times 2**exponent they are the values


def coded_factors_parts(entry: Entry) -> CodedFactorsParts:
    """Split the payload of a CODED_FACTORS entry.

    Raises:
        ValueError: the entry has another mode.
        WireError: the entry breaks the format.
    """
    step, top, sigmas, _, _, _, levels, stream = _split(entry, Mode.CODED_FACTORS)
    return CodedFactorsParts(step, top, _int16(sigmas), _int16(levels), stream)


def coded_dense_parts(entry: Entry) -> CodedDenseParts:
    """Split the payload of a CODED_DENSE entry.

    A row may take no byte of the payload, so that there can be as many as the tensor has elements.

    Raises:
        ValueError: the entry has another mode.
        WireError: the entry breaks the format.
    """
    step, _, _, base, width, codes, levels, stream = _split(entry, Mode.CODED_DENSE)
    return CodedDenseParts(step, base, width, codes, _int16(levels), stream)


def coded_hybrid_parts(entry: Entry) -> CodedHybridParts:
    """Split the payload of a CODED_HYBRID entry; see `coded_dense_parts`.

    Raises:
        ValueError: the entry has another mode.
        WireError: the entry breaks the format.
    """
    step, top, sigmas, base, width, codes, levels, stream = _split(entry, Mode.CODED_HYBRID)
    rows = base, width, codes
    return CodedHybridParts(step, top, _int16(sigmas), *rows, _int16(levels), stream)


def half_parts(entry: Entry) -> HalfParts:
    """Split the payload of a HALF entry.

    Raises:
        ValueError: the entry has another mode.
        WireError: the entry breaks the format.
    """
    require_mode(entry, Mode.HALF)
    _C.check_payload(entry_fields(entry), 0)
    payload = memoryview(entry.payload)
    exponent = int.from_bytes(payload[:_HALF_BYTES], "little", signed=True)
    return HalfParts(exponent, payload[_HALF_BYTES:])


def coded_factors_payload(step: int, sigmas: Iterable[int], stream: Buffer) -> bytes:
    """Make the payload of a CODED_FACTORS entry; the inverse of `coded_factors_parts`.

    Args:
        step: log2 of the quantisation step in 1/256 octave.
        sigmas: log2 of the singular values in 1/16 octave, at least one, falling.
        stream: bytes of the entropy coder.

    Raises:
        WireError: numbers that the format cannot say. What goes beyond a limit is left to `encode`.
    """
    return b"".join((_two_bytes("step", step), _sigmas(sigmas), memoryview(stream)))


def coded_dense_payload(step: int, base: int, width: int, codes: Buffer, stream: Buffer) -> bytes:
    """Make the payload of a CODED_DENSE entry; the inverse of `coded_dense_parts`.

    Args:
        step: as in `coded_factors_payload`.
        base: level of code 1 in 1/16 octave.
        width: bits of a code, 0 to 6; with 0 every code is 1.
        codes: one byte a row, as in `CodedDenseParts`.
        stream: bytes of the entropy coder.

    Raises:
        WireError: numbers that the format cannot say. What goes beyond a limit is left to `encode`.
    """
    return b"".join((_two_bytes("step", step), _row_codes(base, width, codes), memoryview(stream)))


def coded_hybrid_payload(
    step: int, sigmas: Iterable[int], base: int, width: int, codes: Buffer, stream: Buffer
) -> bytes:
    """Make the payload of a CODED_HYBRID entry; the inverse of `coded_hybrid_parts`.

    Args:
        step: as in `coded_factors_payload`.
        sigmas: as in `coded_factors_payload`.
        base: as in `coded_dense_payload`, of the residual.
        width: as in `coded_dense_payload`.
        codes: as in `coded_dense_payload`.
        stream: bytes of the entropy coder.

    Raises:
        WireError: numbers that the format cannot say. What goes beyond a limit is left to `encode`.
    """
    rows = varint(memoryview(codes).nbytes) + _row_codes(base, width, codes)
    return b"".join((_two_bytes("step", step), _sigmas(sigmas), rows, memoryview(stream)))


def half_payload(exponent: int, halves: Buffer) -> bytes:
    """Make the payload of a HALF entry; the inverse of `half_parts`.

    Raises:
        WireError: an exponent that does not fit. What goes beyond a limit is left to `encode`.
    """
    return b"".join((_two_bytes("exponent", exponent), memoryview(halves)))


def _split(entry: Entry, mode: Mode) -> tuple[int, int, bytes, int, int, bytes, bytes, memoryview]:
    require_mode(entry, mode)
    parts = _C.split_coded(entry_fields(entry))
    return (*parts[:7], memoryview(entry.payload)[parts[7] :])


def _int16(numbers: bytes) -> array[int]:
    found = array("h")
    found.frombytes(numbers)
    return found


def _two_bytes(what: str, value: int) -> bytes:
    try:
        return int(value).to_bytes(2, "little", signed=True)
    except OverflowError:
        raise WireError(f"{what} must fit 16 bits, got {value}") from None


def _sigmas(sigmas: Iterable[int]) -> bytes:
    try:
        numbers = array("h", sigmas)
    except OverflowError:
        raise WireError("sigmas must fit 16 bits") from None
    if not numbers:
        raise WireError("sigmas must not be empty")
    return _two_bytes("top", numbers[0]) + _C.pack_gaps(numbers)


def _row_codes(base: int, width: int, codes: Buffer) -> bytes:
    packed = _C.pack_codes(codes, width)  # which also checks the width
    return _two_bytes("base", base) + bytes([width]) + packed
