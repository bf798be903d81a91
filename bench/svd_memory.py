"""How much memory one call of truncated_svd_list takes beside its input: asked of a new process.

    python bench/svd_memory.py FOLDER ROWS COLS ENERGY

is that process. It reads the matrix, and an earlier basis and spectrum where there are any, from
raw files, calls twice, and prints the bytes by which either call raised the peak, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd_fast import ops
from fedkd_fast.reference import Subspace

MATRIX, BASIS, SHARES = "matrix", "basis", "shares"
STEP = 1 << 20


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fill_up_to_peak() -> list[bytearray]:
    """Take what the process once had and gave back, so that the next byte is a new peak."""
    taken: list[bytearray] = []
    peak = peak_bytes()
    while peak_bytes() - peak < STEP:
        taken.append(bytearray(b"\1") * STEP)
    return taken


def give_back() -> None:
    """Return freed memory to the system, as far as the allocator can."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def child(folder: Path, rows: int, cols: int, energy: float) -> dict[str, int]:
    """Call twice, and tell by how much either call raised the peak."""
    torch.set_num_threads(1)
    matrix = torch.from_numpy(np.fromfile(folder / MATRIX, np.float32).reshape(rows, cols))
    earlier = None
    if (folder / BASIS).exists():
        basis = np.fromfile(folder / BASIS, np.float32).reshape(-1, max(rows, cols))
        shares = np.fromfile(folder / SHARES, np.float64)
        earlier = [Subspace(torch.from_numpy(basis), torch.from_numpy(shares))]
    extra = {}
    for call in ("first_call_bytes", "extra_bytes"):
        give_back()
        taken = fill_up_to_peak()
        before = peak_bytes()
        ops.truncated_svd_list([matrix], energy=energy, earlier=earlier)
        extra[call] = peak_bytes() - before
        del taken
    return extra


def measure(
    matrix: torch.Tensor, earlier: Subspace | None, energy: float, runs: int
) -> dict[str, Any]:
    """Return the peak of extra memory, factors included, relative to the matrix; the worst of runs.

    The first call of a process also pays what libraries keep for the next ones: their code, what
    they compile, their buffers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        matrix.numpy().tofile(folder / MATRIX)
        if earlier is not None:
            earlier.basis.contiguous().numpy().tofile(folder / BASIS)
            earlier.shares.numpy().tofile(folder / SHARES)
        command = [sys.executable, __file__, scratch, *map(str, matrix.shape), str(energy)]
        told = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(runs)
        ]
    worst = {call: max(one[call] for one in told) for call in told[0]}
    size = matrix.numel() * matrix.element_size()
    return {
        "shape": list(matrix.shape),
        "energy": energy,
        "start": "cold" if earlier is None else "warm",
        "runs": runs,
        **worst,
        "matrix_bytes": size,
        "ratio": round(worst["extra_bytes"] / size, 2),
        "ratio_of_first_call": round(worst["first_call_bytes"] / size, 2),
    }


if __name__ == "__main__":
    told = child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    print(json.dumps(told))
