"""Compressor and decompress: the promised error on decoded bytes, all tensors, all refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import model, powerlaw, relative_error

import fedkd_fast
from fedkd_fast import Compressor, SubspaceCache, WireError, decompress, inspect
from fedkd_fast.codec.common import DTYPES, VECTOR_SHARE
from fedkd_fast.codec.message import CODECS
from fedkd_fast.wire import Mode

LOSSY = ("wf1", "dense", "wf0", "factors-fp32")


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


def test_codecs_by_size() -> None:
    update = {"w": powerlaw(256, 256)}
    sizes = {codec: len(Compressor(0.95, codec).compress(update)) for codec in CODECS}
    assert sizes["wf0"] * 5 < sizes["factors-fp32"] < sizes["raw"]
    assert sizes["wf1"] * 8 < sizes["factors-fp32"]
    assert sizes["wf1"] * 1.07 < sizes["wf0"]


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
        assert info.mode not in (Mode.FACTORS, Mode.PACKED_FACTORS, Mode.CODED_FACTORS)
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
    assert info.mode is Mode.CODED_FACTORS and info.shape == (32, 64, 3, 3)
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


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("feedback", [False, True])
def test_statistics_of_batch_normalisation_lose_nothing(codec: str, feedback: bool) -> None:
    variance = torch.logspace(-7, 0, 200)
    update = {"w": powerlaw(60, 40), "norm.running_var": variance, "a/running_mean": variance - 0.5}
    compressor = Compressor(0.9, codec, feedback=feedback)
    for _ in range(3):
        decoded = decompress(compressor.compress(update))
        assert not torch.equal(decoded["w"], update["w"])
        for name in ("norm.running_var", "a/running_mean"):
            assert torch.equal(decoded[name], update[name])
    # Zeros of either sign, too, and only what is called so.
    zeros = {"running_var": torch.full((40, 40), -0.0), "running_vary": variance}
    decoded = decompress(compressor.compress(zeros))
    assert bool(torch.signbit(decoded["running_var"]).all())
    if codec != "factors-fp32":
        assert not torch.equal(decoded["running_vary"], variance)


def test_what_loses_nothing_is_a_choice() -> None:
    update = {"w": powerlaw(60, 40), "running_var": torch.logspace(-7, 0, 200)}
    for exact, wanted in [((), set()), (("w",), {"w"}), (["running_var"], {"running_var"})]:
        decoded = decompress(Compressor(0.9, exact=exact).compress(update))
        assert {name for name in update if torch.equal(decoded[name], update[name])} == wanted
    # A budget has to have room for it.
    frame = Compressor(budget_bytes=3000, exact=("running_var",)).compress(update)
    assert torch.equal(decompress(frame)["running_var"], update["running_var"])
    assert 0.9 * 3000 < len(frame) <= 3000
    wrong: list[Any] = ["w", b"w", 5, [1], [["w"]]]
    for one in wrong:
        words = re.escape(f"exact must be a collection of endings of names, got {one!r}")
        with pytest.raises(TypeError, match=words):
            Compressor(exact=one)


def test_targets_are_single_numbers() -> None:
    several: list[Any] = [torch.ones(2), np.ones(2), [0.9], "0.9", True, 1j]
    for name in ("energy", "error", "budget_bytes", "bits_per_param"):
        for one in several:
            with pytest.raises(TypeError, match=f"^{name} must be a number, got "):
                Compressor(**{name: one})
    update = {"w": powerlaw(60, 40)}
    for one in (0.9, np.float32(0.9), torch.tensor(0.9)):
        assert len(Compressor(energy=float(one)).compress(update)) < 60 * 40


@pytest.mark.parametrize("bits", [33.0, 1e306, 1e308])
def test_more_bits_than_there_are_lose_nothing(bits: float) -> None:
    update = {"w": powerlaw(60, 40)}
    assert torch.equal(
        decompress(Compressor(bits_per_param=bits).compress(update))["w"], update["w"]
    )


def test_big_endian_arrays() -> None:
    array = np.arange(6, dtype=">f4")
    assert decompress(Compressor(codec="raw").compress({"w": array}))["w"].tolist() == list(
        range(6)
    )


def test_thousands_of_tiny_tensors_travel_as_they_are() -> None:
    update = {f"layer.{index}.bias": torch.randn(3) for index in range(3000)}
    for codec, mode in (("wf1", Mode.HALF), ("wf0", Mode.RAW)):
        infos = inspect(Compressor(0.9, codec).compress(update))
        assert {info.mode for info in infos} == {mode}


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
    with pytest.raises(ValueError, match="stateless=True excludes cache"):
        Compressor(cache=SubspaceCache(), stateless=True)
    with pytest.raises(TypeError, match="update must be a mapping"):
        Compressor().compress([torch.ones(2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="non-empty str names"):
        Compressor().compress({1: torch.ones(2)})  # type: ignore[dict-item]
    with pytest.raises(
        ValueError, match=r"give one of energy, error, .* got \['energy', 'error'\]"
    ):
        Compressor(0.9, error=0.1)
    for error in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"error must lie in \[0, 1\), got"):
            Compressor(error=error)
    with pytest.raises(ValueError, match="budget_bytes must be at least 1, got 0"):
        Compressor(budget_bytes=0)
    with pytest.raises(ValueError, match="bits_per_param must be positive, got 0"):
        Compressor(bits_per_param=0)
    with pytest.raises(ValueError, match="scope must be one of .*, got 'model'"):
        Compressor(scope="model")
    for wish in ({"budget_bytes": 100}, {"scope": "message"}):
        with pytest.raises(ValueError, match="need codec 'wf1' or 'dense', got 'wf0'"):
            Compressor(codec="wf0", **wish)


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
