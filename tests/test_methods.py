"""What a learner does with its models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_task import CLASSES, TinyTask, tiny_task
from torch import Tensor, nn

from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.methods import METHODS, LocalSettings, get_method
from fedkd_fast.methods.base import SoloLearner
from fedkd_fast.methods.fedkd import MutualLearner
from fedkd_fast.models import load_model, run_model, save_model, trainable_parameters
from fedkd_fast.tasks import IGNORED_LABEL, Batch

# Variants of federated averaging of the mentor.
BASELINES = ("fedlora", "fedprox", "scaffold", "fedpaq", "powersgd", "sparseloco")
SETTINGS = LocalSettings(lr_mentor=1e-2, lr_mentee=1e-2, seed=1)
ONE_WAY = dataclasses.replace(SETTINGS, mutual=False)


class TaggingTask(TinyTask):
    """Every token of a sequence has a label, but for padding."""

    def build_mentor(self, client: int = 0) -> nn.Module:
        return Tagger()

    def build_mentee(self, client: int = 0) -> nn.Module:
        return Tagger()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(tokens)
        return logits


def batches(task: TinyTask) -> list[Batch]:
    (shard,) = task.shards(1, 0)
    return [*task.batches(shard, 0)]


@pytest.mark.parametrize(
    ("method", "mentor", "mentee", "shared"),
    [
        ("fedkd", True, True, "mentee"),
        ("local", True, False, None),
        ("central", True, False, None),
        ("fedavg", True, False, "mentor"),
        ("fedavg-mentee", False, True, "mentee"),
        *((name, True, False, "mentor") for name in BASELINES),
    ],
)
def test_models_of_each_method(method: str, mentor: bool, mentee: bool, shared: str | None) -> None:
    learner = get_method(method).make_learner(tiny_task(method), SETTINGS)
    assert (learner.mentor is not None, learner.mentee is not None) == (mentor, mentee)
    assert learner.shared is (getattr(learner, shared) if shared else None)
    losses = learner.train(batches(TinyTask()))
    assert (losses.mentor is not None, losses.mentee is not None) == (mentor, mentee)


def test_registry() -> None:
    assert [name for name, method in METHODS.items() if method.pools_data] == ["central"]
    silent = [name for name, method in METHODS.items() if not method.exchanges]
    assert silent == ["local", "central"]
    assert {name for name, method in METHODS.items() if method.packing} == {
        *("fedpaq", "powersgd", "sparseloco")
    }
    assert all(name == method.name for name, method in METHODS.items())
    with pytest.raises(ValueError, match="method must be one of fedkd, local, .*, got 'x'"):
        get_method("x")


@pytest.mark.parametrize("layered", [False, True])
def test_mentor_and_mentee_learn_together(layered: bool) -> None:
    learner = MutualLearner(TinyTask(layered=layered), SETTINGS)
    data = batches(TinyTask())
    first = learner.train(data)
    for _ in range(10):
        last = learner.train(data)
    assert first.mentor is not None
    assert first.mentee is not None
    assert last.mentor is not None
    assert last.mentee is not None
    assert last.mentor < first.mentor
    assert last.mentee < first.mentee


def test_the_mentee_teaches_the_mentor() -> None:
    """Labels that cost nothing leave the peer as the only teacher."""
    task = TinyTask()
    alone, taught = (
        SoloLearner(task, SETTINGS, "mentor", shares=False),
        MutualLearner(task, SETTINGS),
    )
    data = batches(task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alone.train(data)
        torch.manual_seed(0)
        taught.train(data)
    assert alone.mentor is not None
    pairs = zip(alone.mentor.parameters(), taught.mentor.parameters(), strict=True)
    assert all(not torch.equal(one, two) for one, two in pairs)


def trained(learner: Any, task: TinyTask, steps: int | None = None) -> tuple[Any, Any]:
    """Train on the first batches; returns the losses and the learner."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        return learner.train(batches(task)[:steps]), learner


def equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("layered", [False, True])
def test_without_mutual_distillation_mentors_learn_as_alone(layered: bool) -> None:
    task = TinyTask(layered=layered)
    # After one batch the mentee has taken its share of what dropout draws.
    steps = None if layered else 1
    own, alone = trained(SoloLearner(task, SETTINGS, "mentor", shares=False), task, steps)
    losses, learner = trained(MutualLearner(task, ONE_WAY), task, steps)
    assert equal(learner.mentor, alone.mentor)
    assert losses.mentor == own.mentor
    _, mutual = trained(MutualLearner(task, SETTINGS), task, steps)
    assert not equal(mutual.mentor, alone.mentor)


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_without_mutual_distillation_mentees_are_taught_all_the_same(
    layered: bool, clip_norm: float | None
) -> None:
    task = TinyTask(layered=layered)
    found = []
    for settings in (SETTINGS, ONE_WAY):
        clipped = dataclasses.replace(settings, clip_norm=clip_norm)
        found.append(trained(MutualLearner(task, clipped), task, 1))
    (losses, mutual), (one_way_losses, one_way) = found
    assert equal(one_way.mentee, mutual.mentee)
    assert losses.mentee == one_way_losses.mentee
    if layered:
        assert equal(one_way._distilling.loss, mutual._distilling.loss)


def test_the_mentor_teaches_a_mentee_that_has_no_labels() -> None:
    silent = dataclasses.replace(ONE_WAY, distillation=DistillationConfig(task_weight=0.0))
    task = TinyTask()
    fresh = MutualLearner(task, silent)
    losses, learner = trained(MutualLearner(task, silent), task)
    assert losses.mentor == 0.0
    assert losses.mentee > 0.0
    assert equal(learner.mentor, fresh.mentor)
    assert not equal(learner.mentee, fresh.mentee)


def test_the_lone_mentor_has_the_task_loss_of_the_configuration() -> None:
    task = TinyTask(layered=True)
    config = DistillationConfig(task_weight=0.5, label_smoothing=0.2)
    mentor, (batch, *_) = task.build_mentor(), batches(task)
    with torch.no_grad():
        scores = run_model(mentor, batch.inputs).logits.double().log_softmax(1)
    target = 0.8 * torch.eye(CLASSES, dtype=torch.float64)[batch.labels] + 0.2 / CLASSES
    wanted = -0.5 * float((target * scores).sum(1).mean())
    learner = MutualLearner(task, dataclasses.replace(ONE_WAY, distillation=config))
    assert learner.train([batch]).mentor == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("make", [MutualLearner, lambda *a: SoloLearner(*a, "mentor", shares=True)])
def test_frozen_parameters_stay_and_are_not_shared(make: Any) -> None:
    class Frozen(TinyTask):
        def _build(self, width: int) -> nn.Module:
            model = super()._build(width)
            next(model.parameters()).requires_grad_(False)
            return model

    learner = make(Frozen(), SETTINGS)
    before = next(learner.shared.parameters()).clone()
    learner.train(batches(TinyTask()))
    assert torch.equal(next(learner.shared.parameters()), before)
    assert "0.weight" not in trainable_parameters(learner.shared)
    assert "0.bias" in trainable_parameters(learner.shared)


@pytest.mark.parametrize("method", ["fedkd", "fedavg", "scaffold"])
def test_labels_of_tokens(method: str) -> None:
    learner = get_method(method).make_learner(TaggingTask(), SETTINGS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 7, 4, generator=generator)
    labels = torch.randint(3, (5, 7), generator=generator)
    labels[:, 4:] = IGNORED_LABEL
    silenced = tokens.clone()
    silenced[:, 4:] = 1e3  # what is ignored must not matter
    twin = get_method(method).make_learner(TaggingTask(), SETTINGS)
    first = learner.train([Batch({"tokens": tokens}, labels)])
    second = twin.train([Batch({"tokens": silenced}, labels)])
    assert first == second


@pytest.mark.parametrize("method", ["fedkd", "fedavg", "scaffold"])
def test_a_batch_without_labels_costs_nothing(method: str) -> None:
    learner = get_method(method).make_learner(TaggingTask(), SETTINGS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 7, 4, generator=generator)
    none = torch.full((5, 7), IGNORED_LABEL)
    losses = learner.train([Batch({"tokens": tokens}, none)])
    assert {losses.mentor, losses.mentee} <= {None, 0.0}
    assert all(value.isfinite().all() for value in learner.exchanged().values())


def test_no_batches_no_loss() -> None:
    assert SoloLearner(TinyTask(), SETTINGS, "mentee", shares=True).train([]).mentee == 0.0


def test_a_tensor_is_an_output() -> None:
    assert run_model(nn.Sequential(), {"input": torch.ones(2, 3)}).logits.shape == (2, 3)


def test_plain_models_are_saved_and_loaded(tmp_path: Any) -> None:
    model = nn.Linear(3, 2)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", lambda: nn.Linear(3, 2))
    assert torch.equal(loaded.get_parameter("weight"), model.weight)
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        load_model(tmp_path, lambda: nn.Linear(3, 2))
