"""The outer step of DiLoCo (Douillard et al. 2023, arXiv 2311.08105) over compressed means.

Every rank trains by itself for many steps; then all take the mean of how far they came, and an
outer optimiser makes one step of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedkd_fast.compress import Compressor
from fedkd_fast.integrations.process_group import GroupMean, Sent, gathered, mean_of
from fedkd_fast.tensors import check_same_tensors

_AGREED, _VELOCITY, _COMPRESSOR = "agreed.", "velocity.", "compressor."


class OuterStep:
    """The outer optimiser of DiLoCo over compressed means of the trainable parameters.

    With θ the parameters that all ranks agree on and θ_i what rank i trained them to::

        Δ = mean_i(θ - θ_i);  v ← μ·v + Δ;  θ ← θ - lr·(Δ + μ·v)

    which is SGD with Nesterov's momentum; ``μ = 0`` and ``lr = 1`` is FedAvg. Buffers and frozen
    parameters stay as they are on each rank.

    Args:
        model: takes the parameters of rank 0 at once.
        group: as in `compressed_mean`.
        compressor: as in `compressed_mean`; left out, one with error feedback and energy 0.95.
        lr: larger means that the agreed parameters move further.
        momentum: μ in [0, 1).

    Raises:
        ValueError: on all ranks together, if `lr` or `momentum` is out of range on one, or they
            differ in these or in names, shapes or dtypes of what is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        compressor: Compressor | None = None,
        lr: float = 0.7,
        momentum: float = 0.9,
    ) -> None:
        self._model, self._group, self._lr, self._momentum = model, group, lr, momentum
        self._compressor = Compressor(feedback=True) if compressor is None else compressor
        self._check_alike()
        for parameter in self._trained().values():
            dist.broadcast(parameter, group_src=0, group=group)
        self._agreed = {name: one.clone() for name, one in self._trained().items()}
        self._velocity = {name: torch.zeros_like(one) for name, one in self._agreed.items()}

    def _trained(self) -> dict[str, Tensor]:
        return {name: one.data for name, one in self._model.named_parameters() if one.requires_grad}

    def _check_alike(self) -> None:
        """See that all ranks will do the same, before the first of them waits for others."""

        def described() -> Sent:
            if not self._lr > 0:
                raise ValueError(f"lr must be above 0, got {self._lr}")
            if not 0 <= self._momentum < 1:
                raise ValueError(f"momentum must lie in [0, 1), got {self._momentum}")
            kinds = [(name, one.shape, one.dtype) for name, one in self._trained().items()]
            text = repr((float(self._lr), float(self._momentum), kinds))
            return Sent(hashlib.blake2b(text.encode(), digest_size=16).digest(), 0.0)

        found, _ = gathered(described, self._group, "the ranks cannot begin")
        others = [rank for rank, one in enumerate(found) if one.frame != found[0].frame]
        if others:
            raise ValueError(
                "lr, momentum, and names, shapes and dtypes of trainable parameters must be the "
                f"same on all ranks, those of {others} are not those of rank 0"
            )

    def _moved(self) -> dict[str, Tensor]:
        """Return how far the parameters came, θ - θ_i."""
        trained = self._trained()
        check_same_tensors(trained, self._agreed, "the parameters that the ranks agreed on")
        return {name: agreed - trained[name] for name, agreed in self._agreed.items()}

    def step(self, weight: float = 1.0) -> GroupMean:
        """Move the model, trained here, to what all ranks agree on.

        Args:
            weight: as in `compressed_mean`.

        Returns:
            Δ and what it cost.

        Raises:
            ValueError: as `compressed_mean`, and if other parameters are trained than at the
                beginning, or in another shape or dtype; the model stays as it was trained, so that
                the step can be tried again.
        """
        found = mean_of(self._moved, self._group, self._compressor, weight=weight)
        trained = self._trained()
        for name, delta in found.mean.items():
            velocity = self._velocity[name].mul_(self._momentum).add_(delta)
            self._agreed[name] -= self._lr * (delta + self._momentum * velocity)
            trained[name].copy_(self._agreed[name])
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return the agreed parameters, their velocity and what the compressor keeps; shared."""
        kept = self._own()
        for name, one in self._compressor.state_dict().items():
            kept[_COMPRESSOR + name] = one
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`; the model takes the agreed parameters.

        Raises:
            ValueError: names that are missing or unknown, or other shapes or dtypes; nothing is
                changed then.
        """
        own, rest = self._own(), {}
        for name, one in state.items():
            if name.startswith(_COMPRESSOR):
                rest[name.removeprefix(_COMPRESSOR)] = one
        wrong = set(own) ^ {name for name in state if not name.startswith(_COMPRESSOR)}
        if wrong:
            raise ValueError(f"state does not match the model: {sorted(wrong)[:3]}")
        check_same_tensors({name: state[name] for name in own}, own, "the model")
        self._compressor.load_state_dict(rest)
        for name, one in own.items():
            one.copy_(state[name])
        for name, parameter in self._trained().items():
            parameter.copy_(self._agreed[name])

    def _own(self) -> dict[str, Tensor]:
        return {
            **{_AGREED + name: one for name, one in self._agreed.items()},
            **{_VELOCITY + name: one for name, one in self._velocity.items()},
        }
