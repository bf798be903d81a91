"""Robust means and differential privacy inside a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import federation
from tiny_task import TinyTask, tiny_task

from fedkd_fast.methods import METHODS
from fedkd_fast.trainer import Stopped, configure, resume_run, train

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]
RULES = ("clip", "clip:0.5", "median", "trimmed:0.2", "krum:1")


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", EXCHANGING)
@pytest.mark.parametrize("rule", RULES)
def test_every_method_takes_every_rule(method: str, rule: str) -> None:
    # The top hundredth of a small model says little, by any rule.
    fields = {"top_share": 0.5} if method == "sparseloco" else {}
    run = train(tiny_task(method), method, clients=6, rounds=3, aggregation=rule, **fields)
    assert run.summary["score"] > 0.5


def test_a_rule_of_equal_updates_is_their_mean() -> None:
    """Up to rounding: one client's frame, six times."""
    means = []
    for rule in ("mean", *RULES[2:]):
        clients, server = federation("fedkd", 6, aggregation=rule)
        clients[0].train(1)
        frame = clients[0].upload(0.95)
        server.step([frame] * 6, 1.0)
        means.append(server.mean)
    for mean in means[1:]:
        for name, value in means[0].items():
            torch.testing.assert_close(mean[name], value, rtol=1e-5, atol=1e-7)


def test_attackers_are_left_out_and_named(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"clients": 10, "rounds": 3, "attackers": 0.2, "attack_factor": -10.0}
    train(TinyTask(100), "fedkd", out=tmp_path / "run", aggregation="krum:2", **fields)
    left = [line for line in journal(tmp_path / "run") if line["event"] == "left-out"]
    from fedkd_fast.faults import Faults

    attackers = Faults(0.0, 0.2, -10.0, 10, seed=0).attackers
    assert {line["client"] for line in left} == attackers
    assert len(left) == 6 and all("krum" in line["detail"] for line in left)
    train(TinyTask(100), "fedkd", out=tmp_path / "clip", aggregation="clip", **fields)
    scaled = [line for line in journal(tmp_path / "clip") if line["event"] == "left-out"]
    assert attackers <= {line["client"] for line in scaled}
    assert all("scaled by" in line["detail"] for line in scaled)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"aggregation": "mode"}, "aggregation must be .*got 'mode'"),
        ({"aggregation": "krum:2"}, "krum:2 needs at least 7 clients a round, got 3"),
        ({"aggregation": "median", "dp_clip": 1.0}, "dp_clip needs aggregation to be mean"),
        ({"weighting": "samples", "dp_clip": 1.0}, "dp_clip needs weighting to be equal"),
        ({"weighting": "samples", "aggregation": "median"}, "median needs weighting to be equal"),
        ({"quorum": 1.0, "dp_clip": 1.0}, "dp_clip needs quorum to be below 1"),
        ({"method": "local", "dp_clip": 1.0}, "dp_clip needs a method that exchanges"),
        ({"norm_limit": 0.5}, "norm_limit must be more than 1, got 0.5"),
        ({"dp_clip": 0.0}, "dp_clip must be positive"),
        ({"dp_noise": 2.0}, "dp_noise needs dp_clip, .* got dp_noise 2.0 and dp_clip None"),
        ({"dp_seed": 0}, "dp_seed needs dp_clip"),
        ({"dp_delta": 1e-6}, "dp_delta needs dp_clip"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], words: str) -> None:
    """But noise that a sweep gives to all of its runs does no harm to those that send nothing."""
    configure(TinyTask(), "local", {"dp_noise": 2.0, "dp_seed": 1})
    with pytest.raises(ValueError, match=words):
        configure(TinyTask(), fields.pop("method", "fedkd"), fields)


PRIVATE: dict[str, Any] = {
    "clients": 10, "rounds": 4, "participation": 0.4, "dp_clip": 0.5, "dp_noise": 0.3, "dp_seed": 5,
    "feedback": "both",
}  # fmt: skip


def test_privacy_is_accounted_for() -> None:
    pytest.importorskip("dp_accounting")
    from fedkd_fast.privacy import epsilon

    run = train(TinyTask(100), "fedkd", **PRIVATE)
    assert run.summary["epsilon"] == pytest.approx(epsilon(0.3, 0.4, 4, 1e-5))
    assert run.summary["delta"] == 1e-5 and math.isfinite(run.summary["epsilon"])
    again = train(TinyTask(100), "fedkd", **PRIVATE)
    assert again.summary["scores_mentee"] == run.summary["scores_mentee"]
    assert again.summary["bytes_down"] == run.summary["bytes_down"]
    secret = train(TinyTask(100), "fedkd", **{**PRIVATE, "dp_seed": None})
    assert secret.summary["bytes_down"] != run.summary["bytes_down"]
    assert "epsilon" not in train(TinyTask(), "fedkd").summary


def test_rounds_without_any_client_release_noise(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    fields = {**PRIVATE, "participation": 0.05, "rounds": 8}
    train(TinyTask(100), "fedkd", out=tmp_path / "run", **fields)
    rounds = [line for line in journal(tmp_path / "run") if line["event"] == "round"]
    assert {0} < {line["asked"] for line in rounds}
    assert len({line["digest"] for line in rounds}) == 8


@pytest.mark.parametrize("turns", [1, 3, 6])
def test_a_private_run_goes_on_with_the_same_noise(turns: int, tmp_path: Path) -> None:
    """Also where nobody knows the seed: participants and noise are part of the checkpoint."""
    pytest.importorskip("dp_accounting")
    train(TinyTask(100), "fedkd", out=tmp_path / "whole", **PRIVATE)
    seen = [0]

    def stop() -> bool:
        seen[0] += 1
        return seen[0] == turns

    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(TinyTask(100), "fedkd", out=out, stop=stop, **PRIVATE)
    resume_run(out, task=TinyTask(100))
    digests = [
        [line["digest"] for line in journal(folder) if line["event"] == "round"]
        for folder in (tmp_path / "whole", out)
    ]
    assert digests[0] == digests[1]


def test_noise_of_a_private_run_is_what_the_accounting_says() -> None:
    """The released mean of no update at all, with a codec that loses nothing."""
    pytest.importorskip("dp_accounting")
    fields = {**PRIVATE, "codec": "raw", "feedback": "none", "dp_noise": 2.0}
    _, server = federation("fedkd", task=TinyTask(100), **fields)
    before = {name: value.clone() for name, value in server.expected()[1].items()}
    for _ in range(40):
        server.step({}, 1.0)
    moved = torch.cat([(server.expected()[1][n] - before[n]).flatten() for n in before])
    # 40 steps of standard deviation 2.0·0.5/(0.4·10) each.
    wanted = math.sqrt(40) * 2.0 * 0.5 / 4.0
    assert float(moved.std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * len(moved)))


def test_scores_of_rounds_that_nobody_came_to_are_of_the_model_then(tmp_path: Path) -> None:
    """The noise of such a round moves the model, and what is scored is that."""
    pytest.importorskip("dp_accounting")
    fields = {**PRIVATE, "participation": 0.05, "rounds": 8, "dp_noise": 20.0}
    train(TinyTask(100), "fedkd", out=tmp_path / "run", **fields)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    asked = {line["round"]: line["asked"] for line in journal(tmp_path / "run")
             if line["event"] == "round"}  # fmt: skip
    brought = {line["round"] for line in lines if line["client"] is not None and line["bytes_down"]}
    assert {number for number, count in asked.items() if not count} <= brought
