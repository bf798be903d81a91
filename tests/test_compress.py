"""Compressor and decompress: the promised error on decoded bytes, all tensors, all refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkd_fast
from fedkd_fast import Compressor, WireError, decompress, inspect
from fedkd_fast.codec import DTYPES, VECTOR_SHARE
from fedkd_fast.compress import CODECS
from fedkd_fast.tensors import digest_of
from fedkd_fast.wire import Mode

LOSSY = ("wf0", "factors-fp32")


def powerlaw(rows: int, cols: int, power: float = 0.8, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with σ_k ~ k^-power: what updates of trained layers look like."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, width, generator=generator))[0]
    return (left * torch.arange(1, width + 1).float() ** -power) @ right.T


def relative_error(exact: torch.Tensor, decoded: torch.Tensor) -> float:
    total = float(exact.double().square().sum())
    return float((exact.double() - decoded.double()).square().sum()) / total


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "encoder.0.query.weight": powerlaw(96, 96),
        "encoder.0.ffn.weight": powerlaw(192, 96, 1.0, seed=1),
        "encoder.0.ffn.bias": torch.randn(192, generator=generator),
        "conv.weight": torch.randn(16, 3, 5, 5, generator=generator),
        "head.weight": torch.randn(3, 96, generator=generator),
        "scalar": torch.tensor(3.25),
        "counter": torch.tensor([5, 7]),
        "flags": torch.tensor([True, False, True]),
        "frozen": torch.zeros(50, 50),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.98, 0.999])
@pytest.mark.parametrize("codec", LOSSY)
def test_every_tensor_keeps_its_energy(codec: str, energy: float) -> None:
    update = model()
    frame = Compressor(energy, codec).compress(update)
    decoded = decompress(frame)
    assert list(decoded) == list(update)
    for name, exact in update.items():
        assert decoded[name].shape == exact.shape and decoded[name].dtype == exact.dtype
        if not exact.is_floating_point() or not exact.numel() or not bool(exact.any()):
            assert torch.equal(decoded[name], exact)
            continue
        allowed = (1 - energy) * (1 if exact.dim() >= 2 else VECTOR_SHARE)
        assert relative_error(exact, decoded[name]) <= allowed


def test_wf0_is_several_times_smaller_than_fp32_factors() -> None:
    update = {"w": powerlaw(256, 256)}
    sizes = {codec: len(Compressor(0.95, codec).compress(update)) for codec in CODECS}
    assert sizes["wf0"] * 5 < sizes["factors-fp32"] < sizes["raw"]


def test_fp32_factors_follow_the_rank_rule_of_the_paper() -> None:
    update = {"w": powerlaw(80, 60)}
    (info,) = inspect(Compressor(0.95, "factors-fp32").compress(update))
    sigma = torch.linalg.svdvals(update["w"].double())
    share = sigma.square().cumsum(0) / sigma.square().sum()
    assert info.mode is Mode.FACTORS
    assert share[info.rank - 1] > 0.95 >= share[info.rank - 2]


@pytest.mark.parametrize("codec", LOSSY)
def test_break_even_in_encoded_bytes(codec: str) -> None:
    # White noise has a flat spectrum: two factors would be larger than the matrix.
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    row = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    frame = Compressor(0.98, codec).compress({"noise": noise, "row": row})
    for info in inspect(frame):
        assert info.mode not in (Mode.FACTORS, Mode.PACKED_FACTORS)
        assert info.payload_bytes <= info.dense_bytes
    # The public code sends both of these as zeros.
    assert float(decompress(frame)["row"].abs().sum()) > 0


@pytest.mark.parametrize("codec", CODECS)
def test_energy_one_truncates_nothing(codec: str) -> None:
    update = model()
    decoded = decompress(Compressor(1.0, codec).compress(update))
    assert all(torch.equal(decoded[name], exact) for name, exact in update.items())


def test_zero_update_takes_no_payload() -> None:
    infos = inspect(Compressor().compress({"w": torch.zeros(100, 100), "b": torch.zeros(9)}))
    assert [info.mode for info in infos] == [Mode.ZERO, Mode.ZERO]
    assert sum(info.payload_bytes for info in infos) == 0


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
def test_floating_dtypes(dtype: torch.dtype) -> None:
    exact = powerlaw(70, 50).to(dtype)
    decoded = decompress(Compressor(0.95).compress({"w": exact}))["w"]
    assert decoded.dtype == dtype
    assert relative_error(exact, decoded) <= 0.05


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_floating_point])
def test_integers_are_exact(dtype: torch.dtype) -> None:
    exact = torch.arange(20).reshape(4, 5).to(dtype)
    assert torch.equal(decompress(Compressor(0.5).compress({"n": exact}))["n"], exact)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e37])
@pytest.mark.parametrize("codec", LOSSY)
def test_any_scale(codec: str, scale: float) -> None:
    exact = (powerlaw(40, 30).double() * scale).float()
    decoded = decompress(Compressor(0.95, codec).compress({"w": exact}))["w"]
    assert relative_error(exact, decoded) <= 0.05


def test_float64_beyond_float32_travels_raw() -> None:
    exact = powerlaw(40, 30).double() * 1e200
    for codec in LOSSY:
        frame = Compressor(0.9, codec).compress({"w": exact})
        assert torch.equal(decompress(frame)["w"], exact)


def test_convolutions_are_flattened() -> None:
    kernel = powerlaw(32, 64 * 9, 1.5).reshape(32, 64, 3, 3)
    frame = Compressor(0.9).compress({"conv": kernel})
    (info,) = inspect(frame)
    assert info.mode is Mode.PACKED_FACTORS and info.shape == (32, 64, 3, 3)
    assert relative_error(kernel, decompress(frame)["conv"]) <= 0.1


def test_tied_tensors_are_sent_once() -> None:
    weight = powerlaw(60, 40)
    frame = Compressor(0.95).compress({"a": weight, "b": weight, "c": weight.clone()})
    modes = [info.mode for info in inspect(frame)]
    assert modes[1] is Mode.ALIAS and modes[2] is not Mode.ALIAS
    decoded = decompress(frame)
    assert decoded["a"].data_ptr() == decoded["b"].data_ptr()
    # Another view of the same memory is another tensor.
    infos = inspect(Compressor(0.95).compress({"a": weight, "t": weight.T}))
    assert infos[1].mode is not Mode.ALIAS


def test_tied_arrays_and_marked_views() -> None:
    array = powerlaw(60, 40).numpy()
    modes = [info.mode for info in inspect(Compressor().compress({"a": array, "b": array}))]
    assert modes[1] is Mode.ALIAS
    ones = torch.ones(30)
    decoded = decompress(Compressor(codec="raw").compress({"a": ones, "b": torch._neg_view(ones)}))
    assert torch.equal(decoded["b"], -ones)


def test_negative_zeros_survive() -> None:
    zeros = torch.full((40, 40), -0.0)
    decoded = decompress(Compressor(0.9).compress({"z": zeros}))["z"]
    assert bool(torch.signbit(decoded).all())


def test_big_endian_arrays() -> None:
    array = np.arange(6, dtype=">f4")
    assert decompress(Compressor(codec="raw").compress({"w": array}))["w"].tolist() == list(
        range(6)
    )


def test_thousands_of_tiny_tensors_travel_raw() -> None:
    update = {f"layer.{index}.bias": torch.randn(3) for index in range(3000)}
    infos = inspect(Compressor(0.9).compress(update))
    assert {info.mode for info in infos} == {Mode.RAW}


def test_numpy_in_strides_and_read_only() -> None:
    array = powerlaw(30, 20).numpy().T[::-1]
    array.setflags(write=False)
    decoded = decompress(Compressor(0.9).compress({"w": array}))["w"]
    assert relative_error(torch.from_numpy(array.copy()), decoded) <= 0.1
    assert decompress(Compressor().compress({"n": np.int64(4)}))["n"] == 4


def test_same_input_same_bytes_and_backends_agree() -> None:
    update = {
        "w": powerlaw(40, 30),
        "b": torch.randn(30, generator=torch.Generator().manual_seed(0)),
    }
    frames = {Compressor(0.95).compress(update) for _ in range(2)}
    assert len(frames) == 1
    (frame,) = frames
    for name, value in decompress(frame, backend="reference").items():
        assert torch.equal(value, decompress(frame)[name])
    reference = Compressor(0.95, backend="reference").compress(update)
    assert relative_error(update["w"], decompress(reference)["w"]) <= 0.05


# ---- base and schema -----------------------------------------------------------------------------


def test_difference_to_a_base() -> None:
    base = model()
    update = {
        name: value + 0.01 * powerlaw(*value.shape)
        if name.endswith("query.weight")
        else value.clone()
        for name, value in base.items()
    }
    update["counter"] = torch.tensor([8, 8])
    frame = Compressor(0.95).compress(update, base)
    decoded = decompress(frame, base=base)
    assert torch.equal(decoded["counter"], update["counter"])
    for name in ("head.weight", "frozen", "flags"):
        assert torch.equal(decoded[name], update[name])
    name = "encoder.0.query.weight"
    assert relative_error(update[name] - base[name], decoded[name] - base[name]) <= 0.0501
    with pytest.raises(ValueError, match="frame is a difference to base .*: pass base="):
        decompress(frame)
    other = {name: value.clone() for name, value in base.items()}
    other["head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="base does not match: the frame was made against"):
        decompress(frame, base=other)
    with pytest.raises(ValueError, match="not a difference"):
        decompress(Compressor().compress(update), base=base)


def test_tied_update_of_an_untied_base_is_not_tied() -> None:
    weight = powerlaw(20, 20)
    base = {"a": torch.zeros(20, 20), "b": torch.ones(20, 20)}
    decoded = decompress(Compressor(1.0).compress({"a": weight, "b": weight}, base), base=base)
    assert torch.equal(decoded["a"], weight)
    # weight - 1 + 1 is rounded twice.
    assert float((decoded["b"] - weight).abs().max()) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scalar"), "missing"),
        (lambda t: t.update(more=torch.zeros(1)), "unexpected"),
        (lambda t: t.update(scalar=torch.zeros(2)), r"'scalar' is .* has \(2,\) float32"),
        (lambda t: t.update(scalar=torch.tensor(1.0).double()), r"has \(\) float64"),
    ],
)
def test_base_and_schema_must_match(change, message: str) -> None:  # type: ignore[no-untyped-def]
    update = model()
    other = dict(update)
    change(other)
    with pytest.raises(ValueError, match=message):
        Compressor().compress(update, base=other)
    with pytest.raises(ValueError, match=message):
        decompress(Compressor().compress(update), schema=other)
    assert decompress(Compressor().compress(update), schema=update)


def test_ties_of_differences_follow_the_base() -> None:
    difference = torch.full((4,), 0.5)
    base = {"a": torch.zeros(4), "b": torch.full((4,), 100.0)}
    frame = Compressor(codec="raw").compress(
        {"a": difference, "b": difference}, base_digest=digest_of(base)
    )
    decoded = decompress(frame, base=base)
    assert decoded["a"].tolist() == [0.5] * 4 and decoded["b"].tolist() == [100.5] * 4


def test_base_plus_difference_may_not_overflow() -> None:
    base = {"w": torch.full((2, 300), 65000.0).half()}
    frame = Compressor(codec="raw").compress(
        {"w": torch.full((2, 300), 1000.0).half()}, base_digest=digest_of(base)
    )
    with pytest.raises(ValueError, match="base\\['w'\\] \\+ difference overflows float16"):
        decompress(frame, base=base)
    with pytest.raises(ValueError, match="overflows float16"):
        Compressor().compress(base, {"w": -base["w"]})


def test_schema_is_checked_before_anything_is_decoded() -> None:
    # 2^31 zeros in 80 bytes: decoding them would take 8 GiB.
    entry = fedkd_fast.wire.Entry("w", "float32", (2**15, 2**15), Mode.ZERO)
    frame = fedkd_fast.wire.encode([entry])
    with pytest.raises(ValueError, match="schema does not match"):
        decompress(frame, schema={"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="base does not match"):
        decompress(frame, base={"w": torch.zeros(2)})


# ---- error feedback ------------------------------------------------------------------------------


def test_feedback_residual_is_exactly_what_was_left_out() -> None:
    compressor = Compressor(0.8, feedback=True)
    residual = {name: torch.zeros_like(value) for name, value in model().items()}
    for seed in range(3):
        update = {"w": powerlaw(40, 30, seed=seed), "b": powerlaw(30, 1, seed=seed)[:, 0]}
        decoded = decompress(compressor.compress(update))
        for name, value in update.items():
            sent = value + residual.get(name, torch.zeros_like(value))
            residual[name] = sent - decoded[name]
            assert torch.equal(compressor.state_dict()[f"feedback.{name}"], residual[name])


def test_feedback_recovers_a_constant_update() -> None:
    update = {"w": powerlaw(40, 30, 0.3)}
    plain, fed = Compressor(0.5), Compressor(0.5, feedback=True)
    rounds = 12
    sums = [
        sum(decompress(compressor.compress(update))["w"] for _ in range(rounds)) / rounds
        for compressor in (plain, fed)
    ]
    assert relative_error(update["w"], sums[1]) < relative_error(update["w"], sums[0]) / 4


def test_state_dict_round_trip() -> None:
    first, second = Compressor(0.7, feedback=True), Compressor(0.7, feedback=True)
    first.compress({"w": powerlaw(30, 20)})
    second.load_state_dict(first.state_dict())
    update = {"w": powerlaw(30, 20, seed=5)}
    assert first.compress(update) == second.compress(update)
    with pytest.raises(ValueError, match="feedback=False"):
        Compressor().load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"only feedback\.\* tensors"):
        second.load_state_dict({"w": torch.zeros(1)})
    with pytest.raises(TypeError, match="must be a floating tensor"):
        second.load_state_dict({"feedback.w": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="use a fresh Compressor"):
        second.compress({"w": powerlaw(20, 20)})


def test_a_refused_update_leaves_the_state_alone() -> None:
    compressor = Compressor(0.7, feedback=True)
    compressor.compress({"a": powerlaw(30, 20), "b": powerlaw(30, 20)})
    before = compressor.state_dict()
    with pytest.raises(ValueError, match=r"update\['b'\] holds NaN"):
        compressor.compress({"a": powerlaw(30, 20), "b": torch.full((30, 20), torch.nan)})
    after = compressor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_feedback_never_sends_what_cannot_be_decoded() -> None:
    compressor = Compressor(0.5, feedback=True)
    state = {"feedback.w": torch.full((300,), 3e38)}
    compressor.load_state_dict(state)
    with pytest.raises(ValueError, match=r"update\['w'\].*overflows float32"):
        compressor.compress({"w": torch.full((300,), 2e38)})
    assert torch.equal(compressor.state_dict()["feedback.w"], state["feedback.w"])
    with pytest.raises(ValueError, match="residual 'w' holds NaN or Inf"):
        compressor.load_state_dict({"feedback.w": torch.tensor([torch.nan])})


def test_a_tensor_with_a_residual_is_not_tied() -> None:
    compressor = Compressor(0.5, feedback=True)
    compressor.compress({"a": powerlaw(20, 30), "b": powerlaw(20, 30, seed=1)})
    residual = compressor.state_dict()["feedback.b"]
    both = powerlaw(20, 30, seed=2)
    decoded = decompress(compressor.compress({"a": both, "b": both}))
    kept = compressor.state_dict()["feedback.b"]
    assert torch.equal(kept, both + residual - decoded["b"])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), TypeError, "dtype torch.float8_e4m3fn"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
        (torch.eye(3).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (torch.empty(3, device="meta"), TypeError, "meta device"),
        (np.array(["a"]), TypeError, "torch does not know"),
        (np.ma.masked_array([1.0], [True]), TypeError, "masked array"),
        (torch.nested.nested_tensor([torch.ones(2)]), TypeError, "nested tensor"),
        ([1.0, 2.0], TypeError, "must be a torch.Tensor or numpy.ndarray, got list"),
        (torch.tensor([1.0, torch.nan]), ValueError, "holds NaN or Inf"),
        (torch.tensor([1.0, torch.inf]), ValueError, "holds NaN or Inf"),
    ],
)
def test_refused_tensors_are_named(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Compressor().compress({"fine": torch.ones(2), "layer.bad": value})
    assert "update['layer.bad']" in str(caught.value)


def test_bad_arguments() -> None:
    for energy in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got"):
            Compressor(energy)
        with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got"):
            Compressor().compress({"w": torch.ones(2)}, energy=energy)
    with pytest.raises(ValueError, match="codec must be one of .*, got 'zip'"):
        Compressor(codec="zip")
    with pytest.raises(ValueError, match="backend must be one of .*, got 'numpy'"):
        Compressor(backend="numpy")
    with pytest.raises(ValueError, match="stateless=True excludes feedback=True"):
        Compressor(feedback=True, stateless=True)
    with pytest.raises(TypeError, match="update must be a mapping"):
        Compressor().compress([torch.ones(2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="non-empty str names"):
        Compressor().compress({1: torch.ones(2)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not both"):
        Compressor().compress({"w": torch.ones(2)}, {"w": torch.ones(2)}, base_digest=b"0" * 16)


def test_damaged_frames_are_refused() -> None:
    frame = Compressor(0.9).compress({"w": powerlaw(30, 20)})
    for cut in range(0, len(frame), 7):
        with pytest.raises(WireError):
            decompress(frame[:cut])
    for position in range(0, len(frame), 5):
        flipped = bytearray(frame)
        flipped[position] ^= 0x10
        with pytest.raises(WireError):
            decompress(flipped)
    with pytest.raises(WireError):
        decompress(frame, max_bytes=100)


def test_raw_nan_is_refused_by_the_receiver() -> None:
    entry = fedkd_fast.wire.Entry(
        "w", "float32", (2,), Mode.RAW, 0, np.array([1.0, np.nan], np.float32).tobytes()
    )
    with pytest.raises(WireError, match="'w' decodes to NaN or Inf"):
        decompress(fedkd_fast.wire.encode([entry]))


def test_import_is_light() -> None:
    heavy = ("transformers", "matplotlib", "sklearn", "rich", "fedkd_fast.ops")
    code = (
        "import sys, fedkd_fast; "
        f"print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[] False"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=0, max_size=3),
    st.sampled_from(CODECS),
    st.floats(0.05, 1.0),
    st.integers(0, 2**31),
)
def test_any_shape(shape: list[int], codec: str, energy: float, seed: int) -> None:
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    frame = Compressor(energy, codec).compress({"t": exact})
    decoded = decompress(frame)["t"]
    assert decoded.shape == exact.shape
    if exact.numel():
        assert relative_error(exact, decoded) <= 1 - energy
    assert all(info.payload_bytes <= info.dense_bytes for info in inspect(frame))
