"""The codec ``dense``: wf1 without factors, at the same promise, and without their price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from updates import model, powerlaw, relative_error

from fedkd_fast import Compressor, SubspaceCache, decompress, inspect, ops, wire
from fedkd_fast.codec.lowrank import LowRank
from fedkd_fast.integrations.link import Broadcaster, Compression, Receiver
from fedkd_fast.wire import Mode


@pytest.fixture
def without_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a matrix was factorised")

    monkeypatch.setattr(ops, "truncated_svd_list", refuse)


@pytest.mark.usefixtures("without_svd")
@pytest.mark.parametrize("wish", [{"energy": 0.95}, {"bits_per_param": 2.5}, {"scope": "message"}])
def test_nothing_is_factorised(wish: dict[str, Any]) -> None:
    modes = {line.mode for line in inspect(Compressor(codec="dense", **wish).compress(model()))}
    assert modes.isdisjoint({Mode.CODED_FACTORS, Mode.CODED_HYBRID})
    assert Mode.CODED_DENSE in modes


@pytest.mark.parametrize("energy", [0.9, 0.95, 0.98, 0.999])
def test_what_may_be_lost_is_used(energy: float) -> None:
    matrix = powerlaw(300, 200)
    decoded = decompress(Compressor(energy, "dense").compress({"w": matrix}))["w"]
    assert 0.95 * (1 - energy) <= relative_error(matrix, decoded) <= 1 - energy


@pytest.mark.parametrize("energy", [0.95, 0.97, 0.98, 0.99])
def test_it_is_used_where_numbers_keep_to_a_few_values(energy: float) -> None:
    """As after a few steps of Adam: errors jump with the step, and not always upwards."""
    made = torch.Generator().manual_seed(0)
    peaks = torch.tensor([-5.0, -1.0, 0.0, 0.0, 4.0])[torch.randint(5, (300, 200), generator=made)]
    matrix = peaks + 0.05 * torch.randn(300, 200, generator=made)
    decoded = decompress(Compressor(energy, "dense").compress({"w": matrix}))["w"]
    assert 0.95 * (1 - energy) <= relative_error(matrix, decoded) <= 1 - energy


def test_it_is_what_wf1_sends_where_factors_do_not_pay() -> None:
    noise = {"w": torch.randn(90, 80, generator=torch.Generator().manual_seed(3))}
    assert Compressor(0.95, "dense").compress(noise) == Compressor(0.95).compress(noise)
    steep = {"w": powerlaw(256, 256, 1.2)}
    sizes = [len(Compressor(0.95, codec).compress(steep)) for codec in ("wf1", "dense")]
    assert 3 * sizes[0] < sizes[1]
    # To readers, which need not know of it.
    assert wire.header(Compressor(0.95, "dense").compress(noise)).codec == "wf1"


LARGE_ROWS = {
    "one": lambda x: x.index_copy(0, torch.tensor([7]), 1e6 * x[7:8]),
    "five": lambda x: x * torch.where(torch.arange(len(x)) % 820 == 3, 240.0, 1.0)[:, None],
    "rank^-1": lambda x: x / (1.0 + torch.arange(len(x)))[:, None],
    "rank^-3": lambda x: x / (1.0 + torch.arange(len(x)))[:, None] ** 3,
    "element": lambda x: x.index_fill(0, torch.tensor([9]), 0.0).index_put(
        (torch.tensor([9]), torch.tensor([5])), torch.tensor(1e6)
    ),
    "heavy": lambda x: x**9,
    "uniform": lambda x: torch.special.ndtr(x) - 0.5,
}


@pytest.mark.parametrize("kind", LARGE_ROWS)
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.95, 0.999])
def test_a_look_at_some_rows_is_as_good_as_one_at_all(kind: str, energy: float) -> None:
    x = LARGE_ROWS[kind](torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)))
    sizes = [
        len(Compressor(energy, "dense", backend=backend).compress({"w": x}))
        for backend in ("native", "reference")
    ]
    assert sizes[0] <= 1.05 * sizes[1]


def test_small_numbers_lose_no_more_where_the_smallest_are_flushed() -> None:
    matrix = 2.0**-60 * torch.randn(100, 100, generator=torch.Generator().manual_seed(1))
    torch.set_flush_denormal(True)
    try:
        for energy in (1 - 1e-9, 1 - 1e-11):
            decoded = decompress(Compressor(energy, "dense").compress({"w": matrix}))["w"]
            scaled = 2.0**60 * matrix.double(), 2.0**60 * decoded.double()
            assert relative_error(*scaled) <= 1 - energy
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("extra", [20, 50])
def test_the_least_budget_is_known(extra: int) -> None:
    made = torch.Generator().manual_seed(2)
    sparse = torch.randn(512, 512, generator=made) * (torch.rand(512, 512, generator=made) < 0.01)
    least = len(Compressor(0.001, "dense").compress({"w": sparse}))
    assert len(Compressor(codec="dense", budget_bytes=least + extra).compress({"w": sparse})) > 0


@pytest.mark.parametrize("shape", [(3, 74, 66), (8, 48), (111, 87)])
def test_budgets_that_take_fewer_columns_are_met(shape: tuple[int, ...]) -> None:
    made = torch.Generator().manual_seed(4)
    update = {"w": torch.randn(shape, generator=made) * torch.rand(shape, generator=made)}
    least = len(Compressor(0.001).compress(update))
    frame = Compressor(budget_bytes=least + 10).compress(update)
    assert len(frame) <= least + 10


@pytest.mark.parametrize("budget", [5000, 7000, 9000, 12000])
@pytest.mark.parametrize("codec", ["dense", "wf1"])
def test_budgets_that_can_be_met_are(budget: int, codec: str) -> None:
    """Also where the curves, which expect Gaussian numbers, are far off."""
    made = torch.Generator().manual_seed(0)
    update = {f"w{i}": torch.tanh(3 * torch.randn(96, 96, generator=made)) for i in range(4)}
    update["v"] = torch.randn(300, generator=made).sign()
    size = len(Compressor(codec=codec, budget_bytes=budget).compress(update))
    assert 0.94 * budget <= size <= budget


@pytest.mark.parametrize("codec", ["dense", "wf1"])
@pytest.mark.parametrize("values", [2, 3, 5])
def test_budgets_lose_nothing_of_few_values_where_that_fits(codec: str, values: int) -> None:
    made = torch.Generator().manual_seed(0)
    matrix = torch.randint(values, (128, 128), generator=made).float() - (values - 1) / 2
    fine = Compressor(1 - 1e-9, codec).compress({"w": matrix})
    assert torch.allclose(decompress(fine)["w"], matrix, rtol=1e-4)
    for factor in (1.0, 1.02, 1.1, 1.4):
        budget = int(factor * len(fine))
        frame = Compressor(codec=codec, budget_bytes=budget).compress({"w": matrix})
        assert len(frame) <= budget
        assert torch.allclose(decompress(frame)["w"], matrix, rtol=1e-4)


@pytest.mark.parametrize("codec", ["dense", "wf1"])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-5)])
@pytest.mark.parametrize("scale", [0.0012, 7.65625])
def test_budgets_lose_next_to_nothing_where_no_step_divides_a_few_values(
    scale: float, dtype: torch.dtype, most: float, values: tuple[float, ...], codec: str
) -> None:
    """Larger frames that lose more would fit as well."""
    made = torch.Generator().manual_seed(1)
    drawn = torch.randint(len(values), (100, 70), generator=made)
    update = {"w": (scale * torch.tensor(values))[drawn].to(dtype)}
    least = len(Compressor(1 - most, codec).compress(update))
    for scope in ("tensor", "message"):
        for factor in (1.0, 1.1, 1.3, 1.7, 3.0):
            budget = int(factor * least)
            frame = Compressor(codec=codec, budget_bytes=budget, scope=scope).compress(update)
            assert len(frame) <= budget
            assert relative_error(update["w"].double(), decompress(frame)["w"].double()) <= most


@pytest.mark.parametrize("codec", ["dense", "wf1"])
@pytest.mark.parametrize("seed", [1, 4, 6, 7])
def test_a_full_frame_that_loses_more_than_another_is_not_the_last(codec: str, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    update = {
        "signs": 0.0012 * torch.randn(100, 120, generator=made).sign(),
        "w": 0.01 * torch.randn(80, 100, generator=made),
        "b": torch.randn(64, generator=made),
    }
    frame = Compressor(codec=codec, bits_per_param=3).compress(update)
    limit = 3 * sum(value.numel() for value in update.values()) // 8
    assert 0.98 * limit <= len(frame) <= limit
    assert relative_error(update["w"], decompress(frame)["w"]) < 5e-3


def test_signs_are_sent_as_such() -> None:
    """They lose nothing at a step of one, which lies beyond steps that lose too much."""
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(3)).sign()
    frame = Compressor(0.95, "dense").compress({"w": matrix})
    assert torch.allclose(decompress(frame)["w"], matrix, atol=0.3)
    assert len(frame) < 0.3 * matrix.numel()


def test_budgets_are_kept_and_used() -> None:
    update = model()
    numel = sum(value.numel() for value in update.values())
    for bits in (2.0, 4.0):
        frame = Compressor(codec="dense", bits_per_param=bits).compress(update)
        assert 0.98 * bits * numel / 8 <= len(frame) <= bits * numel / 8


def test_one_promise_for_the_message_is_cheaper() -> None:
    update = {"a": powerlaw(200, 100, 1.2), "b": 3 * powerlaw(150, 100, 0.3, seed=1)}
    frames = {
        scope: Compressor(0.9, "dense", scope=scope).compress(update)
        for scope in ("tensor", "message")
    }
    decoded = decompress(frames["message"])
    lost = sum(float((update[name] - decoded[name]).double().square().sum()) for name in update)
    assert lost <= 0.1 * sum(float(value.double().square().sum()) for value in update.values())
    assert len(frames["message"]) < 0.9 * len(frames["tensor"])


def test_a_product_is_written_out() -> None:
    made = torch.Generator().manual_seed(0)
    left, right = torch.randn(90, 3, generator=made), torch.randn(3, 70, generator=made)
    frame = Compressor(0.95, "dense").compress(
        {"w": LowRank(left.T.contiguous(), right, (90, 70), left.dtype)}
    )
    assert inspect(frame)[0].mode is Mode.CODED_DENSE
    assert relative_error(left @ right, decompress(frame)["w"]) <= 0.05


@pytest.mark.usefixtures("without_svd")
def test_a_link_keeps_residuals_alone() -> None:
    compression = Compression(codec="dense")
    server, client = Broadcaster(compression), Receiver(compression)
    start = {"w": torch.randn(60, 40, generator=torch.Generator().manual_seed(0))}
    step = 0.1 * powerlaw(60, 40)
    server.publish(start)
    client.receive(server.letter("a"))
    server.confirm("a", 1)
    # What one reply leaves out comes with the next, also at another process.
    first = server.weights(client.reply({"w": start["w"] + step}))["w"] - start["w"]
    kept = client.state()
    assert [line.name for line in inspect(kept)] == ["held.w", "kept.feedback.w", "replies"]
    other = Receiver(compression)
    other.load(kept)
    second = server.weights(other.reply(start))["w"] - start["w"]
    assert relative_error(step, first) > 0.05 > relative_error(step, first + second)


def test_a_cache_is_left_empty() -> None:
    cache = SubspaceCache()
    Compressor(0.95, "dense", cache=cache).compress(model())
    assert not cache.state_dict()
