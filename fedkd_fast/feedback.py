"""Error feedback: what one message leaves out travels with the next.

``x_r = δ_r + e_{r-1}``; send ``C(x_r)``; ``e_r = x_r - decode(C(x_r))`` (Seide et al. 2014;
Karimireddy et al. 2019). The residual is taken from the decoded bytes, so it is exactly what the
receiver lacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ErrorFeedback:
    """Residuals by tensor name, float32 (float64 for float64 tensors)."""

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Tell whether something was left out of this tensor before."""
        return name in self._residuals

    def add(self, name: str, update: Tensor) -> Tensor:
        """Return ``update + residual``; a residual of another shape is stale and an error.

        Raises:
            ValueError: the tensor changed its shape or precision since the residual was kept.
        """
        residual = self._residuals.get(name)
        if residual is None:
            return update
        if residual.shape != update.shape or residual.dtype != update.dtype:
            raise ValueError(
                f"update[{name!r}] is {tuple(update.shape)} {update.dtype}, but its error-feedback "
                f"residual is {tuple(residual.shape)} {residual.dtype}: use a fresh Compressor"
            )
        return update + residual

    def keep(self, name: str, sent: Tensor, decoded: Tensor) -> None:
        """Store ``sent - decoded`` for the next message."""
        self._residuals[name] = sent - decoded.to(sent.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the residuals by tensor name; the tensors are shared, not copied."""
        return dict(self._residuals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all residuals.

        Raises:
            TypeError: a value is not a floating tensor.
            ValueError: a value holds NaN or Inf.
        """
        for name, residual in state.items():
            if not isinstance(residual, torch.Tensor) or not residual.is_floating_point():
                raise TypeError(f"residual {name!r} must be a floating tensor, got {residual!r}")
            if not bool(torch.isfinite(residual).all()):
                raise ValueError(f"residual {name!r} holds NaN or Inf")
        self._residuals = {name: residual.detach().clone() for name, residual in state.items()}
