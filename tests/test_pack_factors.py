"""Packing: the same bytes as the specification, everywhere; and the fixed-order product."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkd_fast import ops, reference

SHAPES = [(1, 1), (3, 7), (5, 8), (4, 513), (2, 1024), (17, 31), (513, 9), (0, 5), (3, 0)]


def sample(rows: int, count: int, bits: list[int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, count, generator=generator)
    widths = torch.tensor((bits * (rows // len(bits) + 1))[:rows], dtype=torch.uint8)
    scale = torch.rand(rows, generator=generator) * 0.2 + 0.01
    return values, scale, widths


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [[0], [1], [2], [3], [5], [8], [12], [16], [7, 0, 1, 13]])
def test_bytes_equal_the_specification(
    device: torch.device, shape: tuple[int, int], bits: list[int]
) -> None:
    values, scale, widths = sample(*shape, bits)
    on_device = [part.to(device) for part in (values, scale, widths)]
    codes = ops.pack_factors(*on_device)
    expected = reference.pack_factors(values, scale, widths)
    assert torch.equal(codes.cpu(), expected)
    unpacked = ops.unpack_factors(codes, on_device[1], on_device[2], shape[1])
    assert torch.equal(unpacked.cpu(), reference.unpack_factors(expected, scale, widths, shape[1]))
    # Values on the grid are fixed points.
    assert torch.equal(ops.pack_factors(unpacked, on_device[1], on_device[2]), codes)


def test_known_bytes() -> None:
    # Step 1 (scale 0.5), 3 bits: -1.5 is in cell -2 -> code 2, 0.2 in cell 0 -> 4, 9 clamps to 7.
    values = torch.tensor([[-1.5, 0.2, 9.0]])
    codes = ops.pack_factors(values, torch.tensor([0.5]), torch.tensor([3], dtype=torch.uint8))
    assert codes.tolist() == [0b11100010, 0b1]
    back = ops.unpack_factors(codes, torch.tensor([0.5]), torch.tensor([3], dtype=torch.uint8), 3)
    assert back.tolist() == [[-1.5, 0.5, 3.5]]


@pytest.mark.parametrize("bits", range(1, 17))
def test_error_inside_the_range_is_at_most_half_a_step(device: torch.device, bits: int) -> None:
    scale = torch.tensor([0.03])
    reach = 0.03 * 2**bits
    values = torch.linspace(-reach, reach, 4001)[None] * (1 - torch.finfo(torch.float32).eps)
    widths = torch.tensor([bits], dtype=torch.uint8)
    codes = ops.pack_factors(*(part.to(device) for part in (values, scale, widths)))
    back = ops.unpack_factors(codes.cpu(), scale, widths, 4001)
    # The product value·(0.5/scale) is rounded twice, which can move a value over a cell's border.
    slack = 2 * torch.finfo(torch.float32).eps * reach
    assert float((back - values).abs().max()) <= 0.03 + slack


def test_extreme_values_clamp() -> None:
    values = torch.tensor([[3e38, -3e38, 0.0, -0.0]])
    scale, widths = torch.tensor([1e-30]), torch.tensor([4], dtype=torch.uint8)
    codes = ops.pack_factors(values, scale, widths)
    assert codes.tolist() == [0x0F, 0x88]


def test_non_contiguous_rows() -> None:
    values, scale, widths = sample(6, 40, [5])
    wide = torch.zeros(6, 80)
    wide[:, ::2] = values
    expected = ops.pack_factors(values, scale, widths)
    assert torch.equal(ops.pack_factors(wide[:, ::2], scale, widths), expected)
    assert torch.equal(ops.pack_factors(values.T.contiguous().T, scale, widths), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bytes_for_any_thread_count(threads: int) -> None:
    values, scale, widths = sample(64, 2000, [6, 3, 9])
    left, right = torch.randn(50, 300), torch.randn(50, 200)
    codes, product = ops.pack_factors(values, scale, widths), ops.reconstruct(left, right)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.pack_factors(values, scale, widths), codes)
        assert torch.equal(
            ops.unpack_factors(codes, scale, widths, 2000),
            reference.unpack_factors(codes, scale, widths, 2000),
        )
        assert torch.equal(ops.reconstruct(left, right), product)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 4),
        (1, 1, 1),
        (7, 5, 33),
        (200, 13, 31),
        (193, 64, 96),
        (17, 131, 201),
        (3, 0, 4),
        (3, 4, 0),
    ],
)
def test_reconstruct_rounds_once_a_term_in_order(
    device: torch.device, shape: tuple[int, int, int]
) -> None:
    rank, rows, cols = shape
    generator = torch.Generator().manual_seed(1)
    # Integers below 2^12: products and sums are exact in float32 and float64 alike, so the order is
    # checked by the next test and the arithmetic by this one.
    left = torch.randint(-64, 64, (rank, rows), generator=generator).float()
    right = torch.randint(-64, 64, (rank, cols), generator=generator).float()
    product = ops.reconstruct(left.to(device), right.to(device)).cpu()
    assert torch.equal(product, reference.reconstruct(left, right))


def test_reconstruct_is_a_chain_of_fused_multiply_adds(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.randn(230, 37, generator=generator),
        torch.randn(230, 45, generator=generator),
    )
    product = ops.reconstruct(left.to(device), right.to(device)).cpu()
    expected = reference.reconstruct(left, right)
    assert torch.equal(product, expected)
    # Another order gives other bits: the test above can fail.
    assert not torch.equal(ops.reconstruct(left.flip(0), right.flip(0)), expected)


def test_reconstruct_rounds_ties_that_float64_cannot_see(device: torch.device) -> None:
    # 3·(1 + 2^-23) lies in the middle of two float32; a first term far below the last bit of
    # float64 says on which side of it the sum is.
    tie = 1 + 2**-23
    left = torch.tensor([[1e-34, -1e-34, 0.0], [tie, tie, tie]])
    left = torch.cat([left, -left], 1)
    right = torch.tensor([[1.0], [3.0]])
    product = ops.reconstruct(left.to(device), right.to(device)).cpu().flatten()
    down, up = 3 + 2**-22, 3 + 2**-21
    assert product.tolist() == [up, down, up, -up, -down, -up]
    assert torch.equal(product, reference.reconstruct(left, right).flatten())


def test_reconstruct_of_extreme_values_is_the_specified_one(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (2, 6, 40), generator=generator).to(torch.int32)
    left, right = bits.view(torch.float32).nan_to_num()  # any exponent: some sums overflow
    product = ops.reconstruct(left.to(device), right.to(device)).cpu()
    expected = reference.reconstruct(left, right)
    assert product.isinf().any() and product.isfinite().any()
    assert torch.equal(product, expected)
    small = 2.0 ** torch.randint(-80, -60, (6, 40), generator=generator)
    factors = small * torch.randn(6, 40, generator=generator)  # products are subnormal numbers
    product = ops.reconstruct(factors.to(device), factors.flip(1).to(device)).cpu()
    assert torch.equal(product, reference.reconstruct(factors, factors.flip(1)))


def test_bad_arguments() -> None:
    values, scale, widths = sample(3, 10, [4])
    with pytest.raises(RuntimeError, match="values must have 2 dimensions, got shape"):
        ops.pack_factors(values[0], scale, widths)
    with pytest.raises(RuntimeError, match="values has the wrong dtype"):
        ops.pack_factors(values.double(), scale, widths)
    with pytest.raises(RuntimeError, match="bits must have one entry per row: 3 rows, got 2"):
        ops.pack_factors(values, scale[:2], widths[:2])
    with pytest.raises(RuntimeError, match="scale must have one entry per row: 3 rows, got 2"):
        ops.pack_factors(values, scale[:2], widths)
    with pytest.raises(RuntimeError, match=r"bits must lie in 0..16, got 17 in row 1"):
        ops.pack_factors(values, scale, torch.tensor([1, 17, 1], dtype=torch.uint8))
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-40):
        with pytest.raises(RuntimeError, match="scale must be finite and at least"):
            ops.pack_factors(values, torch.tensor([0.1, 0.1, bad]), widths)
    codes = ops.pack_factors(values, scale, widths)
    with pytest.raises(RuntimeError, match="codes must hold 15 bytes, got 14"):
        ops.unpack_factors(codes[:-1], scale, widths, 10)
    with pytest.raises(RuntimeError, match="count must be >= 0, got -1"):
        ops.unpack_factors(codes, scale, widths, -1)
    for count in (2**47, 2**61, 2**63 - 1):  # of which bytes and offsets would wrap
        with pytest.raises(RuntimeError, match=rf"at most 2.48, got 3 and {count}"):
            ops.unpack_factors(codes, scale, widths, count)
    with pytest.raises(RuntimeError, match="same number of rows"):
        ops.reconstruct(torch.ones(2, 3), torch.ones(3, 3))


def test_values_have_no_gradient() -> None:
    _, scale, widths = sample(2, 4, [2])
    codes = torch.zeros(2, dtype=torch.uint8)
    assert not ops.unpack_factors(codes, scale.requires_grad_(), widths, 4).requires_grad


def test_torch_compile_keeps_them_in_one_graph() -> None:
    left, right = torch.randn(3, 5), torch.randn(3, 7)
    scale, widths = torch.full((2,), 0.1), torch.tensor([4, 3], dtype=torch.uint8)
    codes = torch.arange(6, dtype=torch.uint8)

    def decode(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.unpack_factors(codes, scale, widths, 6), ops.reconstruct(left, right) + 1

    compiled = torch.compile(decode, fullgraph=True, backend="eager")
    expected = decode(codes)
    assert all(torch.equal(a, b) for a, b in zip(compiled(codes), expected, strict=True))


def test_fake_kernels_know_the_device_of_the_data() -> None:
    with FakeTensorMode():
        codes = torch.empty(6, dtype=torch.uint8, device="cuda")
        widths = torch.tensor([4, 4], dtype=torch.uint8)
        values = ops.unpack_factors(codes, torch.ones(2), widths, 6)
        assert values.device.type == "cuda" and values.dtype == torch.float32


def test_opcheck(device: torch.device, runs_on_simt: bool) -> None:
    if runs_on_simt:
        pytest.skip("its library has no fake kernels")
    values, scale, widths = (part.to(device) for part in sample(4, 20, [3]))
    codes = ops.pack_factors(values, scale, widths)
    torch.library.opcheck(torch.ops.fedkd_fast.pack_factors, (values, scale, widths))
    torch.library.opcheck(torch.ops.fedkd_fast.unpack_factors, (codes, scale, widths, 20))
    torch.library.opcheck(torch.ops.fedkd_fast.reconstruct, (values, values))
