"""FedProx and SCAFFOLD: what holds clients together while they train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import TinyTask
from torch import Tensor

from fedkd_fast.client import Client
from fedkd_fast.loop import Loop
from fedkd_fast.methods import LocalSettings
from fedkd_fast.methods.base import SoloLearner
from fedkd_fast.methods.fedprox import ProximalLearner
from fedkd_fast.methods.scaffold import PREFIX, ControlledLearner
from fedkd_fast.tasks import Batch
from fedkd_fast.trainer import Run, configure, train
from fedkd_fast.trees import copied

SETTINGS = LocalSettings(lr_mentor=1e-2, lr_mentee=1e-2, seed=1)
# Sums of a few float32 numbers of the size of the largest, each rounded once.
ROUNDINGS = 16


def close(found: Tensor, wanted: Tensor, scale: float | None = None) -> bool:
    largest = float(wanted.abs().max()) if scale is None else scale
    bound = ROUNDINGS * torch.finfo(torch.float32).eps * max(largest, 1e-6)
    return float((found.double() - wanted.double()).abs().max()) <= bound


def weights(run: Run) -> list[Tensor]:
    return [one.detach() for one in run.mentors[0].parameters()]


def test_fedprox_without_pull_is_fedavg() -> None:
    plain = train(TinyTask(), "fedavg", rounds=3)
    prox = train(TinyTask(), "fedprox", rounds=3, proximal=0.0)
    for one, two in zip(weights(plain), weights(prox), strict=True):
        assert torch.equal(one, two)
    assert plain.summary["bytes_up"] == prox.summary["bytes_up"]


def test_fedprox_holds_clients_near() -> None:
    def drift(pull: float) -> float:
        clients, _ = federation("fedprox", proximal=pull, local_epochs=3)
        start = clients[0].learner.exchanged()
        clients[0].train(1)
        end = clients[0].learner.exchanged()
        return sum(float((end[name] - start[name]).square().sum()) for name in start)

    assert drift(10.0) < 0.5 * drift(0.0)


def test_the_gradient_gains_the_distance_from_the_last_broadcast() -> None:
    learner = ProximalLearner(
        TinyTask(), LocalSettings(lr_mentor=1e-2, lr_mentee=1e-2, seed=1, proximal=0.3)
    )
    start = {name: value + 1.0 for name, value in learner.exchanged().items()}
    learner.adopt(start)
    with torch.no_grad():
        for parameter in learner.shared_parameters().values():
            parameter.add_(2.0)
            parameter.grad = torch.ones_like(parameter)
    learner.correct_gradients()
    for name, parameter in learner.shared_parameters().items():
        assert parameter.grad is not None
        assert close(parameter.grad, 1.0 + 0.3 * (parameter.detach() - start[name]))


def test_a_client_put_back_between_broadcasts_is_held_near_to_the_last_one() -> None:
    (client, *_), _ = federation("fedprox", proximal=0.3)
    client.train(1)
    (other, *_), _ = federation("fedprox", proximal=0.3)
    other.load(copied(client.state()))
    client.train(2)
    other.train(2)
    ends = client.learner.exchanged(), other.learner.exchanged()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Sgd:
    """Plain steps in the place of AdamW's."""

    def __init__(self, learner: SoloLearner, rate: float) -> None:
        self._optimizer = torch.optim.SGD(learner.model.parameters(), lr=rate)
        self.done = 0

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self, lr_share: float) -> None:
        self._optimizer.step()
        self.done += 1


def data(part: int) -> list[Batch]:
    task = TinyTask()
    return [*task.batches(task.shards(2, 0)[part], part)]


def test_the_control_is_option_two_of_the_paper_for_sgd() -> None:
    rate = 0.05
    learner = ControlledLearner(TinyTask(), SETTINGS)
    learner.model.eval()
    state = learner.exchanged()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.startswith(PREFIX):
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    learner.adopt(state)
    learner.control = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in learner.control.items()
    }
    own, steps = dict(learner.control), Sgd(learner, rate)
    learner._steps = steps  # type: ignore[assignment]
    learner.train(data(0))
    moved_to = {name: one.detach().clone() for name, one in learner.shared_parameters().items()}
    learner.adopt(state)
    for name, parameter in moved_to.items():
        moved = (state[name].double() - parameter.double()) / (steps.done * rate)
        wanted = own[name].double() - state[PREFIX + name].double() + moved
        # x - y is a difference of numbers that are larger than it.
        assert close(learner.control[name], wanted, float(state[name].abs().max()) / rate)
        assert not close(learner.control[name], own[name])


def test_corrected_steps_follow_c_where_the_client_sees_only_its_own_gradient() -> None:
    """Where every raw gradient equals c_i, the step is along c."""
    learner = ControlledLearner(TinyTask(), SETTINGS)
    state = learner.exchanged()
    for name in learner.control:
        state[PREFIX + name] = torch.full_like(state[PREFIX + name], 3.0)
    learner.adopt(state)
    learner.control = {name: torch.full_like(one, 2.0) for name, one in learner.control.items()}
    for parameter in learner.shared_parameters().values():
        parameter.grad = torch.full_like(parameter, 2.0)
    learner.correct_gradients()
    for parameter in learner.shared_parameters().values():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))


def controls(clients: list[Client]) -> Iterator[tuple[str, Tensor]]:
    """Yield the mean of the clients' controls by name."""
    learners = [client.learner for client in clients]
    assert all(isinstance(one, ControlledLearner) for one in learners)
    for name in learners[0].control:  # type: ignore[attr-defined]
        yield name, torch.stack([one.control[name].double() for one in learners]).mean(0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_servers_control_is_the_mean_of_the_clients(share: float) -> None:
    clients, server = federation("scaffold", 4, participation=share)
    for number in (1, 2, 3):
        chosen = clients if share == 1.0 else clients[number - 1 : number + 1]
        for client in chosen:
            if client.version < server.version:
                client.apply(*server.catch_up(client.version))
                client.version = server.version
        exchange(chosen, server, number)
    held = chosen[0].learner.exchanged()
    for name, mean in controls(clients):
        assert float(mean.abs().max()) > 0.0
        assert close(held[PREFIX + name], mean, 0.1 + float(mean.abs().max()))


@pytest.mark.parametrize(
    "fields",
    [
        {"faults": 0.4, "quorum": 0.1, "clients": 6},
        {"faults": 0.4, "quorum": 0.1, "clients": 6, "participation": 0.5},
        {"weighting": "samples"},
        {"weighting": "samples", "faults": 0.4, "quorum": 0.1, "clients": 6},
        {"norm_limit": 1.01, "quorum": 0.1, "clients": 5},
    ],
)
def test_replies_that_do_not_count_leave_the_control_where_it_was(fields: dict[str, Any]) -> None:
    """Lost, late, damaged, too large: c stays the mean of all c_i, however replies are weighted."""
    task = TinyTask(61)  # shards of two sizes
    loop = Loop(configure(task, "scaffold", {"rounds": 5, **fields}), task, None, None)
    loop.run()
    assert "weighting" in fields or loop.journal.faults()["refused"]
    clients = [loop.pool.look(index) for index in range(len(loop.pool))]
    assert loop.server is not None
    _, held = loop.server.expected()
    for name, mean in controls(clients):  # type: ignore[arg-type]
        assert float(mean.abs().max()) > 0.0
        assert close(held[PREFIX + name], mean, 0.1 + float(mean.abs().max()))


@pytest.mark.parametrize("feedback", ["none", "up"])
def test_a_control_that_comes_later_is_kept(feedback: str) -> None:
    """With error feedback, what a lost reply said of c_i comes with the next one."""
    (one, two), server = federation("scaffold", 2, feedback=feedback, codec="wf1")
    for client in (one, two):
        client.train(1)
    one.lost(one.upload(0.95))
    broadcast = server.step([two.upload(0.95)], 0.95)
    for client in (one, two):
        client.apply(broadcast)
    moved = [any(bool(mean.any()) for _, mean in controls([client])) for client in (one, two)]
    assert moved == [feedback == "up", True]


def test_a_client_put_back_before_the_broadcast_knows_what_it_replied() -> None:
    clients, server = federation("scaffold", 2)
    exchange(clients, server)
    for client in clients:
        client.train(2)
    broadcast = server.step([client.upload(1.0) for client in clients], 1.0)
    others, _ = federation("scaffold", 2)
    for one, two in zip(clients, others, strict=True):
        two.load(copied(one.state()))
        for client in (one, two):
            client.apply(broadcast)
    for (name, mean), (_, again) in zip(controls(clients), controls(others), strict=True):
        assert torch.equal(mean, again), name


def test_an_older_checkpoint_goes_on_with_what_it_has() -> None:
    learner, other = (ControlledLearner(TinyTask(), SETTINGS) for _ in range(2))
    learner.train(data(0))
    learner.adopt(learner.exchanged())
    state = copied(learner.state())
    del state["next"]
    other.load({**state, "change": learner._zeros()})
    found, wanted = other.exchanged(), learner.exchanged()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_round_without_batches_leaves_the_control() -> None:
    learner = ControlledLearner(TinyTask(), SETTINGS)
    learner.train(data(0))
    learner.adopt(learner.exchanged())
    before = dict(learner.control)
    learner.train([])
    assert all(torch.equal(learner.control[name], value) for name, value in before.items())
    assert all(torch.equal(learner.exchanged()[PREFIX + n], learner._server[n]) for n in before)


def test_model_and_control_travel() -> None:
    plain, twice = (train(TinyTask(), method).summary for method in ("fedavg", "scaffold"))
    elements = 4 * plain["parameters_shared"]
    for direction in ("bytes_up", "bytes_down"):
        # In two rounds; a frame also says what it holds, a few bytes a tensor.
        assert 2 * elements <= twice[direction] - plain[direction] <= 2 * (elements + 32)
    assert twice["parameters_shared"] == 2 * plain["parameters_shared"]


def test_a_server_optimizer_moves_parameters_alone() -> None:
    """The control stays what it is: the clients' mean."""
    clients, server = federation("scaffold", 2, server_optimizer="momentum", server_lr=0.5)
    start = clients[0].learner.exchanged()
    exchange(clients, server)
    held = clients[0].learner.exchanged()
    for name, mean in controls(clients):
        assert close(held[PREFIX + name], mean)
    plain, other = federation("scaffold", 2)
    exchange(plain, other)
    for name, value in plain[0].learner.exchanged().items():
        if not name.startswith(PREFIX):
            wanted = start[name] + 0.5 * (value - start[name])
            assert close(held[name], wanted, float(start[name].abs().max()))
