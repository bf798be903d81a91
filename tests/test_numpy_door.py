"""numpy in, numpy out, and the bytes door in a process that has nothing of the training half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd_fast import Compressor, aggregate, as_numpy, decompress

WITHOUT_EXTRAS = Path(__file__).parent / "without_extras.py"
ENERGY = 0.95


def an_update(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, 48, 3), np.float32)
    return {
        "layer.weight": left @ right.T,
        "layer.bias": generator.standard_normal(48, np.float32),
        "half": generator.standard_normal((4, 4)).astype(np.float16),
        "seen": np.array([seed, 7]),
        "on": np.array(seed % 2 == 0),
    }


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm((found - wanted).ravel()) / np.linalg.norm(wanted.ravel()))


def test_arrays_come_back_as_arrays() -> None:
    update = an_update(0)
    found = as_numpy(decompress(Compressor(energy=ENERGY).compress(update)))
    assert list(found) == list(update)
    for name, value in update.items():
        assert isinstance(found[name], np.ndarray)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert relative_error(found["layer.weight"], update["layer.weight"]) <= (1 - ENERGY) ** 0.5
    assert found["seen"].tolist() == [0, 7] and found["on"].item() is True


def test_a_difference_to_arrays_is_applied_to_them() -> None:
    base, update = an_update(2), an_update(4)
    frame = Compressor(energy=1.0).compress(update, base)
    found = as_numpy(decompress(frame, base=base))
    for name in ("layer.weight", "layer.bias"):
        np.testing.assert_array_equal(found[name], base[name] + (update[name] - base[name]))


def test_a_mean_is_arrays_too() -> None:
    updates = [an_update(seed) for seed in range(3)]
    frames = [Compressor(energy=1.0).compress(update) for update in updates]
    weights = np.array([1.0, 2.0, 5.0])
    found = as_numpy(aggregate(frames, weights))
    for name in ("layer.weight", "layer.bias"):
        mean = np.average([update[name].astype(np.float64) for update in updates], 0, weights)
        spread = np.finfo(np.float32).eps * np.abs(mean).max()
        np.testing.assert_allclose(found[name], mean, atol=spread, rtol=0)
        assert found[name].dtype == np.float32


def test_bfloat16_becomes_float32_without_loss() -> None:
    value = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    frame = Compressor(energy=1.0).compress({"w": value})
    found = as_numpy(decompress(frame))
    assert found["w"].dtype == np.float32
    assert torch.equal(torch.from_numpy(found["w"]).bfloat16(), value)
    again = Compressor(energy=1.0).compress(found)
    with pytest.raises(ValueError, match=r"'w' is \(8, 8\) float32, schema has \(8, 8\) bfloat16"):
        decompress(again, schema={"w": value})


def test_tied_tensors_are_tied_arrays() -> None:
    value = torch.ones(6, 4, dtype=torch.bfloat16)
    other = torch.ones(6, 4)
    frame = Compressor(energy=1.0).compress({"a": value, "b": value, "c": other, "d": other})
    found = as_numpy(decompress(frame))
    assert np.shares_memory(found["a"], found["b"]) and np.shares_memory(found["c"], found["d"])
    assert len(Compressor(energy=1.0).compress(found)) < len(
        Compressor(energy=1.0).compress({name: one.copy() for name, one in found.items()})
    )


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"tensors\['a'\] must be a torch.Tensor, got ndarray"):
        as_numpy({"a": np.ones(3)})  # type: ignore[dict-item]


SERVER = """
import io
import numpy as np
import fedkd_fast

generator = np.random.default_rng(0)
updates = [{"w": generator.standard_normal((40, 30), np.float32)} for _ in range(3)]
compressor = fedkd_fast.Compressor(energy=0.9, feedback=True, cache=fedkd_fast.SubspaceCache())
frames = [compressor.compress(update) for update in updates]
print(fedkd_fast.inspect(frames[0])[0].name)
decoded = fedkd_fast.as_numpy(fedkd_fast.decompress(frames[0], schema=updates[0]))
mean = fedkd_fast.aggregate(frames, weights=[1, 2, 3], schema=updates[0])
print(decoded["w"].shape, fedkd_fast.as_numpy(mean)["w"].dtype, mean.refused)
broadcast = mean.recompress(fedkd_fast.Compressor(energy=0.9))
print(fedkd_fast.as_numpy(fedkd_fast.decompress(broadcast))["w"].shape)
file = io.BytesIO()
fedkd_fast.Compressor(energy=0.9).compress_to(file, updates[0])
file.seek(0)
print(fedkd_fast.as_numpy(dict(fedkd_fast.decompress_from(file)))["w"].shape)
try:
    fedkd_fast.decompress(frames[0][:-1])
except fedkd_fast.WireError as error:
    print("refused")
"""


def test_the_bytes_door_needs_nothing_of_the_training_half(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    done = subprocess.run(
        [sys.executable, WITHOUT_EXTRAS, script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "w",
        "(40, 30) float32 {}",
        "(40, 30)",
        "(40, 30)",
        "refused",
    ]
