"""The federated loop on a tiny task of plain torch modules."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import TinyTask, tiny_task
from torch import nn

import fedkd_fast
from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.methods import METHODS, Losses
from fedkd_fast.methods.fedkd import MutualLearner
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.tasks import PredictingTask, Task
from fedkd_fast.trainer import Run, train

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]
SILENT = [name for name, method in METHODS.items() if not method.exchanges]
# A raw difference, its mean in float64, and the sum with the base are rounded once each.
ROUNDINGS = 3


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("seconds")}


def test_a_plain_class_is_a_task() -> None:
    assert isinstance(TinyTask(), Task)
    assert not isinstance(TinyTask(), PredictingTask)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_writes_a_run_folder(method: str, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    run = train(tiny_task(method), method, out=str(out), seed=3)
    assert run.folder == out
    summary = json.loads((out / "summary.json").read_text())
    assert summary == dict(run.summary)
    assert (summary["method"], summary["task"], summary["seed"]) == (method, "tiny", 3)
    config = json.loads((out / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= set(config)
    assert config["rounds"] == 2
    assert config["version"] == fedkd_fast.__version__
    assert config["task_facts"]["samples_train"] == 60
    assert config["task_facts"]["parameters_mentor"] == summary["parameters_mentor"]
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]
    for role in ("mentor", "mentee"):
        score, exists = summary[f"score_{role}"], (out / f"{role}s" / "0").is_dir()
        exists = exists if role == "mentor" else (out / "mentee").is_dir()
        assert (score is not None) == exists
    rows = [line for line in lines(out) if line["client"] is not None]
    assert {row["round"] for row in rows} == {1, 2}
    assert len(rows) == 2 * (1 if method == "central" else 3)


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(method: str) -> None:
    run = train(tiny_task(method), method, rounds=6, local_epochs=2, top_share=0.2)
    guessing = 0.5
    found = [run.summary[name] for name in ("score_mentor", "score_mentee")]
    assert all(score > guessing for score in found if score is not None)


@pytest.mark.parametrize("method", EXCHANGING)
def test_bytes_are_counted_per_client_over_all_rounds(method: str, tmp_path: Path) -> None:
    run = train(tiny_task(method), method, out=str(tmp_path / "run"))
    rows = [line for line in lines(tmp_path / "run") if line["client"] is not None]
    server = [line for line in lines(tmp_path / "run") if line["client"] is None]
    assert run.summary["bytes_up"] == sum(row["bytes_up"] for row in rows) / 3
    assert run.summary["bytes_down"] == sum(row["bytes_down"] for row in rows) / 3
    assert run.summary["bytes_down"] == sum(row["bytes_down"] for row in server)
    assert all(row["bytes_up"] > sum(layer["bytes"] for layer in row["layers"]) for row in rows)
    assert all(row["bytes_up"] == 0 for row in server)
    shares = run.summary["bytes_up"] + run.summary["bytes_down"]
    assert run.summary["saving"] == 1 - shares / run.summary["bytes_fedavg_mentor"]


def test_fedavg_sends_what_savings_are_measured_against() -> None:
    summary = train(TinyTask(), "fedavg").summary
    # A difference also carries the digest of its base, in a field that is always there.
    assert summary["saving"] == 0.0
    assert summary["parameters_shared"] == summary["parameters_mentor"]


@pytest.mark.parametrize("method", SILENT)
def test_without_exchange_nothing_is_sent(method: str, tmp_path: Path) -> None:
    summary = train(TinyTask(), method, out=str(tmp_path / "run")).summary
    assert summary["bytes_up"] == summary["bytes_down"] == 0
    assert summary["saving"] is None
    assert all(line["layers"] == [] for line in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("codecs", "lossy"),
    [({}, False), ({"codec_down": "wf1"}, True), ({"codec": "wf1", "codec_down": "raw"}, True)],
)
def test_the_energy_is_recorded_where_a_leg_heeds_it(
    codecs: dict[str, str], lossy: bool, tmp_path: Path
) -> None:
    train(TinyTask(), "fedavg", out=str(tmp_path / "run"), **codecs)
    found = {line["energy"] for line in lines(tmp_path / "run")}
    assert found == ({0.95, 0.98} if lossy else {None})


def test_layers_of_a_frame_are_recorded(tmp_path: Path) -> None:
    train(TinyTask(), "fedkd", out=str(tmp_path / "run"), codec="factors-fp32", energy_start=0.5)
    layers = {layer["name"]: layer for layer in lines(tmp_path / "run")[0]["layers"]}
    assert set(layers) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert layers["0.weight"]["shape"] == [12, 6]
    assert layers["0.weight"]["full_rank"] == 6
    assert layers["0.weight"]["mode"] == "FACTORS"
    assert 1 <= layers["0.weight"]["rank"] < 6
    assert (layers["0.bias"]["full_rank"], layers["0.bias"]["rank"]) == (0, 0)
    assert layers["0.bias"]["dense_bytes"] == 4 * 12


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_run(method: str, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> Run:
        # Global random state and what trained before must not matter.
        torch.rand(seed + len(name))
        return train(tiny_task(method), method, out=str(tmp_path / name), seed=seed)

    first, again, other = run("first", 1), run("the same", 1), run("another", 2)
    records = [[without_times(x) for x in lines(tmp_path / n)] for n in ("first", "the same")]
    assert records[0] == records[1]
    pairs = zip(first.mentors, again.mentors, strict=True)
    for model, twin in [*pairs, (first.mentee or nn.Identity(), again.mentee or nn.Identity())]:
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)
    losses = [[line["loss_mentor"] for line in lines(tmp_path / n)] for n in ("first", "another")]
    if other.mentors:
        assert losses[0] != losses[1]


@pytest.mark.parametrize("method", EXCHANGING)
def test_one_seed_gives_the_same_bytes(method: str) -> None:
    runs = []
    for _ in range(2):
        clients, server = federation(method, 2)
        runs.append([exchange(clients, server, number) for number in (1, 2)])
    assert runs[0] == runs[1]


def test_training_leaves_torch_as_it_was() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(TinyTask(), "fedkd", rounds=1, threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("method", EXCHANGING)
def test_lossless_exchange_is_the_mean_of_the_clients(method: str) -> None:
    clients, server = federation(method, codec="raw")
    start = clients[0].learner.exchanged()
    for client in clients:
        client.train(1)
    trained = [client.learner.exchanged() for client in clients]
    broadcast = server.step([client.upload(1.0) for client in clients], 1.0)
    for client in clients:
        client.apply(broadcast)
    for name, value in start.items():
        mean = torch.stack([copy[name].double() for copy in trained]).mean(0)
        largest = max(float(t.abs().max()) for t in (value, *(copy[name] for copy in trained)))
        bound = ROUNDINGS * torch.finfo(torch.float32).eps * largest
        for client in clients:
            found = client.learner.exchanged()[name]
            assert float((found.double() - mean).abs().max()) <= bound


def test_a_task_must_be_an_object_that_gives_its_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = TinyTask
    with pytest.raises(TypeError, match=r"task must be an object, got the class TinyTask"):
        train(wrong, "fedkd", rounds=1)
    monkeypatch.setattr(TinyTask, "evaluate", lambda *args, **fields: {"f1": 1.0})
    with pytest.raises(ValueError, match="task.evaluate must give 'accuracy', .* got 'f1'"):
        train(TinyTask(), "fedkd", rounds=1)


@pytest.mark.parametrize("given", [1, 5])
def test_a_task_must_deal_a_shard_to_each_client(
    monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    whole = TinyTask.shards
    monkeypatch.setattr(TinyTask, "shards", lambda task, clients, seed: whole(task, given, seed))
    with pytest.raises(ValueError, match=rf"task.shards\(2, …\) must give 2 shards, got {given}"):
        train(TinyTask(), "fedkd", clients=2, rounds=1)


@pytest.mark.parametrize("method", EXCHANGING)
def test_every_copy_is_the_same_bits(method: str) -> None:
    clients, server = federation(method)
    for number in (1, 2, 3):
        frames, _ = exchange(clients, server, number)
        assert len(set(frames)) == 3
        assert {client.digest() for client in clients} == {server.digest()}


def test_a_broadcast_leaves_the_mentor_alone() -> None:
    clients, server = federation("fedkd")
    for client in clients:
        client.train(1)
    assert len({client.digest() for client in clients}) == 3
    mentor = clients[0].learner.mentor
    assert mentor is not None
    private = [parameter.clone() for parameter in mentor.parameters()]
    clients[0].apply(server.step([client.upload(0.9) for client in clients], 0.9))
    for before, after in zip(private, mentor.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_copy_that_differs_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(client: Client, *frames: bytes) -> None:
        whole(client, *frames)
        if client.index == 1:
            assert client.learner.shared is not None
            with torch.no_grad():
                next(client.learner.shared.parameters()).add_(1.0)

    whole = Client.apply
    monkeypatch.setattr(Client, "apply", apply)
    with pytest.raises(RuntimeError, match="client 1 holds other shared parameters.*round 1"):
        train(TinyTask(), "fedkd")


@pytest.mark.parametrize("method", EXCHANGING)
def test_an_update_of_other_parameters_is_refused(method: str) -> None:
    clients, server = federation(method, 2)
    frames, _ = exchange(clients, server)
    clients[0].train(2)
    later = clients[0].upload(0.9)
    with pytest.raises(ValueError, match="base"):
        server.step([later, frames[1]], 0.9)


@pytest.mark.parametrize(
    ("method", "rate"), [(method, "lr_mentor") for method in METHODS if method != "fedavg-mentee"]
    + [("fedkd", "lr_mentee"), ("fedavg-mentee", "lr_mentee")]
)  # fmt: skip
def test_divergence_names_what_client_and_round(method: str, rate: str) -> None:
    what = r"training diverged: ('[\w.]+'|the loss) of the (mentor|mentee) of client 0"
    with pytest.raises(ValueError, match=rf"{what} holds NaN or Inf after round \d; a smaller"):
        train(tiny_task(method), method, rounds=3, **{rate: 1e38})


def test_a_loss_of_infinity_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    (client,), _ = federation("fedkd", 1)
    monkeypatch.setattr(MutualLearner, "train", lambda *_: Losses(1.0, math.inf))
    with pytest.raises(ValueError, match="the loss of the mentee of client 0 holds NaN or Inf"):
        client.train(1)


def test_hidden_states_are_distilled_where_models_have_them() -> None:
    runs = [train(TinyTask(layered=True), "fedkd", hidden=hidden) for hidden in (True, False)]
    pairs = zip(runs[0].mentors[0].parameters(), runs[1].mentors[0].parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)


def test_energy_goes_from_start_to_end() -> None:
    config = TrainConfig(rounds=4, energy_start=0.9, energy_end=0.99)
    energies = [config.energy(number) for number in range(1, 5)]
    assert (energies[0], energies[-1]) == (0.9, 0.99)
    assert energies == sorted(energies)
    assert TrainConfig(rounds=1, energy_start=0.9).energy(1) == 0.9


def test_learning_rates_end_at_their_share() -> None:
    config = TrainConfig(rounds=3, lr_end=0.2)
    assert [config.lr_share(number) for number in (1, 2, 3)] == [1.0, 0.6, 0.2]
    ends = [train(TinyTask(), "fedkd", lr_end=share) for share in (1.0, 0.1)]
    pairs = zip(ends[0].mentors[0].parameters(), ends[1].mentors[0].parameters(), strict=True)
    assert all(not torch.equal(one, two) for one, two in pairs)


def test_progress_is_told_every_client_and_round() -> None:
    told: list[RoundRecord | ClientRecord] = []
    run = train(TinyTask(), "fedkd", rounds=3, eval_every=2, progress=told.append)
    steps = [(one.client, one.done) if isinstance(one, ClientRecord) else None for one in told]
    assert steps == 3 * [(0, 1), (1, 2), (2, 3), None]
    seen = [record for record in told if isinstance(record, RoundRecord)]
    assert [(record.round, record.rounds) for record in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [record.score_mentor is not None for record in seen] == [False, True, True]
    assert math.isclose(sum(record.bytes_up for record in seen), run.summary["bytes_up"])
    assert sum(record.bytes_down for record in seen) == run.summary["bytes_down"]


def test_given_fields_win_over_those_of_the_task() -> None:
    config = train(TinyTask(), "local", rounds=1).config
    assert (config.rounds, config.clients, config.lr_mentor) == (1, 3, 1e-2)
    assert config.batch_size == TrainConfig().batch_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"clients": 61}, "clients must be at most 60, got 61"),
        ({"local_epochs": 0}, "local_epochs must be positive and finite, got 0.0"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"threads": 200_000}, "threads must be at most 1024, got 200000"),
        ({"mentee_layers": 0}, "mentee_layers must be at least 1, got 0"),
        ({"energy_start": 1.5}, r"energy_start must lie in \(0, 1\], got 1.5"),
        ({"energy_end": 0.0}, r"energy_end must lie in \(0, 1\], got 0.0"),
        ({"energy_end": math.nan}, r"energy_end must lie in \(0, 1\], got nan"),
        ({"lr_mentor": 0.0}, "lr_mentor must be positive and finite, got 0.0"),
        ({"lr_mentee": math.inf}, "lr_mentee must be positive and finite, got inf"),
        ({"lr_end": 0.0}, r"lr_end must lie in \(0, 1\], got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
        ({"codec": "zip"}, "codec must be one of wf1, dense, wf0, factors-fp32, raw, got 'zip'"),
        ({"method": "fedsgd"}, "method must be one of fedkd, .*, got 'fedsgd'"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(TinyTask(), out=str(out), **fields)
    assert not out.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 1.5}, "rounds must be an integer, got 1.5"),
        ({"clients": True}, "clients must be an integer, got True"),
        ({"energy_start": "high"}, "energy_start must be a number, got 'high'"),
        ({"round": 1}, "'round' is no field of TrainConfig"),
    ],
)
def test_values_of_wrong_types(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train(TinyTask(), **fields)


def test_unknown_task() -> None:
    known = "digits, text, adr, ner, mind"
    with pytest.raises(ValueError, match=f"task must be one of {known}, got 'chess'"):
        train("chess")
