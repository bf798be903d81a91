"""A communication hook for `DistributedDataParallel`: gradients as factors on a shared basis.

A hook runs at every step, so it has to be cheap, and what ranks send has to add up: frames do not.
As in PowerSGD (Vogels et al., NeurIPS 2019) all ranks project on one basis, found by one subspace
iteration a step from where the last one ended. Of a gradient G_i (P, Q) on rank i::

    M_i = G_i + E_i;  A = orthonormal(mean_i M_i·B);  B_i = M_iᵀ·A;  B = mean_i B_i
    Ĝ = A·Bᵀ = A·Aᵀ·(mean_i M_i);  E_i = M_i - A·B_iᵀ

E_i is what rank i has not told yet: ``Σ_steps Ĝ + mean_i E_i = Σ_steps mean_i G_i``. It is kept
for each parameter, because DDP forms new buckets after the first step. Both all-reduces of a bucket
are waited for inside the hook: gloo can run out of threads where one is started in the callback of
another.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

_RESIDUAL, _BASIS = "residual.", "basis."


class LowRankState:
    """What `ddp_hook` keeps: residuals and bases by parameter name, and bytes.

    ``ddp.register_comm_hook(LowRankState(model, rank=4), ddp_hook)``. Parameters of one dimension,
    and those whose factors would not be half as large, are all-reduced as they are.

    Args:
        model: before DDP wraps it, or DDP's own; names and shapes of parameters are read from it.
        rank: K of the factors; more: more bytes, finer gradients.
        group: the one that DDP has; the default group where left out.
        seed: of the first bases; the same on all ranks.

    Attributes:
        sent_bytes: what this rank has handed to all-reduce so far.
        dense_bytes: what it would have handed there without the hook.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 4,
        *,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.group = group
        self.sent_bytes = self.dense_bytes = 0
        self._names: dict[Tensor, str] = {
            one: name for name, one in model.named_parameters() if one.requires_grad
        }
        self._residual: dict[str, Tensor] = {}  # E_i (P, Q)
        self._basis: dict[str, Tensor] = {}  # B (Q, K)
        self._first: dict[str, Tensor] = {}  # where B begins, and begins anew
        generator = torch.Generator().manual_seed(seed)
        for parameter, name in self._names.items():
            rows, columns = _sides(parameter)
            if 2 * rank * (rows + columns) <= rows * columns:
                device, dtype = parameter.device, _wide(parameter.dtype)
                self._residual[name] = torch.zeros(rows, columns, dtype=dtype, device=device)
                drawn = torch.randn(columns, rank, generator=generator, device="cpu")
                self._first[name] = drawn.to(device, dtype)
                self._basis[name] = self._first[name].clone()

    def average(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Put the mean over ranks in the place of gradients of one dtype.

        If a gradient is not finite on some rank, all of these become NaN on all ranks, so that a
        gradient scaler skips the step everywhere, and residuals stay.
        """
        names = [self._names[one] for one in parameters if one in self._names]
        if len(names) < len(parameters):
            raise ValueError(
                f"model had {len(parameters) - len(names)} of these parameters frozen, or not at "
                "all, when LowRankState was made of it: make one anew"
            )
        self.dense_bytes += sum(one.nbytes for one in gradients)
        # M_i (P, Q), by name
        wanted = {
            name: one.reshape(_sides(one)) + self._residual[name]
            for name, one in zip(names, gradients, strict=True)
            if name in self._basis
        }
        # M_i·B (P, K), or the gradient itself
        shares = [
            wanted[name] @ self._basis[name] if name in wanted else one.to(_wide(one.dtype))
            for name, one in zip(names, gradients, strict=True)
        ]
        means = dict(zip(names, self._all_reduced(shares), strict=True))
        if not all(bool(torch.isfinite(one).all()) for one in means.values()):
            for one in gradients:
                one.fill_(torch.nan)
            return
        left = {name: torch.linalg.qr(means[name]).Q for name in wanted}  # A (P, K)
        right = {name: one.T @ left[name] for name, one in wanted.items()}  # B_i (Q, K)
        self._basis.update(zip(right, self._all_reduced(list(right.values())), strict=True))
        for name, gradient in zip(names, gradients, strict=True):
            if name in wanted:
                self._residual[name] = wanted[name].addmm_(left[name], right[name].T, alpha=-1)
                means[name] = left[name] @ self._basis[name].T
                # A gradient of zeros, or one of lower rank, leaves directions in which nothing
                # would ever be looked for again.
                dead = (self._basis[name] == 0).all(0)
                self._basis[name] = torch.where(dead, self._first[name], self._basis[name])
            gradient.copy_(means[name].view_as(gradient))

    def _all_reduced(self, shares: list[Tensor]) -> list[Tensor]:
        """Return the means over ranks of tensors of one dtype, by one all-reduce."""
        if not shares:
            return []
        flat = torch.cat([one.reshape(-1) for one in shares])
        self.sent_bytes += flat.nbytes
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)
        parts = torch.split(flat, [one.numel() for one in shares])
        return [part.view_as(one) for part, one in zip(parts, shares, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return residuals, which each rank has its own of, and bases; shared, not copied."""
        return {
            **{_RESIDUAL + name: one for name, one in self._residual.items()},
            **{_BASIS + name: one for name, one in self._basis.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: names or shapes are not those of this model and rank; nothing is changed.
        """
        own = self.state_dict()
        if found := sorted(set(own) ^ set(state)):
            raise ValueError(f"state does not match the model: {found[:3]}")
        for name, one in own.items():
            if state[name].shape != one.shape:
                raise ValueError(
                    f"state {name!r} must have shape {tuple(one.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
        for name, one in own.items():
            one.copy_(state[name])


# DDP compares the annotations with these very types, so they are no strings in this file.
def ddp_hook(
    state: LowRankState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over ranks: what `register_comm_hook` takes."""
    state.average(bucket.parameters(), bucket.gradients())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Return P and Q of a tensor's matrix: the first dimension against the others."""
    return (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.ndim else (1, 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
