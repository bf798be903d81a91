"""The communication hook over real ranks: what arrives, what it costs, what it leaves for later."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedkd_fast.integrations.ddp import LowRankState, ddp_hook

RANKS = 2
EPS = torch.finfo(torch.float32).eps


def a_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    )


def some_data(rank: int) -> tuple[Tensor, Tensor]:
    """Samples of four noisy kinds, others on each rank."""
    kinds = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(4, (256,), generator=generator)
    return kinds[labels] + 3 * torch.randn(256, 64, generator=generator), labels


def trained(rank: int, rank_of_factors: int | None) -> Any:
    model = DistributedDataParallel(a_model(), bucket_cap_mb=0.1)
    state, buckets = LowRankState(model, rank_of_factors or 1), []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
        buckets.append((bucket.index(), bucket.buffer().numel()))
        return ddp_hook(state, bucket)

    if rank_of_factors:
        model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, labels = some_data(rank)
    start = float(nn.functional.cross_entropy(model(inputs), labels))
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    flat = torch.cat([one.detach().flatten() for one in model.parameters()])
    return start, float(loss), flat.numpy(), (state.sent_bytes, state.dense_bytes), buckets


def without_hook(rank: int) -> Any:
    return trained(rank, None)


def with_hook(rank: int) -> Any:
    return trained(rank, 4)


def test_a_model_of_several_buckets_learns_as_without_the_hook(ranks: Ranks) -> None:
    plain, hooked = ranks.run(without_hook), ranks.run(with_hook)
    sizes = [numel for index, numel in hooked[0][4] if index == 0]
    assert {index for index, _ in hooked[0][4]} >= {0, 1}, "one bucket proves nothing"
    assert len(set(sizes)) > 1, "buckets were not rebuilt"
    assert hooked[0][2].tobytes() == hooked[1][2].tobytes()
    before, wanted, found = (
        np.mean([result[i] for result in results])
        for results, i in ((plain, 0), (plain, 1), (hooked, 1))
    )
    assert wanted < before / 2 and found < wanted + 0.1 * (before - wanted)
    sent, dense = hooked[0][3]
    parameters = sum(one.numel() for one in a_model().parameters())
    factors = 4 * (64 + 256 + 256 + 256)  # the last layer is too small
    vectors = 256 + 256 + 4 + 4 * 256
    assert dense == 40 * 4 * parameters
    assert sent == 40 * 4 * (factors + vectors)
    assert dense > 15 * sent


def gradients_of(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(50 * step + rank)
    return {
        name: torch.randn(one.shape, generator=generator)
        for name, one in a_model().named_parameters()
    }


def averaged(state: LowRankState, model: nn.Module, gradients: dict[str, Tensor]) -> None:
    state.average(list(model.parameters()), list(gradients.values()))


def summed(rank: int) -> Any:
    model = a_model()
    state = LowRankState(model, rank=3)
    total = {name: torch.zeros_like(one).double() for name, one in gradients_of(0, 0).items()}
    for step in range(10):
        gradients = gradients_of(rank, step)
        averaged(state, model, gradients)
        for name, one in gradients.items():
            total[name] += one
    residuals = {
        name.removeprefix("residual."): one.numpy()
        for name, one in state.state_dict().items()
        if name.startswith("residual.")
    }
    return {name: one.numpy() for name, one in total.items()}, residuals


def test_sums_over_steps_lack_only_the_mean_residual(ranks: Ranks) -> None:
    results = ranks.run(summed)
    assert set(results[0][1]) == {"0.weight", "2.weight"}
    for name, total in results[0][0].items():
        assert total.tobytes() == results[1][0][name].tobytes()
        exact = sum(
            gradients_of(rank, step)[name].double().numpy() / RANKS
            for rank in range(RANKS)
            for step in range(10)
        )
        lacking = 0.0
        if name in results[0][1]:
            lacking = sum(one[name].astype(np.float64) for _, one in results) / RANKS
            assert np.linalg.norm(lacking) > 0.1 * np.linalg.norm(exact), "nothing was left out"
        # Products of up to 256 terms, each rounded, at each of ten steps.
        rounding = 10 * 256**0.5 * EPS * np.abs(exact).max()
        np.testing.assert_allclose(total + lacking, exact, atol=rounding, rtol=0)


def of_low_rank(rank: int) -> Any:
    model = nn.Linear(48, 32, bias=False)
    state = LowRankState(model, rank=4)
    sides = torch.randn(RANKS, 80, generator=torch.Generator().manual_seed(1))
    gradient = sides[rank, :32, None] * sides[rank, None, 32:]
    state.average([model.weight], [gradient])
    return gradient.numpy(), sides.numpy()


def test_a_mean_of_low_rank_arrives_whole(ranks: Ranks) -> None:
    for gradient, sides in ranks.run(of_low_rank):
        wanted = sum(np.outer(one[:32], one[32:]) for one in sides) / RANKS
        # Products of 48 terms find a basis up to rounding; two spare columns keep it well-posed.
        assert np.linalg.norm(gradient - wanted) <= 48 * EPS * np.linalg.norm(wanted)


def one_overflows(rank: int) -> Any:
    model = a_model()
    state = LowRankState(model, rank=3)
    averaged(state, model, gradients_of(rank, 0))
    before = copy.deepcopy(state.state_dict())
    gradients = gradients_of(rank, 1)
    if rank == 1:
        gradients["2.weight"][5, 5] = torch.inf
    averaged(state, model, gradients)
    unchanged = all(torch.equal(before[name], one) for name, one in state.state_dict().items())
    hopeless = all(bool(one.isnan().all()) for one in gradients.values())
    gradients = gradients_of(rank, 2)
    averaged(state, model, gradients)
    return unchanged, hopeless, all(bool(one.isfinite().all()) for one in gradients.values())


def test_a_gradient_that_overflows_leaves_no_trace(ranks: Ranks) -> None:
    assert ranks.run(one_overflows) == [(True, True, True)] * RANKS


def zero_then_more(rank: int) -> Any:
    model = nn.Linear(48, 32, bias=False)
    state = LowRankState(model, rank=2)
    nothing = torch.zeros(32, 48)
    state.average([model.weight], [nothing])
    moved = []
    for step in range(3):
        gradient = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
        state.average([model.weight], [gradient])
        moved.append(float(gradient.norm()))
    return float(nothing.norm()), moved


def test_a_gradient_of_zeros_does_not_end_the_iteration(ranks: Ranks) -> None:
    for nothing, moved in ranks.run(zero_then_more):
        assert nothing == 0.0 and min(moved) > 1.0


def halves(rank: int) -> Any:
    model = nn.Linear(48, 32).bfloat16()
    state = LowRankState(model, rank=2)
    weight, bias = torch.full((32, 48), 1.0 + rank).bfloat16(), torch.ones(32).bfloat16()
    state.average([model.weight, model.bias], [weight, bias])
    return weight.dtype == torch.bfloat16, float(weight[3, 4]), float(bias[0])


def test_gradients_of_16_bits_keep_residuals_of_32(ranks: Ranks) -> None:
    bfloat_step = 2.0**-8
    for kept, value, bias in ranks.run(halves):
        assert kept and bias == 1.0 and abs(value - 1.5) <= 1.5 * bfloat_step


def channels_last(rank: int) -> Any:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 4))
    model = DistributedDataParallel(convolutions.to(memory_format=torch.channels_last))
    model.register_comm_hook(LowRankState(model, rank=2), ddp_hook)
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(8, 16, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    model(inputs).square().mean().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters()]).numpy()


def test_tensors_in_another_order_of_memory(ranks: Ranks) -> None:
    first, second = ranks.run(channels_last)
    assert first.tobytes() == second.tobytes() and np.isfinite(first).all() and first.any()


def resumed(rank: int) -> Any:
    model = a_model()
    state, again = LowRankState(model, rank=3), LowRankState(model, rank=3, seed=7)
    averaged(state, model, gradients_of(rank, 0))
    again.load_state_dict(copy.deepcopy(state.state_dict()))
    results = []
    for one in (state, again):
        gradients = gradients_of(rank, 1)
        averaged(one, model, gradients)
        results.append(b"".join(value.numpy().tobytes() for value in gradients.values()))
    return results[0] == results[1]


def test_state_is_restored_to_the_bit(ranks: Ranks) -> None:
    assert ranks.run(resumed) == [True] * RANKS


def test_wrong_arguments_and_states_are_named() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRankState(a_model(), rank=0)
    state = LowRankState(a_model(), rank=2)
    wider = LowRankState(a_model(), rank=3).state_dict()
    with pytest.raises(ValueError, match=r"'basis.0.weight' must have shape \(64, 2\), got"):
        state.load_state_dict(wider)
    with pytest.raises(ValueError, match=r"state does not match the model: \['basis.0.weight'\]"):
        state.load_state_dict(
            {k: v for k, v in state.state_dict().items() if k != "basis.0.weight"}
        )


def a_late_gradient(rank: int) -> Any:
    """Begin with a gradient of zeros, and leave the first rows alone for ever."""
    layer = nn.Linear(64, 256, bias=False)
    state = LowRankState(layer, rank=4)
    generator = torch.Generator().manual_seed(rank)
    told, whole = torch.zeros(256, 64), torch.zeros(256, 64)
    for step in range(60):
        gradient = torch.zeros(256, 64)
        if step:
            gradient[8:] = torch.randn(248, 2, generator=generator) @ torch.randn(
                2, 64, generator=torch.Generator().manual_seed(7)
            )
        whole += gradient
        state.average([layer.weight], [gradient])
        told += gradient
    return told.numpy(), whole.numpy(), state.state_dict()["residual.weight"].numpy()


def test_a_gradient_of_zeros_is_not_the_end_of_learning(ranks: Ranks) -> None:
    results = ranks.run(a_late_gradient)
    told = results[0][0]
    whole = sum(result[1] for result in results) / RANKS
    left = sum(result[2] for result in results) / RANKS
    assert np.linalg.norm(told - whole) < 0.05 * np.linalg.norm(whole)
    assert np.allclose(told + left, whole, atol=1e-4)


def test_parameters_that_were_frozen_are_named() -> None:
    model = a_model()
    model[0].requires_grad_(False)
    state = LowRankState(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="1 of these parameters frozen, or not at all, when Low"):
        state.average([model[0].bias], [torch.zeros(256)])
