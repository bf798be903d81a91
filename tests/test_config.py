"""What decides a run: presets, defaults, schedules, and values that are refused."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
from tiny_task import TinyTask

from fedkd_fast.config import PRESETS, TrainConfig
from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.trainer import configure


class OwnRecipe(TinyTask):
    """A task with a recipe of its own for FedKD, all of which the presets undo."""

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        fields = {
            "codec": "wf1",
            "feedback": "both",
            "mentee_adapter": "lora:4",
            "mentor_adapter": "lora:8",
            "energy_start": 0.5,
            "energy_end": 0.6,
            "refresh_steps": 3,
            "hidden": False,
            "attention": False,
            "energy_shape": "cosine",
            "distillation": {"temperature": 2.0},
        }
        return super().defaults() | (fields if method == "fedkd" else {})


def test_the_paper() -> None:
    config = configure(OwnRecipe(), "fedkd", {"preset": "paper"})
    assert config.distillation_config() == DistillationConfig.paper() == DistillationConfig()
    assert (config.codec, config.feedback) == ("factors-fp32", "none")
    assert (config.mentor_adapter, config.mentee_adapter) == (None, None)
    assert (config.energy_start, config.energy_end) == (0.95, 0.98)
    assert (config.energy_shape, config.refresh_steps) == ("linear", 0)
    # What the paper says nothing of stays the task's.
    assert (config.rounds, config.clients, config.lr_mentor) == (2, 3, 1e-2)


def test_the_public_code() -> None:
    config = configure(OwnRecipe(), "fedkd", {"preset": "public_code"})
    assert config.distillation_config() == DistillationConfig.public_code()
    assert config.energy_shape == "public-code"
    assert (config.codec, config.feedback) == ("factors-fp32", "none")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_wins_over_a_preset(preset: str) -> None:
    given = {"preset": preset, "codec": "raw", "hidden": False, "energy_end": 0.99}
    config = configure(OwnRecipe(), "fedkd", given)
    assert (config.codec, config.hidden, config.energy_end) == ("raw", False, 0.99)
    modes = configure(OwnRecipe(), "fedkd", {"preset": preset, "distillation": {"temperature": 3}})
    wanted = getattr(DistillationConfig, preset)()
    assert modes.distillation_config().temperature == 3
    assert modes.distillation_config().loss == wanted.loss


def test_presets_leave_the_tasks_own_dictionary_alone() -> None:
    own = {"rounds": 2}

    class Constant(TinyTask):
        def defaults(self, method: str | None = None) -> dict[str, Any]:
            return own

    assert configure(Constant(), "fedkd", {"preset": "paper"}).codec == "factors-fp32"
    assert own == {"rounds": 2}


def test_without_a_preset_the_task_decides() -> None:
    config = configure(OwnRecipe(), "fedkd", {"distillation": {"label_smoothing": 0.1}})
    assert (config.codec, config.mentee_adapter, config.refresh_steps) == ("wf1", "lora:4", 3)
    found = config.distillation_config()
    assert (found.temperature, found.label_smoothing) == (2.0, 0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_of_fedkd_alone(preset: str) -> None:
    config = configure(OwnRecipe(), "fedavg", {"preset": preset})
    assert config.codec is None
    assert config.energy_shape == TrainConfig.energy_shape


@pytest.mark.parametrize("preset", PRESETS)
def test_other_methods_keep_their_recipes_beside_a_preset(preset: str) -> None:
    given, plain = ({"preset": preset}, {})
    found, wanted = (configure("text", "fedlora", fields) for fields in (given, plain))
    assert found.lr_mentor == wanted.lr_mentor != configure("text", "fedavg", given).lr_mentor


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match="preset must be one of paper, public_code, got 'own'"):
        configure(TinyTask(), "fedkd", {"preset": "own"})


def energies(shape: str, first: float, last: float, rounds: int = 5) -> list[float]:
    config = TrainConfig(rounds=rounds, energy_start=first, energy_end=last, energy_shape=shape)
    return [config.energy(number) for number in range(1, rounds + 1)]


def test_shapes_of_the_energy() -> None:
    first, last = 0.9, 0.99
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    wanted = {
        "linear": [first + (last - first) * t for t in shares],
        "cosine": [first + (last - first) * (1 - math.cos(math.pi * t)) / 2 for t in shares],
        "geometric": [1 - 0.1 ** (1 - t) * 0.01**t for t in shares],
        # As the code has it: (1 + round) / rounds, counted from 0.
        "public-code": [first + (last - first) * (t + 1) / 5 for t in range(5)],
    }
    for shape, values in wanted.items():
        assert energies(shape, first, last) == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "geometric", "public-code"])
def test_energies_stay_shares(shape: str) -> None:
    for first, last in ((0.95, 1.0), (1.0, 1.0), (0.98, 0.9), (0.1, 0.1)):
        for rounds in (1, 2, 7):
            found = energies(shape, first, last, rounds)
            low, high = min(first, last), max(first, last)
            assert all(low - 1e-12 <= value <= min(high + 1e-12, 1.0) for value in found)
    assert energies(shape, 0.95, 1.0)[-1] == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"energy_shape": "step"}, "energy_shape must be one of linear, cosine, .*, got 'step'"),
        ({"feedback": "sideways"}, "feedback must be one of none, up, down, both, got 'sideways'"),
        ({"weighting": "loss"}, "weighting must be one of equal, samples, got 'loss'"),
        ({"server_optimizer": "sgd"}, "server_optimizer must be one of none, .*, got 'sgd'"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"codec_down": "zip"}, "codec_down must be one of wf1, .*, got 'zip'"),
        ({"energy_shape": None}, "energy_shape must be one of .*, got None"),
        ({"bits": 3}, "bits must be 2, 4, 8 or 16, got 3"),
        ({"bits": 32}, "bits must be 2, 4, 8 or 16, got 32"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"proximal": -0.1}, "proximal must be finite and at least 0, got -0.1"),
        ({"proximal": math.inf}, "proximal must be finite and at least 0, got inf"),
        ({"top_share": 0.0}, r"top_share must lie in \(0, 1\], got 0.0"),
        ({"top_share": 1.1}, r"top_share must lie in \(0, 1\], got 1.1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"local_steps": 0}, "local_steps must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"refresh_steps": -1}, "refresh_steps must be at least 0, got -1"),
        ({"server_lr": 0.0}, "server_lr must be positive and finite, got 0.0"),
        ({"server_momentum": 1.5}, r"server_momentum must lie in \[0, 1\], got 1.5"),
        ({"distillation": {"temperature": 0.0}}, "temperature must be above 0, got 0.0"),
        (
            {"mutual": False, "distillation": {"loss": "joint"}},
            "mutual=False needs separate losses, got loss='joint'",
        ),
        ({"mutual": False, "refresh_steps": 2}, "mutual=False .* refresh_steps must be 0, got 2"),
        ({"distillation": {"loss": "none"}}, "loss must be one of separate, joint, got 'none'"),
        ({"local_steps": 10**20}, "local_steps must be at most 9007199254740992, got 1000"),
        ({"clients": 10**6 + 1}, "clients must be at most 1000000, got 1000001"),
        ({"rounds": 10**5000}, "rounds must be at most 9007199254740992, got one of 16610 bits"),
        ({"memory_gb": 10**400}, "memory_gb must be positive and finite, got inf"),
        ({"server_momentum": -(10**400)}, r"server_momentum must lie in \[0, 1\], got -inf"),
        ({"attack_factor": math.nan}, "attack_factor must be finite, got nan"),
        ({"preset": {}}, "preset must be one of paper, public_code, got {}"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(TinyTask(), "fedkd", fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation": {"heat": 2.0}}, "distillation must name fields .*, got 'heat'"),
        ({"distillation": {"hidden": True}}, "but for hidden and attention, got 'hidden'"),
        ({"distillation": {"temperature": "hot"}}, "temperature must be a number, got 'hot'"),
        ({"bits": 8.0}, "bits must be an integer, got 8.0"),
        ({"rank": True}, "rank must be an integer, got True"),
        ({"proximal": "small"}, "proximal must be a number, got 'small'"),
        ({"top_share": None}, "top_share must be a number, got None"),
        ({"spectra": "no"}, "spectra must be True or False, got 'no'"),
        ({"overwrite": 1}, "overwrite must be True or False, got 1"),
        ({"gradient_checkpointing": None}, "gradient_checkpointing must be True or False, got"),
        ({"distilation": {}}, "'distilation' is no field of TrainConfig"),
        ({"distillation": None}, "distillation must be a mapping, got None"),
        ({"distillation": 2}, "distillation must be a mapping, got 2"),
        ({"attack_factor": "x"}, "attack_factor must be a number, got 'x'"),
        ({"text_column": None}, "text_column must be text, got None"),
        ({"data": 2018}, "data must be text, got 2018"),
    ],
)
def test_values_of_wrong_types(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        configure(TinyTask(), "fedkd", fields)


def test_task_and_method_are_names() -> None:
    for task in (None, 5):
        with pytest.raises(TypeError, match=f"task must be a name or an object .* got {task}"):
            configure(task, "fedkd", {})  # type: ignore[arg-type]
    for method in ({}, 5):
        for make in (partial(configure, "digits", fields={}), partial(TrainConfig, "digits")):
            with pytest.raises(TypeError, match=f"method must be text, got {method}"):
                make(method=method)


def test_seeds_may_have_any_size() -> None:
    assert TrainConfig(seed=2**200, dp_seed=2**200).seed == 2**200


def test_every_switch_is_checked() -> None:
    switches = {one.name for one in dataclasses.fields(TrainConfig) if one.type == "bool"}
    assert {"hidden", "spectra"} <= switches
    for name in switches:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            TrainConfig(**{name: "no"})


def test_amounts_may_be_zero() -> None:
    config = configure(TinyTask(), "fedprox", {"proximal": 0, "server_momentum": 0})
    assert (config.proximal, config.server_momentum) == (0, 0)


def test_tasks_of_ones_own_cannot_name_unknown_fields() -> None:
    class Wrong(TinyTask):
        def defaults(self, method: str | None = None) -> dict[str, Any]:
            return {"epochs": 3}

    with pytest.raises(TypeError, match="'epochs' is no field of TrainConfig"):
        configure(Wrong(), "fedkd", {})
