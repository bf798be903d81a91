"""Tries an installed fedkd_fast as a user would: libraries, ops, command line.

`make wheel` runs it, without pytest, as ``python -I``, which keeps the checkout off the path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fedkd_fast
import fedkd_fast._C as _C
from fedkd_fast import ops, reference

PACKAGE = Path(fedkd_fast.__file__).parent
SYSTEM = r"(libstdc\+\+|libm|libgcc_s|libc|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d"
ENERGY = 0.9


def needed(library: Path) -> set[str]:
    """What a library asks of others than the system's; a path into a build machine is refused."""
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, dynamic
    names = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    return {name for name in names if not re.fullmatch(SYSTEM, name)}


def try_libraries() -> None:
    assert PACKAGE.is_relative_to(sys.prefix), f"{PACKAGE} is not the installed package"
    library = PACKAGE / "libfedkd_fast_ops.so"
    assert needed(library) == {"libtorch.so"}
    assert b"/torch/include/" not in library.read_bytes(), "messages name the builder's folders"
    assert needed(Path(_C.__file__)) == set()


def try_ops() -> None:
    logits = torch.randn(2, 16, 10)
    labels = torch.randint(10, (16,))
    torch.testing.assert_close(
        ops.distill_loss(*logits, labels), reference.distill_loss(*logits, labels)
    )
    matrix = torch.randn(30, 20)
    torch.testing.assert_close(
        ops.truncated_svd(matrix, energy=ENERGY).S, reference.truncated_svd(matrix, energy=ENERGY).S
    )
    packing = torch.rand(3) + 0.1, torch.tensor([2, 5, 9], dtype=torch.uint8)
    codes = ops.pack_factors(matrix[:3], *packing)
    assert torch.equal(codes, reference.pack_factors(matrix[:3], *packing))


def try_command_line(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def fedkd_fast_command(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("fedkd-fast")), *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True)

    tensors = {"weight": torch.randn(64, 48), "bias": torch.randn(64)}
    save_file(tensors, folder / "in.safetensors")
    fedkd_fast_command("info")
    fedkd_fast_command("compress", "in.safetensors", "it.fkd", "--energy", str(ENERGY))
    fedkd_fast_command("decompress", "it.fkd", "out.safetensors")
    back = load_file(folder / "out.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        lost = (back[name] - tensor).square().sum() / tensor.square().sum()
        assert lost <= 1 - ENERGY, f"{name} lost {lost:.1%}"


if __name__ == "__main__":
    torch.manual_seed(0)
    try_libraries()
    try_ops()
    with tempfile.TemporaryDirectory() as folder:
        try_command_line(Path(folder))
