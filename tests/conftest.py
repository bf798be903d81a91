"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_build import SIMT, simt_ops
from ranks import Ranks

from fedkd_fast import ops

# One thread: the suite's matrices are small, and threads that spin against each other are slower.
torch.set_num_threads(1)


# They compile for minutes. At the end, all other cores would wait for them.
FIRST = {"test_simt.py", "test_simt_barriers.py", "test_simt_stream.py", "test_wire_fuzz.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests of native executables."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(
    params=[
        "cpu",
        "simt",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device an op test runs on; `simt` runs the CUDA kernels on the CPU."""
    if request.param == "simt":
        if not SIMT:
            pytest.skip("Linux on x86-64")
        monkeypatch.setattr(ops._library, "native", simt_ops())
        return torch.device("cpu")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of one gloo group."""
    found = Ranks(2, tmp_path_factory.mktemp("store"))
    yield found
    found.close()


@pytest.fixture
def runs_on_simt(device: torch.device) -> bool:
    """Whether `device` is `simt`."""
    return ops._library.native is not torch.ops.fedkd_fast


@pytest.fixture
def runs_cuda_kernels(device: torch.device, runs_on_simt: bool) -> bool:
    """Whether `device` stands for the CUDA half of the ops, which reports some errors late."""
    return device.type == "cuda" or runs_on_simt


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran CUDA kernels without a GPU: the closing line does not."""
    passed = [r for r in terminalreporter.stats.get("passed", []) if "[simt" in r.nodeid]
    if passed:
        seconds = sum(report.duration for report in passed)
        terminalreporter.write_line(
            f"{len(passed)} tests ran CUDA kernels on the CPU, in {seconds:.0f} s"
        )
