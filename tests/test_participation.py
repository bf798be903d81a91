"""Rounds in which some clients take part: who, and how the others come back."""

from __future__ import annotations

import itertools
import json
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import TinyTask, tiny_task
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.aggregation import Aggregate
from fedkd_fast.assembly import participants
from fedkd_fast.client import Client, Decoded
from fedkd_fast.compress import Compressor
from fedkd_fast.config import TrainConfig
from fedkd_fast.decompression import NotFiniteError, decompress
from fedkd_fast.feedback import ErrorFeedback
from fedkd_fast.legs import CompressorLeg
from fedkd_fast.methods import METHODS
from fedkd_fast.server import Server, ServerOptimizer
from fedkd_fast.tensors import digest_of
from fedkd_fast.trainer import train
from fedkd_fast.wire import Base

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]


def test_participants_are_drawn_by_the_seed() -> None:
    config = TrainConfig(participation=0.5)
    rounds = [participants(config, 6, number) for number in range(1, 201)]
    assert rounds == [participants(config, 6, number) for number in range(1, 201)]
    assert all(found == sorted(set(found)) and len(found) == 3 for found in rounds)
    counts = Counter(client for found in rounds for client in found)
    # 100 each on average, with a deviation of 7.
    assert set(counts) == set(range(6))
    assert all(70 <= count <= 130 for count in counts.values())
    other = TrainConfig(participation=0.5, seed=1)
    assert rounds != [participants(other, 6, number) for number in range(1, 201)]


@pytest.mark.parametrize(("share", "count"), [(1.0, 4), (0.9, 4), (0.6, 2), (0.01, 1)])
def test_how_many_take_part(share: float, count: int) -> None:
    assert len(participants(TrainConfig(participation=share), 4, 1)) == count


def broadcasts(server: Server, count: int) -> list[bytes]:
    """Let a server make versions out of one sender's random updates."""
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        state = {
            name: value + torch.randn(value.shape, generator=generator)
            for name, value in server._parameters.items()
        }
        frame = CompressorLeg(sender()).encode(state, server._parameters, 1.0)
        found.append(server.step([frame], 0.9))
    return found


def sender(codec: str = "raw") -> Compressor:
    return Compressor(codec=codec, schema=False)


def make_server(codec: str) -> tuple[dict[str, Tensor], Server]:
    start = {"w": torch.ones(64, 32), "b": torch.ones(32)}
    legs = CompressorLeg(sender()), CompressorLeg(sender(codec))
    return start, Server(start, *legs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates_that_leave_the_range_of_the_parameters_are_refused(dtype: torch.dtype) -> None:
    """Each is finite, and so is each parameter, but not their sum."""
    start = {"w": torch.full((8, 4), torch.finfo(dtype).max / 2, dtype=dtype)}
    server = Server(start, CompressorLeg(sender("raw")), CompressorLeg(sender("raw")))
    update = {"w": torch.zeros(8, 4, dtype=dtype)}
    for last, fits in ((0.25, True), (-0.9, True), (0.9, False)):
        update["w"][7, 3] = last * torch.finfo(dtype).max
        frame = sender("raw").compress(update, relative_to=Base(digest=server.digest()))
        if fits:
            assert server.norm(frame) == pytest.approx(abs(float(update["w"][7, 3])))
        else:
            with pytest.raises(NotFiniteError, match=f"takes 'w' beyond {dtype}"):
                server.norm(frame)


@pytest.mark.parametrize(
    ("optimizer", "last"),
    [
        (ServerOptimizer(lr=2.5), 0.3),
        (ServerOptimizer("momentum", momentum=0.9), 0.06),
        (ServerOptimizer("adam"), 1e-18),
    ],
    ids=lambda one: getattr(one, "kind", ""),
)
def test_what_the_optimizer_makes_too_large_is_refused(
    optimizer: ServerOptimizer, last: float
) -> None:
    start = {"w": torch.full((8, 4), torch.finfo(torch.float32).max / 2)}
    server = Server(start, *(CompressorLeg(sender("raw")) for _ in range(2)), optimizer)
    update = {"w": torch.zeros(8, 4)}
    for share, fits in ((0.01, True), (1.0, False)):
        update["w"][7, 3] = share * last * torch.finfo(torch.float32).max
        frame = sender("raw").compress(update, relative_to=Base(digest=server.digest()))
        if fits:
            server.norm(frame)
        else:
            with pytest.raises(NotFiniteError, match="takes 'w' beyond"):
                server.norm(frame)


def test_missed_broadcasts_are_replayed_while_they_are_smaller() -> None:
    _, server = make_server("wf1")
    assert server.catch_up(0) == []
    sent = broadcasts(server, 2)
    assert [server.catch_up(version) for version in range(3)] == [sent, sent[1:], []]


@pytest.mark.parametrize("codec", ["raw", "wf1", "dense", "wf0"])
def test_the_fewest_bytes_are_sent(codec: str) -> None:
    start, server = make_server(codec)
    sent = broadcasts(server, 40)
    whole = sender().compress(server._parameters)
    ways = set()
    for version in range(40):
        frames = server.catch_up(version)
        missed = sum(map(len, sent[version:]))
        ways.add(frames == [whole])
        assert frames == (sent[version:] if missed <= len(whole) else [whole])
        assert sum(map(len, frames)) == min(missed, len(whole))
    # Forty updates are more than the model; the last one is less, unless it is whole itself.
    assert ways == ({True} if codec == "raw" else {True, False})
    # What nobody would be sent is not kept, but for one.
    kept = [len(frame) for _, frame in sorted(server._sent.items())]
    assert sum(kept[1:]) <= sum(value.nbytes for value in start.values())


@pytest.mark.parametrize("method", EXCHANGING)
@pytest.mark.parametrize("missed", [1, 2, 30])
def test_who_comes_back_has_the_same_bits(method: str, missed: int) -> None:
    clients, server = federation(method, 2, bits=4)
    for number in range(1, missed + 1):
        exchange(clients[:1], server, number)
    frames = server.catch_up(clients[1].version)
    clients[1].apply(*frames)
    assert clients[1].digest() == clients[0].digest() == server.digest()
    whole = sum(value.nbytes for value in clients[0].learner.exchanged().values())
    assert sum(map(len, frames)) <= whole + 128
    # It goes on from there as if nothing had been.
    clients[1].version = server.version
    exchange(clients, server, missed + 1)
    assert clients[1].digest() == server.digest()


def test_frames_with_whole_parameters_say_so() -> None:
    clients, server = federation("fedavg", 2)
    for number in range(1, 4):
        exchange(clients[:1], server, number)
    (frame,) = server.catch_up(0)
    assert wire.header(frame).base is None


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", EXCHANGING)
def test_every_byte_of_catching_up_is_counted(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: Counter[int] = Counter()

    def apply(client: Client, *frames: bytes) -> None:
        received[client.index] += sum(map(len, frames))
        whole(client, *frames)

    whole = Client.apply
    monkeypatch.setattr(Client, "apply", apply)
    out = tmp_path / "run"
    fields: dict[str, Any] = {"rounds": 5, "clients": 4, "participation": 0.5}
    run = train(tiny_task(method), method, out=str(out), **fields)
    rows = [row for row in read(out) if row["client"] is not None]
    assert run.summary["bytes_down"] == sum(received.values()) / 4
    assert run.summary["bytes_down"] == sum(row["bytes_down"] for row in rows) / 4
    assert run.summary["bytes_up"] == sum(row["bytes_up"] for row in rows) / 4
    for number in range(1, 5):
        chosen = {row["client"] for row in rows if row["round"] == number}
        assert chosen == set(participants(run.config, 4, number))
    # The last round brings the final model to everybody; who did not take part sends nothing.
    last = {row["client"]: row for row in rows if row["round"] == 5}
    absent = set(last) - set(participants(run.config, 4, 5))
    assert set(last) == set(range(4))
    assert len(absent) == 2
    assert all(last[client]["bytes_up"] == 0 for client in absent)
    assert all(last[client]["loss_mentor"] is None for client in absent)
    assert set(received) == set(range(4))


class Decoding:
    """Versions 0 to 3 of shared parameters, and a cache of what leads to them; counts decoding."""

    def __init__(self) -> None:
        self.compressor = Compressor(codec="raw")
        self.versions = [{"x": torch.full((100,), float(number))} for number in range(4)]
        self.digests = [digest_of(version) for version in self.versions]
        self.frames = [
            self.compressor.compress(new, base=old)
            for old, new in itertools.pairwise(self.versions)
        ]
        self.whole = self.compressor.compress(self.versions[3])
        self.cache = Decoded()
        self.calls: list[bytes] = []

    def decode(self, frame: bytes, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.calls.append(frame)
        return decompress(frame, base=base if wire.header(frame).base else None)

    def get(self, version: int, *frames: bytes) -> int:
        """Apply frames to a version; return which one that gives."""
        # Every client has parameters of its own.
        base = {"x": self.versions[version]["x"].clone()}
        state, digest = self.cache.get(frames, base, self.digests[version], self.decode)
        assert digest_of(state) == digest
        return self.digests.index(digest)


def test_each_broadcast_is_decoded_once() -> None:
    run = Decoding()
    for version in range(3):
        assert run.get(version, run.frames[version]) == version + 1
        for missed in range(version + 1):  # clients that come back
            assert run.get(missed, *run.frames[missed : version + 1]) == version + 1
    assert run.calls == run.frames


def test_whole_parameters_are_decoded_once_whoever_gets_them() -> None:
    run = Decoding()
    assert [run.get(version, run.whole) for version in (0, 2, 1)] == [3, 3, 3]
    assert run.get(2, run.frames[2]) == 3 and run.get(1, run.whole) == 3
    assert run.calls == [run.whole, run.frames[2]]


def test_one_version_is_kept_decoded() -> None:
    run = Decoding()
    state, _ = run.cache.get(run.frames[:1], run.versions[0], run.digests[0], run.decode)
    gone = weakref.ref(state["x"])
    del state
    assert run.get(1, run.frames[1]) == 2
    assert gone() is None
    # Who still asks for the one before gets it all the same.
    assert run.get(0, run.frames[0]) == 1 and run.get(0, *run.frames[:2]) == 2


def test_what_was_decoded_for_others_is_not_for_another_base() -> None:
    run = Decoding()
    assert run.get(0, run.frames[0]) == 1
    other = {"x": torch.full((100,), 0.5)}
    with pytest.raises(ValueError, match="base"):
        run.cache.get(run.frames[:1], other, digest_of(other), run.decode)
    assert run.get(0, run.frames[0]) == 1


def test_fewer_participants_send_fewer_bytes() -> None:
    half, all_of_them = (
        train(TinyTask(), "fedavg", rounds=4, clients=4, participation=share).summary
        for share in (0.5, 1.0)
    )
    assert half["bytes_up"] == all_of_them["bytes_up"] / 2
    assert half["bytes_down"] < all_of_them["bytes_down"]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_fewer_participants_are_no_saving(share: float) -> None:
    """What is saved is saved against averaging among the same clients."""
    fields: dict[str, Any] = {"rounds": 6, "clients": 4, "participation": share}
    # But for digests of bases, which whole models do without: 16 bytes in a thousand here.
    saving = train(TinyTask(), "fedavg", **fields).summary["saving"]
    assert 0.0 <= saving < 0.016
    assert train(TinyTask(), "scaffold", **fields).summary["saving"] < -0.9


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_that_make_no_sense(share: float) -> None:
    with pytest.raises(ValueError, match=r"participation must lie in \(0, 1\], got"):
        train(TinyTask(), participation=share)


def test_means_can_weigh_samples() -> None:
    clients, server = federation("fedavg", task=TinyTask(61), weighting="samples")
    sizes = [len(client.shard) for client in clients]
    assert sizes == [21, 20, 20]
    start = clients[0].learner.exchanged()
    for client in clients:
        client.train(1)
    trained = [client.learner.exchanged() for client in clients]
    weights = [3.0, 0.0, 1.0]
    server.step([client.upload(1.0) for client in clients], 1.0, weights)
    for name, value in start.items():
        parts = [w * one[name].double() for w, one in zip(weights, trained, strict=True)]
        wanted = torch.stack(parts).sum(0) / sum(weights)
        bound = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max() + value.abs().max())
        assert float((server._parameters[name].double() - wanted).abs().max()) <= bound


def test_samples_that_cannot_be_counted_cannot_weigh() -> None:
    class Uncounted(TinyTask):
        def shards(self, clients: int, seed: int) -> list[Any]:
            return [iter(shard) for shard in super().shards(clients, seed)]

    with pytest.raises(ValueError, match="weighting by samples needs shards with a length"):
        train(Uncounted(), "fedavg", weighting="samples")


@pytest.mark.parametrize("weighting", ["equal", "samples"])
@pytest.mark.parametrize("method", ["fedavg", "fedpaq"])
def test_a_run_weighs_by_the_samples_of_who_takes_part(
    weighting: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def mean(leg: Any, frames: Any, base: Any, weights: Any) -> Aggregate:
        seen.append(weights)
        return whole(leg, frames, base, weights)

    leg = "CompressorLeg" if method == "fedavg" else "PackedLeg"
    module = __import__("fedkd_fast.legs", fromlist=[leg])
    whole = getattr(module, leg).mean
    monkeypatch.setattr(getattr(module, leg), "mean", mean)
    fields: dict[str, Any] = {"rounds": 3, "participation": 0.5, "weighting": weighting}
    run = train(TinyTask(61), method, **fields)
    sizes = [21, 20, 20]
    wanted = [[sizes[i] for i in participants(run.config, 3, number)] for number in (1, 2, 3)]
    assert seen == (wanted if weighting == "samples" else [None] * 3)


def test_what_is_still_to_be_sent_fades_with_missed_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    residual = ErrorFeedback(0.9)
    leg = CompressorLeg(Compressor(0.5, feedback=residual), residual)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(20, 10)}
    leg.encode({"w": torch.randn(20, 10, generator=generator)}, base, 0.5)
    kept = residual.state_dict()["w"].clone()
    leg.absent(2)
    assert torch.allclose(residual.state_dict()["w"], 0.81 * kept)
    seen = []
    monkeypatch.setattr(Client, "absent", lambda client, rounds: seen.append(rounds))
    train(TinyTask(), "fedkd", rounds=6, clients=3, participation=0.34, feedback="up")
    assert seen and max(seen) > 1
