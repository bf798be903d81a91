"""Where a number comes from."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any


def commit() -> str:
    """Name the commit of this checkout; "unknown" without git, or outside a checkout."""
    root = Path(__file__).parent.parent
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts(threads: int) -> dict[str, Any]:
    """Say what was measured, and on what."""
    # Not above: the GPU bench asks for the commit where torch or the codec may be missing.
    import torch

    import fedkd_fast._C as _C

    return {
        "version": _C.version,
        "commit": commit(),
        "compiler": _C.compiler,
        "cuda_archs": _C.cuda_archs if _C.has_cuda else None,
        "torch": torch.__version__,
        "threads": threads,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
