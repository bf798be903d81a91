"""Scores of models that lie at clients in other processes, the same as within one process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedkd_fast.client import Client
from fedkd_fast.config import TrainConfig
from fedkd_fast.evaluation import Evaluation, Models
from fedkd_fast.remote import ClientError, LostStateError, NoAnswerError, RemotePool, finite
from fedkd_fast.scores import Metrics, Scores, test_sets
from fedkd_fast.server import Server
from fedkd_fast.tasks import Task

_RETRY_S = 1.0  # between two attempts to reach a client whose models are to be scored


class RemoteEvaluation(Evaluation):
    """Scores models where they are: mentors never leave their clients.

    A round in which a client does not answer, or cannot score, has no scores. After the last one
    there is a wait for it; then the run ends without the scores of its models. One that lost its
    state has nothing to score: what it began with is not its model.

    Args:
        config: of the run.
        task: has the names of metrics, and says which models differ.
        pool: the clients.
        first: a client with models as all begin with; takes over the final ones that are shared.
        server: of the run, if anything is exchanged.
        wait_s: for clients whose final models are to be scored.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        pool: RemotePool,
        first: Client,
        server: Server | None,
        wait_s: float,
    ) -> None:
        super().__init__(config, task, pool)
        self._remote, self._learner, self._server, self._wait_s = (
            pool,
            first.learner,
            server,
            wait_s,
        )
        learner = first.learner
        self._shares_mentor = learner.shared is not None and learner.shared is learner.mentor
        self._has = {"mentor": learner.mentor is not None, "mentee": learner.mentee is not None}
        # Whether clients have a model of their own in a role.
        self._many = {
            "mentor": self._apart or (self._has["mentor"] and not self._shares_mentor),
            "mentee": self._apart,
        }
        self._many["mean"] = self._many["mentor"]

    def models(self) -> Models:
        """Return the models that are here: those that all clients share."""
        if self._apart or self._server is None:
            return [], []
        _, parameters = self._server.expected()
        self._learner.adopt(parameters)
        mentor, mentee = self._learner.mentor, self._learner.mentee
        mentors = [mentor] if mentor is not None and self._shares_mentor else []
        return mentors, [mentee] if mentee is not None else []

    def score(self, split: str, models: Models, *, final: bool = False) -> Scores:
        """Let clients score their models on a split; a role has scores if all of it are there."""
        config, task = self._config, self._task
        clients = test_sets(task, config.clients, len(self._pool))
        clients = min(clients, config.scored_clients)
        roles = [role for role, there in self._has.items() if there]
        if split == "test" and config.inference == "mean" and len(roles) == 2:
            roles.append("mean")
        asked: dict[int, list[tuple[str, int]]] = {}
        for role in roles:
            for index, test in self._scorers(role, clients):
                asked.setdefault(index, []).append((role, test))
        if final:  # all save their models
            asked.update({index: asked.get(index, []) for index in range(len(self._pool))})
        found, failed = self._found(asked, split, final, self._wait_s if final else 0.0)
        for index, error in failed.items():
            if final or isinstance(error, LostStateError):
                self._remote.failed(index, f"its models are not scored: {error}")
        if failed and not final:
            return Scores(task.metric, "none")
        # What all share anybody can score who is there.
        shared = [(role, 0) for role in roles if self._scorers(role, 0) == [(self.current, 0)]]
        others = sorted(found) if shared and self.current in failed else []
        while others and self.current not in found:
            index = others.pop(0)
            again, failed = self._found({index: shared}, split, final, 0.0)
            for error in failed.values():
                self._remote.failed(index, f"what all share is not scored: {error}")
            if again:
                self.current = index
                found[index] |= again[index]
        lists: dict[str, list[Metrics]] = {}
        for role in ("mentor", "mentee", "mean"):
            scorers = [index for index, _ in self._scorers(role, clients)]
            there = all(role in found.get(index, ()) for index in scorers)
            one = [found[index][role] for index in scorers] if there else []
            lists[role] = one if len(one) == clients else one * clients
        return Scores(task.metric, split, lists["mentor"], lists["mentee"], lists["mean"])

    def _scorers(self, role: str, clients: int) -> list[tuple[int, int]]:
        """Return who scores its model of a role, and on whose test data, in the order of scores."""
        if self._many[role] or getattr(self._task, "own_tests", False):
            return [(index, index) for index in range(clients)]
        return [(self.current, 0)]

    def _found(
        self,
        asked: Mapping[int, Sequence[tuple[str, int]]],
        split: str,
        final: bool,
        wait_s: float,
    ) -> tuple[dict[int, dict[str, Metrics]], dict[int, Exception]]:
        """Return what each of the clients says of its models, by role, and why others do not."""
        found: dict[int, dict[str, Metrics]] = {}
        failed: dict[int, Exception] = {}
        missing, until = [*asked], time.monotonic() + wait_s
        while True:
            self._remote.send({i: self._work(i, asked[i], split, final) for i in missing})
            left = []
            for index in missing:
                client = self._remote.take(index)
                before = failed.pop(index, None)
                try:
                    scores = client.facts().get("scores")
                    found[index] = _scores_of(index, asked[index], scores, self._task.metric)
                except (NoAnswerError, ClientError) as error:
                    failed[index] = error
                    # Who says the same twice will go on doing so.
                    settled = isinstance(error, ClientError) and str(error) == str(before)
                    if not settled and not isinstance(error, LostStateError):
                        left.append(index)
            missing = left
            if not missing or time.monotonic() >= until:
                return found, failed
            time.sleep(_RETRY_S)

    def _work(
        self, index: int, roles: Sequence[tuple[str, int]], split: str, final: bool
    ) -> tuple[list[list[Any]], list[bytes]]:
        """Return the order to score, with what the shared model lacks where that is of all."""
        shared = not self._apart and any(
            role != "mentor" or self._shares_mentor for role, _ in roles
        )
        frames: list[bytes] = []
        if shared and self._server is not None:
            frames = self._server.catch_up(self._remote.version(index))
        return [["score", split, [*roles], final, len(frames)]], frames

    def final(self) -> tuple[Scores, Models]:
        """Score models on test data as clients save them: alone, their adapters merged."""
        scores = self.score("test", ([], []), final=True)
        return scores, self.merged()


def _scores_of(
    index: int, roles: Sequence[tuple[str, int]], found: Any, metric: str
) -> dict[str, Metrics]:
    """Return metrics by role as a client gives them, after a look at each."""
    scores: dict[str, Metrics] = {}
    for role, _ in roles:
        metrics = found.get(role) if isinstance(found, Mapping) else None
        if not isinstance(metrics, Mapping) or metric not in metrics:
            raise ClientError(f"client {index} gives no {metric} of its {role}")
        scores[role] = {
            str(name): finite(value, f"{name} of the {role} of client {index}")
            for name, value in metrics.items()
        }
    return scores
