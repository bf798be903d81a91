"""Whole runs of task ner: every method, run folders, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import make_encoder

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("seqeval", reason="seqeval is not installed")

from tiny_ner import (
    DRUGS,
    ILLNESSES,
    POSITIONS,
    VOCABULARY,
    data,
    encoder,
    make_dataset,
    ner_task,
    single,
    write_conll,
)

from fedkd_fast.methods import METHODS
from fedkd_fast.models import trainable_parameters
from fedkd_fast.runs import evaluate_run, load_run, predict_run
from fedkd_fast.sweep import plan_sweep
from fedkd_fast.trainer import Run, train

__all__ = ["data", "encoder", "single"]
POOLED = [method for method in METHODS if METHODS[method].pools_data]
FEDERATED = [method for method in METHODS if method not in POOLED]
FAST: dict[str, Any] = {"max_length": 16, "rounds": 2, "batch_size": 8, "threads": 1}


def run_of(data: Path | str, encoder: str, method: str, **fields: Any) -> Run:
    return train("ner", method, data=str(data), mentor=encoder, **FAST | fields)


@pytest.mark.parametrize("method", FEDERATED)
def test_every_method_trains_clients_with_tags_of_their_own(
    method: str, data: Path, encoder: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = run_of(data, encoder, method, out=str(out), lr_mentor=1e-2, lr_mentee=1e-2)
    assert (run.config.clients, run.summary["clients"]) == (3, 3)
    found = load_run(out)
    start = ner_task(data, encoder)
    for role, models in (("mentor", found.mentors), ("mentee", found.mentees)):
        if not models:
            continue
        assert len(models) == 3
        states = [model.state_dict() for model in models]
        heads = [state["classifier.weight"] for state in states]
        assert [len(head) for head in heads] == [3, 3, 5]
        # Two sets of tags of one size: what began as equal heads was trained apart.
        assert not torch.equal(heads[0], heads[1])
        build = start.build_mentor if role == "mentor" else start.build_mentee
        before = build().state_dict()
        names = [name for name in before if not name.startswith("classifier.")]
        shared = METHODS[method].exchanges and (role == "mentee" or not found.mentees)
        equal = [all(torch.equal(states[0][n], one[n]) for one in states[1:]) for n in names]
        moved = [not torch.equal(states[0][name], before[name]) for name in names]
        assert all(equal) == shared
        assert any(moved)
    again = evaluate_run(out)
    for key in ("score_mentor", "scores_mentor", "score_mentee", "score_mean", "metrics"):
        assert again[key] == run.summary[key], key
    scores = run.summary["scores_mentor"] or run.summary["scores_mentee"]
    assert len(scores) == 3
    assert len(list(predict_run(out, client=2))) == 30


def test_a_private_head_does_not_travel(data: Path, encoder: str) -> None:
    run = run_of(data, encoder, "fedavg", rounds=1)
    model = run.mentors[0]
    trained = trainable_parameters(model)
    body = sum(v.numel() for name, v in trained.items() if not name.startswith("classifier."))
    assert run.summary["parameters_shared"] == body < sum(v.numel() for v in trained.values())


@pytest.mark.parametrize("method", ["fedkd", "fedavg", *POOLED])
def test_a_single_dataset_shares_its_head(
    method: str, single: Path, encoder: str, tmp_path: Path
) -> None:
    run = run_of(single, encoder, method, clients=2, out=str(tmp_path / "run"))
    again = evaluate_run(tmp_path / "run")
    for key in ("score_mentor", "score_mentee", "score_mean", "metrics"):
        assert again[key] == run.summary[key], key
    assert len(load_run(tmp_path / "run").mentors) == (2 if method == "fedkd" else 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # The other half of the data is looked at once, at the end.
    assert [json.loads(line)["split"] for line in lines if '"client": 0' in line] == ["dev", "test"]


@pytest.mark.parametrize("joined", [False, True])
def test_a_sweep_knows_its_finished_runs(
    joined: bool, data: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the datasets decide how many clients there are, and where they are relative."""
    pytest.importorskip("yaml", reason="sweeps need PyYAML")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(data / "c")
    named = "data/a,data/b" if joined else "data"
    common = {"task": "ner", "data": named, "mentor": encoder, "rounds": 1, "local_steps": 1}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"common": {**common, "max_length": 16}, "methods": ["local"]}))
    (planned,) = plan_sweep(file, tmp_path / "out")
    planned.train()
    (again,) = plan_sweep(file, tmp_path / "out")
    assert again.finished
    assert len(load_run(again.folder).mentors) == 2
    # What is scored now is something else, also where nothing else is.
    test = data / "b" / "test.conll"
    test.write_text(test.read_text().replace("B-Disease", "O", 1))
    with pytest.raises(ValueError, match="local-s0 holds a run on other test data than there are"):
        plan_sweep(file, tmp_path / "out")
    # Data that cannot be read may be other ones.
    test.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"test\.conll, line 1: not UTF-8 text"):
        plan_sweep(file, tmp_path / "out")
    test.write_text("took O\n")
    config = again.folder / "config.json"
    known = json.loads(config.read_text())
    del known["task_facts"]["content"]
    config.write_text(json.dumps(known))
    assert plan_sweep(file, tmp_path / "out")[0].finished, "older runs do not tell"


def test_a_mentee_must_know_as_many_positions(data: Path, encoder: str, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    short = make_encoder(tmp_path / "short", VOCABULARY, 8)
    with pytest.raises(ValueError, match="max_length must be at most 8, the positions that .*sho"):
        run_of(data, encoder, "fedkd", mentee=short)


def test_a_run_without_models_is_refused(data: Path, encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_of(data, encoder, "fedavg", out=str(out), rounds=1, local_steps=1)
    shutil.rmtree(out / "mentors")
    with pytest.raises(ValueError, match="run holds no models: mentee or mentors is wanted"):
        load_run(out)


@pytest.mark.parametrize("method", POOLED)
def test_central_needs_one_set_of_tags(method: str, data: Path, encoder: str) -> None:
    with pytest.raises(ValueError, match=f"method {method} puts all data together, .* task ner"):
        run_of(data, encoder, method)


@pytest.mark.parametrize("method", ["fedavg", "fedkd", *POOLED])
def test_datasets_of_equal_tags_share_a_head_and_are_tested_apart(
    method: str, encoder: str, tmp_path: Path
) -> None:
    for seed in range(2):
        make_dataset(tmp_path / "data" / str(seed), ("Drug", None), seed, dev=True)
    fields = {"out": str(tmp_path / "run"), "lr_mentor": 1e-2, "lr_mentee": 1e-2}
    run = run_of(tmp_path / "data", encoder, method, **fields)
    task = ner_task(tmp_path / "data", encoder)
    wanted = [
        task.evaluate((run.mentors * 2)[client if len(run.mentors) > 1 else 0], client=client)["F1"]
        for client in range(2)
    ]
    assert run.summary["scores_mentor"] == wanted
    assert evaluate_run(tmp_path / "run")["scores_mentor"] == wanted


def test_it_learns(data: Path, encoder: str) -> None:
    """Words tell their types, so even random layers under a trained head find some."""
    fields = {"local_epochs": 5, "lr_mentor": 2e-2, "lr_mentee": 2e-2, "lr_end": 1.0}
    run = run_of(data, encoder, "fedkd", **fields)
    task = ner_task(data, encoder)
    before = [task.evaluate(task.build_mentor(client), client=client)["F1"] for client in range(3)]
    for score, first in zip(run.summary["scores_mentor"], before, strict=True):
        assert score > first + 0.2
    assert run.summary["score_mentor"] > 0.5


def test_datasets_by_comma(
    data: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    run = run_of("c, a", encoder, "local", out=str(tmp_path / "run"), rounds=1)
    assert run.config.clients == 2
    monkeypatch.chdir(tmp_path)
    again = evaluate_run(tmp_path / "run")
    assert again["scores_mentor"] == run.summary["scores_mentor"]
    with pytest.raises(ValueError, match=r"clients must be 3, the datasets .* got 2"):
        run_of(data, encoder, "local", clients=2)


def test_a_run_is_not_scored_on_other_tags(single: Path, encoder: str, tmp_path: Path) -> None:
    run_of(single, encoder, "local", clients=1, local_steps=1, out=str(tmp_path / "run"))
    for file in single.iterdir():
        file.write_text(file.read_text().replace("-Drug", "-Zebra"))
    with pytest.raises(ValueError, match=r"not those of the run: .*Zebra.* has \['O', 'B-Drug"):
        evaluate_run(tmp_path / "run")


def test_a_run_tags_where_its_data_and_encoder_are_gone(
    data: Path, encoder: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_of(data, encoder, "fedkd", out=str(out), local_epochs=3, lr_mentor=2e-2, lr_mentee=2e-2)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"data": "/gone", "mentor": "/gone"}))
    samples = tmp_path / "samples.jsonl"
    rows = [{"tokens": [word, "the"]} for word in (*DRUGS, *ILLNESSES)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for client, types in enumerate(({"Drug"}, {"Disease"}, {"Drug", "Reaction"})):
        found = [record["entities"] for record in predict_run(out, str(samples), client=client)]
        assert len(found) == len(rows)
        assert {one["type"] for entities in found for one in entities} <= types
        model = load_run(out).mentors[client]
        known = model.config.id2label.values()  # type: ignore[union-attr,operator]
        assert {name[2:] for name in known if name != "O"} == types


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, "data must name tagged sentences for task ner, got None"),
        ({"mentor": None}, "mentor must name a pretrained encoder for task ner, got None"),
        ({"mentor": "/nowhere"}, "mentor must be a folder or name .* got '/nowhere'"),
        ({"max_length": 2}, "max_length must be at least 3, got 2"),
        ({"max_length": POSITIONS + 1}, f"max_length must be at most {POSITIONS}, .* got 33"),
        ({"mentee_layers": 4}, r"mentee_layers must lie in 1\.\.3, .* got 4"),
        ({"data": "./nope"}, r"data must be a folder .* got '\./nope': no such folder"),
        ({"partition": "key:drug"}, r"partition must name a key of the data \(none\)"),
    ],
)
def test_options(
    fields: dict[str, Any], message: str, single: Path, encoder: str, tmp_path: Path
) -> None:
    given = FAST | {"data": str(single), "mentor": encoder, "out": str(tmp_path / "run")} | fields
    with pytest.raises(ValueError, match=message):
        train("ner", "fedkd", **given)
    assert not (tmp_path / "run").exists()


def test_data_without_entities(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_conll(tmp_path / "data" / f"{split}.txt", [(["the"], ["O"])])
    with pytest.raises(ValueError, match="data .* hold no entities to train on"):
        run_of(tmp_path / "data", encoder, "local", clients=1)
