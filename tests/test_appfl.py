"""APPFL's compressor over frames, with the real package's loader where it is installed."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections import OrderedDict
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkd_fast import Compressor, WireError
from fedkd_fast.integrations import appfl
from fedkd_fast.integrations.appfl import FrameCompressor
from fedkd_fast.wire import Entry, Mode, encode

INSTALLED = importlib.util.find_spec("appfl") is not None


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 4))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def test_weights_go_there_and_back_within_a_hundredth() -> None:
    model, compressor = a_model(), FrameCompressor({})
    data = compressor.compress_model(model.state_dict())
    found = compressor.decompress_model(data, model)
    assert isinstance(found, OrderedDict) and list(found) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert relative_error(found[name].float(), value.float()) <= 0.01
    model.load_state_dict(found)
    assert data[:4] == bytes(4) and len(data) < sum(v.nbytes for v in found.values()) / 2


def test_a_configuration_decides_the_loss() -> None:
    model = a_model()
    sizes = [
        len(FrameCompressor(config).compress_model(model.state_dict()))
        for config in ({"error": 0.001}, {}, {"energy": 0.95})
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]
    with pytest.raises(ValueError, match="energy"):
        FrameCompressor({"energy": 0.9, "error": 0.1})


def test_feedback_sends_later_what_was_left_out() -> None:
    compressor = FrameCompressor({"energy": 0.5, "feedback": True})
    step = {"0.weight": torch.randn(128, 64)}
    total = sum(
        compressor.decompress_model(compressor.compress_model(step), a_model())["0.weight"]
        for _ in range(20)
    )
    assert relative_error(total / 20, step["0.weight"]) < 0.2 * 0.5**0.5


@pytest.mark.parametrize("config", [{}, {"energy": 0.95}, {"energy": 0.95, "feedback": True}])
def test_statistics_of_batch_normalisation_stay_as_they_are(config: dict[str, Any]) -> None:
    compressor, model = FrameCompressor(config), a_model()
    weight = model.get_parameter("0.weight")
    # Two names of one tensor around the statistics, one of each pair.
    tied = {"first": weight, **model.state_dict(), "last": weight, "again": torch.ones(3)}
    for fading in range(20):
        tied["1.running_var"] = torch.logspace(-6, 0, 128) * 0.8**fading
        found = compressor.decompress_model(compressor.compress_model({"a": tied}), None)["a"]
        assert list(found) == list(tied)
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            assert torch.equal(found[name], tied[name])
        assert torch.equal(found["first"], found["last"])
    with pytest.raises(ValueError, match=r"running_var'\] holds NaN or Inf"):
        compressor.compress_model({"w": weight, "running_var": torch.tensor([torch.nan])})


def assert_alike(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    else:
        assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["nested", "list", "by client", "empty"])
def test_models_of_other_forms(kind: str, batched: bool) -> None:
    weights = dict(a_model().state_dict())
    models = {
        "nested": {"primal": weights, "dual": weights, "penalty": 0.5, "name": "a", "none": None},
        "list": [weights, {"2.bias": torch.ones(4)}],
        "by client": {1: weights, 2: weights, "c": {"deep": weights}},
        "empty": {},
    }
    compressor = FrameCompressor({"energy": 1.0})
    data = compressor.compress_model(models[kind], batched=batched)
    assert_alike(compressor.decompress_model(data, a_model(), batched=batched), models[kind])
    assert_alike(compressor.decompress_model(data, None), models[kind])


def test_what_cannot_be_sent_is_named() -> None:
    compressor = FrameCompressor({})
    with pytest.raises(TypeError, match=r"model\['a/b'\] must be a tensor, dict, list or plain"):
        compressor.compress_model({"a": {"b": {1, 2}}})
    with pytest.raises(ValueError, match="two tensors that would be called 'a/b'"):
        compressor.compress_model({"a/b": torch.ones(2), "a": {"b": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"update\['w'\] holds NaN or Inf"):
        compressor.compress_model({"w": torch.tensor([torch.nan])})


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("x", (3,), "tensor 'x' is none of the model's"),
        ("0.weight", (64, 128), r"'0.weight' must have shape \(128, 64\), got \(64, 128\)"),
        (
            "0.weight",
            (1 << 30, 1 << 30),
            r"'0.weight' must have shape \(128, 64\), got \(1073741824",
        ),
    ],
)
def test_tensors_that_the_model_lacks_are_refused_before_they_are_decoded(
    name: str, shape: tuple[int, ...], reason: str
) -> None:
    frame = encode([Entry(name, "float32", shape, Mode.ZERO)], codec="wf1")
    with pytest.raises(ValueError, match=reason):
        FrameCompressor({}).decompress_model(bytes(4) + frame, a_model())


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (b"{", "form of the model: not JSON"),
        (b"\xff", "codec can't decode"),
        (b'["tensor"]', "form of the model is damaged: "),
        (b'["dict", [["a", ["tensor", "w"], 3]]]', "form of the model is damaged: "),
        (b'["dict", [["w", ["tensor", "v"]]]]', "'v' is not in the frame"),
        (b'["dict", []]', r"it has no place for \['w'\]"),
        (b'["list", {"a": 1}]', "form of the model is damaged: "),
        (b'["plain", ["x"]]', "form of the model is damaged: "),
        (b'["list", [' * 400 + b"]]" * 400, "nested too deeply|form of the model is damaged"),
        (b'["list", [' * 100000 + b"]]" * 100000, "nested too deeply"),
    ],
)
def test_damaged_forms_are_named(form: bytes, reason: str) -> None:
    frame = Compressor().compress({"w": torch.ones(3)})
    with pytest.raises(WireError, match=reason):
        FrameCompressor({}).decompress_model(struct.pack("<I", len(form)) + form + frame, None)


def test_damaged_messages_are_named() -> None:
    compressor = FrameCompressor({})
    data = compressor.compress_model({"a": {"w": torch.ones(3)}})
    assert json.loads(data[4 : 4 + struct.unpack("<I", data[:4])[0]])[0] == "dict"
    for end in range(len(data)):
        with pytest.raises(WireError):
            compressor.decompress_model(data[:end], None)


def test_register_makes_appfl_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INSTALLED:
        for name in ("appfl", "appfl.compressor"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    appfl.register()
    assert importlib.import_module("appfl.compressor").FrameCompressor is FrameCompressor


@pytest.mark.skipif(INSTALLED, reason="appfl is installed")
def test_without_appfl_the_message_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[appfl\]"'):
        appfl.register()


@pytest.mark.skipif(not INSTALLED, reason="appfl is not installed")
def test_in_appfls_loader() -> None:
    from appfl.misc.utils import get_appfl_compressor
    from omegaconf import OmegaConf

    appfl.register()
    config = OmegaConf.create({"enable_compression": True, "energy": 0.95, "feedback": True})
    compressor = get_appfl_compressor("FrameCompressor", config)
    found = compressor.decompress_model(
        compressor.compress_model(a_model().state_dict()), a_model()
    )
    assert relative_error(found["0.weight"], a_model().state_dict()["0.weight"]) <= 0.05**0.5


def many_models(count: int) -> tuple[bytes, nn.Module]:
    """A few bytes that stand for so many models of 64 KiB."""
    entries = [Entry(f"{i}/weight", "float32", (128, 128), Mode.ZERO) for i in range(count)]
    form = ["list", [["dict", [["weight", ["tensor", one.name]]]] for one in entries]]
    text = json.dumps(form).encode()
    data = struct.pack("<I", len(text)) + text + encode(entries, codec="wf1")
    return data, nn.Linear(128, 128, bias=False)


def test_a_message_takes_no_more_than_the_model_allows() -> None:
    data, model = many_models(4)
    assert len(FrameCompressor({}).decompress_model(data, model)) == 4
    data, model = many_models(9)
    with pytest.raises(WireError, match="max_bytes = 524288"):
        FrameCompressor({}).decompress_model(data, model)
    assert len(FrameCompressor({}).decompress_model(data, model, batched=True)) == 9
    with pytest.raises(WireError, match="max_bytes = 300000"):
        FrameCompressor({"max_bytes": 300000}).decompress_model(data, model, batched=True)
    assert len(FrameCompressor({"max_bytes": 1 << 20}).decompress_model(data, model)) == 9


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_a_bound_is_an_integer(value: object) -> None:
    with pytest.raises(ValueError, match="max_bytes must be an integer above 0, got"):
        FrameCompressor({"max_bytes": value})


def test_booleans_are_no_weights() -> None:
    frame = encode([Entry("0.weight", "bool", (128, 64), Mode.ZERO)], codec="wf1")
    with pytest.raises(ValueError, match="'0.weight' must hold numbers as torch.float32 does"):
        FrameCompressor({}).decompress_model(bytes(4) + frame, a_model())


class WithMore(nn.Linear):
    """Has something in its state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_models_have_more_than_tensors() -> None:
    compressor, model = FrameCompressor({}), WithMore(128, 64)
    averaged = {"weight": model.weight.detach().double(), "bias": torch.ones(64)}
    found = compressor.decompress_model(compressor.compress_model(averaged), model)
    assert found["weight"].dtype == torch.float64
