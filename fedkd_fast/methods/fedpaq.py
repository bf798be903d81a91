"""FedPAQ (Reisizadeh et al., AISTATS 2020): averaged updates of few bits, both ways.

Each tensor is rounded at random to ``2^bits - 1`` equidistant levels, as in QSGD (Alistarh et al.
2017) but with the largest magnitude for its norm, so that the result is right on average::

    s = max|x| / L,  L = 2^(bits-1) - 1;  q = ⌊x/s⌋ + [u < x/s - ⌊x/s⌋],  u ~ U[0, 1);  x̂ = s·q

Bytes of a tensor of N entries: ``⌈N·bits/8⌉`` and 4 for s. The paper quantises uploads alone; the
table of FedKD counts both legs as quantised, and so do we.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkd_fast.methods.base import Method
from fedkd_fast.methods.fedavg import FEDAVG
from fedkd_fast.methods.packing import State, pack_bits, packed_bytes, unpack_bits
from fedkd_fast.trees import Tree

# Whole numbers of these widths are dtypes; narrower ones share bytes.
_DTYPES = {16: torch.int16, 8: torch.int8}


class StochasticQuantiser:
    """Unbiased rounding to integers with one float32 scale a tensor.

    Of a tensor ``name``, ``name/codes`` are the integers, in the tensor's shape where they have a
    dtype of their own and as a run of bytes of ``q + L`` otherwise, and ``name/scale`` is s.

    Args:
        bits: of each integer: 2, 4, 8 or 16; fewer: fewer bytes, more noise.
        seed: of the rounding.
    """

    def __init__(self, bits: int, seed: int) -> None:
        self._bits, self._most = bits, 2 ** (bits - 1) - 1
        self._generator = torch.Generator().manual_seed(seed)

    def layout(self, like: State) -> dict[str, Tensor]:
        """Return empty codes and scales of these tensors."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            dtype, shape = _DTYPES.get(self._bits), tuple(value.shape)
            if dtype is None:
                dtype, shape = torch.uint8, (packed_bytes(value.numel(), self._bits),)
            found[f"{name}/codes"] = torch.zeros(shape, dtype=dtype, device="cpu")
            found[f"{name}/scale"] = torch.zeros((), device="cpu")
        return found

    def pack(self, update: State) -> dict[str, Tensor]:
        """Round at random."""
        found: dict[str, Tensor] = {}
        for name, value in update.items():
            single = value.float()
            scale = single.abs().max() / self._most if value.numel() else single.new_zeros(())
            steps = single / torch.where(scale > 0, scale, 1.0)
            low = steps.floor()
            dice = torch.rand(value.shape, generator=self._generator, device="cpu")
            up = dice < steps - low
            codes = (low + up).clamp(-self._most, self._most)
            dtype = _DTYPES.get(self._bits)
            found[f"{name}/codes"] = (
                pack_bits(codes + self._most, self._bits) if dtype is None else codes.to(dtype)
            )
            found[f"{name}/scale"] = scale
        return found

    def unpack(self, packed: State, like: State) -> dict[str, Tensor]:
        """Multiply codes with their scales."""
        found: dict[str, Tensor] = {}
        for name, value in like.items():
            codes = packed[f"{name}/codes"]
            if self._bits not in _DTYPES:
                whole = unpack_bits(codes, self._bits, value.numel()) - self._most
                codes = whole.reshape(value.shape)
            found[name] = (codes.float() * packed[f"{name}/scale"]).to(value.dtype)
        return found

    def state(self) -> Tree:
        """Return where the random numbers are."""
        return self._generator.get_state()

    def load(self, state: Tree) -> None:
        """Go on with these random numbers."""
        self._generator.set_state(state)


def _packing(config: Any, seed: int) -> StochasticQuantiser:
    return StochasticQuantiser(config.bits, seed)


FEDPAQ = Method("fedpaq", FEDAVG.make_learner, exchanges=True, packing=_packing)
