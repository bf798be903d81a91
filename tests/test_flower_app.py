"""FedKD as a Flower app: the configuration here, messages and runs by Flower's own Python."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flower_env import ROOT, end_superlink, flower_environment, flower_python, run_flower

from fedkd_fast.envelopes import SealedCarrier, SealedNode
from fedkd_fast.integrations import flower
from fedkd_fast.integrations.flower.seals import make_node, sealed_carrier
from fedkd_fast.integrations.flower.settings import partition, settings, state_folder
from fedkd_fast.sealing import PrivateKey
from fedkd_fast.trainer import train

EXAMPLE = ROOT / "examples" / "flower"
CLOCKS = ("seconds", "seconds_codec")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in CLOCKS}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_nothing_of_flower_is_imported_before_it_is_used() -> None:
    code = "import sys, fedkd_fast.integrations.flower; assert 'flwr' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'serverapp'"):
        _ = flower.serverapp


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_the_message_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r"needs Flower: pip install \"fedkd-fast\[flower\]\""):
        _ = flower.server_app


def test_options_are_those_of_train_with_dashes() -> None:
    found = settings(
        {
            "task": "digits",
            "rounds": 3,
            "mentee-layers": 2,
            "lr-mentor": "",
            "distillation.temperature": 2.0,
            "distillation.loss": "",
            "wait": 5,
            "client-timeout": 7.5,
        }
    )
    config = found.config
    assert (config.rounds, config.mentee_layers, config.client_timeout) == (3, 2, 7.5)
    assert config.lr_mentor == 1e-3 and config.clients == 4, "what is not given is the recipe's"
    assert config.distillation == {"temperature": 2.0} and found.wait_s == 5.0
    assert config.checkpoint_every == config.retries == 0
    assert settings({}).config.threads == 1, "digits set it"


def test_a_node_may_have_things_elsewhere() -> None:
    found = settings({"rounds": 3, "out": "/runs/a", "tensorboard": True}, {"threads": 2})
    assert found.config.threads == 2 and found.config.rounds == 3
    assert found.config.out is None and not found.config.tensorboard


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"round": 3}, "unknown name 'round'; known are .*rounds"),
        ({"local_epochs": 3}, "unknown name 'local_epochs'; known are .*local-epochs"),
        ({"faults": 0.1}, "'faults' must be left out: .*one process"),
        ({"checkpoint-every": 1}, "'checkpoint-every' must be left out"),
        ({"out": "runs/a"}, "'out' must be an absolute path, got 'runs/a'"),
        ({"wait": "long"}, "'wait' must be seconds, at least 0, got 'long'"),
        ({"wait": float("nan")}, "'wait' must be seconds, at least 0, got nan"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"task": "faces"}, "task must be one of .*, got 'faces'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'partition-id' must be 0 to 2, the run has 3 clients, got None"),
        ({"partition-id": 3}, "got 3"),
        ({"partition-id": True}, "got True"),
        ({"partition-id": 0, "num-partitions": 2}, "'num-partitions' must be 3.*got 2"),
    ],
)
def test_a_node_that_cannot_be_a_client_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(config, 3)


def test_each_client_of_each_run_has_a_folder() -> None:
    assert state_folder({"state-dir": "/states"}, 5, 1) == Path("/states/run-5/client-1")
    assert state_folder({}, 5, 1).is_absolute()
    with pytest.raises(ValueError, match="'state-dir' must be an absolute path, got 'here'"):
        state_folder({"state-dir": "here"}, 5, 1)


def test_the_example_has_all_options_and_none_that_is_refused() -> None:
    tomllib = pytest.importorskip("tomllib")
    app = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    nested = app["config"].pop("distillation")
    config = {**app["config"], **{f"distillation.{k}": v for k, v in nested.items()}}
    assert settings(config).config.rounds == 2 and not settings(config).config.encrypt
    with pytest.raises(ValueError, match="known are (.*)") as error:
        settings({"?": 1})
    known = set(str(error.value).split("known are ")[1].split(", "))
    assert known == set(app["config"]) - {"wait", "rejoin", "server-key", "enrolment"}
    assert app["components"] == {
        "serverapp": "fedkd_fast.integrations.flower:server_app",
        "clientapp": "fedkd_fast.integrations.flower:client_app",
    }


def test_a_run_is_sealed_unless_it_says_otherwise(tmp_path: Path) -> None:
    found = settings({})
    assert found.config.encrypt and settings({}, {}).config.encrypt
    how = "make pairs of keys with `fedkd-fast keygen FILE`.*or set the run config encrypt=false"
    carrier: Any = object()
    with pytest.raises(ValueError, match=f"run config lacks 'server-key' and 'enrolment': {how}"):
        sealed_carrier(carrier, found.config, {"server-key": ""}, 7)
    own = PrivateKey.generate()
    own.save(tmp_path / "own")
    with pytest.raises(ValueError, match=f"node config lacks 'server-key': {how}"):
        make_node(found, 0, tmp_path, {"key": str(tmp_path / "own")}, 7)
    with pytest.raises(ValueError, match="node config 'key' must be an absolute path, got 'own'"):
        make_node(found, 0, tmp_path, {"key": "own", "server-key": "server"}, 7)
    (tmp_path / "pub").write_text(str(PrivateKey.generate().public))
    (tmp_path / "clients").write_text(json.dumps({"0": str(own.public)}))
    keys = {"key": str(tmp_path / "own"), "server-key": str(tmp_path / "pub")}
    assert isinstance(make_node(found, 0, tmp_path, keys, 7), SealedNode)
    files = {"server-key": str(tmp_path / "own"), "enrolment": str(tmp_path / "clients")}
    assert isinstance(sealed_carrier(carrier, found.config, files, 7), SealedCarrier)


def test_a_node_with_a_key_takes_part_in_sealed_runs_alone(tmp_path: Path) -> None:
    """Else whoever brings the run's configuration could have its updates in the clear."""
    plain = settings({"encrypt": False})
    carrier: Any = object()
    assert sealed_carrier(carrier, plain.config, {}, 7) is carrier
    assert not isinstance(make_node(plain, 0, tmp_path, {}, 7), SealedNode)
    with pytest.raises(ValueError, match="encrypt must be true for a node that has a 'key'"):
        make_node(plain, 0, tmp_path, {"key": "/keys/own"}, 7)


def test_messages_of_flower_change_nothing(tmp_path: Path) -> None:
    """Without the runtime: also where a node comes back, is gone for good, or is another one."""
    script = str(ROOT / "tests" / "flower_grid.py")
    run_flower(tmp_path, script, str(tmp_path), timeout_s=900)
    fields = {"clients": 2, "rounds": 3, "samples_per_client": 40, "feedback": "both"}
    train("digits", out=str(tmp_path / "here"), **fields)
    for case in ("plain", "restarted", "moved"):
        assert metrics(tmp_path / case) == metrics(tmp_path / "here"), case
    fields["encrypt"] = True
    train("digits", out=str(tmp_path / "here-sealed"), **fields)
    assert metrics(tmp_path / "restarted-sealed") == metrics(tmp_path / "here-sealed")
    assert (
        summary(tmp_path / "restarted-sealed")["bytes_up"] > summary(tmp_path / "plain")["bytes_up"]
    )
    retries = [line["event"] for line in events(tmp_path / "restarted-sealed")].count("retry")
    assert retries == 1
    faults = [
        (line["event"], line["round"], line["client"])
        for case in ("restarted", "unavailable")
        for line in events(tmp_path / case)
        if line["event"] in ("retry", "failed")
    ]
    assert faults == [("retry", 2, 1), ("failed", 2, 1), ("failed", 3, 1)]
    assert len(summary(tmp_path / "unavailable")["scores_mentor"]) == 2
    assert metrics(tmp_path / "unavailable")[:3] == metrics(tmp_path / "here")[:3]
    assert {line["bytes_up"] for line in metrics(tmp_path / "unavailable")[4:5]} == {0}


def test_a_simulation_is_the_same_run(tmp_path: Path) -> None:
    fields = {"clients": 2, "rounds": 2, "seed": 1, "samples_per_client": 60}
    environment = flower_environment(tmp_path)
    options = "seed=1 samples-per-client=60 out='" + str(tmp_path / "there") + "'"
    flwr = str(flower_python().with_name("flwr"))
    try:
        for _ in range(5):
            found = subprocess.run(
                [flwr, "run", str(EXAMPLE), "--stream", "--run-config", options],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=900,
            )
            # Flower gives its SuperLink 15 s to start, which a busy machine may not.
            if "Failed to start local SuperLink" not in found.stdout + found.stderr:
                break
    finally:
        end_superlink(environment["FLWR_LOCAL_CONTROL_API_PORT"])
    assert (tmp_path / "there").is_dir(), found.stdout + found.stderr
    train("digits", out=str(tmp_path / "here"), **fields)
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")
    assert summary(tmp_path / "there") == summary(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["plain", "killed"])
def test_a_deployment_is_the_same_run(tmp_path: Path, kill: bool) -> None:
    """With TLS, node authentication, seals; also where a SuperNode is killed and comes back."""
    options = ["--kill-round", "2"] if kill else []
    found = run_flower(
        tmp_path,
        *(str(EXAMPLE / "deploy.py"), str(tmp_path / "deployed"), *options),
        timeout_s=1800,
    )
    train("digits", clients=2, rounds=2, encrypt=True, out=str(tmp_path / "here"))
    there = tmp_path / "deployed" / "run"
    assert ("killed SuperNode 1 in round 2" in found.stdout) == kill
    failed = [line for line in events(there) if line["event"] == "failed"]
    if not failed:
        assert metrics(there) == metrics(tmp_path / "here")
        assert [line["event"] for line in events(there)].count("retry") == int(kill)
    else:  # it came back too late for the round
        assert kill and [(line["round"], line["client"]) for line in failed] == [(2, 1)]
    assert summary(there)["rounds"] == 2
