"""The cases of the GPU benches: inputs, calls of all implementations, the check before the clock.

Every builder takes the device, so that the tests can run it without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import peers
from bench.gpu import rans
from bench.gpu.case import FLOAT32_EPS, Prepared, copying, noise, spread
from bench.gpu.plan import COMPILED
from fedkd_fast import ops, reference


def prepare(op: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    """Make the inputs of a case and its calls."""
    # Compiled code of other shapes counts against a limit, after which torch silently runs eager.
    torch.compiler.reset()
    return BUILDERS[op](shape, dtype, device)


# ---- distill_loss --------------------------------------------------------------------------------


def distill_loss(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    mentor, mentee = (
        noise(device, *shape, seed=seed).to(getattr(torch, dtype)).requires_grad_()
        for seed in (0, 1)
    )
    generator = torch.Generator(device).manual_seed(2)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator, device=device)
    truth: list[Tensor] = []

    def step(losses: peers.Losses) -> Callable[[], tuple[Tensor | None, ...]]:
        def run() -> tuple[Tensor | None, ...]:
            peers.train_step(losses, mentor, mentee, labels)
            return mentor.grad, mentee.grad

        return run

    out = ops.distill_buffers(mentor.detach())

    def alone() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return peers.native_distill_loss(mentor, mentee, labels, out)

    def check(impl: str, gradients: tuple[Tensor | None, ...]) -> float:
        if not truth:
            truth.extend(peers.true_gradients(mentor, mentee, labels))
        if impl == "ours-op":  # what backward would do
            gradients = tuple(out.summary[-1] * g for g in gradients if g is not None)
        pairs = zip(gradients, truth, strict=True)
        return max(peers.check_gradient(found, wanted) for found, wanted in pairs)

    moved_bytes = 4 * mentor.numel() * mentor.element_size()
    calls = {
        "ours": step(peers.our_losses),
        "ours-op": alone,
        "eager": step(peers.eager_losses),
        "copy": copying(moved_bytes, device),
        COMPILED: step(torch.compile(peers.eager_losses, dynamic=False)),
    }
    return Prepared(calls, check, moved_bytes)


# ---- layer_mse, projected_mse --------------------------------------------------------------------


def layer_mse(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    pairs, samples, *rest = shape
    layers = [
        noise(device, samples, *rest, seed=seed).softmax(-1).to(getattr(torch, dtype))
        for seed in range(2 * pairs)
    ]
    out = [torch.empty_like(layer) for layer in layers]
    scale = torch.full((samples,), 1 / samples, device=device)
    moved_bytes = 2 * sum(layer.nbytes for layer in layers)
    plain = [layer.detach() for layer in layers]
    calls = {
        "ours": stepping(peers.our_maps, layers, scale),
        "ours-op": lambda: peers.native_maps(plain, scale, out),
        "eager": stepping(peers.eager_maps, layers, scale),
        "copy": copying(moved_bytes, device),
        COMPILED: stepping(torch.compile(peers.eager_maps, dynamic=False), layers, scale),
    }
    return Prepared(calls, checking(peers.eager_maps, layers, scale), moved_bytes)


def projected_mse(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    samples, tokens, wide, narrow = shape
    sizes = (samples, tokens, wide), (samples, tokens, narrow), (wide, narrow)
    layers = [
        noise(device, *size, seed=seed).to(getattr(torch, dtype)) for seed, size in enumerate(sizes)
    ]
    layers[2] /= narrow**0.5
    scale = torch.full((samples,), 1 / samples, device=device)
    residual, states, weight = (layer.detach().flatten(0, -2) for layer in layers)
    check = checking(peers.eager_states, layers, scale)

    def products() -> tuple[Tensor, ...]:
        return states @ weight.mT, residual @ weight, residual.mT @ states

    def check_all(impl: str, found: tuple[Tensor | None, ...]) -> float:
        return 0.0 if impl == "products" else check(impl, found)  # those are no gradients

    calls = {
        "ours": stepping(peers.our_states, layers, scale),
        "products": products,
        "eager": stepping(peers.eager_states, layers, scale),
        COMPILED: stepping(torch.compile(peers.eager_states, dynamic=False), layers, scale),
    }
    flops = 6 * samples * tokens * wide * narrow
    return Prepared(calls, check_all, 2 * sum(layer.nbytes for layer in layers), flops)


def stepping(
    compare: peers.Compare, layers: peers.Layers, scale: Tensor
) -> Callable[[], tuple[Tensor | None, ...]]:
    for layer in layers:
        layer.requires_grad_()
    return lambda: peers.layer_step(compare, layers, scale)


def checking(
    specified: peers.Compare, layers: peers.Layers, scale: Tensor
) -> Callable[[str, tuple[Tensor | None, ...]], float]:
    eps = torch.finfo(layers[0].dtype).eps
    return lambda impl, found: peers.check_layers(found, specified, layers, scale, eps)


# ---- pack_factors, unpack_factors ----------------------------------------------------------------


class Packing(NamedTuple):
    """Rows of one width, with what both directions need."""

    values: Tensor  # (K, n)
    scale: Tensor  # (K,), on the CPU, where no call has to wait for it
    bits: Tensor  # (K,), likewise
    codes: Tensor  # as the op packs them
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, device: torch.device) -> Packing:
        """Make rows of noise and pack them."""
        width = int(dtype.removesuffix(" bits"))
        values = noise(device, *shape)
        # Four standard deviations on either side: some values clamp, as in a real update.
        scale = torch.full(shape[:1], 4.0 / 2**width)
        bits = torch.full(shape[:1], width, dtype=torch.uint8)
        return cls(values, scale, bits, ops.pack_factors(values, scale, bits), width)

    @property
    def moved_bytes(self) -> int:
        """Bytes of the values and of their codes."""
        return 4 * self.values.numel() + self.codes.numel()

    def some_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows on the CPU: which, their codes, their scales and widths."""
        picked = spread(*self.values.shape)
        codes = self.codes.reshape(len(self.values), -1)[picked].flatten().cpu()
        return picked, codes, self.scale[picked], self.bits[picked]


def eager_pack(values: Tensor, inverse: Tensor, width: int) -> Tensor:
    half = 2 ** (width - 1)
    codes = (torch.floor(values * inverse).clamp(-half, half - 1) + half).to(torch.uint8)
    return (codes if width == 8 else codes[:, ::2] | codes[:, 1::2] << 4).flatten()


def eager_unpack(codes: Tensor, scale: Tensor, width: int) -> Tensor:
    table = codes.reshape(len(scale), -1)
    if width == 4:
        table = torch.stack([table & 15, table >> 4], 2).flatten(1)
    return scale[:, None] * (2 * table.float() - (2**width - 1))


def pack_factors(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    case = Packing.of(shape, dtype, device)
    inverse = (0.5 / case.scale)[:, None].to(device)
    picked, codes, scale, bits = case.some_rows()
    compiled = torch.compile(eager_pack, dynamic=False)

    def check(impl: str, found: Tensor) -> float:
        wanted = reference.pack_factors(case.values[picked].cpu(), scale, bits)
        assert torch.equal(codes, wanted), "codes differ from the specification"
        assert torch.equal(found, case.codes), "codes differ from those of the first call"
        back = ops.unpack_factors(case.codes, case.scale, case.bits, shape[1])
        again = ops.pack_factors(back, case.scale, case.bits)
        assert torch.equal(again, case.codes), "values on the grid are not fixed points"
        return 0.0

    calls = {
        "ours": lambda: ops.pack_factors(case.values, case.scale, case.bits),
        "eager": lambda: eager_pack(case.values, inverse, case.width),
        "copy": copying(case.moved_bytes, device),
        COMPILED: lambda: compiled(case.values, inverse, case.width),
    }
    return Prepared(calls, check, case.moved_bytes)


def unpack_factors(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    case = Packing.of(shape, dtype, device)
    picked, codes, scale, bits = case.some_rows()
    steps = case.scale.to(device)
    compiled = torch.compile(eager_unpack, dynamic=False)

    def check(impl: str, found: Tensor) -> float:
        wanted = reference.unpack_factors(codes, scale, bits, shape[1])
        assert torch.equal(found[picked].cpu(), wanted), "values differ from the specification"
        again = ops.pack_factors(found, case.scale, case.bits)
        assert torch.equal(again, case.codes), "the values do not pack to the codes they came from"
        return 0.0

    calls = {
        "ours": lambda: ops.unpack_factors(case.codes, case.scale, case.bits, shape[1]),
        "eager": lambda: eager_unpack(case.codes, steps, case.width),
        "copy": copying(case.moved_bytes, device),
        COMPILED: lambda: compiled(case.codes, steps, case.width),
    }
    return Prepared(calls, check, case.moved_bytes)


# ---- reconstruct ---------------------------------------------------------------------------------


def reconstruct(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    rank, height, width = shape
    left, right = noise(device, rank, height), noise(device, rank, width, seed=1)
    picked = spread(height, width)
    columns = left.cpu()[:, picked]
    truth = left.double().T @ right.double()
    allowed = rank * FLOAT32_EPS * float((left.abs().T @ right.abs()).max())

    def check(impl: str, found: Tensor) -> float:
        if impl == "ours":
            wanted = reference.reconstruct(columns, right.cpu())
            assert torch.equal(found[picked].cpu(), wanted), "bits differ from the specification"
        error = float((found.double() - truth).abs().max())
        assert error <= allowed, f"off by {error:.3g}, allowed are {allowed:.3g}"
        return error

    moved_bytes = 4 * (left.numel() + right.numel() + height * width)
    calls = {
        "ours": lambda: ops.reconstruct(left, right),
        "torch.matmul": lambda: left.T @ right,
        "copy": copying(moved_bytes, device),
    }
    return Prepared(calls, check, moved_bytes, 2 * rank * height * width)


# ---- truncated_svd -------------------------------------------------------------------------------


def truncated_svd(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    batch, rows, cols = shape
    earlier, drift = (peers.updates(batch, rows, cols, seed, device) for seed in (0, 1))
    matrix = earlier + peers.DRIFT * drift
    before = ops.truncated_svd_list(list(earlier), energy=peers.ENERGY)
    starts = [factors.subspace() for factors in before]
    rank = int(ops.truncated_svd(matrix, energy=peers.ENERGY).rank.max())

    def call(impl: str) -> Callable[[], peers.Factors]:
        return lambda: peers.SVDS[impl](matrix, starts, rank)

    def check(impl: str, factors: peers.Factors) -> float:
        return peers.check_energy(matrix, factors)

    factor_values = batch * rank * (rows + cols + 1)
    calls = {impl: call(impl) for impl in peers.SVDS}
    return Prepared(calls, check, 4 * (matrix.numel() + factor_values))


# ---- truncated_svd_list --------------------------------------------------------------------------


def flat(factors: list[reference.Factors]) -> tuple[Tensor, ...]:
    return tuple(part for one in factors for part in (one.left, one.sigma, one.right))


def torch_svds(stacks: list[Tensor], driver: str | None) -> tuple[Tensor, ...]:
    """Factorise matrix stacks by a solver of cuSOLVER, and cut each matrix by its energy."""
    parts = []
    for stack in stacks:
        u, s, vh = torch.linalg.svd(
            stack, full_matrices=False, driver=driver if stack.is_cuda else None
        )
        for b, sigma in enumerate(s):
            kept = reference.select_rank(sigma, peers.ENERGY)
            parts += [u[b, :, :kept].mT, sigma[:kept], vh[b, :kept]]
    return tuple(parts)


def truncated_svd_list(shape: tuple[int, ...], dtype: str, device: torch.device) -> Prepared:
    batches = list(zip(shape[::3], shape[1::3], shape[2::3], strict=True))

    def stacked(seed: int) -> list[Tensor]:
        return [peers.updates(*batch, seed, device) for batch in batches]

    before = stacked(0)
    stacks = [old + peers.DRIFT * new for old, new in zip(before, stacked(1), strict=True)]
    matrices = [matrix for stack in stacks for matrix in stack]
    known = ops.truncated_svd_list([one for old in before for one in old], energy=peers.ENERGY)
    starts = [factors.subspace() for factors in known]

    def ours(earlier: list[reference.Subspace] | None) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: flat(ops.truncated_svd_list(matrices, energy=peers.ENERGY, earlier=earlier))

    def torchs(driver: str | None) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch_svds(stacks, driver)

    def check(impl: str, parts: tuple[Tensor, ...]) -> float:
        shares = []
        for matrix, left, sigma, right in zip(
            matrices, parts[::3], parts[1::3], parts[2::3], strict=True
        ):
            rest = matrix.double() - (left.double().mT * sigma.double()) @ right.double()
            shares.append(float(rest.square().sum() / matrix.double().square().sum()))
        misses = sum(share >= 1 - peers.ENERGY for share in shares)
        assert not misses, f"{misses} of {len(shares)} lose too much, up to {max(shares):.6f}"
        return max(shares)

    values = sum(matrix.numel() for matrix in matrices) + sum(part.numel() for part in ours(None)())
    calls = {
        "ours": ours(None),
        "ours-warm": ours(starts),
        "torch.linalg.svd": torchs(None),
        "gesvda": torchs("gesvda"),
        "gesvdj": torchs("gesvdj"),
    }
    return Prepared(calls, check, 4 * values)


# ---- all of them ---------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[tuple[int, ...], str, torch.device], Prepared]] = {
    "pack_factors": pack_factors,
    "unpack_factors": unpack_factors,
    "reconstruct": reconstruct,
    "rans_encode": rans.rans_encode,
    "rans_decode": rans.rans_decode,
    "truncated_svd": truncated_svd,
    "truncated_svd_list": truncated_svd_list,
    "distill_loss": distill_loss,
    "layer_mse": layer_mse,
    "projected_mse": projected_mse,
}
