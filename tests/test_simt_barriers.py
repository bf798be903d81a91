"""Every barrier of the CUDA kernels is needed, and its absence is noticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import ROOT, run_in

BARRIER = "__syncthreads();"
PLACES = [
    (source.name, number)
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for number, line in enumerate(source.read_text().splitlines())
    if BARRIER in line
]


def test_there_are_barriers() -> None:
    assert {name for name, _ in PLACES} == {
        "distill_loss.cu",
        "layer_mse.cu",
        "pack_factors.cu",
        "truncated_svd.cu",
        "truncated_svd_small.cu",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), PLACES, ids=str)
def test_simt_notices_a_missing_barrier(name: str, number: int, tmp_path: Path) -> None:
    for part in ("csrc", "tests/native"):
        shutil.copytree(ROOT / part, tmp_path / part)
    source = tmp_path / "csrc" / "cuda" / name
    lines = source.read_text().splitlines()
    lines[number] = lines[number].replace(BARRIER, "")
    source.write_text("\n".join(lines) + "\n")
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", str(tmp_path / "tests" / "native"), "-B", str(build), "-G", "Ninja"],
        ["cmake", "--build", str(build), "--target", "simt_kernels_thread"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    done = run_in(build, "simt_kernels_thread")
    assert done.returncode != 0
    assert "data race" in done.stderr or "FAIL" in done.stdout
