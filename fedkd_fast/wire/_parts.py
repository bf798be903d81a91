"""The sections of payloads of the modes FACTORS, PACKED_FACTORS, PACKED_DENSE and ROWS."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from fedkd_fast.wire._entries import Entry, Mode, WireError

_FLOAT_BYTES = 4
_ROW_MODES = {int(mode): mode for mode in Mode if mode not in (Mode.ZERO, Mode.ALIAS, Mode.ROWS)}


class FactorsParts(NamedTuple):
    """Sections of a FACTORS payload, each little-endian float32 in C order."""

    sigma: memoryview  # (K,)
    left: memoryview  # (K, P)
    right: memoryview  # (K, Q)


class PackedFactorsParts(NamedTuple):
    """Sections of a PACKED_FACTORS payload."""

    scale: memoryview  # (K,) little-endian float32
    bits_left: memoryview  # (K,) uint8
    bits_right: memoryview  # (K,) uint8
    codes_left: memoryview  # component k takes ceil(P * bits_left[k] / 8) bytes
    codes_right: memoryview  # component k takes ceil(Q * bits_right[k] / 8) bytes


class PackedDenseParts(NamedTuple):
    """Sections of a PACKED_DENSE payload of R = rank rows."""

    scale: memoryview  # (R,) little-endian float32
    bits: memoryview  # (R,) uint8, 0 for a row of zeros
    codes: memoryview  # row r takes ceil((numel / R) * bits[r] / 8) bytes


class RowsParts(NamedTuple):
    """Sections of a ROWS payload."""

    gaps: memoryview  # for each row that is sent, a varint: how many rows are left out before it
    rows: Entry  # these rows as an entry of shape (rank, *shape[1:])


def factors_parts(entry: Entry) -> FactorsParts:
    """Split the payload of a FACTORS entry.

    Args:
        entry: an entry of mode FACTORS.

    Returns:
        Views of sigma, left and right.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape and rank say.
    """
    rows, columns = _matrix(entry, Mode.FACTORS)
    sizes = [_FLOAT_BYTES * entry.rank * n for n in (1, rows, columns)]
    return FactorsParts(*_split(entry, sizes))


def packed_factors_parts(entry: Entry) -> PackedFactorsParts:
    """Split the payload of a PACKED_FACTORS entry.

    Args:
        entry: an entry of mode PACKED_FACTORS.

    Returns:
        Views of scales, bit counts and codes.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape, rank and bit counts say.
    """
    rows, columns = _matrix(entry, Mode.PACKED_FACTORS)
    rank = entry.rank
    bits = memoryview(entry.payload)[_FLOAT_BYTES * rank :]
    codes_left = _code_bytes(rows, bits[:rank])
    codes_right = _code_bytes(columns, bits[rank : 2 * rank])
    return PackedFactorsParts(
        *_split(entry, [_FLOAT_BYTES * rank, rank, rank, codes_left, codes_right])
    )


def packed_dense_parts(entry: Entry) -> PackedDenseParts:
    """Split the payload of a PACKED_DENSE entry.

    Args:
        entry: an entry of mode PACKED_DENSE.

    Returns:
        Views of scales, bit counts and codes.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload has another length than shape, rank and bit counts say, or the rank
            does not divide the number of elements.
    """
    require_mode(entry, Mode.PACKED_DENSE)
    rows, numel = entry.rank, math.prod(entry.shape)
    if rows < 1 or numel % rows != 0:
        raise WireError(f"rank of {entry.name!r} must divide its {numel} elements, got {rows}")
    bits = memoryview(entry.payload)[_FLOAT_BYTES * rows : (_FLOAT_BYTES + 1) * rows]
    codes = _code_bytes(numel // rows, bits)
    return PackedDenseParts(*_split(entry, [_FLOAT_BYTES * rows, rows, codes]))


def rows_entry(shape: tuple[int, ...], gaps: bytes, rows: Entry) -> Entry:
    """Make the ROWS entry of a tensor of this shape; the inverse of `rows_parts`.

    Args:
        shape: of the whole tensor, at least two dimensions.
        gaps: as in `RowsParts`.
        rows: the rows that are sent, in any mode but ZERO, ALIAS and ROWS.
    """
    head = bytes([rows.mode]) + varint(rows.rank) + varint(len(gaps))
    payload = b"".join((head, gaps, rows.payload))
    return Entry(rows.name, rows.dtype, shape, Mode.ROWS, rows.shape[0], payload)


def rows_parts(entry: Entry) -> RowsParts:
    """Split the payload of a ROWS entry.

    Args:
        entry: an entry of mode ROWS.

    Returns:
        A view of the gaps, and the entry of the rows, whose payload is a view.

    Raises:
        ValueError: the entry has another mode.
        WireError: its payload ends before its rows begin, or they have no mode of their own.
    """
    _matrix(entry, Mode.ROWS)
    payload = memoryview(entry.payload)
    try:
        mode = _ROW_MODES[payload[0]]
        rank, at = read_varint(payload, 1)
        size, at = read_varint(payload, at)
    except (IndexError, KeyError):
        raise WireError(f"payload of {entry.name!r} must begin with mode, rank and ids") from None
    gaps, rest = payload[at : at + size], payload[at + size :]
    shape = (entry.rank, *entry.shape[1:])
    return RowsParts(gaps, Entry(entry.name, entry.dtype, shape, mode, rank, rest))


def varint(value: int) -> bytes:
    low = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(digit | 0x80 for digit in low[:-1]), low[-1]])


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def require_mode(entry: Entry, mode: Mode) -> None:
    """Refuse entries of another mode."""
    if entry.mode != mode:
        raise ValueError(f"mode of {entry.name!r} must be {mode.name}, got {entry.mode!r}")


def _matrix(entry: Entry, mode: Mode) -> tuple[int, int]:
    """Return P and Q of an entry that must have this mode."""
    require_mode(entry, mode)
    if len(entry.shape) < 2:
        raise WireError(f"shape of {entry.name!r} must have 2 dimensions, got {entry.shape}")
    return entry.shape[0], math.prod(entry.shape[1:])


def _code_bytes(length: int, bits: Iterable[int]) -> int:
    """Return the bytes of rows of `length` codes, each row rounded up to whole bytes."""
    return sum((length * width + 7) // 8 for width in bits)


def _split(entry: Entry, sizes: list[int]) -> list[memoryview]:
    payload = memoryview(entry.payload)
    if len(payload) != sum(sizes):
        raise WireError(
            f"payload of {entry.name!r} must take {sum(sizes)} bytes, got {len(payload)}"
        )
    parts = []
    for size in sizes:
        parts.append(payload[:size])
        payload = payload[size:]
    return parts
