"""Clocks of a GPU: one call, the card's copy bandwidth, its rate of bfloat16 products.

`ms` is the time between two events around one call, on a queue that a delay holds until the whole
call has been enqueued, so that the host's speed does not enter it; where a call waits for the
device itself, that wait counts. The L2 cache is overwritten before each repeat. `call_ms` is what
one of many calls in a row takes by the host's clock: launches count, inputs may lie in L2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_WARM_UPS = 3
_FEWEST, _MOST = 3, 50
_AIM_S = 0.25  # for the repeats of one clock
_LONG_S = 0.5  # a longer call is timed once, by the host's clock
_DELAY_CYCLES = 4_000_000  # about 2 ms: longer than the host takes to enqueue a training step
_COPY_BYTES = 2**30
_COPY_REPEATS = 20
_GEMM_SIDE = 8192
_GEMM_REPEATS = 10


class Timing(NamedTuple):
    """Medians, in milliseconds."""

    ms: float
    call_ms: float
    repeats: int


def events(call: Callable[[], object], repeats: int, before: Callable[[], object]) -> list[float]:
    """Milliseconds of each repeat between two events on the current stream."""
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def seconds(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def context_is_lost() -> bool:
    """Wait for the device; say whether a fault has left nothing more to do in this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure(call: Callable[[], object]) -> Timing:
    """Time a call, which has been made before, by both clocks."""
    first = seconds(call, 1)
    if first > _LONG_S:
        return Timing(1e3 * first, 1e3 * first, 1)
    for _ in range(_WARM_UPS):
        call()
    repeats = min(_MOST, max(_FEWEST, int(_AIM_S / seconds(call, 1))))
    device = torch.cuda.current_device()
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def before() -> None:
        flushed.zero_()
        torch.cuda._sleep(_DELAY_CYCLES)

    ms = statistics.median(events(call, repeats, before))
    call_ms = statistics.median(1e3 * seconds(call, -(-repeats // 3)) for _ in range(3))
    return Timing(ms, call_ms, repeats)


def copy_gb_per_s() -> float:
    """Bytes read plus bytes written by a large copy inside the card's memory, over its time."""
    free, _ = torch.cuda.mem_get_info()
    source = torch.empty(min(_COPY_BYTES, free // 4), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    ms = statistics.median(events(lambda: target.copy_(source), _COPY_REPEATS, lambda: None))
    return 2 * source.numel() / ms / 1e6


def bf16_tflop_per_s() -> float:
    """Rate of a large product of random bfloat16 matrices."""
    left, right = (
        torch.randn(_GEMM_SIDE, _GEMM_SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    for _ in range(_WARM_UPS):
        left @ right
    ms = statistics.median(events(lambda: left @ right, _GEMM_REPEATS, lambda: None))
    return 2 * _GEMM_SIDE**3 / ms / 1e9
