"""`fit_factors`: factors to integers, one side rounded and the other fitted to it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd_fast.ops import _library


def fit_factors(
    matrix: Tensor,
    through: Tensor | None,
    near: Tensor,
    far: Tensor,
    sigma: Tensor,
    multiplier: Tensor,
    near_shrink: Tensor,
    far_shrink: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn leading factors of A into integers s and q with ``A ≈ Σ_k scale_k · q_k ⊗ s_k``.

    ``s = rint(near · (multiplier · near_shrink))``; ``q = rint(far_shrink · X / scale)`` with the X
    that minimises ``|A - Σ_k X_k ⊗ s_k|²``. On the CPU.

    Args:
        matrix: (N, Q) float32, A; rows or columns in order. With `through`, (N, r).
        through: (r, Q) float32: A is matrix · through, which is not written out.
        near: (K, Q) float32, orthonormal rows, K > 0.
        far: (K, N) float32, with ``A · near_kᵀ = sigma_k · far_kᵀ``.
        sigma: (K,) float32.
        multiplier: (K,) float32, positive, as the next three: steps of 1 in units of `near`.
        near_shrink: (K,) float32.
        far_shrink: (K,) float32.
        scale: (K,) float32.

    Returns:
        s (K, Q) and q (K, N), integers as float32, and ``|A|² - |A - Σ_k scale_k · q_k ⊗ s_k|²``,
        a float64 scalar: -Inf where a row of s is nearly a sum of others (a variance inflation
        factor of 16 or more), q then being anything. The fit and the gain may be off by what eight
        bits of small parts of them are: the gain by 1e-5 of the matrix's squared norm and 1e-3 of
        what is lost. The same bits for any number of threads.

    Raises:
        RuntimeError: a wrong shape, dtype or device.
    """
    for part in (through, near, far, sigma, multiplier, near_shrink, far_shrink, scale):
        if part is not None and part.device != matrix.device:
            raise RuntimeError(
                f"all tensors must be on the matrix's device, {matrix.device}, got {part.device}"
            )
    sent, fitted, gain = _library.native.fit_factors(
        matrix.detach(), through, near, far, sigma, multiplier, near_shrink, far_shrink, scale
    )
    return sent, fitted, gain


@torch.library.register_fake("fedkd_fast::fit_factors")
def _fit_factors_fake(
    matrix: Tensor,
    through: Tensor | None,
    near: Tensor,
    far: Tensor,
    sigma: Tensor,
    multiplier: Tensor,
    near_shrink: Tensor,
    far_shrink: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gain = matrix.new_empty((), dtype=torch.float64)
    return torch.empty_like(near), torch.empty_like(far), gain
