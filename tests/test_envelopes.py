"""Orders and answers under seal: what is not the peer's, or came before, is refused by name."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from remote_support import NEEDED, Mail, assert_same, here, journal, remote, summary
from tiny_task import tiny_task

from fedkd_fast.connect import connect
from fedkd_fast.envelopes import SealedCarrier, SealedNode
from fedkd_fast.node import Answer, Node, Order
from fedkd_fast.remote import NoAnswerError
from fedkd_fast.sealing import PrivateKey
from fedkd_fast.trainer import train


def sealed_order(mail: Mail, number: int = 1, client: int = 1) -> Order:
    """Return an order under seal, as the server sends it."""
    known = {index: key.public for index, key in mail.keys.items()}
    sent: dict[int, Order] = {}

    class Post:
        def gather(self, clients: int) -> Mapping[int, Mapping[str, Any]]:
            return {}

        def exchange(self, orders: Mapping[int, Order], *args: Any) -> Mapping[int, Answer]:
            sent.update(orders)
            return {}

    order = Order(0, number, [["train", 1, 1.0], ["upload", 0.9]], [b"one", b"two", b"three"])
    carrier = SealedCarrier(Post(), mail.server, known, "7")
    carrier.exchange({client: order}, 1, lambda client: None)
    return sent[client]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def mail(tmp_path: Path) -> Mail:
    return Mail(tmp_path, tiny_task("fedkd"), "fedkd", {**NEEDED, "encrypt": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: replace(o, frames=[flipped(o.frames[0]), *o.frames[1:]]), "changed on the way"),
        (lambda o: replace(o, frames=[*o.frames[:3], flipped(o.frames[3])]), "changed on the way"),
        (lambda o: replace(o, frames=o.frames[:3]), "3 sealed frames expected, got 2"),
        (lambda o: replace(o, frames=[*o.frames[:2], o.frames[3]]), "3 sealed frames expected"),
        (lambda o: replace(o, frames=[*o.frames, o.frames[3]]), "message 4 was accepted"),
        (lambda o: replace(o, frames=[o.frames[i] for i in (0, 2, 1, 3)]), "came too late"),
        (lambda o: replace(o, frames=[]), "0 sealed frames expected"),
        (lambda o: replace(o, number=2), "round 2 expected, got 1"),
        (lambda o: replace(o, steps=[["sealed", "00" * 16]]), "changed on the way"),
        (lambda o: replace(o, steps=[["sealed", "00"]]), "must name 16 bytes, got 1"),
        (lambda o: Order(0, 1, [["train", 1, 1.0]]), "client 1 takes sealed orders only"),
    ],
)
def test_an_order_that_was_changed_is_refused_and_not_carried_out(
    mail: Mail, tmp_path: Path, change: Callable[[Order], Order], message: str
) -> None:
    answer = mail.node(1).execute(change(sealed_order(mail)))
    assert list(answer.facts) == ["error"] and message in answer.facts["error"]
    assert not answer.frame and not (tmp_path / "1" / "state").exists()
    assert not (tmp_path / "1" / "seals.json").exists(), "what is refused changes nothing"


def test_an_order_for_another_client_is_refused(mail: Mail) -> None:
    answer = mail.node(1).execute(sealed_order(mail, client=2))
    assert "client 1 expected, got 2" in answer.facts["error"]


def test_an_order_of_another_server_or_run_is_refused(mail: Mail, tmp_path: Path) -> None:
    own = {"key": mail.keys[1], "server": PrivateKey.generate().public, "run": "7"}
    for change in ({}, {"server": mail.server.public, "run": "8"}):
        node = SealedNode(mail.config, tiny_task("fedkd"), 1, tmp_path / "x", **{**own, **change})
        answer = node.execute(sealed_order(mail))
        assert "not sealed with the expected keys" in answer.facts["error"]


def test_an_order_is_never_taken_after_a_later_one(tmp_path: Path) -> None:
    """Each node is made anew, so what it holds orders against lies on its disk."""
    refused: list[str] = []
    known: dict[int, list[Order]] = {}

    def replay(mail: Mail) -> None:
        def before(client: int, order: Order) -> None:
            earlier = known.setdefault(client, [])
            if earlier and earlier[-1].number < order.number:
                for old in earlier[:-1]:
                    refused.append(mail.node(client).execute(old).facts["error"])
            earlier.append(order)

        mail.before = before

    fields = {"rounds": 3, "encrypt": True, "feedback": "both"}
    run, _ = remote(tmp_path, mail=replay, **fields)
    assert_same(tmp_path, run, here(tmp_path, **fields))
    assert len(refused) > 10 and all("is repeated or too late" in reason for reason in refused)


def test_an_order_of_another_process_of_the_server_is_refused(mail: Mail) -> None:
    order = sealed_order(mail)
    for _ in range(2):  # once more is no harm
        assert list(mail.node(1).execute(order).facts) == ["sealed"]
    answer = mail.node(1).execute(sealed_order(mail, number=2))
    assert "is of another run than this order" in answer.facts["error"]


def other_answers(kind: str) -> Callable[[Mail], None]:
    """Let answers of client 1 be forged in round 2."""

    def forge(mail: Mail) -> None:
        earlier: dict[int, Answer] = {}
        seen: dict[int, int] = {}

        def changed(client: int, order: Order, answer: Answer) -> Answer:
            last, whole = earlier.get(client), answer
            earlier[client] = answer
            seen[client] = seen.get(client, 0) + bool(answer.frame)
            if client != 1 or seen[client] != 2 or not answer.frame:
                return whole
            assert last is not None
            head = base64.b64decode(answer.facts["sealed"])
            return {
                "tampered": Answer(
                    {"sealed": base64.b64encode(flipped(head)).decode()}, whole.frame
                ),
                "frame": Answer(whole.facts, flipped(whole.frame)),
                "cut": Answer(whole.facts),
                "replayed": last,
                "misdirected": earlier[2],
                "reflected": Answer(
                    {"sealed": base64.b64encode(order.frames[0]).decode()}, order.frames[-1]
                ),
                "forged": Answer({"error": "I am client 1", "missing": True}),
                "nonsense": Answer({"sealed": "no base64!"}),
            }[kind]

        mail.changed = changed

    return forge


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tampered", r"\(damaged\): .*client 1.*changed on the way"),
        ("frame", r"\(damaged\): .*client 1.*changed on the way"),
        ("cut", r"\(short\): 1 sealed frames expected, got 0"),
        ("replayed", r"\(replayed\): .*was accepted"),
        ("misdirected", r"\(other client\): .*client 1 expected, got 2"),
        ("reflected", r"\(other direction\): .*direction up"),
        ("forged", "not sealed; whoever wrote it says: I am client 1"),
        ("nonsense", "base64"),
    ],
)
def test_an_answer_that_is_not_the_clients_is_none(tmp_path: Path, kind: str, reason: str) -> None:
    """It is refused by name, the run goes on, and the client as if it had not answered."""
    run, _ = remote(tmp_path, mail=other_answers(kind), rounds=3, encrypt=True, quorum=0.5)
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert [(line["round"], line["client"]) for line in failed] == [(2, 1)]
    assert re.search(f"answer of client 1 to order .* is refused.*{reason}", failed[0]["reason"])
    lost, _ = remote(tmp_path / "lost", mail=lose_second, rounds=3, encrypt=True, quorum=0.5)
    assert summary(run) == summary(lost)


def lose_second(mail: Mail) -> None:
    seen: list[int] = []

    def changed(client: int, order: Order, answer: Answer) -> Answer:
        seen.append(client if answer.frame else -1)
        hit = client == 1 and answer.frame and seen.count(1) == 2
        return Answer({"error": "lost"}) if hit else answer

    mail.changed = changed


def test_neither_losses_nor_steps_travel_in_the_clear(tmp_path: Path) -> None:
    sent: list[str] = []

    def read(mail: Mail) -> None:
        def changed(client: int, order: Order, answer: Answer) -> Answer:
            assert all(
                frame.startswith(b"FKS1") for frame in (*order.frames, answer.frame) if frame
            )
            sent.extend([order.text(), answer.text()])
            return answer

        mail.changed = changed

    remote(tmp_path, mail=read, encrypt=True)
    assert sent and not any(re.search("losses|scores|train|samples", text) for text in sent)


def test_keys_must_be_there_and_be_the_clients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enrolment must have keys of all clients, 1, 2 lack"):
        remote(tmp_path, mail=lambda mail: [mail.keys.pop(one) for one in (1, 2)], encrypt=True)

    def other(mail: Mail) -> None:
        whole = mail.node

        def node(client: int) -> Node:
            mail.keys[1] = PrivateKey.generate()
            return whole(client)

        mail.node = node

    with pytest.raises(NoAnswerError, match=r"client 1 to order 0 is refused: not sealed.*changed"):
        remote(tmp_path, mail=other, encrypt=True)
    assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize(
    "head", ["5", "null", "[1]", "{}", '["{}", true]', '["{}", 0, 0]', "[[], 0]"]
)
def test_what_a_client_seals_must_be_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """Whoever is enrolled can seal anything, and must not end the run with it."""

    def execute(node: SealedNode, order: Order) -> Answer:
        if node._index != 1 or order.number == 0:  # which says hello
            return whole(node, order)
        channel, _ = node._opened(order)
        return Answer(
            {"sealed": base64.b64encode(channel.seal(head.encode(), order.number)).decode()}
        )

    whole = SealedNode.execute
    monkeypatch.setattr(SealedNode, "execute", execute)
    run, _ = remote(tmp_path, encrypt=True, rounds=2)
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert {line["client"] for line in failed} == {1} and run.summary["rounds"] == 2


def test_both_sides_seal_or_neither(tmp_path: Path, mail: Mail) -> None:
    task = tiny_task("fedkd")
    plain = Mail(tmp_path, task, "fedkd", NEEDED)
    with pytest.raises(ValueError, match="encrypt must be False with a carrier that does not seal"):
        connect(mail.config, task, mail, wait_s=0.0)
    sealed = SealedCarrier(plain, mail.server, {i: k.public for i, k in mail.keys.items()}, "7")
    with pytest.raises(ValueError, match="encrypt must be True with a carrier that seals"):
        connect(plain.config, task, sealed, wait_s=0.0)
    with pytest.raises(ValueError, match="client 0 does not seal what it sends, the server does"):
        sealed.gather(3)
    with pytest.raises(ValueError, match="client 0 takes sealed orders only"):
        train(task, connect=connect(plain.config, task, mail, wait_s=0.0), **NEEDED)
