"""Builds tests/native: the simt engine's library and the sanitizer executables."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# One folder an environment, like that of the package: its cache names the environment's tools.
BUILD = ROOT / "build" / f"native-{zlib.crc32(sys.prefix.encode()):08x}"
SIMT_LIBRARY = BUILD / "libfedkd_fast_simt.so"


def built() -> Path:
    """Build what has changed, once, and return the folder; a failure shows the compiler's words."""
    if problem := _problem_of_build():
        raise RuntimeError(problem)
    return BUILD


@functools.cache
def _problem_of_build() -> str:
    torch_dir = Path(torch.__file__).parent
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    configure = ["cmake", "-S", str(ROOT / "tests" / "native"), "-B", str(BUILD), "-G", "Ninja"]
    for command in ([*configure, f"-DTORCH_DIR={torch_dir}"], ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PATH": tools}
        )
        if done.returncode:
            return f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return ""


@functools.cache
def simt_ops() -> torch._ops._OpNamespace:
    """Load the ops that run CUDA kernels on CPU threads."""
    built()
    torch.ops.load_library(str(SIMT_LIBRARY))  # type: ignore[no-untyped-call]
    return torch.ops.fedkd_fast_simt


def run(name: str, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run an executable of the build."""
    return run_in(built(), name, *arguments, timeout_s=timeout_s)


def run_in(
    folder: Path, name: str, *arguments: str, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run an executable without address randomisation, which ThreadSanitizer does not bear."""
    command = ["setarch", "--addr-no-randomize", str(folder / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
