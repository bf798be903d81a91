"""Real ranks of a gloo process group on the loopback device, for tests."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START_S, _CALL_S = 120, 60


def _serve(rank: int, count: int, folder: str, calls: Any, replies: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_START_S),
    )
    replies.put((rank, None, None))
    while (call := calls.get()) is not None:
        try:
            replies.put((rank, call(rank), None))
        except BaseException:
            replies.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Processes that each hold a rank and run the functions that they are given."""

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._calls = [context.Queue() for _ in range(count)]
        self._replies = context.Queue()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, count, str(folder), calls, self._replies), daemon=True
            )
            for rank, calls in enumerate(self._calls)
        ]
        for process in self._processes:
            process.start()
        self._wait(_START_S)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return what a module's function of the rank gives on each of them; a hang is an error."""
        for calls in self._calls:
            calls.put(function)
        return self._wait(_CALL_S)

    def _wait(self, seconds: float) -> list[Any]:
        results = {}
        while len(results) < len(self._calls):
            try:
                rank, result, failure = self._replies.get(timeout=seconds)
            except queue.Empty:
                missing = sorted(set(range(len(self._calls))) - set(results))
                raise AssertionError(f"ranks {missing} hang") from None
            results[rank] = result, failure
        failures = [f"rank {rank}: {one}" for rank, (_, one) in results.items() if one]
        assert not failures, "\n".join(failures)
        return [results[rank][0] for rank in sorted(results)]

    def close(self) -> None:
        """Let all processes end, and end those that do not."""
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
