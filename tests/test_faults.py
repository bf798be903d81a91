"""Replies that fail, come late or twice, or are not what they should be: the round goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import exchange, federation
from tiny_task import TinyTask, tiny_task
from torch import Tensor

from fedkd_fast.client import Client
from fedkd_fast.decompression import decompress
from fedkd_fast.faults import KINDS, Faults, not_finite_frame
from fedkd_fast.methods import METHODS
from fedkd_fast.replies import Refused, Replies
from fedkd_fast.trainer import QuorumError, Run, train

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", EXCHANGING)
def test_replies_that_do_not_count(method: str) -> None:
    clients, server = federation(method, 4)
    exchange(clients, server)
    for client in clients:
        client.train(2)
    frames = [client.upload(0.9) for client in clients]
    replies = Replies(2, [0, 1, 2], server.norm)
    replies.add(0, 2, frames[0])
    good = frames[1]
    for client, number, frame, reason in (
        (0, 2, frames[0], "duplicate"),
        (0, 2, good, "duplicate"),
        (3, 2, frames[3], "stranger"),
        (1, 1, good, "late"),
        (1, 3, good, "early"),
        (1, 2, good[:-1], "damaged"),
        (1, 2, b"", "damaged"),
        (1, 2, good[:80] + bytes([good[80] ^ 1]) + good[81:], "damaged"),
        (1, 2, not_finite_frame(*server.expected()), "not-finite"),
    ):
        with pytest.raises(Refused, match=f"^client {client}: ") as caught:
            replies.add(client, number, frame)
        assert caught.value.reason == reason
    assert set(replies.frames) == {0}
    replies.add(1, 2, good)
    assert replies.frames == {0: frames[0], 1: good}
    # Made against the parameters of another round.
    server.step(replies.frames, 0.9)
    later = Replies(3, [2], server.norm)
    with pytest.raises(Refused, match="base does not match") as caught:
        later.add(2, 3, frames[2])
    assert caught.value.reason == "mismatch"


@pytest.mark.parametrize("method", EXCHANGING)
def test_the_norm_is_that_of_the_decoded_update(method: str) -> None:
    clients, server = federation(method, 2, participation=0.5)
    base = {name: value.clone() for name, value in server.expected()[1].items()}
    clients[0].train(1)
    frame = clients[0].upload(0.9)
    server.step([frame], 1.0)
    mean = server.mean
    wanted = sum(float(mean[name].double().pow(2).sum()) for name in base) ** 0.5
    again = federation(method, 2)[1]
    assert again.norm(frame) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("factor", [99.0, 101.0])
def test_an_exploding_update_is_refused(factor: float) -> None:
    clients, server = federation("fedavg", 4)
    for client in clients:
        client.train(1)
    honest = [client.upload(0.9) for client in clients]
    norms = sorted(map(server.norm, honest[:3]))
    scale = factor * norms[1] / server.norm(honest[3])
    replies = Replies(1, range(4), server.norm)
    for index, frame in enumerate(honest[:3]):
        replies.add(index, 1, frame)
    replies.add(3, 1, clients[3].upload(0.9, factor=scale))
    # The median of four lies between the two in the middle.
    middle = (norms[1] + norms[2]) / 2
    refused = replies.refuse_large(100.0 * norms[1] / middle)
    assert [one.client for one in refused] == ([3] if factor > 100 else [])
    assert set(replies.frames) == set(range(4)) - {one.client for one in refused}
    for one in refused:
        assert "the median norm of the round" in one.detail and one.reason == "norm"


def test_two_replies_have_no_outlier() -> None:
    clients, server = federation("fedavg", 2)
    replies = Replies(1, range(2), server.norm)
    for client, factor in zip(clients, (1.0, 1e6), strict=True):
        client.train(1)
        replies.add(client.index, 1, client.upload(0.9, factor=factor))
    assert replies.refuse_large(100.0) == []


def test_faults_are_drawn_by_seed_and_share() -> None:
    faults = Faults(0.3, 0.1, -10.0, 20, seed=3)
    kinds = [faults.kind(client, number) for client in range(20) for number in range(200)]
    counts = Counter(kinds)
    assert counts[None] == pytest.approx(0.7 * 4000, rel=0.05)
    assert set(counts) == {None, *KINDS}
    assert all(counts[kind] == pytest.approx(0.06 * 4000, rel=0.25) for kind in KINDS)
    again = Faults(0.3, 0.1, -10.0, 20, seed=3)
    assert kinds == [again.kind(client, number) for client in range(20) for number in range(200)]
    assert len(faults.attackers) == 2 and faults.attackers == again.attackers
    assert {faults.factor(client) for client in faults.attackers} == {-10.0}
    assert faults.factor(min(set(range(20)) - faults.attackers)) == 1.0
    message = bytes(range(256)) * 3
    damaged = [faults.corrupt(message, 1, number, 0) for number in range(50)]
    assert message not in damaged and any(len(one) < len(message) for one in damaged)


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("feedback", ["none", "both"])
def test_each_fault_is_in_the_journal(encrypt: bool, feedback: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"clients": 8, "rounds": 6, "faults": 0.5, "quorum": 0.05}
    run = train(
        TinyTask(), "fedkd", out=tmp_path / "run", encrypt=encrypt, feedback=feedback, **fields
    )
    faults = Faults(0.5, 0.0, 1.0, 8, seed=0)
    planned = {
        (number, client): kind
        for number in range(1, 7)
        for client in range(8)
        if (kind := faults.kind(client, number))
    }
    found: dict[tuple[int, int], set[str]] = {}
    for line in journal(tmp_path / "run"):
        if "client" in line:
            number = line["round"] - (line.get("reason") == "late")
            word = line["event"] if line["event"] != "refused" else line["reason"]
            found.setdefault((number, line["client"]), set()).add(word)
    again = {"sealed-replayed"} if encrypt else {"duplicate"}
    for place, kind in planned.items():
        got = found.pop(place, set())
        if kind == "late":  # of the last round nothing comes any more
            assert got == ({"late"} if place[0] < 6 else set()), place
        elif kind == "corrupt":
            assert "retry" in got and len(got) > 1, place
        else:
            words = {"fail": {"failed"}, "duplicate": again, "not-finite": {"not-finite"}}
            assert got == words[kind], place
    assert not found
    for line in journal(tmp_path / "run"):
        if line["event"] == "round":
            bad = [k for (n, _), k in planned.items() if n == line["round"] and k != "duplicate"]
            assert line["asked"] == 8 and line["accepted"] == 8 - len(bad)
    assert run.summary["faults"]["retry"] == sum(kind == "corrupt" for kind in planned.values())
    assert run.summary["score_mentee"] > 0.6


class Breaking(TinyTask):
    """The data of one client cannot be read in some rounds."""

    def __init__(self, client: int, *numbers: int) -> None:
        super().__init__()
        self.calls, self.client, self.numbers = 0, client, numbers
        self.shard: Any = None

    def shards(self, clients: int, seed: int) -> Any:
        found = super().shards(clients, seed)
        self.shard = found[self.client]
        return found

    def batches(self, shard: Any, seed: int) -> Any:
        if shard is self.shard:
            self.calls += 1
            if self.calls in self.numbers:
                yield next(iter(super().batches(shard, seed)))
                raise OSError("the disk of the client is gone")
        yield from super().batches(shard, seed)


def test_a_client_that_fails_is_as_it_was_before(tmp_path: Path) -> None:
    """It comes back in the next round, brought up to date, and its mentor lost that round."""
    run = train(Breaking(1, 2), "fedkd", rounds=3, out=tmp_path / "run")
    failed = [line for line in journal(tmp_path / "run") if line["event"] == "failed"]
    assert [(line["round"], line["client"]) for line in failed] == [(2, 1)]
    assert failed[0]["reason"] == "the disk of the client is gone"
    assert run.summary["faults"] == {"failed": 1}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    own = {row["round"]: row for row in rows if row["client"] == 1}
    assert own[2]["bytes_up"] == own[2]["bytes_down"] == 0 and own[2]["loss_mentor"] is None
    others = {row["round"]: row["bytes_down"] for row in rows if row["client"] == 0}
    assert own[3]["bytes_down"] == others[2] + others[3]
    # With a quorum of all, a fault ends the run, with its own error.
    with pytest.raises(OSError, match="the disk of the client is gone"):
        train(Breaking(1, 2), "fedkd", rounds=3, quorum=1.0)


def test_a_client_that_fails_without_a_word_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(client: Client, *arguments: Any) -> Any:
        if client.index in failed:
            raise TimeoutError
        return whole(client, *arguments)

    whole, failed = Client.train, {1}
    monkeypatch.setattr(Client, "train", failing)
    fields: dict[str, Any] = {"rounds": 1, "quorum": 0.5}
    train(TinyTask(), "fedkd", **fields, out=tmp_path / "run")
    found = journal(tmp_path / "run")
    assert [line["accepted"] for line in found if line["event"] == "round"] == [2]
    assert [line["reason"] for line in found if line["event"] == "failed"] == ["TimeoutError()"]
    failed.add(2)
    with pytest.raises(QuorumError, match=r"has 1 of 3 .*client 1: TimeoutError\(\); client 2"):
        train(TinyTask(), "fedkd", **fields)


def test_what_a_client_received_before_it_failed_is_counted(tmp_path: Path) -> None:
    """It is brought up to date, fails, and has to be brought up to date again."""
    run = train(Breaking(1, 2, 3), "fedkd", rounds=4, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    down = {(row["round"], row["client"]): row["bytes_down"] for row in rows}
    sent = [down[number, 0] for number in (1, 2, 3, 4)]
    assert [down[number, 1] for number in (1, 2, 3, 4)] == [sent[0], 0, sent[1], sum(sent[1:])]
    assert (
        run.summary["bytes_down"] == sum(down[place] for place in down if place[1] is not None) / 3
    )


def test_what_did_not_arrive_comes_with_the_next_message() -> None:
    """Error feedback: a message that was lost is wholly in the residual."""
    clients, server = federation("fedkd", 2, feedback="both")
    one, other = clients
    base = one.learner.exchanged()
    for client in clients:
        client.train(1)
    frame = one.upload(0.5)
    update = {name: value - base[name] for name, value in one.learner.exchanged().items()}
    one.lost(frame)
    kept = one.state()["up"]
    for name, value in update.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-6)
    broadcast = server.step({1: other.upload(0.5)}, 0.5)
    one.apply(broadcast)
    sent = decompress(one.upload(1.0), base=one.learner.exchanged())
    arrived = {name: value - one.learner.exchanged()[name] for name, value in sent.items()}
    for name, value in update.items():
        torch.testing.assert_close(arrived[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", EXCHANGING)
def test_losing_a_message_without_feedback_keeps_nothing(method: str) -> None:
    clients, _ = federation(method, 1, feedback="none")
    clients[0].train(1)
    before = _floats(clients[0].state()["up"])
    clients[0].lost(clients[0].upload(0.9))
    assert before.keys() == _floats(clients[0].state()["up"]).keys() or method == "powersgd"


def _floats(tree: Any) -> dict[str, Tensor]:
    tree = tree.get("residuals") if isinstance(tree, dict) else tree
    return tree or {}


def scores(run: Run) -> float:
    return float(run.summary["score_mentee"])


def test_a_quorum_of_replies_decides() -> None:
    fields: dict[str, Any] = {"clients": 5, "rounds": 1, "faults": 1.0, "seed": 4}
    with pytest.raises(QuorumError, match="round 1 has .* of 5 replies, quorum asks for 5"):
        train(TinyTask(), "fedkd", quorum=0.99, **fields)
    with pytest.raises(ValueError, match=r"quorum must lie in \(0, 1\], got 0"):
        train(TinyTask(), "fedkd", quorum=0.0)


def test_a_reply_that_takes_too_long_is_not_waited_for() -> None:
    with pytest.raises(QuorumError, match="client_timeout is 1e-09 s"):
        train(TinyTask(), "fedkd", client_timeout=1e-9)
    assert train(TinyTask(), "fedkd", client_timeout=1e9).summary["faults"] == {}


@pytest.mark.parametrize("method", EXCHANGING)
def test_sealed_frames_change_bytes_and_nothing_else(method: str) -> None:
    plain, sealed = (train(tiny_task(method), method, encrypt=one) for one in (False, True))
    assert sealed.summary["score_mentor"] == plain.summary["score_mentor"]
    assert sealed.summary["score_mentee"] == plain.summary["score_mentee"]
    for leg in ("bytes_up", "bytes_down"):
        assert sealed.summary[leg] == plain.summary[leg] + 2 * 46


def test_a_mentor_that_fails_to_refresh_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Client.refresh

    def refresh(client: Client, lr_share: float = 1.0) -> None:
        if client.index == 1 and client.version == 2:
            raise ValueError("no batch could be made")
        whole(client, lr_share)

    monkeypatch.setattr(Client, "refresh", refresh)
    run = train(TinyTask(), "fedkd", rounds=3, refresh_steps=1, out=tmp_path / "run")
    assert run.summary["faults"] == {"failed": 1}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(row["bytes_down"] > 0 for row in rows if row["client"] is not None)
    with pytest.raises(ValueError, match="no batch could be made"):
        train(TinyTask(), "fedkd", rounds=3, refresh_steps=1, quorum=1.0)
