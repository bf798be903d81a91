"""Compressed means and the outer step over real ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn

from fedkd_fast import EF21, Compressor
from fedkd_fast.integrations import process_group
from fedkd_fast.integrations.outer_step import OuterStep
from fedkd_fast.integrations.process_group import compressed_mean

RANKS = 2
ENERGY = 0.9
EPS = torch.finfo(torch.float32).eps


def an_update(rank: int, step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    factors = torch.randn(2, 6 + rank, 64, generator=generator)
    return {
        "w": factors[0].T @ factors[1] + 0.1 * torch.randn(64, 64, generator=generator),
        "b": torch.randn(64, generator=generator),
        "n": torch.tensor([rank, 4 * rank]),
    }


def plain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: one.numpy().copy() for name, one in tensors.items()}


def failing(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mean_of(weight: float = 1.0, **kwargs: Any) -> Any:
    rank = dist.get_rank()
    return compressed_mean(an_update(rank), weight=weight, **kwargs)


def with_estimates(rank: int) -> str:
    return failing(lambda: mean_of(compressor=Compressor(feedback=EF21())))


def test_estimates_are_refused(ranks: Ranks) -> None:
    for found in ranks.run(with_estimates):
        assert "compressor must have no EF21" in found


def a_mean(rank: int) -> Any:
    found = mean_of(compressor=Compressor(ENERGY))
    return plain(found.mean), *found[1:]


def test_all_ranks_hold_the_same_mean_within_the_promised_error(ranks: Ranks) -> None:
    (first, *cost), (second, *other_cost) = ranks.run(a_mean)
    updates = [an_update(rank) for rank in range(RANKS)]
    for name in updates[0]:
        assert first[name].tobytes() == second[name].tobytes()
    exact = sum(update["w"].double() for update in updates) / RANKS
    # Errors of decoded updates add up at most as their norms do.
    allowed = sum((1 - ENERGY) ** 0.5 * float(update["w"].norm()) for update in updates) / RANKS
    error = float((torch.from_numpy(first["w"]) - exact).norm())
    assert 0 < error <= allowed
    assert first["n"].tolist() == [0, 2]
    frames = [len(Compressor(ENERGY).compress(update)) for update in updates]
    head = process_group._HEAD.size
    assert frames[0] != frames[1], "padding is not tried"
    assert cost == other_cost == [tuple(frames), head + max(frames), head + max(frames)]
    assert max(frames) < sum(one.nbytes for one in updates[0].values()) / 4


def a_weighted_mean(rank: int) -> Any:
    exact = compressed_mean(an_update(rank), weight=1.0 + 2 * rank, energy=1.0).mean
    only_second = compressed_mean(an_update(rank), weight=float(rank), energy=1.0).mean
    return plain(exact), plain(only_second)


def test_weights_are_those_of_the_ranks(ranks: Ranks) -> None:
    updates = [an_update(rank) for rank in range(RANKS)]
    for exact, only_second in ranks.run(a_weighted_mean):
        wanted = (updates[0]["w"].double() + 3 * updates[1]["w"].double()) / 4
        rounding = EPS * float(wanted.abs().max())
        assert float((torch.from_numpy(exact["w"]) - wanted).abs().max()) <= rounding
        np.testing.assert_array_equal(only_second["w"], updates[1]["w"].numpy())


STEPS = 12


def sums_with_feedback(rank: int) -> Any:
    compressor = Compressor(0.5, feedback=True)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(STEPS):
        total += compressed_mean(an_update(rank, step), compressor=compressor).mean["w"]
    return total.numpy(), compressor.state_dict()["feedback.w"].numpy()


def test_what_a_mean_leaves_out_comes_with_the_next(ranks: Ranks) -> None:
    results = ranks.run(sums_with_feedback)
    exact = sum(
        an_update(rank, step)["w"].double() / RANKS
        for rank in range(RANKS)
        for step in range(STEPS)
    )
    residual = sum(torch.from_numpy(one).double() for _, one in results) / RANKS
    assert float(residual.norm()) > 0.05 * float(exact.norm()), "nothing was left out"
    rounding = 4 * STEPS * EPS * float(exact.abs().max() + residual.abs().max())
    for total, _ in results:
        assert float((torch.from_numpy(total) + residual - exact).abs().max()) <= rounding


def other_schemas(rank: int) -> str:
    update = an_update(rank)
    if rank == 1:
        update["extra"] = torch.zeros(3)
    return failing(lambda: compressed_mean(update))


def other_shapes(rank: int) -> str:
    return failing(lambda: compressed_mean({"w": torch.ones(3 + rank, 4)}))


def test_ranks_of_other_schemas_fail_everywhere(ranks: Ranks) -> None:
    first, second = ranks.run(other_schemas)
    assert (
        "ranks [0, 1] cannot use what was sent: rank 1: " in first and "'extra' not in it" in first
    )
    assert (
        "ranks [0, 1] cannot use what was sent: rank 0: " in second
        and "'extra' only in it" in second
    )
    first, second = ranks.run(other_shapes)
    assert "rank 1: " in first and "'w' is (4, 4) float32" in first and "(3, 4) float32" in first
    assert "rank 0: " in second and "'w' is (3, 4) float32" in second


def one_has_nothing(rank: int) -> Any:
    compressor = Compressor(ENERGY, feedback=True)
    update = an_update(rank)
    compressed_mean(update, compressor=compressor)
    before = compressor.state_dict()
    broken = {**update, "b": update["b"].log()} if rank == 1 else update
    reason = failing(lambda: compressed_mean(broken, compressor=compressor))
    kept = compressor.state_dict()
    same = before.keys() == kept.keys() and all(torch.equal(before[n], kept[n]) for n in kept)
    again = compressed_mean(update, compressor=compressor).mean["w"]
    return reason, same, again.numpy().tobytes()


def test_a_rank_without_a_frame_fails_everywhere_and_leaves_no_trace(ranks: Ranks) -> None:
    first, second = ranks.run(one_has_nothing)
    for reason, same, _ in (first, second):
        assert (
            "rank 1: ValueError: update['b'] holds NaN or Inf" in reason and "rank 0" not in reason
        )
        assert same, "the residual has moved"
    assert first[2] == second[2]


def a_wrong_weight(rank: int) -> str:
    return failing(lambda: mean_of(weight=1.0 - 2 * rank))


def no_weight(rank: int) -> str:
    return failing(lambda: mean_of(weight=0.0))


def test_wrong_weights_are_named(ranks: Ranks) -> None:
    for reason in ranks.run(a_wrong_weight):
        assert "rank 1: ValueError: weight must be finite and >= 0, got -1.0" in reason
    for reason in ranks.run(no_weight):
        assert "weights must not all be zero" in reason


class Damaging(Compressor):
    """Its frames lose their last bytes on one rank."""

    def compress(self, update: Any, *args: Any, **kwargs: Any) -> bytes:
        frame = super().compress(update, *args, **kwargs)
        return frame[: -5 * dist.get_rank()] if dist.get_rank() else frame


def a_damaged_frame(rank: int) -> str:
    return failing(lambda: mean_of(compressor=Damaging(ENERGY)))


def damaged_on_the_way(rank: int) -> Any:
    gather, dist.all_gather = dist.all_gather, None

    def damaging(parts: list[Tensor], own: Tensor, group: Any = None) -> None:
        gather(parts, own, group=group)
        if rank == 1 and len(own) > 100:
            parts[0][80] ^= 0x10

    dist.all_gather = damaging
    try:
        return failing(lambda: mean_of(compressor=Compressor(ENERGY)))
    finally:
        dist.all_gather = gather


def test_damaged_frames_are_named_on_all_ranks(ranks: Ranks) -> None:
    for reason in ranks.run(a_damaged_frame):
        assert "ranks [0, 1] cannot use what was sent: rank 1: " in reason and "frame" in reason
    first, second = ranks.run(damaged_on_the_way)
    assert first == "ValueError: nothing is averaged, ranks [1] cannot use what was sent"
    assert "ranks [1] cannot use what was sent: rank 0: " in second


def outside_of_the_group(rank: int) -> str:
    alone = dist.new_group([0])
    if rank == 0:
        found = compressed_mean(an_update(rank), alone, energy=1.0)
        return str((found.received_bytes, len(found.frame_bytes)))
    return failing(lambda: compressed_mean(an_update(rank), alone))


def test_a_group_of_some(ranks: Ranks) -> None:
    first, second = ranks.run(outside_of_the_group)
    assert first == "(0, 1)"
    assert second == "ValueError: group must be one that this process is a rank of"


def a_model(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 3))


def trained(model: nn.Module, rank: int, step: int) -> None:
    """Move parameters to where no other rank does."""
    generator = torch.Generator().manual_seed(1000 + 100 * step + rank)
    with torch.no_grad():
        for one in model.parameters():
            one += 0.1 * torch.randn(one.shape, generator=generator)


def parameters_of(model: nn.Module) -> dict[str, Any]:
    return {name: one.detach().numpy().copy() for name, one in model.named_parameters()}


def nesterov_steps(rank: int) -> Any:
    model, like = a_model(rank), a_model(0)
    outer = OuterStep(model, compressor=Compressor(1.0), lr=0.7, momentum=0.9)
    start = parameters_of(model)
    optimizer = torch.optim.SGD(like.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for step in range(3):
        trained(model, rank, step)
        delta = outer.step().mean
        for name, one in like.named_parameters():
            one.grad = delta[name]
        optimizer.step()
    return start, parameters_of(model), parameters_of(like), plain(delta)


def test_the_outer_step_is_nesterovs(ranks: Ranks) -> None:
    (start, moved, wanted, delta), (other_start, other_moved, _, _) = ranks.run(nesterov_steps)
    for name in moved:
        assert start[name].tobytes() == other_start[name].tobytes(), "rank 0's parameters count"
        assert moved[name].tobytes() == other_moved[name].tobytes()
        scale = 8 * EPS * np.abs(wanted[name]).max()
        np.testing.assert_allclose(moved[name], wanted[name], atol=scale, rtol=0)
        assert np.abs(delta[name]).max() > 0


def a_fedavg_step(rank: int, *, assigned: bool = False) -> Any:
    model = a_model(rank)
    outer = OuterStep(model, compressor=Compressor(1.0), lr=1.0, momentum=0.0)
    if assigned:  # other tensors than the outer step was made with
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    trained(model, rank, 0)
    before = parameters_of(model)
    outer.step()
    return before, parameters_of(model)


@pytest.mark.parametrize("assigned", [False, True])
def test_without_momentum_it_is_fedavg(ranks: Ranks, assigned: bool) -> None:
    (one, moved), (other, also) = ranks.run(partial(a_fedavg_step, assigned=assigned))
    for name in moved:
        wanted = (one[name].astype(np.float64) + other[name]) / 2
        scale = 4 * EPS * np.abs(wanted).max()
        np.testing.assert_allclose(moved[name], wanted, atol=scale, rtol=0)
        assert moved[name].tobytes() == also[name].tobytes()


def resumed_steps(rank: int) -> Any:
    model = a_model(rank)
    outer = OuterStep(model, compressor=Compressor(0.7, feedback=True))
    trained(model, rank, 0)
    outer.step()
    state = {name: one.clone() for name, one in outer.state_dict().items()}
    trained(model, rank, 1)
    outer.step()
    other = a_model(5)
    again = OuterStep(other, compressor=Compressor(0.7, feedback=True))
    wrong = failing(lambda: again.load_state_dict({**state, "agreed.x": state["agreed.0.bias"]}))
    small = failing(lambda: again.load_state_dict({**state, "agreed.0.bias": torch.ones(1)}))
    again.load_state_dict(state)
    trained(other, rank, 1)
    again.step()
    same = all(
        one.tobytes() == two.tobytes()
        for one, two in zip(
            parameters_of(model).values(), parameters_of(other).values(), strict=True
        )
    )
    return same, wrong, small


def test_the_outer_step_resumes_to_the_bit(ranks: Ranks) -> None:
    for same, wrong, small in ranks.run(resumed_steps):
        assert same
        assert small.startswith(
            "ValueError: the model does not match: 'agreed.0.bias' is (1,) float32"
        )
        assert wrong == "ValueError: state does not match the model: ['agreed.x']"


def a_failed_step(rank: int) -> Any:
    model = a_model(rank)
    outer = OuterStep(model)
    trained(model, rank, 0)
    if rank == 0:
        with torch.no_grad():
            next(model.parameters())[0, 0] = torch.nan
    before = parameters_of(model)
    reason = failing(outer.step)
    kept = parameters_of(model)
    return reason, all(before[name].tobytes() == kept[name].tobytes() for name in kept)


def test_a_failed_step_leaves_models_alone(ranks: Ranks) -> None:
    for reason, same in ranks.run(a_failed_step):
        assert "rank 0: ValueError: update['0.weight'] holds NaN or Inf" in reason and same


def wrong_arguments_of_one(rank: int) -> Any:
    kwargs: list[dict[str, float]] = [{"lr": 0.0}, {"momentum": 1.0}, {"lr": 0.5}]
    return [
        failing(lambda one=one: OuterStep(a_model(rank), **(one if rank == 1 else {})))
        for one in kwargs
    ]


def test_outer_arguments_out_of_range_fail_everywhere(ranks: Ranks) -> None:
    for lr, momentum, differ in ranks.run(wrong_arguments_of_one):
        assert "the ranks cannot begin: rank 1: ValueError: lr must be above 0, got 0.0" in lr
        assert "rank 1: ValueError: momentum must lie in [0, 1), got 1.0" in momentum
        assert "must be the same on all ranks, those of [1] are not those of rank 0" in differ


def other_layers(rank: int) -> Any:
    """Train another layer of the same shape on each rank, or one more."""
    swapped, more = a_model(0), a_model(0)
    kept = parameters_of(swapped)
    for index, parameter in enumerate(swapped.parameters()):
        parameter.requires_grad_(index // 2 == rank)
    next(more.parameters()).requires_grad_(rank == 0)
    reasons = [failing(lambda one=one: OuterStep(one)) for one in (swapped, more)]
    left = parameters_of(swapped)
    return reasons, all(kept[name].tobytes() == left[name].tobytes() for name in kept)


def test_ranks_that_train_other_parameters_fail_everywhere(ranks: Ranks) -> None:
    for reasons, same in ranks.run(other_layers):
        assert all("those of [1] are not those of rank 0" in reason for reason in reasons)
        assert same


def changed_models(rank: int) -> Any:
    """Change on rank 1 what is trained, or as which numbers, between two steps."""
    found = []
    for change in (lambda model: model.double(), lambda model: model[0].requires_grad_(True)):
        model = a_model(0)
        model[0].requires_grad_(False)
        outer = OuterStep(model)
        if rank == 1:
            change(model)
        found.append(failing(outer.step))
    return found


def test_models_that_changed_are_named_everywhere(ranks: Ranks) -> None:
    for dtypes, names in ranks.run(changed_models):
        assert "rank 1: ValueError: the parameters that the ranks agreed on does not" in dtypes
        assert "float64" in dtypes and "rank 0" not in dtypes
        assert "rank 1: ValueError" in names and "'0.bias'" in names


def without_memory(rank: int) -> Any:
    compressor = Compressor(ENERGY, feedback=True)
    before = compressor.state_dict()

    def failed(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    whole = process_group.aggregate
    process_group.aggregate = failed if rank == 1 else whole
    try:
        reason = failing(lambda: mean_of(compressor=compressor))
    finally:
        process_group.aggregate = whole
    return reason, before.keys() == compressor.state_dict().keys()


def test_any_error_of_a_rank_fails_everywhere(ranks: Ranks) -> None:
    (first, kept), (second, also) = ranks.run(without_memory)
    assert "ranks [1] cannot use what was sent" in first
    assert "out of memory" in second
    assert kept and also
