"""The sanitizers of `python -m bench.gpu`, with a compute-sanitizer that only pretends."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_places import place

from bench.gpu import plan, sanitizer, stages
from bench.gpu.process import Finished


@pytest.mark.parametrize(
    ("done", "outcome", "said"),
    [
        (Finished(0, "========= ERROR SUMMARY: 0 errors\n"), "passed", "0 errors"),
        (Finished(99, "========= ERROR SUMMARY: 3 errors\n"), "failed", "3 errors"),
        (
            Finished(0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"),
            *("failed", "1 hazard displayed (0 errors, 1 warning)"),
        ),
        (
            Finished(1, "RuntimeError: no\n========= ERROR SUMMARY: 0 errors\n"),
            *("failed", "exit status 1: RuntimeError: no"),
        ),
        (Finished(0, "ran\n"), "failed", "compute-sanitizer gave no summary"),
        (Finished(None, ""), "too slow", "took too long"),
        (
            Finished(None, "========= Invalid __global__ read of size 4 bytes\n=========  at x\n"),
            *("failed", "Invalid __global__ read of size 4 bytes"),
        ),
    ],
)
def test_an_answer_is_read(done: Finished, outcome: str, said: str) -> None:
    found = sanitizer.read(done)
    assert found["outcome"] == outcome and said in (found.get("error"), found.get("summary"))


def test_a_missing_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *_, **__: None)
    found = sanitizer.sanitize(place(tmp_path), "memcheck", None)
    assert found["outcome"] == stages.SKIPPED and "not found" in found["error"]


STUB = """#!{python}
import sys, time
words = sys.argv[1:]
op = words[-1]
if "--kernel-name" in words and {refuses}:
    sys.exit("========= Error: unrecognised option '--kernel-name'")
open("asked", "a").write(" ".join(words) + "\\n")
if op == {hangs!r}:
    print("========= COMPUTE-SANITIZER", flush=True)
    time.sleep(600)
if op == {dies!r}:
    print("RuntimeError: no library")
    sys.exit(1)
found = int(op == {wrong!r})
print(op + ": ran")
print("========= ERROR SUMMARY: %d errors" % found)
sys.exit(99 * found)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a compute-sanitizer on the path; returns a function that runs it on all ops."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def run(seconds: float = 60, only: str | None = None, **behaviour: Any) -> stages.Result:
        kinds = {"refuses": False, "hangs": "", "dies": "", "wrong": "", **behaviour}
        program = folder / "compute-sanitizer"
        program.write_text(STUB.format(python=sys.executable, **kinds))
        program.chmod(0o755)
        return sanitizer.sanitize(place(tmp_path, seconds), "memcheck", only)

    return run


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_only_our_kernels_are_watched(stub: Any, tmp_path: Path) -> None:
    found = stub()
    assert found["outcome"] == stages.PASSED and found["kernels"] == "ours"
    assert found["passed"] == len(plan.TABLE) == len(asked(tmp_path))
    for line, op in zip(asked(tmp_path), plan.TABLE, strict=True):
        assert "--tool memcheck" in line and "--kernel-name kernel_substring=fedkd_fast" in line
        assert line.endswith(f"-m bench.gpu.once --only {op}")


def test_a_tool_without_the_filter_watches_all(stub: Any, tmp_path: Path) -> None:
    found = stub(refuses=True)
    assert found["outcome"] == stages.PASSED and found["kernels"] == "all"
    # It is asked once, and remembered.
    log = (tmp_path / "gpu.log").read_text()
    assert log.count("unrecognised option") == 1
    assert len(asked(tmp_path)) == len(plan.TABLE)


def test_what_is_said_of_an_op_is_kept(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer, "OP_S", 3.0)
    found = stub(hangs="layer_mse", wrong="rans_encode", dies="reconstruct")
    assert found["outcome"] == stages.FAILED
    assert (
        found["error"]
        == "rans_encode: 1 errors; reconstruct: exit status 1: RuntimeError: no library"
    )
    assert found["ops"]["layer_mse"]["outcome"] == stages.TOO_SLOW
    assert found["ops"]["unpack_factors"] == {"outcome": "passed", "summary": "0 errors"}
    assert (found["passed"], found["failed"], found["too slow"]) == (len(plan.TABLE) - 3, 2, 1)
    # A program that dies is no reason to watch all kernels from then on.
    assert found["kernels"] == "ours" and "--kernel-name" in asked(tmp_path)[-1]


def test_ops_that_the_time_does_not_suffice_for(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "TOOL_S", 3.0)
    found = stub(hangs="layer_mse")
    missed = list(plan.TABLE)[1:]
    assert found["outcome"] == stages.NOT_REACHED
    assert found["error"] == f"no answer for {', '.join(missed)}"
    assert (found["passed"], found["too slow"], found["not reached"]) == (1, 1, len(missed) - 1)


def test_one_op_alone(stub: Any, tmp_path: Path) -> None:
    assert stub(only="distill_loss")["passed"] == 1 == len(asked(tmp_path))


def test_every_kernel_has_the_namespace_in_its_name() -> None:
    sources = sorted((stages.CHECKOUT / "csrc" / "cuda").glob("*.cu"))
    kernels = [name for name in sources if "__global__" in name.read_text()]
    assert kernels
    for source in kernels:
        before, _, _ = source.read_text().partition("__global__")
        # Opened, and not closed again.
        assert re.search(r"^namespace fedkd_fast::cuda {", before, re.MULTILINE), source
        assert "}  // namespace" not in source.read_text().rpartition("__global__")[0], source
