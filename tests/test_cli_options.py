"""The options of `train`: complete, checked, with the defaults of tasks; and its progress bar."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import pytest
from cli_support import Refusal, refused

from fedkd_fast.__main__ import build_parser, main
from fedkd_fast.cli.progress import Status, progress_bar
from fedkd_fast.codec.message import CODECS
from fedkd_fast.config import PRESETS, TrainConfig
from fedkd_fast.methods import METHODS
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.tasks import TASKS, task_defaults

__all__ = ["refused"]
# Fields whose option has another name.
RENAMED = {"distillation": "--distill"}


def options() -> dict[str, argparse.Action]:
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions = commands.choices["train"]._actions
    return {flag: action for action in actions for flag in action.option_strings}


@pytest.mark.parametrize("field", sorted(TrainConfig.__dataclass_fields__))
def test_every_field_has_an_option(field: str) -> None:
    found = options()
    action = found[RENAMED.get(field, f"--{field.replace('_', '-')}")]
    assert action.dest == field
    # What is not given must be left to the task's recipe.
    assert action.default is argparse.SUPPRESS
    default = getattr(TrainConfig(), field)
    if isinstance(default, bool):
        assert action.nargs == 0
    elif isinstance(default, (int, float)):
        assert action.type is type(default)


def test_options_of_a_recipe_can_be_turned_off() -> None:
    found = options()
    assert {"--no-hidden", "--no-attention", "--no-mutual"} <= set(found)
    assert "--no-gradient-checkpointing" in found
    for flag in ("--mentor-adapter", "--mentee-adapter"):
        kind = found[flag].type
        assert callable(kind)
        assert kind("none") is None
        assert kind("lora:4") == "lora:4"


def _help(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_defaults_of_task_and_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, general = _help(capsys), TrainConfig()
    # One that no recipe changes, and one that they do.
    assert f"moves further than the clients did (default: {general.server_lr})" in text
    tasks_of: dict[str, list[str]] = {}
    for task in TASKS:
        rounds = task_defaults(task, general.method).get("rounds", general.rounds)
        tasks_of.setdefault(str(rounds), []).append(task)
    shown = "; ".join(f"{value} for {', '.join(tasks)}" for value, tasks in tasks_of.items())
    assert f"more: more bytes (default: {shown})" in text
    assert "(default: )" not in text and "None" not in text


def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    for name in (*METHODS, *PRESETS, *CODECS, *TASKS, "label_smoothing"):
        assert name in text


def test_distillation_is_parsed_by_type(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="training needs the extra [train]")
    given = ["--distill", "temperature=2", "--distill", "loss=joint", "--distill", "temperature=3"]
    short = ["--rounds", "1", "--clients", "2", "--local-steps", "1", "--quiet", "--no-hidden"]
    assert main(["train", "--out", str(tmp_path / "run"), *short, *given]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["distillation"] == {"temperature": 3.0, "loss": "joint"}
    assert (config["hidden"], config["attention"], config["local_steps"]) == (False, True, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("temperature=0", "temperature must be above 0, got 0.0"),
        ("temperature=hot", "temperature must be a number, got 'hot'"),
        ("task_weight=-1", "task_weight must be finite and at least 0, got -1.0"),
        ("loss=both", "loss must be one of separate, joint, got 'both'"),
        ("hidden=no", "hidden is a switch: give --hidden or --no-hidden"),
        ("heat=1", "KEY one of denominator, .*temperature.*, got 'heat=1'"),
        ("temperature", "KEY=VALUE is wanted .* got 'temperature'"),
    ],
)
def test_distillation_that_makes_no_sense(
    tmp_path: Path, refused: Refusal, value: str, message: str
) -> None:
    line = refused("train", "--out", tmp_path / "run", "--distill", value)
    assert re.search(f"argument --distill: .*{message}", line)


# ---- progress ------------------------------------------------------------------------------------


def client(number: int, done: int, loss: float | None = 0.51) -> ClientRecord:
    return ClientRecord(number, 10, done, done, 4, loss, 0.7, 1.0)


def scored(number: int, score: float | None, split: str | None) -> RoundRecord:
    return RoundRecord(number, 10, 0.95, 0.5, 0.7, score, score, None, split, 1000, 2000, 1.0, 0.1)


def test_progress_moves_with_clients_and_rounds() -> None:
    status = Status()
    assert (status.done, status.total) == (0, None)
    status.take(client(1, 1))
    assert (status.done, status.total) == (1, 40)
    assert status.text == "round 1/10  client 1/4  loss 0.510"
    status.take(client(1, 4))
    status.take(scored(1, 0.913, "dev"))
    assert (status.done, status.total) == (4, 40)
    assert status.text == "round 1/10  loss 0.500  dev 91.3%  1.00 kB up, 2.00 kB down"
    # The score stays until there is another one, and bytes add up.
    status.take(client(2, 3, loss=None))
    assert status.done == 7
    assert status.text == (
        "round 2/10  client 3/4  loss 0.700  dev 91.3%  1.00 kB up, 2.00 kB down"
    )
    status.take(scored(2, None, None))
    status.take(scored(3, 0.5, "test"))
    assert status.text == "round 3/10  loss 0.500  test 50.0%  3.00 kB up, 6.00 kB down"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(False, "1/8 fedkd:key:-s0") as show:
        assert show is not None
        show(client(1, 2))
        show(scored(1, 0.913, "test"))
    text = screen.getvalue()
    assert "1/8 fedkd:key:-s0" in text and "left" in text
    assert "round 1/10  loss 0.500  test 91.3%  1.00 kB up, 2.00 kB down" in text


@pytest.mark.parametrize("silent", [True, False])
def test_no_bar_where_nobody_would_see_it(silent: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(silent) as show:
        assert show is None
    assert capsys.readouterr().err == ""
