"""The cases of `rans_encode` and `rans_decode`; the peers quantise to bytes, and code nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.case import CHECKED_VALUES, Prepared, copying, noise
from fedkd_fast import ops, reference


class Coding(NamedTuple):
    """Rows of one level, with what both directions need."""

    values: Tensor  # (R, n)
    multiplier: Tensor  # (R,), on the CPU, like the levels
    levels: Tensor
    codes: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, device: torch.device) -> Coding:
        """Make rows of noise, and encode them."""
        values = noise(device, *shape)
        levels = torch.full(shape[:1], int(dtype.removeprefix("level ")), dtype=torch.int16)
        multiplier = 2 ** (levels / 16)
        return cls(values, multiplier, levels, *ops.rans_encode([values], multiplier, levels, [0]))

    def encode(self) -> tuple[Tensor, Tensor]:
        """Encode once more."""
        return ops.rans_encode([self.values], self.multiplier, self.levels, [0])

    def decode(self) -> Tensor:
        """Decode the codes."""
        rows, count = self.values.shape
        scale = 1 / self.multiplier
        return ops.rans_decode(self.codes, self.sizes, scale, self.levels, [rows], [count], [0])[0]

    @property
    def moved_bytes(self) -> int:
        """Bytes of the values and of their codes."""
        return 4 * self.values.numel() + self.codes.numel()

    def check_codes(self) -> None:
        """Hold the codes against the specification where that is not too slow, else decode them."""
        if self.values.numel() <= CHECKED_VALUES:
            values = [self.values.cpu()]
            wanted, _ = reference.rans_encode(values, self.multiplier, self.levels, [0])
            assert torch.equal(self.codes.cpu(), wanted), "codes differ from the specification"
        assert torch.equal(self.decode(), self.on_the_grid()), "codes decode to other values"

    def on_the_grid(self) -> Tensor:
        """Return what the values decode to."""
        multiplier = self.multiplier[:, None].to(self.values.device)
        return (self.values * multiplier).round() * (1 / multiplier)


def rans_encode(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    """Build the case of the encoder."""
    case = Coding.of(shape, dtype, device)
    multiplier = case.multiplier[:, None].to(device)

    def check(impl: str, found: tuple[Tensor, ...]) -> float:
        if impl == "ours":
            case.check_codes()
            assert torch.equal(found[0], case.codes), "codes differ from those of the first call"
        else:
            assert torch.equal(found[0] * (1 / multiplier), case.on_the_grid()), "other integers"
        return 0.0

    calls = {
        "ours": case.encode,
        "eager": lambda: ((case.values * multiplier).round().to(torch.int8),),
        "copy": copying(case.moved_bytes, device),
    }
    return Prepared(calls, check, case.moved_bytes)


def rans_decode(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    """Build the case of the decoder."""
    case = Coding.of(shape, dtype, device)
    multiplier = case.multiplier[:, None].to(device)
    integers = (case.values * multiplier).round().to(torch.int8)

    def check(impl: str, found: Tensor) -> float:
        assert torch.equal(found, case.on_the_grid()), "values differ from the specification"
        return 0.0

    calls = {
        "ours": case.decode,
        "eager": lambda: integers.float() * (1 / multiplier),
        "copy": copying(case.moved_bytes, device),
    }
    return Prepared(calls, check, case.moved_bytes)
