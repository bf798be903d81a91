"""Training on a GPU: on a pretended one everywhere, on a real one where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_device import pretended_gpu
from tiny_task import TinyTask, tiny_task
from torch import Tensor, nn

from fedkd_fast import ops
from fedkd_fast._device import check_device, device_of, on_device, require_device
from fedkd_fast.config import TrainConfig
from fedkd_fast.methods import METHODS, LocalSettings
from fedkd_fast.methods.base import SoloLearner
from fedkd_fast.models import MeanOfModels, run_model
from fedkd_fast.runs import evaluate_run, load_run
from fedkd_fast.sweep import plan_sweep
from fedkd_fast.tasks import Batch, Task
from fedkd_fast.trainer import Run, train

# What a run takes differs from one to the next.
TIMES = {"seconds", "seconds_codec"}


def run_there(task: str | Task, method: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Run:
    """Train on the pretended GPU."""
    monkeypatch.setattr("fedkd_fast.trainer.require_device", lambda name: None)
    with pretended_gpu() as there:
        run = train(task, method, device="cuda", **fields)
        models = [*run.mentors, *([] if run.mentee is None else [run.mentee])]
        assert models
        assert all(one in there for model in models for one in model.parameters())
    return run


def outcome(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.summary.items() if name not in TIMES}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def same_run(here: Run, there: Run) -> bool:
    """Tell whether the same kernels gave the same, so that nothing depends on the device."""
    assert outcome(here) == outcome(there)
    pairs = [*zip(here.mentors, there.mentors, strict=True)]
    if here.mentee is not None and there.mentee is not None:
        pairs.append((here.mentee, there.mentee))
    return all(same_weights(*pair) for pair in pairs)


# ---- the pretence --------------------------------------------------------------------------------


def test_what_cuda_refuses_is_refused() -> None:
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (
            lambda: here + there,
            lambda: here.add_(there),
            lambda: torch.cat([here, there]),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: here[there.long()],
            lambda: there.index_put_((torch.tensor([0]),), here[:1]),
            lambda: ops.layer_mse(there[:, None], there[:, None], here),
            lambda: nn.Linear(3, 1).to("cuda")(here),
        ):
            with pytest.raises(RuntimeError, match="all tensors on one device wanted"):
                wrong()
        for wrong in (lambda: there.numpy(), lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="can't convert"):
                wrong()


def test_what_cuda_allows_is_allowed() -> None:
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        found = [
            there + torch.tensor(2.0),
            there[torch.tensor([0])],
            here.to("cuda", copy=True),
            there.new_zeros(2),
            torch.zeros_like(there),
            nn.Linear(3, 1).to("cuda")(there),
            there.double(),
        ]
        assert [str(one.device) for one in found] == ["cuda"] * len(found)
        moved = [here.copy_(there), there.cpu(), there.to("cpu"), here.to("cpu")]
        assert [str(one.device) for one in moved] == ["cpu"] * len(moved)
        assert there.to("cuda") is there
        assert there.cpu().numpy().tolist() == [1.0] * 3


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_device(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"rounds": 2, "clip_norm": 1.0, "participation": 0.7}
    here = train(tiny_task(method), method, **fields)
    out = tmp_path / "run"
    there = run_there(tiny_task(method), method, monkeypatch, out=str(out), **fields)
    assert same_run(here, there)
    # What was saved is read on a machine without the device.
    loaded = load_run(out, tiny_task(method))
    assert loaded.config["device"] == "cuda"
    assert all(map(same_weights, loaded.mentors, here.mentors))
    assert evaluate_run(out, tiny_task(method))["score_mentor"] == here.summary["score_mentor"]


@pytest.mark.parametrize("method", METHODS)
def test_clients_in_files_run_on_a_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a client goes where its models lie."""
    fields: dict[str, Any] = {"rounds": 3, "feedback": "both", "participation": 0.7}
    here = train(tiny_task(method), method, **fields)
    there = run_there(tiny_task(method), method, monkeypatch, memory_gb=1e-9, **fields)
    assert same_run(here, there)


@pytest.mark.parametrize(
    "fields",
    [
        {"refresh_steps": 2},
        {"mutual": False},
        {"hidden": False},
        {"inference": "mean"},
        {"preset": "public_code", "hidden": False, "clip_norm": 0.5},
        {"codec": "raw", "server_optimizer": "adam", "server_lr": 0.1},
        {"feedback": "both", "spectra": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_modes_of_distillation_run_on_a_device(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TinyTask(layered=True)
    there = run_there(task, "fedkd", monkeypatch, rounds=1, **fields)
    assert same_run(train(task, "fedkd", rounds=1, **fields), there)


def test_digits_run_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    given: dict[str, Any] = {"clients": 2, "rounds": 1, "local_steps": 2, "inference": "mean"}
    fields: dict[str, Any] = {**given, "samples_per_client": 40, "gradient_checkpointing": True}
    there = run_there("digits", "fedkd", monkeypatch, **fields)
    assert same_run(train("digits", "fedkd", **fields), there)


@pytest.mark.parametrize("task", ["text", "ner", "mind"])
def test_texts_run_on_a_device(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    data, encoder = _texts(task, tmp_path)
    given: dict[str, Any] = {
        "data": data,
        "mentor": encoder,
        "mentee_layers": 1,
        "clients": 2,
        "batch_size": 8,
    }
    fields: dict[str, Any] = {
        **given,
        "rounds": 1,
        "max_length": 12,
        "hidden": True,
        "attention": True,
    }
    fields |= {"mentee_adapter": None, "inference": "mean", "local_steps": 2}
    there = run_there(task, "fedkd", monkeypatch, **fields)
    assert same_run(train(task, "fedkd", **fields), there)


def _texts(task: str, folder: Path) -> tuple[str, str]:
    """Write data and an encoder."""
    from tiny_encoder import make_encoder
    from tiny_news import write_encoder, write_news

    if task == "mind":
        write_news(folder / "data")
        return str(folder / "data"), write_encoder(folder / "encoder")
    words = ["good", "bad", "day", "film"]
    data = folder / "data"
    data.mkdir()
    if task == "text":
        rows = [
            {"text": f"{words[n % 2]} {words[2 + n // 2 % 2]}", "label": n % 2} for n in range(24)
        ]
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{split}.jsonl").write_text(text)
    else:
        pytest.importorskip("seqeval", reason="seqeval is not installed")
        lines = "".join(
            f"{words[n % 4]}\t{'B-X' if n % 4 < 2 else 'O'}\n\n"[: None if n % 3 else -1]
            for n in range(48)
        )
        for split in ("train", "test"):
            (data / f"{split}.conll").write_text(lines)
    (folder / "encoder").mkdir()
    return str(data), make_encoder(folder / "encoder", words, 16)


# ---- parts ---------------------------------------------------------------------------------------


def test_a_batch_goes_as_a_whole() -> None:
    batch = Batch({"a": torch.ones(2), "b": torch.ones(2)}, torch.zeros(2), torch.ones(2, 3))
    with pretended_gpu() as there:
        moved = batch.to(torch.device("cuda"))
        parts = [*moved.inputs.values(), moved.labels, moved.layer_share]
        assert all(one is not None and one in there for one in parts)
        assert moved.to(torch.device("cuda")).labels is moved.labels
        assert Batch({}, torch.zeros(2)).to(torch.device("cuda")).layer_share is None
    assert batch.to(torch.device("cpu")).inputs["a"] is batch.inputs["a"]


def test_models_are_called_where_they_lie() -> None:
    assert str(device_of(nn.Identity())) == "cpu"
    task = TinyTask()
    points = {"points": task.points}
    with pretended_gpu() as there:
        model = task.build_mentee().to("cuda").eval()
        assert device_of(model) == torch.device("cuda")
        logits = run_model(model, points).logits
        assert logits in there
        assert run_model(MeanOfModels([model, model]), points).logits in there


def test_only_copies_to_a_gpu_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: asked.append(non_blocking))
    for name in ("cuda:1", "cpu"):
        on_device(torch.zeros(1), torch.device(name))
    assert asked == [True, False]


def test_half_precision_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *kind, dtype: asked.append((*kind, dtype)))
    settings: dict[str, Any] = {"lr_mentor": 0.1, "lr_mentee": 0.1, "seed": 0, "bfloat16": True}
    with pretended_gpu():
        for device in ("cpu", "cuda:1"):
            learner = SoloLearner(
                TinyTask(), LocalSettings(**settings, device=device), "mentee", shares=True
            )
            learner.autocast()
    assert asked == [("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedkd"])
def test_what_travels_is_on_the_cpu(method: str) -> None:
    settings = LocalSettings(lr_mentor=0.1, lr_mentee=0.1, seed=0, device="cuda")
    with pretended_gpu() as there:
        learner = METHODS[method].make_learner(TinyTask(), settings)
        state = learner.exchanged()
        assert all(one not in there for one in state.values())
        learner.adopt({name: value + 1.0 for name, value in state.items()})
        assert all(one in there for one in learner.shared_parameters().values())
        found = learner.exchanged()
        assert all(torch.equal(found[name], value + 1.0) for name, value in state.items())


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_names_of_devices(name: str) -> None:
    check_device(name)
    assert TrainConfig(device=name).device == name


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:01", "cpu:0", "mps", 0, None]
)
def test_no_names_of_devices(name: Any) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"device must be cpu, cuda or cuda:N, got {name!r}")
    ):
        TrainConfig(device=name)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    require_device("cpu")
    message = "device must be .* that is there, got 'cuda': this torch has no CUDA"
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(TinyTask(), "fedkd", device="cuda", out=str(out))
    assert not out.exists()
    plan = tmp_path / "sweep.yaml"
    plan.write_text("methods: [fedkd]\ncommon: {device: cuda}\n")
    with pytest.raises(ValueError, match=f"fedkd.*: {message}"):
        plan_sweep(plan, tmp_path / "sweep")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    require_device("cuda")
    require_device("cuda:0")
    with pytest.raises(ValueError, match="got 'cuda:1': this torch finds 1 GPUs"):
        require_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got 'cuda': this torch finds 0 GPUs"):
        require_device("cuda")


# ---- with a GPU ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_gpu(method: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rounds": 2, "clip_norm": 1.0}
    here = train(tiny_task(method), method, **fields)
    there = train(tiny_task(method), method, device="cuda", out=str(tmp_path / "run"), **fields)
    assert all(one.is_cuda for model in there.mentors for one in model.parameters())
    # The same but for roundings, and the same bytes where all numbers travel.
    for name in ("score_mentor", "score_mentee"):
        if here.summary[name] is not None:
            assert there.summary[name] == pytest.approx(here.summary[name], abs=0.1)
    if here.summary["codec"] == "raw":
        assert there.summary["bytes_up"] == pytest.approx(here.summary["bytes_up"], rel=0.01)
    scores = evaluate_run(tmp_path / "run", tiny_task(method))
    assert scores["score_mentor"] == pytest.approx(there.summary["score_mentor"], abs=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_of_layers_runs_on_a_gpu(precision: str) -> None:
    fields: dict[str, Any] = {"rounds": 2, "precision": precision, "refresh_steps": 2}
    here = train(TinyTask(layered=True), "fedkd", **fields)
    there = train(TinyTask(layered=True), "fedkd", device="cuda", **fields)
    assert there.summary["score_mentee"] == pytest.approx(here.summary["score_mentee"], abs=0.1)
