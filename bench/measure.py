"""Rates from a finished benchmark."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture


def record_rate(benchmark: BenchmarkFixture, name: str, amount: float) -> None:
    """Note amount / best time; nothing where `--benchmark-disable` measured nothing."""
    if benchmark.stats is not None:
        benchmark.extra_info[name] = amount / benchmark.stats.stats.min
