"""Adapters: what of a model learns and travels, and that nothing of them is left in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import exchange, federation
from tiny_task import AttentiveTask, TinyTask
from torch import Tensor, nn

from fedkd_fast.adapters import add_adapter, merge_adapter
from fedkd_fast.methods import LocalSettings, get_method
from fedkd_fast.models import build_text_classifier, load_model, run_model, save_model
from fedkd_fast.tasks import Batch, Task, TaskOptions
from fedkd_fast.trainer import Run, configure, train

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fedkd_fast.tasks.digits import DigitsTask

EPSILON = torch.finfo(torch.float32).eps
TOKENS, LAYERS = 8, 3


class TokenTask(TinyTask):
    """The classes of the tiny task, as sequences of tokens for a BERT."""

    name = "tokens"

    def __init__(self, encoder: str, mentee_layers: int = 1) -> None:
        super().__init__(24)
        self.encoder, self.mentee_layers = encoder, mentee_layers
        self.ids = (self.points.abs() * 2).long().clamp(max=TOKENS - 1)

    def build_mentor(self, client: int = 0) -> nn.Module:
        return build_text_classifier(self.encoder, ["a", "b", "c"], seed=0)

    def build_mentee(self, client: int = 0) -> nn.Module:
        layers = self.mentee_layers
        return build_text_classifier(self.encoder, ["a", "b", "c"], layers=layers, seed=0)

    def batches(self, shard: Any, seed: int) -> Iterable[Batch]:
        order = np.random.default_rng(seed).permutation(shard)
        for index in np.array_split(torch.from_numpy(order), 2):
            yield Batch({"input_ids": self.ids[index]}, self.labels[index])

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        hits = logits(model.eval(), {"input_ids": self.ids}).argmax(1) == self.labels
        return {"accuracy": float(hits.double().mean())}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": LAYERS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            **sizes, num_attention_heads=2, intermediate_size=32, initializer_range=0.2
        )
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bert", "digits"])
def task(request: pytest.FixtureRequest, encoder: str) -> Any:
    return TokenTask(encoder) if request.param == "bert" else DigitsTask()


def sample(task: Task) -> dict[str, Tensor]:
    return next(iter(task.batches(task.shards(1, 0)[0], 0))).inputs


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return run_model(model, inputs).logits


def federated(task: Any, method: str, **fields: Any) -> Run:
    return train(task, method, rounds=2, clients=2, local_steps=2, batch_size=16, **fields)


def test_only_adapters_and_head_travel(task: Any) -> None:
    clients, server = federation("fedlora", 2, task=task, local_steps=2, rounds=2)
    start = [client.learner.exchanged() for client in clients]
    model = clients[0].learner.shared
    assert model is not None
    names = set(start[0])
    heads = {name for name in names if name.startswith("classifier.")}
    adapters = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    assert names == heads | adapters
    assert heads == {"classifier.weight", "classifier.bias"}
    assert len(adapters) == 3 * 2 * 2  # layers, projections, matrices
    for name in names:
        assert torch.equal(start[0][name], start[1][name])
    assert all(float(value.abs().max()) > 0 for name, value in start[0].items() if "lora_A" in name)
    assert not any(value.any() for name, value in start[0].items() if "lora_B" in name)
    frozen = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if name not in names
    }
    frames, broadcast = exchange(clients, server)
    numbers = 4 * sum(value.numel() for value in start[0].values())
    # A first step leaves A where B is zero; entries of zeros cost nothing.
    for frame in (*frames, broadcast):
        assert len(frame) <= numbers + 64 + 8 * len(names)
    assert {client.digest() for client in clients} == {server.digest()}
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value)


def test_adapters_start_as_nothing_and_are_merged_exactly(task: Any) -> None:
    plain, adapted = task.build_mentor().eval(), task.build_mentor().eval()
    add_adapter(adapted, "lora:4:8", 7)
    inputs = sample(task)
    assert torch.equal(logits(plain, inputs), logits(adapted, inputs))
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    found = {name: value.detach() for name, value in adapted.named_parameters()}
    wanted = dict(base)
    for name in base:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in found:
            one, two = (found[f"{stem}.lora_{letter}.default.weight"] for letter in ("B", "A"))
            wanted[name] = (base[name].double() + 8 / 4 * one.double() @ two.double()).float()
    changed = logits(adapted, inputs)
    assert float((changed - logits(plain, inputs)).abs().max()) > 1e-3
    merge_adapter(adapted)
    assert not [name for name in adapted.state_dict() if "lora_" in name]
    assert {*adapted.state_dict()} == {*base}
    for name, value in adapted.state_dict().items():
        bound = 8 * EPSILON * float(wanted[name].abs().max())
        assert float((value - wanted[name]).detach().abs().max()) <= bound
    largest = float(changed.abs().max())
    assert float((logits(adapted, inputs) - changed).abs().max()) <= 1000 * EPSILON * largest
    assert sum(float((wanted[n] - base[n]).abs().max()) > 0 for n in base) == 3 * 2


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("fedlora", {}),
        ("fedlora", {"mentor_adapter": "lora:2"}),
        ("fedkd", {"mentee_adapter": "lora:4"}),
        ("fedkd", {"mentor_adapter": "lora:4", "mentee_adapter": "lora:2"}),
        ("fedavg-mentee", {"mentee_adapter": "lora:4"}),
    ],
)
def test_saved_models_need_no_peft(
    task: Any,
    method: str,
    fields: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = federated(task, method, out=str(tmp_path / "run"), **fields)
    monkeypatch.setitem(sys.modules, "peft", None)
    inputs = sample(task)
    folders = [(tmp_path / "run" / "mentors" / "0", model) for model in run.mentors[:1]]
    if run.mentee is not None:
        folders.append((tmp_path / "run" / "mentee", run.mentee))
    assert folders
    for folder, model in folders:
        assert not [name for name in model.state_dict() if "lora_" in name]
        assert not list(folder.glob("adapter*"))
        loaded = load_model(folder, task.build_mentor)
        assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))


def test_the_score_is_that_of_the_saved_model(encoder: str) -> None:
    task = TokenTask(encoder)
    run = federated(task, "fedlora", lr_mentor=1e-2)
    assert run.summary["score_mentor"] == task.evaluate(run.mentors[0])["accuracy"]


def test_deeper_mentees_cost_no_more_with_adapters(encoder: str) -> None:
    """Adapters of all the mentor's layers are smaller than one layer of the mentee."""
    whole = federated(TokenTask(encoder, 1), "fedkd").summary
    deep = federated(TokenTask(encoder, LAYERS), "fedkd", mentee_adapter="lora:1").summary
    assert deep["parameters_mentee"] == deep["parameters_mentor"] > whole["parameters_mentee"]
    assert deep["parameters_shared"] < whole["parameters_shared"]
    assert 0 < deep["bytes_up"] < whole["bytes_up"]


def test_a_digits_mentee_of_all_layers_with_an_adapter() -> None:
    task = DigitsTask(TaskOptions(mentee_layers=3))
    summary = federated(task, "fedkd", mentee_adapter="lora:4").summary
    # Two projections in three layers, A and B of 64 × 4, and the head of ten classes.
    assert summary["parameters_shared"] == 3 * 2 * 2 * 64 * 4 + 64 * 10 + 10
    assert summary["parameters_mentee"] == summary["parameters_mentor"]


def test_the_mentors_adapter_leaves_its_encoder_alone(encoder: str) -> None:
    task = TokenTask(encoder)
    settings = LocalSettings(lr_mentor=1e-2, lr_mentee=1e-2, seed=0, mentor_adapter="lora:2")
    learner = get_method("fedkd").make_learner(task, settings)
    assert learner.mentor is not None
    before = {name: value.detach().clone() for name, value in learner.mentor.named_parameters()}
    learner.train(task.batches(task.shards(1, 0)[0], 0))
    moved = {
        name
        for name, value in learner.mentor.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert moved
    assert all("lora_" in name or name.startswith("classifier.") for name in moved)
    # The mentee has none and shares all but its embeddings.
    assert not any("lora_" in name for name in learner.exchanged())


def test_saved_plain_models_have_merged_weights(tmp_path: Path) -> None:
    model = AttentiveTask().build_mentor()
    keys = [*model.state_dict()]
    add_adapter(model, "lora:1", 0)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n] == [
        *("head.weight", "head.bias")
    ]
    merge_adapter(model)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", AttentiveTask().build_mentor)
    assert [*loaded.state_dict()] == keys


@pytest.mark.parametrize("value", ["lora", "lora:0", "lora:x", "lora:4:0", "lora:4:", "dora:4", 4])
def test_names_of_no_adapter(value: Any) -> None:
    with pytest.raises(ValueError, match="mentee_adapter must be lora:RANK or lora:RANK:ALPHA"):
        configure(AttentiveTask(), "fedkd", {"mentee_adapter": value})


def test_models_without_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="adapter needs projections named query, .*_Points has"):
        train(TinyTask(), "fedlora")


def test_the_run_records_the_adapter(encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    federated(TokenTask(encoder), "fedkd", mentee_adapter="lora:2", out=str(out))
    assert json.loads((out / "config.json").read_text())["mentee_adapter"] == "lora:2"
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert {layer["name"].split(".")[-1] for layer in line["layers"]} == {"weight", "bias"}
    assert any("lora_A" in layer["name"] for layer in line["layers"])
