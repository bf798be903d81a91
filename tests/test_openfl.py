"""OpenFL's pipeline of frames, with the real package where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedkd_fast import Compressor, WireError

ENERGY = 0.9
INSTALLED = importlib.util.find_spec("openfl") is not None
only_installed = pytest.mark.skipif(not INSTALLED, reason="openfl is not installed")


class Transformer:
    """Stands in for OpenFL's, which is as empty."""


class TransformationPipeline:
    """Stands in for OpenFL's: forward one after the other, backward popping the metadata."""

    def __init__(self, transformers: list[Any], **kwargs: Any) -> None:
        self.transformers = transformers

    def forward(self, data: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        metadata = []
        for one in self.transformers:
            data, found = one.forward(data=data, **kwargs)
            metadata.append(found)
        return data, metadata

    def backward(self, data: Any, transformer_metadata: list[Any], **kwargs: Any) -> Any:
        for one in self.transformers[::-1]:
            data = one.backward(data=data, metadata=transformer_metadata.pop(), **kwargs)
        return data

    def is_lossy(self) -> bool:
        return any(one.lossy for one in self.transformers)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter over the real package, or over what stands in for it."""
    name = "fedkd_fast.integrations.openfl"
    if not INSTALLED:
        for module in ("openfl", "openfl.pipelines", "openfl.pipelines.pipeline"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        sys.modules[module].__dict__.update(
            Transformer=Transformer, TransformationPipeline=TransformationPipeline
        )
    yield importlib.import_module(name)
    if not INSTALLED:
        del sys.modules[name]


def a_matrix() -> np.ndarray:
    factors = np.random.default_rng(0).standard_normal((2, 96, 5), np.float32)
    return factors[0] @ factors[1].T


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_a_matrix_goes_there_and_back(adapter: Any) -> None:
    pipeline = adapter.FramePipeline(energy=ENERGY)
    data, metadata = pipeline.forward(a_matrix(), lossless=False)
    assert isinstance(data, bytes) and metadata == [{}] and pipeline.is_lossy()
    found = pipeline.backward(data, metadata)
    assert (found.dtype, found.shape) == (np.float32, (96, 96))
    assert relative_error(found, a_matrix()) <= (1 - ENERGY) ** 0.5
    assert len(data) < a_matrix().nbytes / 20
    found += 1  # it is no view of the message


@pytest.mark.parametrize(
    "value",
    [np.float32(2.5), np.arange(7), np.zeros((0, 3), np.float32), np.ones((2, 3, 4), np.float16)],
    ids=["number", "integers", "empty", "halves"],
)
def test_other_values_keep_shape_and_dtype(adapter: Any, value: Any) -> None:
    pipeline = adapter.FramePipeline(energy=1.0)
    assert not pipeline.is_lossy()
    found = pipeline.backward(*pipeline.forward(value))
    assert found.dtype == value.dtype and found.shape == value.shape
    np.testing.assert_array_equal(found, value)


def test_float64_becomes_float32(adapter: Any) -> None:
    pipeline = adapter.FramePipeline(energy=1.0)
    found = pipeline.backward(*pipeline.forward(a_matrix().astype(np.float64)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, a_matrix())


def test_what_is_wrong_is_named(adapter: Any) -> None:
    pipeline = adapter.FramePipeline(energy=ENERGY)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        pipeline.forward(np.array([1.0, np.nan]))
    data, metadata = pipeline.forward(a_matrix())
    with pytest.raises(WireError):
        pipeline.backward(data[:-1], list(metadata))
    two = Compressor().compress({"a": np.ones(3), "b": np.ones(3)})
    with pytest.raises(WireError, match=r"must hold one tensor, 'tensor', got \['a', 'b'\]"):
        pipeline.backward(two, list(metadata))
    with pytest.raises(WireError, match="1000"):
        adapter.FramePipeline(max_bytes=1000).backward(data, list(metadata))
    with pytest.raises(ValueError, match="energy"):
        adapter.FramePipeline(energy=0.0)


def test_vectors_and_what_is_stored_lose_nothing(adapter: Any) -> None:
    pipeline, value = adapter.FramePipeline(energy=ENERGY), a_matrix()
    for exact in (pipeline.forward(data=value), pipeline.forward(value, lossless=True)):
        np.testing.assert_array_equal(pipeline.backward(*exact), value)
    lossy = pipeline.forward(value, lossless=False)
    assert relative_error(pipeline.backward(*lossy), value) > 0.01
    variance = np.logspace(-6, 0, 64, dtype=np.float32)
    np.testing.assert_array_equal(pipeline.backward(*pipeline.forward(variance)), variance)
    smaller = adapter.FramePipeline(energy=ENERGY, exact_vectors=False)
    assert len(smaller.forward(variance)[0]) < len(pipeline.forward(variance)[0])


@only_installed
def test_models_that_openfl_stores_lose_nothing(adapter: Any) -> None:
    from openfl.protocols import utils

    pipeline = adapter.FramePipeline(energy=ENERGY)
    model = utils.construct_model_proto({"weight": a_matrix()}, 0, pipeline)
    found, _ = utils.deconstruct_model_proto(model, pipeline)
    np.testing.assert_array_equal(found["weight"], a_matrix())


class Runner:
    """Stands in for a task runner that is told how to treat its optimizer."""

    def set_optimizer_treatment(self, treatment: str) -> None:
        pass


class Client:
    """Stands in for the aggregator: weights in the first round, their changes later."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def get_aggregated_tensor(
        self, name: str, round_number: int, report: bool, tags: Any, require_lossless: bool
    ) -> Any:
        from openfl.protocols import utils
        from openfl.utilities import TensorKey

        kept = tuple(tag for tag in tags if tag != "lossy_compressed")
        key = TensorKey(name, "aggregator", round_number, report, kept)
        key, data, metadata = self.codec.compress(key, a_matrix(), require_lossless)
        return utils.construct_named_tensor(key, data, metadata, lossless=require_lossless)


@only_installed
def test_collaborators_send_deltas_in_every_round(adapter: Any) -> None:
    from openfl.pipelines import TensorCodec
    from openfl.utilities import TensorKey

    from fedkd_fast.integrations.openfl_collaborator import DeltaCollaborator

    pipeline = adapter.FramePipeline(energy=ENERGY)
    one = DeltaCollaborator(
        "one",
        "aggregator",
        "federation",
        Client(TensorCodec(pipeline)),
        Runner(),
        {},
        use_delta_updates=True,
        compression_pipeline=pipeline,
    )
    for number in range(4):
        base = one.get_data_for_tensorkey(
            TensorKey("weight", "aggregator", number, False, ("model",))
        )
        trained = TensorKey("weight", "one", number, False, ("trained",))
        sent = one.nparray_to_named_tensor(trained, base + a_matrix().T)
        assert set(sent.tags) == {"trained", "delta", "lossy_compressed"}
        assert len(sent.data_bytes) < a_matrix().nbytes / 20
        one.tensor_db.clean_up(1)


@only_installed
def test_in_openfls_plan_codec_and_protobuf(adapter: Any) -> None:
    from openfl.federated import Plan
    from openfl.pipelines import TensorCodec
    from openfl.protocols import base_pb2, utils
    from openfl.utilities import TensorKey

    plan = Plan()
    plan.config = {
        "compression_pipeline": {
            "template": "fedkd_fast.integrations.openfl.FramePipeline",
            "settings": {"energy": ENERGY},
        }
    }
    codec = TensorCodec(plan.get_tensor_pipe())
    key = TensorKey("layer.weight", "one", 3, False, ("trained", "delta"))
    sent_key, data, metadata = codec.compress(key, a_matrix())
    assert "lossy_compressed" in sent_key.tags
    message = utils.construct_named_tensor(sent_key, data, metadata, lossless=False)
    received = base_pb2.NamedTensor.FromString(message.SerializeToString())
    again = [
        {"int_to_float": m.int_to_float, "int_list": m.int_list, "bool_list": m.bool_list}
        for m in received.transformer_metadata
    ]
    _, found = codec.decompress(sent_key, received.data_bytes, again)
    assert relative_error(found, a_matrix()) <= (1 - ENERGY) ** 0.5
