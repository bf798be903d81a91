"""The compile net: every kernel file compiles for every architecture, and no kernel spills."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench import kernel_resources

KERNEL = re.compile(r"__global__ void (\w+_kernel)\(")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    if kernel_resources.nvcc() is None:
        pytest.skip("no nvcc")
    return kernel_resources.measure()


def test_no_kernel_spills(records: list[dict[str, Any]]) -> None:
    assert [record for record in records if record["spill_bytes"] or record["stack_bytes"]] == []


def test_launches_know_when_to_ask_for_shared_memory(records: list[dict[str, Any]]) -> None:
    # cuda/launch.cuh asks from 24 KiB of dynamic memory on, so that 48 come of both kinds at most.
    assert max(record["shared_bytes"] for record in records) <= 24 * 1024


def test_every_kernel_is_compiled_for_every_architecture(records: list[dict[str, Any]]) -> None:
    written = {
        name for source in kernel_resources.sources() for name in KERNEL.findall(source.read_text())
    }
    for architecture in kernel_resources.ARCHITECTURES:
        compiled = {r["kernel"].split("<")[0] for r in records if r["sm"] == int(architecture)}
        assert compiled == written and written


def test_the_kept_report_is_of_these_kernels(records: list[dict[str, Any]]) -> None:
    kept = json.loads(kernel_resources.RESULT.read_text())
    names = [[(record["kernel"], record["sm"]) for record in side] for side in (kept, records)]
    assert names[0] == names[1], "run python bench/kernel_resources.py"


def test_words_that_ptxas_did_not_use_before_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="ptxas has changed its words"):
        kernel_resources.parse("Compiling entry function 'f' for 'sm_90'\nnothing more", "a.cu")


def test_a_spill_would_be_seen() -> None:
    report = (
        "ptxas info : Compiling entry function '_Z1fPf' for 'sm_90'\n"
        "    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info : Used 255 registers, used 1 barriers, 1024 bytes smem, 500 bytes cmem[0]\n"
    )
    (record,) = kernel_resources.parse(report, "a.cu")
    assert record["spill_bytes"] == 40 and record["stack_bytes"] == 8
    assert record["registers"] == 255 and record["shared_bytes"] == 1024
