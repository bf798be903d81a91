"""CUDA kernels on the CPU: the engine reports faults, and sanitizers find nothing in ours."""

from __future__ import annotations

import re

import pytest
from native_build import ROOT, SIMT, run

pytestmark = pytest.mark.skipif(not SIMT, reason="Linux on x86-64")

LINE = re.compile(r"error (\d+), total (-?\d+), sum (-?\d+)")
PLACE = r"simt: .*{kernel}_kernel.*, block \({block}, 0, 0\), thread \(\d+, 0, 0\)"
LAUNCH_FAILURE, BAD_CONFIGURATION = 719, 9
RACE = "WARNING: ThreadSanitizer: data race"
MOST_ENGINE_LINES = 400


def results(name: str, build: str = "plain") -> tuple[int, int, int]:
    done = run(f"simt_faults_{build}", name)
    match = LINE.search(done.stdout)
    assert match, done.stderr
    error, total, total_sum = (int(group) for group in match.groups())
    return error, total, total_sum


@pytest.mark.parametrize("build", ["plain", "thread", "address"])
@pytest.mark.parametrize(
    ("name", "total", "total_sum"),
    [
        ("rotate", 0, 3 * 128),
        ("reuse", 0, sum(range(1, 65))),
        ("count", 128, 0),
        ("warp", 0, 0),
        ("grid", 0, 64 * (0 + 1 + 2 + 3)),
    ],
)
def test_simt_runs_sound_kernels(name: str, total: int, total_sum: int, build: str) -> None:
    assert results(name, build) == (0, total, total_sum)


@pytest.mark.parametrize("build", ["plain", "thread", "address"])
@pytest.mark.parametrize(
    ("name", "block", "what"),
    [
        ("divergent", 0, r"divergent barrier: waits at .*:\d+, but thread .* waits at .*:\d+"),
        ("early_return", 1, r"(returned, but thread .* waits at|but thread \(5, 0, 0\) has ret)"),
        ("deadlock", r"\d", "deadlock: waits at .*, and no thread is left to come"),
        ("parted_block", r"\d", "(no thread is left to come|all that are left wait)"),
        ("partial_warp", 0, "uses a warp operation without all 32 lanes"),
    ],
)
def test_simt_reports_barriers_that_not_all_reach(
    name: str, block: object, what: str, build: str
) -> None:
    done = run(f"simt_faults_{build}", name.replace("_", "-"), timeout_s=30)
    assert re.search(PLACE.format(kernel=name, block=block) + ".*" + what, done.stderr), done.stderr
    assert done.returncode == 1 and f"error {LAUNCH_FAILURE}" in done.stdout


@pytest.mark.parametrize("name", ["too-many-threads", "too-many-blocks"])
def test_simt_refuses_launches_that_a_gpu_refuses(name: str) -> None:
    assert results(name)[0] == BAD_CONFIGURATION


@pytest.mark.parametrize(
    "name", ["rotate-without-barrier", "reuse-without-barrier", "count-without-atomic"]
)
def test_simt_thread_sanitizer_finds_planted_races(name: str) -> None:
    done = run("simt_faults_thread", name)
    assert RACE in done.stderr and "simt_faults.cu" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["overrun_static", "overrun_dynamic", "overrun_local"])
def test_simt_address_sanitizer_finds_planted_overruns(name: str) -> None:
    done = run("simt_faults_address", name.replace("_", "-"))
    assert re.search(PLACE.format(kernel=name, block=0), done.stderr), done.stderr
    assert re.search("buffer-overflow|out of bounds", done.stderr) and done.returncode != 0


@pytest.mark.parametrize("build", ["thread", "address"])
def test_simt_kernels_are_clean_under_sanitizers(build: str) -> None:
    done = run(f"simt_kernels_{build}")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [line for line in done.stdout.splitlines() if line.startswith("ok  ")]
    assert len(cases) >= 20 and "0 failed" in done.stdout
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr


def test_rans_paths_agree_and_survive_mutations_under_sanitizers() -> None:
    done = run("rans_address", "1", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"\d{4,} refused, paths:.* portable", done.stdout)


def test_packing_paths_give_the_bits_of_the_formula_under_sanitizers() -> None:
    done = run("pack_factors_address")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"\d{4,} cases, paths:.* portable", done.stdout)


def test_passes_of_fitting_do_what_their_formulas_say_under_sanitizers() -> None:
    done = run("fit_factors_address")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} cases\n", done.stdout)


@pytest.mark.parametrize("build", ["plain", "address"])
def test_eigenvalues_and_vectors_of_symmetric_matrices(build: str) -> None:
    done = run(f"eigen_{build}")
    assert done.returncode == 0 and done.stdout == "0 broken promises\n", done.stdout + done.stderr


def test_simt_builds_every_kernel_file() -> None:
    listed = (ROOT / "tests/native/CMakeLists.txt").read_text()
    sources = [path.name for path in (ROOT / "csrc/cuda").glob("*.cu")]
    assert sources and [name for name in sources if f"cuda/{name}" not in listed] == []


def test_simt_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "csrc/simt").iterdir())
    assert lines < MOST_ENGINE_LINES
