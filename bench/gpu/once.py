"""Call every CUDA kernel once, on small inputs: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.gpu.once

The sizes reach what kernels treat apart: a row for a warp and one for a block, rows that vector
loads can take and rows that they cannot, every storage type, widths on and off byte borders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from bench.gpu import cases
from fedkd_fast import ops, reference
from fedkd_fast.distillation import DistillationConfig

LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLASSES = (7, 64, 1500, 2047)
COUNTS = (21, 1024)
BITS = (0, 1, 4, 7, 8, 16)
LAYERS = ((3, 2, 40, 40), (2, 3, 7, 7), (3, 300, 65))
LEVELS = [0, 70, -48, -60, 335, 20, 47]
PRODUCTS = ((5, 33, 47), (8, 64, 128))
MATRICES = ((2, 24, 40), (1, 64, 32))
# With subspaces that fit in shared memory, and that do not.
LISTED = ((80, 70, 10), (264, 272, 100))


def distill_loss(device: torch.device) -> None:
    for dtype in LOGITS:
        for classes in CLASSES:
            mentor, mentee = (
                cases.noise(device, 9, classes, seed=seed).to(dtype).requires_grad_()
                for seed in (0, 1)
            )
            labels = torch.arange(9, device=device) % classes
            labels[3] = -100
            for config in (DistillationConfig.paper(), DistillationConfig.public_code()):
                ops.distill_loss(mentor, mentee, labels, config=config).total.backward()


def layer_mse(device: torch.device) -> None:
    for dtype in LOGITS:
        for shape in LAYERS:
            mentor, mentee = (
                cases.noise(device, *shape, seed=seed).to(dtype).requires_grad_() for seed in (0, 1)
            )
            scale = torch.ones(shape[0], device=device)
            mask = torch.arange(shape[0] * shape[-2], device=device) % 3 > 0
            for chosen in (None, mask.view(shape[0], shape[-2])):
                ops.layer_mse(mentor, mentee, scale, mask=chosen).total.backward()


def projected_mse(device: torch.device) -> None:
    mentor, mentee, weight = (
        cases.noise(device, *size).requires_grad_() for size in ((3, 9, 33), (3, 9, 17), (33, 17))
    )
    ops.projected_mse(mentor, mentee, weight, torch.ones(3, device=device)).total.backward()


def rows(count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    bits = torch.tensor(BITS, dtype=torch.uint8, device=device)
    return cases.noise(device, len(BITS), count), torch.full_like(bits, 1).float() / 16, bits


def pack_factors(device: torch.device) -> None:
    for count in COUNTS:
        ops.pack_factors(*rows(count, device))


def unpack_factors(device: torch.device) -> None:
    for count in COUNTS:
        _, scale, bits = rows(count, device)
        length = sum(-(-count * width // 8) for width in BITS)
        codes = torch.arange(length, device=device).to(torch.uint8)
        ops.unpack_factors(codes, scale, bits, count)


def reconstruct(device: torch.device) -> None:
    for rank, height, width in PRODUCTS:
        ops.reconstruct(cases.noise(device, rank, height), cases.noise(device, rank, width))


def message(device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    # Chunks of few lanes and of many; levels of every way to code a row.
    values = [cases.noise(device, len(LEVELS), count) for count in (7, 3001)]
    levels = torch.tensor(2 * LEVELS, dtype=torch.int16)
    return values, 2 ** (levels / 16), levels


def rans_encode(device: torch.device) -> None:
    values, multiplier, levels = message(device)
    ops.rans_encode(values, multiplier, levels, [0, 1])
    ops.rans_encode(values, multiplier * 100, levels, [0, 1])  # escapes


def rans_decode(device: torch.device) -> None:
    values, multiplier, levels = message(device)
    shapes = [list(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
    for factor in (multiplier, multiplier * 100):
        codes, sizes = reference.rans_encode([v.cpu() for v in values], factor, levels, [0, 1])
        ops.rans_decode(codes.to(device), sizes, 1 / factor, levels, *shapes, [0, 1])


def truncated_svd(device: torch.device) -> None:
    for shape in MATRICES:
        matrix = cases.noise(device, *shape)
        for dtype in (torch.float32, torch.float64):
            ops.truncated_svd(matrix.to(dtype), energy=0.9)


def truncated_svd_list(device: torch.device) -> None:
    for rows, cols, rank in LISTED:
        # Shares that make a subspace of about that rank plausible; noise then needs another way.
        shares = torch.full((rank,), 1 / rank, dtype=torch.float64)
        earlier = reference.Subspace(torch.empty(0, max(rows, cols)), shares)
        matrices = [cases.noise(device, rows, cols, seed=seed) for seed in range(2)]
        low = cases.noise(device, rows, 3) @ cases.noise(device, 3, cols)
        ops.truncated_svd_list([*matrices, low], energy=0.9, earlier=[earlier] * 3)


RUNS: dict[str, Callable[[torch.device], None]] = {
    "distill_loss": distill_loss,
    "layer_mse": layer_mse,
    "projected_mse": projected_mse,
    "rans_encode": rans_encode,
    "rans_decode": rans_decode,
    "reconstruct": reconstruct,
    "pack_factors": pack_factors,
    "unpack_factors": unpack_factors,
    "truncated_svd": truncated_svd,
    "truncated_svd_list": truncated_svd_list,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.once")
    parser.add_argument("--only", choices=tuple(RUNS))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    for op in [arguments.only] if arguments.only else RUNS:
        RUNS[op](device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{op}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
