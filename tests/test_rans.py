"""rANS streams: the bytes of the specification, everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from native_build import ROOT
from rans_cases import LARGEST, Message, check, decode, sample
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkd_fast import _C, ops


@pytest.mark.parametrize("count", [1, 3, 4, 5, 31, 32, 33, 65])
@pytest.mark.parametrize("levels", [[0], [47, -48, 48], [17, -49, 70, 335, -300]])
def test_bytes_equal_the_specification(device: torch.device, levels: list[int], count: int) -> None:
    check(sample([(3, count), (2, count + 1)], levels), device)


@pytest.mark.parametrize("levels", [[10, 40], [60, -100]])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 16383)],
        [(1, 16384)],
        [(1, 65535), (1, 1), (1, 1)],
        [(1, 65536), (1, 1)],
        [(1, 65537)],
        [(3, 40000)],
        [(1, 131073), (2, 7)],
        [(700, 33), (1, 0), (0, 5)],
    ],
    ids=str,
)
def test_chunks_end_where_the_specification_says(
    shapes: list[tuple[int, int]], levels: list[int]
) -> None:
    check(sample(shapes, levels, tails=0.3))


def test_many_streams_with_escapes_and_raw_bits(device: torch.device) -> None:
    shapes = [(4, 5000), (7, 3), (2, 20000), (1, 1), (5, 999), (3, 6000), (1, 7)]
    owner = [0, 0, 1, 2, 3, 3, 4]
    check(sample(shapes, [-48, 3, 90, -60, 200, 20], owner, tails=1.5), device)


def test_many_lanes(device: torch.device) -> None:
    check(sample([(3, 5500)], [3, 60, -10], tails=0.3), device)


def test_small_streams_with_escapes_and_raw_bits(device: torch.device) -> None:
    shapes = [(4, 37), (7, 3), (2, 50), (1, 1), (3, 20), (1, 7)]
    check(sample(shapes, [-48, 3, 90, -60, 200, 20], [0, 0, 1, 2, 3, 4], tails=2.5), device)


@pytest.mark.parametrize("count", [9, 17000])
def test_escapes_of_one_word_and_of_two(count: int) -> None:
    borders = [0, 7, 8, -7, -8, 2**14 - 1, 2**14, -(2**14), -(2**14) - 1, LARGEST, -LARGEST]
    values = torch.zeros(1, count)
    for place, border in enumerate(borders):
        values[0, place * (count - 1) // len(borders)] = border
    message = Message([values], torch.ones(1), torch.zeros(1, dtype=torch.int16), [0])
    check(message)
    assert torch.equal(decode(message, *ops.rans_encode(*message))[0], values)


@pytest.mark.parametrize("count", [40, 17000])
def test_rounds_to_even_and_clamps(count: int) -> None:
    values = torch.zeros(1, count)
    values[0, :10] = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, 3e38, -3e38, LARGEST + 0.5, LARGEST - 0.5, 1e-40]
    )
    levels = torch.tensor([0], dtype=torch.int16)
    message = Message([values], torch.ones(1), levels, [0])
    check(message)
    wanted = [0, 2, 2, 0, -2, LARGEST, -LARGEST, LARGEST, LARGEST - 1, 0]
    assert decode(message, *ops.rans_encode(*message))[0][0, :10].tolist() == wanted


def test_codes_of_a_gaussian_are_as_short_as_its_entropy() -> None:
    for level in (-30, 0, 20, 47, 60, 200):
        message = sample([(4, 65536)], [level])
        codes, _ = ops.rans_encode(*message)
        ratio = 2 ** (level / 16)
        edges = torch.arange(-8 * ratio - 1, 8 * ratio + 1).round().double()
        normal = torch.distributions.Normal(0.0, 1.0)
        mass = normal.cdf((edges + 0.5) / ratio) - normal.cdf((edges - 0.5) / ratio)
        entropy = float(-(mass * mass.clamp(min=1e-300).log2()).sum())
        # Tables cost less than 0.01, and 4·65536 values are that close to their mean.
        assert abs(len(codes) * 8 / (4 * 65536) - entropy) < 0.03


def test_the_format_does_not_change() -> None:
    grid = torch.arange(-20000, 20000).float().remainder(1013) - 506
    values = [(grid * grid / 25000).view(5, 8000) * grid.sign().view(5, 8000), grid[None, :40]]
    levels = torch.tensor([25, 0, 90, -50, 47, -48], dtype=torch.int16)
    message = Message(values, torch.full((6,), 0.75), levels, [0, 1])
    codes, sizes = ops.rans_encode(*message)
    assert sizes.tolist() == GOLDEN_SIZES
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == GOLDEN


GOLDEN_SIZES = [22540, 156]
GOLDEN = "31d5b8277cbe14e4afb4da9d0bcfbde7f10d1dcd4b5c394efa4ed0e9122fcb2a"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bytes_for_any_thread_count(threads: int) -> None:
    message = sample([(9, 30000), (50, 40)], [30, 80, -70], [0, 1], tails=0.5)
    codes, sizes = ops.rans_encode(*message)
    values = decode(message, codes, sizes)
    torch.set_num_threads(threads)
    try:
        again, same = ops.rans_encode(*message)
        assert torch.equal(codes, again) and torch.equal(sizes, same)
        for ours, truth in zip(decode(message, codes, sizes), values, strict=True):
            assert torch.equal(ours, truth)
    finally:
        torch.set_num_threads(1)


def test_non_contiguous_segments() -> None:
    message = sample([(6, 40)], [20])
    wide = torch.zeros(6, 80)
    wide[:, ::2] = message.values[0]
    codes, _ = ops.rans_encode(*message)
    assert torch.equal(ops.rans_encode([wide[:, ::2]], *message[1:])[0], codes)
    turned = message.values[0].T.contiguous().T
    assert torch.equal(ops.rans_encode([turned], *message[1:])[0], codes)


def test_nothing_to_code() -> None:
    nothing, levels = torch.empty(0), torch.empty(0, dtype=torch.int16)
    codes, sizes = ops.rans_encode([], nothing, levels, [])
    assert codes.shape == sizes.shape == (0,)
    assert ops.rans_decode(codes, sizes, nothing, levels, [], [], []) == []
    message = sample([(2, 3), (0, 4), (1, 0)], [-49], [0, 0, 1])
    codes, sizes = ops.rans_encode(*message)
    assert len(codes) == 0 and sizes.tolist() == [0, 0]
    assert [v.abs().sum().item() for v in decode(message, codes, sizes)] == [0, 0, 0]


def test_values_have_no_gradient() -> None:
    message = sample([(2, 3)], [0])
    codes, sizes = ops.rans_encode(*message)
    (values,) = decode(message._replace(multiplier=torch.ones(2).requires_grad_()), codes, sizes)
    assert not values.requires_grad


# ---- arguments -----------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    values, multiplier, levels, _ = sample([(3, 10), (2, 4)], [0])
    with pytest.raises(RuntimeError, match=r"values\[1\] must have 2 dimensions, got shape"):
        ops.rans_encode([values[0], values[1][0]], multiplier, levels, [0, 0])
    with pytest.raises(RuntimeError, match=r"values\[0\] has the wrong dtype"):
        ops.rans_encode([values[0].double(), values[1]], multiplier, levels, [0, 0])
    with pytest.raises(RuntimeError, match="owner must have one entry per segment: 2 seg.*got 1"):
        ops.rans_encode(values, multiplier, levels, [0])
    for owner in ([1, 1], [0, 2], [-1, 0], [0, -1]):
        with pytest.raises(RuntimeError, match="owner must rise from 0 by at most 1, got"):
            ops.rans_encode(values, multiplier, levels, owner)
    with pytest.raises(RuntimeError, match="multiplier must have one entry per row: 5 rows, got 4"):
        ops.rans_encode(values, multiplier[:4], levels, [0, 0])
    with pytest.raises(RuntimeError, match="levels must have one entry per row: 5 rows, got 4"):
        ops.rans_encode(values, multiplier, levels[:4], [0, 0])
    with pytest.raises(RuntimeError, match="levels has the wrong dtype"):
        ops.rans_encode(values, multiplier, levels.long(), [0, 0])
    with pytest.raises(RuntimeError, match="multiplier has the wrong dtype"):
        ops.rans_encode(values, multiplier.double(), levels, [0, 0])
    with pytest.raises(RuntimeError, match="levels must be at most 335, got 336 in row 2"):
        ops.rans_encode(
            values, multiplier, levels.clone().index_fill_(0, torch.tensor(2), 336), [0, 0]
        )
    for bad in (float("nan"), float("inf")):
        wrong = multiplier.clone()
        wrong[3] = bad
        with pytest.raises(RuntimeError, match="multiplier must be finite where a row is coded, g"):
            ops.rans_encode(values, wrong, levels, [0, 0])
    codes, sizes = ops.rans_encode(values, multiplier, levels, [0, 1])

    def decoding(
        codes: torch.Tensor = codes,
        sizes: torch.Tensor = sizes,
        rows: Sequence[int] = (3, 2),
        counts: Sequence[int] = (10, 4),
        scale: torch.Tensor = multiplier,
    ) -> list[torch.Tensor]:
        return ops.rans_decode(codes, sizes, scale, levels, rows, counts, [0, 1])

    assert [v.shape for v in decoding()] == [(3, 10), (2, 4)]
    with pytest.raises(RuntimeError, match="codes has the wrong dtype"):
        decoding(codes.int())
    with pytest.raises(RuntimeError, match="sizes has the wrong dtype"):
        decoding(sizes=sizes.int())
    with pytest.raises(RuntimeError, match="sizes must have one entry per stream: 2 streams, got"):
        decoding(sizes=sizes[:1])
    with pytest.raises(RuntimeError, match="sizes must add up to the .* bytes of codes, got"):
        decoding(torch.cat([codes, codes]))
    for wrong in (torch.tensor([-1, 0]), torch.tensor([10000, 0]), torch.tensor([2**62, 2**62])):
        with pytest.raises(RuntimeError, match="sizes must be >= 0 and within codes, got"):
            decoding(sizes=wrong)
    with pytest.raises(RuntimeError, match="rows and counts must have one entry per segment"):
        decoding(rows=[3])
    with pytest.raises(RuntimeError, match="rows and counts must be >= 0, got -1 and 10"):
        decoding(rows=[-1, 2])
    with pytest.raises(RuntimeError, match="rows times counts must be at most 2.48, got 3 and"):
        decoding(counts=[2**62, 4])
    with pytest.raises(RuntimeError, match="at most 2.48 rows and values, got more in segment 1"):
        decoding(counts=[2**46, 2**47])
    with pytest.raises(RuntimeError, match="scale must be finite where a row is coded, got nan"):
        decoding(scale=multiplier * float("nan"))


def test_the_tables_are_those_of_their_script() -> None:
    script = ROOT / "bench" / "gaussian_tables.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "csrc" / "common" / "gaussian_tables.inc").read_text()
    assert len(_C.gaussian_tables) == 96
    for *stored, escape in _C.gaussian_tables:
        support = max(h for h in range(32) if stored[h])
        assert stored[0] + 2 * sum(stored[1:]) + escape == 4096
        assert min(stored[: support + 1]) >= 1 and escape >= 1 and max(stored) <= 4095


def test_torch_compile_keeps_them_in_one_graph() -> None:
    message = sample([(2, 20)], [5])
    codes, sizes = ops.rans_encode(*message)
    compiled = torch.compile(
        lambda codes: decode(message, codes, sizes)[0] + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(codes), decode(message, codes, sizes)[0] + 1)


def test_fake_kernels_know_the_device_of_the_data() -> None:
    with FakeTensorMode():
        codes = torch.empty(60, dtype=torch.uint8, device="cuda")
        levels = torch.zeros(2, dtype=torch.int16)
        (values,) = ops.rans_decode(codes, torch.tensor([60]), torch.ones(2), levels, [2], [9], [0])
        assert values.device.type == "cuda" and values.shape == (2, 9)


def test_opcheck(device: torch.device, runs_on_simt: bool) -> None:
    if runs_on_simt:
        pytest.skip("its library has no fake kernels")
    message = sample([(4, 20)], [3]).to(device)
    codes, sizes = ops.rans_encode(*message)
    torch.library.opcheck(torch.ops.fedkd_fast.rans_encode, tuple(message))
    arguments = (codes, sizes, 1 / message.multiplier, message.levels, [4], [20], [0])
    torch.library.opcheck(torch.ops.fedkd_fast.rans_decode, arguments)
