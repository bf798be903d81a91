"""Calls give the same where another device is the default one, as ``torch.set_default_device``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkd_fast import Compressor, ErrorFeedback, aggregate, decompress, ops
from fedkd_fast.integrations.ddp import LowRankState
from fedkd_fast.integrations.link import Broadcaster, Compression, Receiver
from fedkd_fast.methods.fedpaq import StochasticQuantiser
from fedkd_fast.methods.packing import Packing
from fedkd_fast.methods.powersgd import SubspaceIteration
from fedkd_fast.methods.sparseloco import ChunkedTop


def make(seed: int) -> dict[str, Tensor]:
    noise = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device="cpu")

    embedding = torch.zeros(200, 16, device="cpu")
    embedding[::9] = normal(23, 16)
    return {
        "factors": normal(90, 4) @ normal(4, 80) + 0.01 * normal(90, 80),
        "dense": normal(40, 50),
        "half": normal(30, 30).half(),
        "wide": normal(8, 8).double() * 1e200,
        "embedding": embedding,
        "bias": normal(40),
        "steps": torch.tensor(7, device="cpu"),
        "mask": normal(9) > 0,
        "nothing": torch.zeros(3, device="cpu"),
        "few": normal(60, 60).sign() * 0.01,
    }


def everything() -> list[object]:
    tensors, found = make(0), []
    for codec in ("wf1", "wf0", "dense", "factors-fp32", "raw"):
        compressor = Compressor(0.95, codec, feedback=ErrorFeedback())
        frames = [compressor.compress(make(seed)) for seed in range(2)]
        mean = aggregate(frames)
        found += [*frames, mean.recompress(Compressor(0.9, codec))]
        found += [tensors for frame in frames for tensors in decompress(frame).values()]
        found += list(mean.values())
    found.append(Compressor(budget_bytes=9000).compress(tensors))
    server, client = Broadcaster(Compression()), Receiver(Compression())
    for _ in range(2):
        server.publish({name: value + value for name, value in server.held.items()} or tensors)
        held = client.receive(server.letter(0))
        server.confirm(0, server.version)
        found += [client.reply(held), *held.values()]
    found.append(client.state())
    matrices = [tensors["dense"], tensors["factors"], tensors["wide"]]
    for factors in ops.truncated_svd_list(matrices, energy=0.9):
        found += [factors.left, factors.sigma, factors.right]
    return found


def by_the_reference() -> list[object]:
    tensors = {name: make(0)[name][:20] for name in ("factors", "dense", "half", "embedding")}
    found: list[object] = []
    for codec in ("wf1", "wf0"):
        frame = Compressor(0.9, codec, backend="reference").compress(tensors)
        found += [frame, *decompress(frame, backend="reference").values()]
    return found


def of_other_methods() -> list[object]:
    update, found = {name: make(0)[name] for name in ("factors", "dense", "half", "nothing")}, []
    packings: list[Packing] = [StochasticQuantiser(4, 0), SubspaceIteration(2, 0), ChunkedTop(0.02)]
    for packing in packings:
        packed = packing.pack(update)
        assert [value.device for value in packing.layout(update).values()] == [
            value.device for value in packed.values()
        ]
        found += [*packed.values(), *packing.unpack(packed, update).values()]
    hook = LowRankState(torch.nn.Linear(60, 50, device="cpu"), 2)
    return [*found, *hook._first.values()]


@pytest.mark.parametrize("calls", [everything, by_the_reference, of_other_methods])
def test_the_default_device_is_of_no_account(
    monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[object]]
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    wanted = calls()
    with torch.device("meta"):
        found = calls()
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor):
            assert isinstance(other, Tensor) and one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other
