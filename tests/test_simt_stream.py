"""What every op owes to a CUDA program, as far as a CPU can show it.

A held stream keeps what is launched on it until it is told to run, and may be told again: so does a
GPU that is busy, and a graph. Torch's own work is not held: data that torch has to copy first, and
torch being asked to wait, are for `test_cuda_rules.py` and a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from native_build import ROOT, SIMT, SIMT_LIBRARY, simt_ops
from op_samples import ALL_OURS, BITS, COUNT, OPS, SCALE, Op, check, noise, overwrite

from fedkd_fast import ops, reference

pytestmark = pytest.mark.skipif(not SIMT, reason="Linux on x86-64")

MARKER = 0x5EED  # stands for a stream; nothing looks behind it
# All tensors of the CPU have one index: a launch inside the guard of one is told from one outside.
FIRST_DEVICE, DEVICE_OF_CPU_TENSORS = 0, -1


@functools.cache
def engine() -> ctypes.CDLL:
    simt_ops()
    library = ctypes.CDLL(str(SIMT_LIBRARY))
    library.simt_listen.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.simt_run.restype = ctypes.c_bool
    stream, device = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
    library.simt_noted.argtypes = [ctypes.c_size_t, stream, device]
    library.simt_noted.restype = ctypes.c_char_p
    return library


@pytest.fixture(autouse=True)
def on_simt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops._library, "native", simt_ops())
    yield
    engine().simt_ignore()


class Launch(NamedTuple):
    kernel: str
    stream: int | None
    device: int


def noted() -> Iterator[Launch]:
    stream, device = ctypes.c_void_p(), ctypes.c_int()
    for index in itertools.count():
        kernel = engine().simt_noted(index, ctypes.byref(stream), ctypes.byref(device))
        if kernel is None:
            return
        yield Launch(kernel.decode(), stream.value, device.value)


@functools.cache
def launches(op: Op) -> list[Launch]:
    """Call the op on its own stream and return what it launched."""
    engine().simt_listen(MARKER, False)
    op.call(*op.sample(0))
    assert engine().simt_current_device() == FIRST_DEVICE
    found = list(noted())
    assert found
    return found


# ---- the rules -----------------------------------------------------------------------------------


def launches_on_the_current_stream(op: Op) -> None:
    assert {launch.stream for launch in launches(op)} == {MARKER}


def launches_on_the_device_of_its_data(op: Op) -> None:
    assert {launch.device for launch in launches(op)} == {DEVICE_OF_CPU_TENSORS}


def needs_nothing_that_dies_with_the_call(op: Op) -> None:
    # Memory that is freed while a stream is held is overwritten, and the stack of the call as well.
    data = op.sample(0)
    engine().simt_listen(MARKER, True)
    pending = op.run(*data)
    assert engine().simt_run()
    check(op.finish(pending), op.truth(*data), op.eps)


def replays_on_new_data(op: Op) -> None:
    data = op.sample(0)
    for part in data:  # a look at the data, or at what has not been computed yet, leads astray
        if part.dtype == torch.bool:
            part.fill_(True)
        else:
            part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max)
    engine().simt_listen(MARKER, True)
    pending = op.run(*data)
    for seed in (1, 2):
        overwrite(data, op.sample(seed))
        assert engine().simt_run()
        check(op.finish(pending), op.truth(*data), op.eps)


RULES: list[Callable[[Op], None]] = [
    launches_on_the_current_stream,
    launches_on_the_device_of_its_data,
    needs_nothing_that_dies_with_the_call,
    replays_on_new_data,
]
HELD = {needs_nothing_that_dies_with_the_call, replays_on_new_data}
CASES = [(rule, name) for rule in RULES for name in (ALL_OURS if rule in HELD else OPS)]


def title(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("rule", "name"), CASES, ids=title)
def test_simt_op_keeps_the_rule(rule: Callable[[Op], None], name: str) -> None:
    rule(OPS[name])


@pytest.mark.parametrize("name", ["pack_factors", "unpack_factors"])
def test_simt_scales_and_widths_are_read_by_the_call(name: str) -> None:
    scale, bits = SCALE.clone(), BITS.clone()
    count = [COUNT] if name == "unpack_factors" else []
    (data,) = OPS[name].sample(0)
    engine().simt_listen(MARKER, True)
    found = getattr(ops, name)(data, scale, bits, *count)
    scale.fill_(torch.nan)
    bits.fill_(255)
    assert engine().simt_run()
    assert torch.equal(found, getattr(reference, name)(data, SCALE, BITS, *count))


def test_simt_samples_reach_every_launch() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    written = Counter(kernel for text in sources for kernel in re.findall(r"launch<(\w+)", text))
    seen = {launch.kernel for op in OPS.values() for launch in launches(op)}
    reached = Counter(re.findall(r"\w+_kernel", " ".join(seen)))
    assert written and written - reached == Counter()


# ---- the rules can be broken ---------------------------------------------------------------------

FAULTS = {
    "default stream": launches_on_the_current_stream,
    "no guard": launches_on_the_device_of_its_data,
    "lasting guard": launches_on_the_device_of_its_data,
    "dead heap": needs_nothing_that_dies_with_the_call,
    "dead stack": needs_nothing_that_dies_with_the_call,
    # Torch keeps a stream's memory in order, so CUDA allows it; no op needs that for plain data.
    "dead tensor": needs_nothing_that_dies_with_the_call,
    "early read": replays_on_new_data,
}


def planted(fault: str) -> Op:
    return Op(
        lambda seed: [noise(seed, 2000)],
        lambda values: [simt_ops().planted(values, fault)],
        lambda values: [values * values[0]],
    )


@pytest.mark.parametrize("rule", RULES, ids=title)
def test_simt_sound_planted_op_keeps_the_rule(rule: Callable[[Op], None]) -> None:
    rule(planted("none"))


@pytest.mark.parametrize("fault", FAULTS)
def test_simt_planted_fault_breaks_its_rule(fault: str) -> None:
    with pytest.raises(AssertionError):
        FAULTS[fault](planted(fault))
