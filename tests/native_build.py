"""Builds tests/native: the simt engine's library and the sanitizer executables."""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# One folder an environment, like that of the package: its cache names the environment's tools.
BUILD = ROOT / "build" / f"native-{zlib.crc32(sys.prefix.encode()):08x}"
# Where CUDA kernels run on the CPU: fiber.h changes between stacks of that machine.
SIMT = platform.system() == "Linux" and platform.machine() == "x86_64"
SIMT_LIBRARY = BUILD / "libfedkd_fast_simt.so"


def built(target: str) -> Path:
    """Build what a target needs, and return the folder; a failure shows the compiler's words."""
    torch_dir = f"-DTORCH_DIR={Path(torch.__file__).parent}"
    source = str(ROOT / "tests" / "native")
    problem = _problem_of("-S", source, "-B", str(BUILD), "-G", "Ninja", torch_dir) or _problem_of(
        "--build", str(BUILD), "--target", target
    )
    if problem:
        raise RuntimeError(problem)
    return BUILD


@functools.cache
def _problem_of(*step: str) -> str:
    """Run a step of CMake, once in this process and in no other meanwhile."""
    command = ["cmake", *step]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PATH": tools}
        )
    if done.returncode:
        return f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return ""


@functools.cache
def simt_ops() -> torch._ops._OpNamespace:
    """Load the ops that run CUDA kernels on the CPU."""
    built("fedkd_fast_simt")
    torch.ops.load_library(str(SIMT_LIBRARY))  # type: ignore[no-untyped-call]
    return torch.ops.fedkd_fast_simt


def run(name: str, *arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run an executable of the build."""
    return run_in(built(name), name, *arguments, timeout_s=timeout_s)


def run_in(
    folder: Path, name: str, *arguments: str, timeout_s: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run an executable without address randomisation, which ThreadSanitizer does not bear."""
    command = ["setarch", "--addr-no-randomize", str(folder / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
