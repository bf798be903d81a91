"""How much memory one call of truncated_svd_list takes beside its input: asked of a new process.

    python bench/svd_memory.py FOLDER ROWS COLS ENERGY

is that process. It reads the matrix, and an earlier basis and spectrum where there are any, from
raw files, and prints the bytes by which the call raised the peak.
"""

from __future__ import annotations

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


def child(folder: Path, rows: int, cols: int, energy: float) -> int:
    torch.set_num_threads(1)
    # A flat spectrum and a steep one take both of the op's ways: libraries have their buffers then.
    flat = torch.randn(256, 128)
    ops.truncated_svd_list(
        [flat, torch.randn(256, 4) @ torch.randn(4, 128) + flat / 99], energy=0.9
    )
    matrix = torch.from_numpy(np.fromfile(folder / MATRIX, np.float32).reshape(rows, cols))
    earlier = None
    if (folder / BASIS).exists():
        basis = np.fromfile(folder / BASIS, np.float32).reshape(-1, max(rows, cols))
        shares = np.fromfile(folder / SHARES, np.float64)
        earlier = [Subspace(torch.from_numpy(basis), torch.from_numpy(shares))]
    taken = fill_up_to_peak()
    before = peak_bytes()
    ops.truncated_svd_list([matrix], energy=energy, earlier=earlier)
    after = peak_bytes()
    del taken
    return after - before


def measure(
    matrix: torch.Tensor, earlier: Subspace | None, energy: float, runs: int
) -> dict[str, Any]:
    """Return the peak of extra memory, factors included, relative to the matrix; the worst of runs.

    What the allocator keeps or gives back differs from one process to the next.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        matrix.numpy().tofile(folder / MATRIX)
        if earlier is not None:
            earlier.basis.contiguous().numpy().tofile(folder / BASIS)
            earlier.shares.numpy().tofile(folder / SHARES)
        command = [sys.executable, __file__, scratch, *map(str, matrix.shape), str(energy)]
        extra = max(
            int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(runs)
        )
    size = matrix.numel() * matrix.element_size()
    return {
        "shape": list(matrix.shape),
        "energy": energy,
        "start": "cold" if earlier is None else "warm",
        "runs": runs,
        "extra_bytes": extra,
        "matrix_bytes": size,
        "ratio": round(extra / size, 2),
    }


if __name__ == "__main__":
    print(child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
