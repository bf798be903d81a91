"""Calls give the same where another device is the default one, as ``torch.set_default_device``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkd_fast import Compressor, ErrorFeedback, aggregate, decompress, ops
from fedkd_fast.integrations.link import Broadcaster, Compression, Receiver


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


def test_the_default_device_is_of_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    wanted = everything()
    with torch.device("meta"):
        found = everything()
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor):
            assert isinstance(other, Tensor) and one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other
