"""The steps of clients and of the server: how many, how long, how exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import TinyTask
from torch import Tensor, nn
from trees_alike import alike

from fedkd_fast.methods import LocalSettings, get_method
from fedkd_fast.methods.base import SoloLearner, Steps
from fedkd_fast.methods.fedkd import MutualLearner
from fedkd_fast.server import ServerOptimizer
from fedkd_fast.tasks import Batch
from fedkd_fast.trainer import train

EPSILON = torch.finfo(torch.float32).eps


def settings(**fields: Any) -> LocalSettings:
    return LocalSettings(**{"lr_mentor": 1e-2, "lr_mentee": 1e-2, "seed": 1, **fields})


def state(model: nn.Module | None) -> list[Tensor]:
    assert model is not None
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def data(task: TinyTask) -> list[Batch]:
    (shard,) = task.shards(1, 0)
    return [*task.batches(shard, 0)]


# Batches of a round: a client of three has 20 samples, in batches of 8, 8 and 4.


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_local_steps_take_as_many_passes_as_they_need(steps: int) -> None:
    (client, *_), _ = federation("fedavg", local_steps=steps, local_epochs=2)
    batches = [*client._batches()]
    assert [len(batch.labels) for batch in batches] == [8, 8, 4, 8, 8, 4, 8][:steps]
    if steps > 3:
        # Another order in the next pass.
        first, second = batches[0].inputs["points"], batches[3].inputs["points"]
        assert not torch.equal(first, second)


def test_epochs_without_local_steps() -> None:
    (client, *_), _ = federation("fedavg", local_epochs=2)
    assert [len(batch.labels) for batch in client._batches()] == [8, 8, 4, 8, 8, 4]


def test_shards_without_batches_end() -> None:
    class Silent(TinyTask):
        def batches(self, shard: Any, seed: int) -> list[Batch]:
            return []

    (client, *_), _ = federation("fedavg", task=Silent(), local_steps=5)
    assert [*client._batches()] == []


@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_refreshing_follows_the_broadcast(refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (client, *_), _ = federation("fedkd", refresh_steps=refresh)
    client.train(1)
    seen = []

    def watched(batches: Any, lr_share: float) -> None:
        seen.append((len([*batches]), lr_share))

    monkeypatch.setattr(client.learner, "refresh", watched)
    client.refresh(0.5)
    # More than an epoch has, three batches, is as many as were asked for.
    assert seen == [(refresh, 0.5)]


def test_without_steps_nothing_is_refreshed() -> None:
    for method, steps in (("fedkd", 0), ("fedavg", 3)):
        (client, *_), _ = federation(method, refresh_steps=steps)
        client.train(1)
        assert client.learner.mentor is not None
        before = state(client.learner.mentor)
        client.refresh()
        assert same(state(client.learner.mentor), before)


def test_refreshing_teaches_the_mentor_alone() -> None:
    task = TinyTask()
    learner = MutualLearner(task, settings())
    mentor, mentee = state(learner.mentor), state(learner.mentee)
    learner.refresh(data(task)[:2])
    assert not same(state(learner.mentor), mentor)
    assert same(state(learner.mentee), mentee)


def test_the_fresh_mentee_is_what_refreshing_follows() -> None:
    task, mentors = TinyTask(), []
    for scale in (1.0, -3.0):
        learner = MutualLearner(task, settings())
        with torch.no_grad():
            for parameter in learner.mentee.parameters():
                parameter.mul_(scale)
        learner.refresh(data(task)[:1])
        mentors.append(state(learner.mentor))
    assert not same(*mentors)


def test_parts_of_an_epoch_go_on_where_the_last_round_stopped() -> None:
    (client, *_), _ = federation("fedkd", local_epochs=0.7)
    (whole, *_), _ = federation("fedkd")
    count = len([*whole._batches()])
    seen = [batch.inputs["points"] for _ in range(3) for batch in client._batches()]
    passes = (batch for epoch in range(3) for batch in client._own.epoch(0, epoch))
    used = itertools.islice(passes, 3 * round(0.7 * count))
    expected = [batch.inputs["points"] for batch in used]
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


def test_batches_of_a_pass_are_counted_once() -> None:
    class Counted(TinyTask):
        made = 0

        def batches(self, shard: Any, seed: int) -> Iterator[Batch]:
            for batch in super().batches(shard, seed):
                self.made += 1
                yield batch

    task = Counted()
    (client, *_), _ = federation("fedavg", task=task, local_epochs=0.7)
    seen = [len([*client._batches()]) for _ in range(4)]
    assert task.made == 3 + sum(seen)


# One step.


def stepped(count: int, gradient: float = 1.0, **fields: Any) -> list[tuple[float, Tensor]]:
    """Take steps with a constant gradient; return rates and gradients as the optimizer saw them."""
    model = nn.Linear(3, 2)
    steps = Steps([model], 0.1, settings(**fields))
    seen = []
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        steps.step(0.5)
        gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        seen.append((steps._optimizer.param_groups[0]["lr"], torch.cat(gradients)))
    return seen


def test_the_state_of_other_parameters_is_refused_and_nothing_lost() -> None:
    models = nn.Linear(3, 2), nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    states = []
    for model in models:
        steps = Steps([model], 0.1, settings())
        torch.autograd.backward(model(torch.ones(1, 3)).sum())
        steps.step(1.0)
        states.append(steps.state())
    steps = Steps([models[0]], 0.1, settings())
    steps.load(states[0])
    for other in states[1:]:
        with pytest.raises(ValueError, match="the optimizer's state is of other parameters"):
            steps.load(other)
    assert alike(steps.state(), states[0])


def test_rates_rise_to_the_full_one() -> None:
    rates = [rate for rate, _ in stepped(6, warmup_steps=4)]
    assert rates == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])
    assert [rate for rate, _ in stepped(2)] == [0.05, 0.05]


def test_warm_up_is_the_clients_first_steps_and_not_each_rounds() -> None:
    task = TinyTask()
    learner = SoloLearner(task, settings(warmup_steps=5), "mentor", shares=True)
    rates = []
    for _ in range(2):
        learner.train(data(task)[:4])
        rates.append(learner._steps._optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.8e-2, 1e-2])


def test_long_gradients_are_cut_over_all_parameters() -> None:
    # Eight entries of 3.
    (_, gradient), *_ = stepped(1, gradient=3.0, clip_norm=1.5)
    assert float(gradient.norm()) == pytest.approx(1.5, rel=1e-5)
    assert torch.equal(gradient, gradient[:1].expand(8))
    (_, gradient), *_ = stepped(1, gradient=3.0, clip_norm=9.0)
    assert torch.equal(gradient, torch.full((8,), 3.0))


@pytest.mark.parametrize("method", ["fedkd", "fedavg", "scaffold"])
@pytest.mark.parametrize("layered", [False, True])
def test_bfloat16_trains(method: str, layered: bool) -> None:
    runs = [
        train(TinyTask(layered=layered), method, rounds=4, local_epochs=2, precision=precision)
        for precision in ("fp32", "bf16")
    ]
    full, half = (state(run.mentors[0]) for run in runs)
    assert not same(full, half)
    # Weights stay in float32.
    assert all(value.dtype == torch.float32 for value in half)
    assert runs[1].summary["score_mentor"] > 0.6
    assert runs[0].summary["bytes_up"] > 0


def test_bfloat16_serves_models_that_return_logits_alone() -> None:
    class Bare(TinyTask):
        def _build(self, width: int) -> nn.Module:
            return _BareModel(super()._build(width))

    assert train(Bare(), "fedkd", precision="bf16").summary["rounds"] == 2


class _BareModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, points: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(points))


def test_bfloat16_is_what_forward_runs_in() -> None:
    task, dtypes = TinyTask(), set()
    learner = get_method("fedavg").make_learner(task, settings(bfloat16=True))
    assert learner.mentor is not None
    hook = learner.mentor.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    learner.train(data(task))
    hook.remove()
    assert dtypes == {torch.bfloat16}


# The server's step.


def updates(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(4, 3, generator=generator), "steps": torch.tensor([number])}
        for number in range(count)
    ]


def test_no_optimizer_is_the_identity() -> None:
    assert ServerOptimizer().identity
    assert not ServerOptimizer(lr=0.5).identity
    assert not ServerOptimizer("momentum").identity
    (mean,) = updates(1)
    assert torch.equal(ServerOptimizer().step(mean)["w"], mean["w"])
    assert torch.equal(ServerOptimizer(lr=0.5).step(mean)["w"], mean["w"] / 2)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_optimizers_follow_their_formulas(kind: Any) -> None:
    rate, beta, epsilon = 0.3, 0.8, 1e-3
    optimizer = ServerOptimizer(kind, lr=rate, momentum=beta)
    v = m = s = torch.zeros(4, 3, dtype=torch.float64)
    for mean in updates(4):
        g = mean["w"].double()
        found = optimizer.step(mean)
        if kind == "momentum":
            v = beta * v + g
            wanted = rate * v
        else:
            m, s = beta * m + (1 - beta) * g, 0.99 * s + 0.01 * g**2
            wanted = rate * m / (s.sqrt() + epsilon)
        bound = 32 * EPSILON * float(wanted.abs().max())
        assert float((found["w"].double() - wanted).abs().max()) <= bound
        assert torch.equal(found["steps"], mean["steps"])


def test_what_is_only_averaged_is_left_alone() -> None:
    optimizer = ServerOptimizer("adam", averaged=("control/",))
    for mean in updates(2):
        found = optimizer.step({"w": mean["w"], "control/w": mean["w"]})
        assert torch.equal(found["control/w"], mean["w"])
        assert not torch.equal(found["w"], mean["w"])


@pytest.mark.parametrize(
    "fields",
    [
        {"server_lr": 0.5},
        {"server_optimizer": "momentum", "server_momentum": 0.5},
        {"server_optimizer": "adam", "server_lr": 0.1},
    ],
)
@pytest.mark.parametrize("method", ["fedkd", "fedavg", "fedpaq", "scaffold"])
def test_copies_stay_equal_under_a_server_optimizer(method: str, fields: dict[str, Any]) -> None:
    clients, server = federation(method, 2, **fields)
    for number in (1, 2, 3):
        exchange(clients, server, number)
        assert {client.digest() for client in clients} == {server.digest()}


def test_momentum_carries_the_model_further() -> None:
    moved = []
    for fields in ({}, {"server_optimizer": "momentum", "server_momentum": 0.9}):
        clients, server = federation("fedavg", 2, **fields)
        start = clients[0].learner.exchanged()
        for number in (1, 2, 3, 4):
            exchange(clients, server, number)
        end = clients[0].learner.exchanged()
        moved.append(math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in start)))
    assert moved[1] > 1.5 * moved[0]


def test_presets_run() -> None:
    for preset, layered in itertools.product(("paper", "public_code"), (False, True)):
        task = TinyTask(layered=layered)
        # The projection of the public code is the identity: widths must agree.
        task.build_mentee = task.build_mentor  # type: ignore[method-assign]
        summary = train(task, "fedkd", preset=preset).summary
        assert summary["codec"] == "factors-fp32"
        assert summary["preset"] == preset


def test_an_unknown_server_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be none, momentum or adam, got 'sgd'"):
        ServerOptimizer("sgd")
