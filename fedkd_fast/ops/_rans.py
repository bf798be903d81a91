"""`rans_encode` and `rans_decode`: quantised matrices to entropy-coded streams and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkd_fast.ops import _library


def rans_encode(
    values: Sequence[Tensor], multiplier: Tensor, levels: Tensor, owner: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Quantise the rows of a message, and code the integers with Gaussian tables.

    ``q = rint(value · multiplier)``, to even, clamped to ``|q| <= 2^22 - 1``. A row's level is the
    logarithm of its standard deviation in steps, in 1/16 octaves: it chooses the table that the row
    is coded with, and how many low bits travel raw. `fedkd_fast.reference.rans_encode` states the
    stream.

    Args:
        values: segments, each (R_m, n_m) float32 and finite; R rows together.
        multiplier: (R,) float32, one over each row's quantisation step; finite where coded.
        levels: (R,) int16, at most 335. Below -48 a row takes no bytes and decodes to zeros. With
            values on a GPU, multiplier and levels may stay on the CPU.
        owner: the stream of each segment, rising from 0 by at most 1.

    Returns:
        Codes, uint8: the streams one after the other; and the bytes of each, (S,) int64 on the CPU.
        The same on every machine and for any number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a level, factor or owner out of range.
    """
    codes, sizes = _library.native.rans_encode(
        [segment.detach() for segment in values], multiplier.detach(), levels, list(owner)
    )
    return codes, sizes


def rans_decode(
    codes: Tensor,
    sizes: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    owner: Sequence[int],
) -> list[Tensor]:
    """Decode a message: ``value = scale · q``, the inverse of `rans_encode`.

    Args:
        codes: uint8, the streams one after the other. They are not trusted.
        sizes: (S,) int64, the bytes of each stream.
        scale: (R,) float32, each row's quantisation step; finite where coded.
        levels: (R,) int16, as they were encoded; scale, levels and sizes may stay on the CPU.
        rows: of each segment, R_m.
        counts: values in a row of each segment, n_m.
        owner: the stream of each segment, rising from 0 by at most 1.

    Returns:
        A (R_m, n_m) float32 for each segment; the same bits on every machine.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a level, factor or owner out of range; and
            a stream that no encoder makes, "stream 3 is corrupt: …".
    """
    values: list[Tensor] = _library.native.rans_decode(
        codes, sizes, scale.detach(), levels, list(rows), list(counts), list(owner)
    )
    return values


@torch.library.register_fake("fedkd_fast::rans_encode")
def _rans_encode_fake(
    values: Sequence[Tensor], multiplier: Tensor, levels: Tensor, owner: Sequence[int]
) -> tuple[Tensor, Tensor]:
    data = values[0] if values else multiplier
    size = torch.library.get_ctx().new_dynamic_size()
    streams = owner[-1] + 1 if owner else 0
    return (
        data.new_empty(size, dtype=torch.uint8),
        torch.empty(streams, dtype=torch.int64, device="cpu"),
    )


@torch.library.register_fake("fedkd_fast::rans_decode")
def _rans_decode_fake(
    codes: Tensor,
    sizes: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    owner: Sequence[int],
) -> list[Tensor]:
    shapes = zip(rows, counts, strict=True)
    return [codes.new_empty(shape, dtype=torch.float32) for shape in shapes]
