"""Which data models are scored on, when training stops, and models that are partly private."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import AttentiveTask, TinyTask
from torch import Tensor, nn

from fedkd_fast.methods import METHODS
from fedkd_fast.models import MeanOfModels, run_model
from fedkd_fast.runs import evaluate_run, load_run
from fedkd_fast.scores import evaluate
from fedkd_fast.trainer import train

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]


class DevTask(TinyTask):
    """Scores on dev as they are given, and notes which split was asked for."""

    has_dev = True

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores, self.asked = scores, []  # type: ignore[var-annotated]

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        self.asked.append(split)
        if split == "dev":
            return {"accuracy": self.scores[self.asked.count("dev") - 1]}
        return super().evaluate(model, split=split, client=client)


def test_dev_after_each_round_and_test_once() -> None:
    task = DevTask([0.1, 0.2])
    train(task, "fedavg", rounds=3)
    assert task.asked == ["dev", "dev", "test"]


@pytest.mark.parametrize(
    ("scores", "patience", "rounds"),
    [
        ([0.5, 0.4, 0.3, 0.2], 2, 3),
        ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 5),
        ([0.5, 0.5, 0.5], 1, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 6),
    ],
)
def test_patience(scores: list[float], patience: int, rounds: int) -> None:
    task = DevTask(scores)
    summary = train(task, "fedavg", rounds=6, patience=patience, eval_every=3).summary
    assert summary["rounds"] == rounds
    assert task.asked[-1] == "test"
    assert task.asked.count("test") == 1
    assert summary["bytes_up"] == rounds / 6 * summary_of_six()["bytes_up"]


@pytest.mark.parametrize(
    ("inference", "rounds"),
    # Of one score a client: mentors get worse from round 2 on, the mentee better and better.
    [("mentor", 2), ("mentee", 5), ("mean", 5)],
)
def test_patience_is_with_the_models_that_infer(inference: str, rounds: int) -> None:
    scores = [score for n in range(5) for score in (*[0.5 - 0.1 * n] * 3, 0.1 + 0.15 * n)]
    task = DevTask(scores)
    fields: dict[str, Any] = {"rounds": 5, "patience": 1, "inference": inference}
    assert train(task, "fedkd", **fields).summary["rounds"] == rounds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    """With patience it would be the best of all; the checkpoint before it is kept."""
    for fields in ({"patience": 2}, {"out": tmp_path / "run"}):
        what = f"task tiny must be finite, got accuracy {value} of the mentor of client 0 on dev"
        with pytest.raises(ValueError, match=what):
            train(DevTask([0.5, value, 0.6]), "fedavg", rounds=3, **fields)
    assert (tmp_path / ".run.partial" / "checkpoint" / "checkpoint.json").is_file()


def summary_of_six() -> Any:
    return train(TinyTask(), "fedavg", rounds=6, eval_every=6).summary


def test_patience_needs_dev() -> None:
    seen: list[object] = []
    for rounds in (1, 3):
        with pytest.raises(ValueError, match="patience needs .*: task tiny has no dev"):
            train(TinyTask(), "fedavg", patience=1, rounds=rounds, progress=seen.append)
    assert not seen, "it is known before anything is trained"


def test_the_mean_of_both_models() -> None:
    task = TinyTask()
    models = [task.build_mentor().eval(), task.build_mentee().eval()]
    inputs = {"points": task.points[:7]}
    with torch.no_grad():
        wanted = sum(run_model(model, inputs).logits.softmax(1) for model in models) / 2
        found = MeanOfModels(models)(**inputs).logits.softmax(1)
    assert torch.allclose(found, wanted, rtol=1e-5)
    run = train(task, "fedkd", inference="mean")
    both = [MeanOfModels([mentor, run.mentee]) for mentor in run.mentors if run.mentee is not None]
    scores = [task.evaluate(model)["accuracy"] for model in both]
    assert run.summary["scores_mean"] == scores


class PrivateTask(AttentiveTask):
    """Every client has a head and test data of its own."""

    name = "private"
    private = ("head.",)
    own_tests = True
    poolable = False

    def _build_for(self, width: int, client: int) -> nn.Module:
        model = self._build(width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + client)
            head = nn.Linear(width, 3 + client)
        model.head = head
        return model

    def build_mentor(self, client: int = 0) -> nn.Module:
        return self._build_for(24, client)

    def build_mentee(self, client: int = 0) -> nn.Module:
        return self._build_for(12, client)

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        classes = run_model(model, {"points": self.points[:1]}).logits.shape[1]
        assert classes == 3 + client, "a model is scored on the data of another client"
        return super().evaluate(model)


@pytest.mark.parametrize("method", EXCHANGING)
def test_private_heads_do_not_travel(method: str) -> None:
    clients, server = federation(method, task=PrivateTask())
    exchange(clients, server)
    names = clients[0].learner.exchanged()
    assert names
    assert not any("head" in name for name in names)
    assert {client.digest() for client in clients} == {server.digest()}
    heads: list[Tensor] = []
    for client in clients:
        assert client.learner.shared is not None
        heads.append(client.learner.shared.get_parameter("head.weight"))
    assert [len(head) for head in heads] == [3, 4, 5]


@pytest.mark.parametrize("method", [*EXCHANGING, "local"])
def test_every_client_has_its_own_models_and_scores(method: str, tmp_path: Path) -> None:
    out, task = tmp_path / "run", PrivateTask()
    run = train(task, method, out=str(out))
    for role, exists in (
        ("mentor", method != "fedavg-mentee"),
        ("mentee", method in ("fedkd", "fedavg-mentee")),
    ):
        scores = run.summary[f"scores_{role}"]
        assert len(scores) == (3 if exists else 0)
        assert len([*(out / f"{role}s").glob("*")]) == (3 if exists else 0)
    loaded = load_run(out, task)
    scores = evaluate(task, "test", loaded.mentors, loaded.mentees, 3, together=True)
    assert scores.of("mentors") == run.summary["scores_mentor"]
    assert scores.of("mentees") == run.summary["scores_mentee"]
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-4:-1]
    if run.summary["scores_mentor"] and method != "local":
        assert [row["score_mentor"] for row in last] == run.summary["scores_mentor"]


class OwnTests(TinyTask):
    """Every client has test data of its own, and all share their models."""

    own_tests = True

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        part = slice(self.samples + client, None, 3)
        found = run_model(model.eval(), {"points": self.points[part]}).logits.argmax(1)
        return {"accuracy": float((found == self.labels[part]).double().mean())}


@pytest.mark.parametrize("scored", [1, 2])
@pytest.mark.parametrize(
    ("task", "method"),
    [(OwnTests, "central")]
    + [
        (task, method)
        for task in (OwnTests, PrivateTask)
        for method in ("fedkd", "fedavg", "fedavg-mentee", "local")
    ],
)
def test_runs_that_score_some_clients_are_scored_again(
    task: type[TinyTask], method: str, scored: int, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"scored_clients": scored, "inference": "mean"}
    run = train(task(), method, out=tmp_path / "run", **fields)
    again = evaluate_run(tmp_path / "run", task())
    for key in ("score_mentor", "scores_mentor", "score_mentee", "score_mean", "metrics"):
        assert again[key] == run.summary[key], key
    assert len(again["scores_mentor"]) == (0 if method == "fedavg-mentee" else scored)


def test_no_client_is_scored_by_a_model_of_another() -> None:
    task = OwnTests()
    models = [task.build_mentor(client) for client in range(2)]
    with pytest.raises(ValueError, match="there must be one mentor or 3, one a client, got 2"):
        evaluate(task, "test", models, [], 3, together=False)


def test_private_data_cannot_be_pooled() -> None:
    message = "method central puts all data together, .* of task private do not allow"
    with pytest.raises(ValueError, match=message):
        train(PrivateTask(), "central")
