"""Sealing and opening a frame, against what the codec takes for the same frame in the same run.

The matrices are those of MiniLM's last update (`deltas.py`), each codec with what it makes of them.
`share_of_codec` is best time over best time of compressing and decompressing, which includes
factorising from the subspace of the round before; the two take turns. Seconds of the one processor
that both run on, so that what else the machine does is not in the share.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from deltas import load
from measure import record_rate
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fedkd_fast import Compressor, SubspaceCache, decompress
from fedkd_fast.sealing import SEAL_BYTES, Channel, PrivateKey

pytest.importorskip("cryptography", reason="sealed frames need the extra [crypto]")

ENERGY = 0.95
TURNS = 3
# Sealing takes so little that one call would measure the clock.
CALLS = 20


def updates() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the last two updates of a model."""
    pairs = [pair for pair in load("minilm") if pair.name.endswith("round 5")]
    return {p.name: p.previous for p in pairs}, {p.name: p.current for p in pairs}


def channels() -> tuple[Channel, Channel]:
    """Return both ends of a channel."""
    client, server = PrivateKey.generate(), PrivateKey.generate()
    return (
        Channel(client, server.public, run=b"bench", client=0, side="client"),
        Channel(server, client.public, run=b"bench", client=0, side="server"),
    )


def seconds(call: Callable[[], object], calls: int = 1) -> float:
    began = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began) / calls


@pytest.mark.parametrize("codec", ["wf1", "wf0", "factors-fp32", "raw"])
def test_seal_and_open(benchmark: BenchmarkFixture, codec: str) -> None:
    previous, current = updates()
    client, server = channels()
    frame = b""

    def codes() -> float:
        nonlocal frame
        compressor = Compressor(ENERGY, codec=codec, cache=SubspaceCache())
        compressor.compress(previous)

        def both() -> None:
            nonlocal frame
            frame = compressor.compress(current)
            decompress(frame)

        return seconds(both)

    def both_ways() -> bytes:
        return server.open(client.seal(frame, 0), 0)

    codes()
    assert both_ways() == frame
    assert len(client.seal(frame, 0)) == len(frame) + SEAL_BYTES
    turns = [(codes(), seconds(both_ways, CALLS)) for _ in range(TURNS)]
    coding, sealing = (min(column) for column in zip(*turns, strict=True))
    benchmark(both_ways)
    record_rate(benchmark, "frame_GBps", len(frame) / 1e9)
    benchmark.extra_info |= {
        "frame_bytes": len(frame),
        "codec_ms": 1e3 * coding,
        "share_of_codec": sealing / coding,
    }
