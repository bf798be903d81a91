"""Messages for tests of the rANS ops, and the check that they share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from fedkd_fast import ops, reference

LARGEST = 2**22 - 1


class Message(NamedTuple):
    values: list[torch.Tensor]
    multiplier: torch.Tensor
    levels: torch.Tensor
    owner: list[int]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(sizes) for sizes in zip(*(v.shape for v in self.values), strict=True)]

    def to(self, device: torch.device) -> Message:
        values = [segment.to(device) for segment in self.values]
        return self._replace(values=values, multiplier=self.multiplier.to(device))


def sample(
    shapes: Sequence[tuple[int, int]],
    levels: Sequence[int],
    owner: Sequence[int] | None = None,
    *,
    tails: float = 0.0,
    seed: int = 0,
) -> Message:
    """Rows with the levels in turn and the standard deviation that they say, or longer tails."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(shape[0] for shape in shapes)
    chosen = torch.tensor(list(itertools.islice(itertools.cycle(levels), rows)), dtype=torch.int16)
    values = []
    for shape in shapes:
        noise = torch.randn(shape, generator=generator)
        values.append(noise * (tails * torch.randn(shape, generator=generator)).exp())
    return Message(values, 2 ** (chosen / 16), chosen, list(owner or [0] * len(shapes)))


def decode(
    message: Message, codes: torch.Tensor, sizes: torch.Tensor, by: object = ops
) -> list[torch.Tensor]:
    scale = 1 / message.multiplier
    return by.rans_decode(codes, sizes, scale, message.levels, *message.shapes, message.owner)  # type: ignore[attr-defined,no-any-return]


def check(message: Message, device: torch.device | None = None) -> torch.Tensor:
    """Hold both ways against the specification, and return the codes."""
    on_device = message.to(device or torch.device("cpu"))
    codes, sizes = ops.rans_encode(*on_device)
    wanted, wanted_sizes = reference.rans_encode(*message)
    assert torch.equal(sizes, wanted_sizes)
    assert torch.equal(codes.cpu(), wanted)
    found = decode(on_device, codes, sizes)
    for ours, truth in zip(found, decode(message, wanted, sizes, reference), strict=True):
        assert torch.equal(ours.cpu(), truth)
    # Scale and multiplier are each other's inverse but for three roundings.
    multipliers = message.multiplier.split([len(part) for part in message.values])
    largest = max(
        (
            float((part.cpu().abs() * row[:, None]).max())
            for part, row in zip(found, multipliers, strict=True)
            if part.numel()
        ),
        default=0.0,
    )
    if 3 * torch.finfo(torch.float32).eps * largest < 1.0:
        again, _ = ops.rans_encode(found, *on_device[1:])
        assert torch.equal(again, codes), "values on the grid are not fixed points"
    return codes.cpu()


HOSTILE = [
    sample([(2, 9)], [2, 60], tails=2.0),
    sample([(1, 16384)], [-40]),
    sample([(2, 9000)], [0], tails=1.0),
]


def refused(message: Message, codes: torch.Tensor, sizes: torch.Tensor | None = None) -> bool:
    """Whether both decoders refuse; where they do not, they agree."""
    sizes = torch.tensor([len(codes)]) if sizes is None else sizes
    try:
        values = decode(message, codes, sizes)
    except RuntimeError as error:
        assert "stream 0 is corrupt: " in str(error)
        with pytest.raises(RuntimeError, match="stream 0 is corrupt: "):
            decode(message, codes, sizes, reference)
        return True
    for ours, truth in zip(values, decode(message, codes, sizes, reference), strict=True):
        assert torch.equal(ours, truth)
    return False
