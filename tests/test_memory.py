"""Pages that nothing uses are given back, where the C library can do so."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from fedkd_fast._memory import give_back


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_holes_of_the_heap_are_given_back() -> None:
    # Small enough for the heap; every sixteenth stays, so that its end cannot move.
    many = [torch.ones(4096) for _ in range(8192)]  # 128 MiB
    held = many[::16]
    before = resident()
    del many
    give_back()
    assert before - resident() > 96 << 20
    assert all(bool((one == 1).all()) for one in held)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()
