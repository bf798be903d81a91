"""Scores of clients in other processes: who gives them, and what if they do not come."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from remote_support import Mail, here, journal, lines, remote

from fedkd_fast.node import Answer, Node, Order
from fedkd_fast.remote import ClientError, NoAnswerError


def test_a_round_without_a_client_to_score_has_no_scores(tmp_path: Path) -> None:
    def deaf(mail: Mail) -> None:
        def scoring(client: int, order: Order) -> Exception | None:
            hit = client == 1 and order.steps[-1][0] == "score" and not order.steps[-1][3]
            return NoAnswerError("client 1 is gone") if hit else None

        mail.before = scoring

    run, _ = remote(tmp_path, mail=deaf, rounds=3)
    here(tmp_path, rounds=3)
    found = [(line["round"], line["split"]) for line in lines(tmp_path / "remote")]
    assert all(split is None for number, split in found if number < 3)
    assert lines(tmp_path / "remote")[-1] == lines(tmp_path / "here")[-1]
    assert len(run.summary["scores_mentor"]) == 3


@pytest.mark.parametrize("nonsense", [{}, {"accuracy": 10**400}, {"accuracy": None}, []])
def test_scores_that_are_nonsense_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonsense: object
) -> None:
    def execute(node: Node, order: Order) -> Answer:
        answer = whole(node, order)
        if node._index == 1 and order.steps[-1][0] == "score" and not order.steps[-1][3]:
            answer.facts["scores"] = dict.fromkeys(answer.facts["scores"], nonsense)
        return answer

    whole = Node.execute
    monkeypatch.setattr(Node, "execute", execute)
    remote(tmp_path, rounds=2)
    found = {(line["round"], line["split"]) for line in lines(tmp_path / "remote")}
    assert found == {(1, None), (2, "test")}


@pytest.mark.parametrize("gone", [(2,), (0,), (0, 1, 2)])
def test_final_scores_that_do_not_come_are_left_out(tmp_path: Path, gone: tuple[int, ...]) -> None:
    """All that was trained is kept; what all share is scored by whoever is there."""

    def deaf(mail: Mail) -> None:
        mail.before = lambda client, order: (
            NoAnswerError(f"client {client} is gone")
            if client in gone and scores_finally(order)
            else None
        )

    run, _ = remote(tmp_path, mail=deaf)
    whole = here(tmp_path)
    assert run.summary["score_mentor"] is None and run.summary["scores_mentor"] == []
    there = len(gone) < 3
    assert run.summary["score_mentee"] == (whole.summary["score_mentee"] if there else None)
    assert run.summary["inference"] == "mentor" and run.summary["score"] is None
    assert run.summary["faults"] == {"failed": len(gone)}
    failed = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert [line["client"] for line in failed] == [*gone]
    assert all("models are not scored: client" in line["reason"] for line in failed)
    assert (tmp_path / "remote" / "mentee").is_dir()


def scores_finally(order: Order) -> bool:
    return order.steps[-1][0] == "score" and bool(order.steps[-1][3])


@pytest.mark.parametrize("method", ["fedavg", "fedlora", "fedkd", "local"])
def test_an_untrained_model_is_never_scored_for_one_that_was_lost(
    tmp_path: Path, method: str
) -> None:
    """What all share is sent again, what was a client's own is gone."""

    def lose(mail: Mail) -> None:
        def forget(client: int, order: Order) -> None:
            if client == 0 and scores_finally(order):
                shutil.rmtree(tmp_path / "nodes" / "0" / "state", ignore_errors=True)

        mail.before = forget

    run, mail = remote(tmp_path, method, mail=lose, wait_s=60.0, rounds=4)
    whole = here(tmp_path, method, rounds=4).summary
    assert run.summary["faults"] == {"failed": 1}
    (failed,) = [line for line in journal(tmp_path / "remote") if line["event"] == "failed"]
    assert failed["client"] == 0 and "has no state after order" in failed["reason"]
    own = method in ("fedkd", "local")
    assert run.summary["score_mentor"] == (None if own else whole["score_mentor"])
    assert run.summary["score_mentee"] == whole["score_mentee"]
    assert sum(scores_finally(order) for client, order in mail.orders if client == 0) == 1


@pytest.mark.parametrize("gone", [(0,), (0, 1, 2)])
def test_whoever_is_there_scores_the_newest_of_what_all_share(
    tmp_path: Path, gone: tuple[int, ...]
) -> None:
    def deaf(mail: Mail) -> None:
        mail.before = lambda client, order: (
            NoAnswerError("gone") if client in gone and scores_finally(order) else None
        )

    fields = {"clients": 6, "participation": 0.2, "scored_clients": 1, "rounds": 5}
    run, _ = remote(tmp_path, "fedavg", mail=deaf, **fields)
    assert run.summary["score"] == here(tmp_path, "fedavg", **fields).summary["score"]


def test_all_who_are_there_are_asked_for_what_all_share(tmp_path: Path) -> None:
    def broken(mail: Mail) -> None:
        def happens(client: int, order: Order) -> Exception | None:
            shared = scores_finally(order) and any(
                role == "mentee" for role, _ in order.steps[-1][2]
            )
            if client == 2 and scores_finally(order):
                return NoAnswerError("client 2 is gone")
            return ClientError("the disk is full") if client == 0 and shared else None

        mail.before = happens

    fields = {"clients": 3, "participation": 0.3, "rounds": 3, "seed": 2}
    run, _ = remote(tmp_path, mail=broken, **fields)
    assert run.summary["score_mentee"] == here(tmp_path, **fields).summary["score_mentee"]


def test_who_says_the_same_twice_is_not_asked_again(tmp_path: Path) -> None:
    def full(mail: Mail) -> None:
        mail.before = lambda client, order: (
            ClientError("no such metric") if client == 1 and scores_finally(order) else None
        )

    run, mail = remote(tmp_path, mail=full, wait_s=60.0, rounds=1)
    assert sum(scores_finally(order) for client, order in mail.orders if client == 1) == 2
    assert run.summary["scores_mentor"] == [] and run.summary["faults"] == {"failed": 1}


def test_a_client_that_cannot_score_once_is_asked_again(tmp_path: Path) -> None:
    left = ["No space left on device"]

    def full(mail: Mail) -> None:
        mail.before = lambda client, order: (
            ClientError(left.pop()) if left and client == 1 and scores_finally(order) else None
        )

    run, _ = remote(tmp_path, mail=full, wait_s=60.0)
    assert not left and run.summary["scores_mentor"] == here(tmp_path).summary["scores_mentor"]


def test_metrics_that_not_all_give_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(node: Node, order: Order) -> Answer:
        answer = whole(node, order)
        for metrics in answer.facts.get("scores", {}).values():
            metrics[f"of {node._index}"] = 1.0
        return answer

    whole = Node.execute
    monkeypatch.setattr(Node, "execute", execute)
    run, _ = remote(tmp_path, rounds=1)
    assert [*run.summary["metrics"]["mentor"]] == ["accuracy"]
