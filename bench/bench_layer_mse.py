"""Squared errors between layers, with all gradients, against eager torch and torch.compile.

Attention maps of four pairs of layers: `ours-op` is the native call alone, with both gradients,
`copy` reads and writes as many bytes. Hidden states with a projection: `products` are the three
products alone that value and gradients need, into buffers, `…-bf16` those of bfloat16 factors.
"""

from __future__ import annotations

import pytest
import torch
from measure import record_rate
from peers import (
    Compare,
    Layers,
    check_layers,
    eager_maps,
    eager_states,
    layer_step,
    native_maps,
    our_maps,
    our_states,
    our_states_bf16,
)
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import MAPS, STATES
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("impl", ["ours", "ours-op", "eager", "compile", "copy"])
def test_attention_maps(
    benchmark: BenchmarkFixture, impl: str, shape: tuple[int, ...], dtype: str
) -> None:
    benchmark.group = f"layer_mse {shape} {dtype}"
    pairs, samples, *rest = shape
    layers = [
        noise(seed, samples, *rest).softmax(-1).to(DTYPES[dtype]).requires_grad_()
        for seed in range(2 * pairs)
    ]
    scale = torch.full((samples,), 1 / samples)
    plain = [layer.detach() for layer in layers]
    if impl == "copy":
        targets = [torch.empty_like(layer) for layer in plain]
        benchmark(lambda: [to.copy_(layer) for to, layer in zip(targets, plain, strict=True)])
    elif impl == "ours-op":
        out = [torch.empty_like(layer) for layer in plain]
        check(native_maps(plain, scale, out), eager_maps, layers, scale, dtype)
        benchmark(lambda: native_maps(plain, scale, out))
    else:
        compare = {"ours": our_maps, "eager": eager_maps}.get(impl) or torch.compile(
            eager_maps, dynamic=False
        )
        check(layer_step(compare, layers, scale), eager_maps, layers, scale, dtype)
        benchmark(lambda: layer_step(compare, layers, scale))
    record_rate(benchmark, "GBps", 4 * pairs * plain[0].nbytes / 1e9)


@pytest.mark.parametrize("shape", STATES, ids=str)
@pytest.mark.parametrize(
    "impl", ["ours", "ours-bf16", "eager", "compile", "products", "products-bf16"]
)
def test_hidden_states(benchmark: BenchmarkFixture, impl: str, shape: tuple[int, ...]) -> None:
    benchmark.group = f"projected_mse {shape} float32"
    samples, tokens, wide, narrow = shape
    mentor, mentee = noise(0, samples, tokens, wide), noise(1, samples, tokens, narrow)
    layers = [mentor, mentee, noise(2, wide, narrow) / narrow**0.5]
    scale = torch.full((samples,), 1 / samples)
    if impl.startswith("products"):
        dtype = torch.bfloat16 if impl.endswith("bf16") else torch.float32
        residual, states, weight = (layer.flatten(0, -2).to(dtype) for layer in layers)
        outs = [torch.empty_like(part) for part in (residual, states, weight)]

        def products() -> None:
            torch.mm(states, weight.mT, out=outs[0])
            torch.mm(residual, weight, out=outs[1])
            torch.mm(residual.mT, states, out=outs[2])

        benchmark(products)
    else:
        dtype_name = "bfloat16" if impl.endswith("bf16") else "float32"
        for layer in layers:
            layer.requires_grad_()
        compare = {"ours": our_states, "ours-bf16": our_states_bf16, "eager": eager_states}.get(
            impl
        ) or torch.compile(eager_states, dynamic=False)
        check(layer_step(compare, layers, scale), eager_states, layers, scale, dtype_name)
        benchmark(lambda: layer_step(compare, layers, scale))
    record_rate(benchmark, "GFLOPps", 6 * samples * tokens * wide * narrow / 1e9)


def check(
    found: tuple[Tensor | None, ...],
    specified: Compare,
    layers: Layers,
    scale: Tensor,
    dtype: str,
) -> None:
    check_layers(found, specified, layers, scale, torch.finfo(DTYPES[dtype]).eps)
