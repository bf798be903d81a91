"""Which models of a run are scored, when, and when they say that it may end."""

from __future__ import annotations

import itertools
from typing import TypeAlias

from torch import nn

from fedkd_fast.adapters import merge_adapter
from fedkd_fast.config import TrainConfig
from fedkd_fast.pool import Pool
from fedkd_fast.recorder import mean
from fedkd_fast.scores import Scores, evaluate, test_sets
from fedkd_fast.tasks import Task
from fedkd_fast.trees import Tree

Models: TypeAlias = tuple[list[nn.Module], list[nn.Module]]  # mentors and mentees


class Evaluation:
    """Scores the models of a run.

    Args:
        config: of the run.
        task: has the data.
        pool: the clients.
    """

    def __init__(self, config: TrainConfig, task: Task, pool: Pool) -> None:
        self._config, self._task, self._pool = config, task, pool
        # Models of clients differ in what is the client's own.
        self._apart = bool(getattr(task, "private", ()))
        self._best: tuple[float, int] | None = None  # score on dev, and its round
        self.current = 0  # a client that has the server's version

    @property
    def clients(self) -> range:
        """The clients whose own models are scored and saved."""
        return range(min(len(self._pool), self._config.scored_clients))

    def models(self) -> Models:
        """Return the distinct mentors and mentees of the clients that are scored.

        Of a model that all share there is one, of a client that has the server's version.
        """
        current = self._pool.look(self.current, lasting=True).learner
        shares_mentor = current.shared is not None and current.shared is current.mentor
        learners = [current]
        if self._apart or (current.mentor is not None and not shares_mentor):
            learners = [self._pool.look(index, lasting=True).learner for index in self.clients]
        alone = learners if self._apart else [current]
        mentors = [one.mentor for one in (alone if shares_mentor else learners)]
        mentees = [one.mentee for one in alone]
        return (
            [model for model in mentors if model is not None],
            [model for model in mentees if model is not None],
        )

    def after(self, number: int) -> tuple[Scores, bool]:
        """Score models as far as a round asks for it, and decide whether it is the last.

        After the last one there is still to do before its models are scored.
        """
        config, final = self._config, number == self._config.rounds
        if final or (number % config.eval_every and config.patience is None):
            return Scores(self._task.metric, "none"), final
        if not getattr(self._task, "has_dev", False):
            return self.score("test", self.models()), False
        scores = self.score("dev", self.models())
        if config.patience is None:
            return scores, False
        value = scores.mean(f"{config.inference}s")
        if value is None:  # no such model, or both together, who are not asked on dev
            value = mean([scores.mean("mentors"), scores.mean("mentees")])
        if value is not None and (self._best is None or value > self._best[0]):
            self._best = value, number
        return scores, self._best is not None and number - self._best[1] >= config.patience

    def final(self) -> tuple[Scores, Models]:
        """Score models on test data as they are saved: alone, their adapters merged."""
        models = self.merged()
        return self.score("test", models), models

    def merged(self) -> Models:
        """Return what `models` does, with adapters merged into them."""
        models = self.models()
        for model in itertools.chain(*models):
            merge_adapter(model)
        return models

    def score(self, split: str, models: Models) -> Scores:
        """Score models on a split."""
        together = split == "test" and self._config.inference == "mean"
        clients = test_sets(self._task, self._config.clients, len(self._pool))
        clients = min(clients, self._config.scored_clients)
        return evaluate(self._task, split, *models, clients, together=together)

    def state(self) -> Tree:
        """Return what later rounds depend on."""
        return {"best": self._best and list(self._best), "current": self.current}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        best = state["best"]
        self._best = None if best is None else (best[0], best[1])
        self.current = state["current"]
