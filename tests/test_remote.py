"""Clients in processes of their own: the same run, to the byte and the last digit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from remote_support import (
    NEEDED,
    Happens,
    Mail,
    assert_same,
    here,
    journal,
    lines,
    remote,
    summary,
)
from tiny_task import TinyTask

from fedkd_fast._errors import QuorumError
from fedkd_fast.client import Client
from fedkd_fast.delivery import Delivery
from fedkd_fast.faults import InjectedFault
from fedkd_fast.methods import METHODS
from fedkd_fast.node import Answer, Node, Order
from fedkd_fast.remote import ClientError, NoAnswerError, read_answer
from fedkd_fast.trainer import configure

METHODS_WITH_CLIENTS = [name for name, method in METHODS.items() if not method.pools_data]


@pytest.mark.parametrize(
    ("method", "encrypt"),
    [(name, False) for name in METHODS_WITH_CLIENTS]
    + [(name, True) for name in ("fedkd", "scaffold", "local")],
)
def test_scores_and_bytes_are_those_of_one_process(
    tmp_path: Path, method: str, encrypt: bool
) -> None:
    fields = {"rounds": 3, "clients": 3, "encrypt": encrypt}
    run, _ = remote(tmp_path, method, **fields)
    assert_same(tmp_path, run, here(tmp_path, method, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"participation": 0.5, "clients": 4},
        {"participation": 0.5, "clients": 4, "inference": "mean", "scored_clients": 3},
        {"participation": 0.3, "clients": 4, "feedback": "both", "refresh_steps": 2},
        {"weighting": "samples", "local_epochs": 0.5, "eval_every": 2},
        {"server_optimizer": "momentum", "aggregation": "median", "lr_end": 0.1},
        {"dp_clip": 1.0, "dp_seed": 3, "participation": 0.5, "clients": 4},
        {"codec": "raw", "spectra": True},
        {"encrypt": True, "participation": 0.5, "clients": 4, "feedback": "both"},
        {"method": "scaffold", "norm_limit": 1.01, "quorum": 0.1, "clients": 4},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_options_of_a_run_hold_elsewhere_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {"rounds": 4, **fields}
    run, _ = remote(tmp_path, **fields)
    assert_same(tmp_path, run, here(tmp_path, **fields))


def fails(client: int, round_number: int) -> Happens:
    """Let what a client trains in a round fail."""

    def happens(index: int, order: Order) -> Exception | None:
        hit = index == client and any(step[:2] == ["train", round_number] for step in order.steps)
        return NoAnswerError(f"client {index} is gone") if hit else None

    return happens


def test_an_answer_that_is_lost_has_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained in vain must be forgotten, residuals and moments of Adam, too."""
    fields = {"rounds": 4, "clients": 3, "feedback": "both", "refresh_steps": 1}

    def lose(mail: Mail) -> None:
        mail.after = fails(1, 2)

    run, _ = remote(tmp_path, mail=lose, **fields)

    def send(delivery: Delivery, client: Client, row: Any, replies: Any, server: Any) -> None:
        if client.index == 1 and replies.number == 2:
            raise InjectedFault("client 1 is gone")
        whole(delivery, client, row, replies, server)

    whole = Delivery.send
    monkeypatch.setattr(Delivery, "send", send)
    assert_same(tmp_path, run, here(tmp_path, **fields))
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert [(line["round"], line["client"], line["reason"]) for line in failed] == [
        (2, 1, "client 1 is gone")
    ]


def test_an_order_that_did_not_arrive_is_as_good_as_an_answer_that_did_not(tmp_path: Path) -> None:
    runs = []
    for name in ("before", "after"):

        def lose(mail: Mail, name: str = name) -> None:
            setattr(mail, name, fails(2, 3))

        runs.append(remote(tmp_path / name, mail=lose, rounds=4, feedback="up")[0])
    assert summary(runs[0]) == summary(runs[1])
    assert lines(tmp_path / "before" / "remote") == lines(tmp_path / "after" / "remote")


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "sealed"])
def test_an_order_may_be_carried_out_twice(tmp_path: Path, encrypt: bool) -> None:
    """Whichever of the answers arrives, and under seal without the same nonce twice."""
    fields = {"feedback": "both", "encrypt": encrypt}

    def twice(mail: Mail) -> None:
        def again(client: int, order: Order, answer: Answer) -> Answer:
            second = mail.node(client).execute(order)
            assert "error" not in second.facts
            assert not encrypt or not answer.frame or second.frame[18:30] != answer.frame[18:30]
            return second if client == 1 else answer

        mail.changed = again

    run, _ = remote(tmp_path, mail=twice, **fields)
    assert_same(tmp_path, run, here(tmp_path, **fields))


def test_an_order_that_comes_too_late_spoils_nothing(tmp_path: Path) -> None:
    task = TinyTask()
    node = Node(configure(task, "fedkd", {**NEEDED, "clients": 3}), task, 0, tmp_path / "node")

    def order(base: int, number: int) -> Answer:
        return node.execute(Order(base, number, [["train", number, 1.0], ["upload", 0.9]]))

    assert order(0, 1).facts["state"] == 1 and order(1, 3).facts["state"] == 3
    late = order(1, 2)  # given up by the server before order 3
    assert late.facts == {"error": "order 2 comes too late: order 3 is carried out"}
    assert order(3, 4).facts["state"] == 4
    assert (tmp_path / "node").stat().st_mode & 0o077 == 0, "others can read it"


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "sealed"])
def test_a_client_that_lost_its_state_begins_anew(tmp_path: Path, encrypt: bool) -> None:
    """Under seal the whole folder, with what it knew of orders."""

    def forget(mail: Mail) -> None:
        forgotten: list[int] = []

        def remove(client: int, order: Order) -> None:
            if client == 0 and mail.round == 3 and not forgotten:
                forgotten.append(client)
                shutil.rmtree(tmp_path / "nodes" / "0" / ("" if encrypt else "state"))

        mail.before = remove

    run, mail = remote(tmp_path, mail=forget, rounds=4, encrypt=encrypt)
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert [(line["round"], line["client"]) for line in failed] == [(3, 0)]
    assert "client 0 has no state after order" in failed[0]["reason"]
    assert run.summary["rounds"] == 4
    if encrypt:
        return
    bases = [order.base for client, order in mail.orders if client == 0]
    assert bases[0] == 0 and 0 in bases[3:], "it must begin anew"


def test_too_few_answers_are_no_quorum(tmp_path: Path) -> None:
    def deaf(mail: Mail) -> None:
        mail.before = lambda client, order: fails(0, 2)(client, order) or fails(1, 2)(client, order)

    with pytest.raises(QuorumError, match="round 2 has 1 of 3 replies.*client 0 is gone"):
        remote(tmp_path, mail=deaf)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"losses": [float("nan"), 1.0]}, "loss of client 1 must be a finite number, got nan"),
        ({"losses": "low"}, "losses of client 1 must be two, got 'low'"),
        ({"seconds": True}, "seconds of client 1 must be a finite number, got True"),
        ({"seconds": 10**400}, "seconds of client 1 must be a finite number, got 1000"),
        ({"state": None}, "state of client 1 must be a finite number, got None"),
        ({"error": ["no"]}, r"\['no'\]"),
        ({"error": ""}, "client 1 failed without a word"),
        ({"seconds": 1.7e308}, r"seconds of client 1 must lie in \[0, 1e\+09\], got 1.7e\+308"),
        ({"seconds_codec": -1.0}, r"seconds_codec of client 1 must lie in \[0, 1e\+09\], got -1"),
    ],
)
def test_nonsense_of_a_client_is_its_own_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    def execute(node: Node, order: Order) -> Answer:
        answer = whole(node, order)
        if "losses" in answer.facts and node._index == 1:
            answer.facts.update(change)
        return answer

    whole = Node.execute
    monkeypatch.setattr(Node, "execute", execute)
    run, _ = remote(tmp_path, rounds=2)
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert {line["client"] for line in failed} == {1} and len(failed) == 2
    assert re.search(reason, failed[0]["reason"])
    assert run.summary["faults"] == {"failed": 2}


def test_clients_without_samples_cannot_weigh_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hello(node: Node) -> dict[str, Any]:
        return {**whole(node), **({"samples": 0} if node._index == 1 else {})}

    whole = Node.hello
    monkeypatch.setattr(Node, "hello", hello)
    with pytest.raises(ValueError, match=r"client 1 must have 1 to [0-9]+ samples, says 0"):
        remote(tmp_path, weighting="samples")
    remote(tmp_path, rounds=1)


@pytest.mark.parametrize("what", ["state-1.2.safetensors", "checkpoint.json"])
def test_a_client_whose_state_is_damaged_begins_anew(tmp_path: Path, what: str) -> None:
    def damage(mail: Mail) -> None:
        def spoil(client: int, order: Order) -> None:
            if (client, mail.round) == (0, 3) and order.steps[-1][0] != "score":
                (path,) = (tmp_path / "nodes" / "0" / "state").glob(f"{what.split('.')[0]}.*")
                path.write_bytes(path.read_bytes()[:-1])

        mail.before = spoil

    run, mail = remote(tmp_path, mail=damage, rounds=4)
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert [(line["round"], line["client"]) for line in failed] == [(3, 0)]
    assert "cannot be used: " in failed[0]["reason"] and run.summary["rounds"] == 4
    assert len(run.summary["scores_mentor"]) == 3
    assert 0 in [order.base for client, order in mail.orders if client == 0][2:]
    aside = [*(tmp_path / "nodes" / "0").glob("state.damaged-*")]
    assert len(aside) == (what == "checkpoint.json"), "nothing of a client's is removed"


@pytest.mark.parametrize("text", ["[]", "{", 7, None])
def test_an_answer_must_be_one(text: object) -> None:
    with pytest.raises(ClientError, match="client 4"):
        read_answer(4, text, b"")


def test_a_frame_that_is_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(node: Node, order: Order) -> Answer:
        answer = whole(node, order)
        if answer.frame and node._index == 0:
            answer.frame = answer.frame[:-1]
        return answer

    whole = Node.execute
    monkeypatch.setattr(Node, "execute", execute)
    run, _ = remote(tmp_path, rounds=2)
    refused = [line for line in journal(tmp_path / "remote") if line["event"] == "refused"]
    assert {(line["client"], line["reason"]) for line in refused} == {(0, "damaged")}
    assert run.summary["faults"] == {"refused": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", "0"),
        ("clients", 9),
        ("digest", "00"),
        ("samples", -1),
        ("samples", 10**30),
        ("samples", True),
    ],
)
def test_a_client_that_does_not_fit_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    whole = Node.hello
    monkeypatch.setattr(Node, "hello", lambda node: {**whole(node), name: value})
    with pytest.raises(ValueError, match=f"client 0 .*{value}"):
        remote(tmp_path)
    assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("checkpoint_every", 1), ("retries", 1), ("faults", 0.5), ("attackers", 0.5)],
)
def test_options_of_one_process_are_refused(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0.*, got {value}"):
        remote(tmp_path, **{name: value})


def test_data_are_not_put_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves data with the clients, got 'central'"):
        remote(tmp_path, "central")


def test_a_node_with_data_of_its_own_trains_on_all_of_them(tmp_path: Path) -> None:
    config = configure(TinyTask(), "fedkd", {"clients": 3})
    shared = Node(config, TinyTask(), 1, tmp_path / "a").hello()
    own = Node(config, TinyTask(), 1, tmp_path / "b", own_data=True).hello()
    assert (shared["samples"], own["samples"]) == (20, 60)
    assert shared["digest"] == own["digest"] and shared["sample"] != own["sample"]


def test_a_node_says_what_it_cannot_do(tmp_path: Path) -> None:
    config = configure(TinyTask(), "fedkd", {})
    with pytest.raises(ValueError, match="client must be 0 to 2, got 3"):
        Node(config, TinyTask(), 3, tmp_path)
    answer = Node(config, TinyTask(), 0, tmp_path).execute(Order(0, 1, [["dance"]]))
    assert answer.facts == {"error": "order has the unknown step 'dance': is the server newer?"}
    with pytest.raises(ValueError, match="order must be a list of base, number and steps"):
        Order.read("[1]", [])
