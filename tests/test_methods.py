"""What a learner does with its models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_task import TinyTask
from torch import Tensor, nn

from fedkd_fast.methods import METHODS, LocalSettings, get_method
from fedkd_fast.methods.base import SoloLearner
from fedkd_fast.methods.fedkd import MutualLearner
from fedkd_fast.models import load_model, run_model, save_model, trainable_parameters
from fedkd_fast.tasks import IGNORED_LABEL, Batch

SETTINGS = LocalSettings(
    lr_mentor=1e-2, lr_mentee=1e-2, weight_decay=0.0, hidden=True, attention=True, seed=1
)


class TaggingTask(TinyTask):
    """Every token of a sequence has a label, but for padding."""

    def build_mentor(self) -> nn.Module:
        return Tagger()

    def build_mentee(self) -> nn.Module:
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
    ],
)
def test_models_of_each_method(method: str, mentor: bool, mentee: bool, shared: str | None) -> None:
    learner = get_method(method).make_learner(TinyTask(), SETTINGS)
    assert (learner.mentor is not None, learner.mentee is not None) == (mentor, mentee)
    assert learner.shared is (getattr(learner, shared) if shared else None)
    losses = learner.train(batches(TinyTask()))
    assert (losses.mentor is not None, losses.mentee is not None) == (mentor, mentee)


def test_registry() -> None:
    assert [name for name, method in METHODS.items() if method.pools_data] == ["central"]
    assert {name for name, method in METHODS.items() if method.lossless} == {
        "fedavg",
        "fedavg-mentee",
    }
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


@pytest.mark.parametrize("method", ["fedkd", "fedavg"])
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
