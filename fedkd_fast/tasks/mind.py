"""News recommendation: the paper's MIND scenario, titles and clicks, AUC, MRR and nDCG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedkd_fast._device import device_of, on_device
from fedkd_fast._seeds import seeded
from fedkd_fast.models import CONFIG_FILE, MeanOfModels
from fedkd_fast.tasks import Batch, TaskOptions, recipe
from fedkd_fast.tasks.content import content_digest
from fedkd_fast.tasks.encoder import Encoder
from fedkd_fast.tasks.mind_data import (
    SOURCE,
    Behaviors,
    popularity_scores,
    read_behaviors,
    read_mind,
    read_news,
)
from fedkd_fast.tasks.mind_metrics import Floats, impression_softmax, ranking_metrics
from fedkd_fast.tasks.mind_model import NewsModel, load_encoder
from fedkd_fast.tasks.partition import Indices, deal
from fedkd_fast.tasks.text import TextTask

HISTORY = 50  # clicks of a user; more know the user better and cost more titles
NEGATIVES = 4  # candidates without a click beside each one with; more: a harder choice
# At once, when nothing is trained.
EVALUATION_TITLES, EVALUATION_IMPRESSIONS = 256, 1024
# In the folder of a saved model: the configurations of both encoders, and the tokenizer.
ENCODERS = "encoders"


class _Samples(NamedTuple):
    """Clicks to learn from."""

    candidates: Indices  # (samples,) places of the clicked candidates among all
    impressions: Indices  # (samples,) rows of their impressions


class MindTask:
    """Which of the news shown to a user will be clicked? Scored by AUC, MRR, nDCG@5 and nDCG@10.

    A model encodes titles, makes a user of the last 50 clicks, and scores candidates by products
    (`NewsModel`). It learns to tell each clicked candidate from 4 others of the same impression, by
    cross entropy over the 5. A batch encodes each title once; hidden states and attention maps of a
    sample are compared by their mean over its titles. The embeddings of both models are frozen and
    never sent; pooling, projection and user encoder are trained and sent with the encoder.

    Data are MIND or in its layout, as `read_mind` says. By default the clicks are dealt to clients
    at random, as in the paper; ``key:user`` keeps those of a user together, ``dirichlet:α`` deals
    the categories of the clicked news unequally.
    """

    name = "mind"
    metric = "AUC"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**TextTask.DEFAULTS, "max_length": 24}
    METHOD_DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {**TextTask.METHOD_DEFAULTS}

    def __init__(self, options: TaskOptions) -> None:
        if options.data is None:
            raise ValueError(f"data must name a folder of MIND ({SOURCE}) for task mind, got None")
        saved = Path(str(options.mentor)) / ENCODERS
        # A model that was trained before: its weights are read after it was built.
        self._restored = (saved / "mentor" / CONFIG_FILE).is_file()
        if self._restored:
            mentor, mentee = str(saved / "mentor"), str(saved / "mentee")
            options = dataclasses.replace(options, mentor=mentor, mentee=mentee, mentee_layers=None)
        self._options = options
        self._encoder = Encoder(options, self.name, self._build)

    @cached_property
    def _data(self) -> dict[str, Behaviors]:
        return read_mind(str(self._options.data))

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests of news, users, histories, candidates and clicks by split."""
        return {
            split: content_digest(
                *(shown.news.titles, shown.news.categories, shown.users, shown.labels),
                *(*shown.history, *shown.candidates),
            )
            for split, shown in self._data.items()
        }

    @cached_property
    def _tokens(self) -> dict[str, list[list[int]]]:
        train, test = self._data["train"], self._data["test"]
        tokens = self._tokenise(train.news.titles)
        return {
            "train": tokens,
            "test": tokens if test.news is train.news else self._tokenise(test.news.titles),
        }

    def _tokenise(self, titles: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self._encoder.tokenise(titles)["input_ids"]
        return tokens

    @cached_property
    def _samples(self) -> _Samples:
        shown = self._data["train"]
        assert shown.labels is not None
        starts = shown.candidates.starts
        clicked = np.flatnonzero(shown.labels)
        rows = np.searchsorted(starts, clicked, side="right") - 1
        clicks = np.add.reduceat(shown.labels, starts[:-1])
        learnable = (clicks < np.diff(starts))[rows]  # something else was shown
        return _Samples(clicked[learnable], rows[learnable])

    def _build(
        self, source: str, labels: Sequence[str], *, layers: int | None, seed: int
    ) -> nn.Module:
        encoder = load_encoder(source, layers=layers, weights=not self._restored)
        with seeded(seed):
            return NewsModel(encoder, cast(Any, encoder).config.hidden_size)

    def build_mentor(self, client: int = 0) -> nn.Module:
        """Load the whole encoder, with a head whose weights the seed decides."""
        return self._encoder.build_mentor(())

    def build_mentee(self, client: int = 0) -> nn.Module:
        """Load the first layers of the encoder, or another one, with a head of the same seed."""
        return self._encoder.build_mentee(())

    def shards(self, clients: int, seed: int) -> list[Indices]:
        """Deal the clicks in the training impressions to clients.

        Raises:
            ValueError: fewer clicks than clients, a partition that the data do not allow, or a
                mentor that is a model trained before, whose weights are not at hand.
        """
        if self._restored:
            raise ValueError(
                "mentor must be a pretrained encoder for training, got a model of a finished run "
                f"in {Path(str(self._options.mentor)).parent.parent}"
            )
        shown, samples = self._data["train"], self._samples
        return deal(
            *(self._options.partition or "iid", clients, seed),
            samples=len(samples.candidates),
            labels=[
                shown.news.categories[self._clicked(n)] for n in range(len(samples.candidates))
            ],
            keys={"user": [shown.users[row] for row in samples.impressions]},
        )

    def merge(self, shards: Sequence[Indices]) -> Indices:
        """Put shards together."""
        return np.concatenate(list(shards))

    def batches(self, shard: Indices, seed: int) -> Iterable[Batch]:
        """Go through a shard once, in random order and with random candidates."""
        generator = np.random.default_rng(seed)
        count = math.ceil(len(shard) / self._options.batch_size)
        for part in np.array_split(generator.permutation(shard), count):
            yield self._batch(part, generator)

    def _batch(self, part: Indices, generator: np.random.Generator) -> Batch:
        shown = self._data["train"]
        labels = generator.integers(NEGATIVES + 1, size=len(part))
        chosen = [
            np.insert(self._negatives(sample, generator), place, self._clicked(sample))
            for sample, place in zip(part, labels, strict=True)
        ]
        candidates = np.stack(chosen)  # (N, 5)
        history, mask = shown.history.last(self._samples.impressions[part], HISTORY)
        titles = np.unique(np.concatenate([candidates.ravel(), history[mask]]))  # (U,)
        candidates = np.searchsorted(titles, candidates)
        history = np.where(mask, np.searchsorted(titles, history), 0)
        # Each title weighs by how often the sample holds it, so that rows add up to 1.
        share = np.zeros((len(part), len(titles)), dtype=np.float32)
        rows = np.arange(len(part))[:, None]
        np.add.at(share, (rows, candidates), 1.0)
        np.add.at(share, (rows, history), mask)
        share /= share.sum(1, keepdims=True)
        texts = self._encoder.inputs([self._tokens["train"][title] for title in titles])
        places = {"candidates": candidates, "history": history, "history_mask": mask}
        inputs = texts | {name: torch.from_numpy(value) for name, value in places.items()}
        return Batch(inputs, torch.from_numpy(labels), torch.from_numpy(share))

    def _clicked(self, sample: int) -> int:
        return int(self._data["train"].candidates.values[self._samples.candidates[sample]])

    def _negatives(self, sample: int, generator: np.random.Generator) -> Indices:
        """Draw candidates of the same impression without a click, twice only where they are few."""
        shown = self._data["train"]
        assert shown.labels is not None
        row = int(self._samples.impressions[sample])
        start, end = shown.candidates.starts[row : row + 2]
        others = shown.candidates.row(row)[shown.labels[start:end] == 0]
        return generator.choice(others, NEGATIVES, replace=len(others) < NEGATIVES)

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        """Return AUC, MRR, nDCG@5 and nDCG@10 on the impressions to score."""
        shown = self._data[split]
        return _metrics(shown, self._scores(model, shown, self._tokens[split]))

    def _scores(self, model: nn.Module, shown: Behaviors, tokens: Sequence[list[int]]) -> Floats:
        """Score all candidates, (T,)."""
        if isinstance(model, MeanOfModels):
            starts = shown.candidates.starts[:-1]
            each = [self._scores(one, shown, tokens) for one in model.models]
            shares = [impression_softmax(scores, starts) for scores in each]
            return np.asarray(np.mean(shares, axis=0))
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            scores = self._products(cast(NewsModel, model), shown, tokens)
        model.train(was_training)
        return scores

    def _products(self, model: NewsModel, shown: Behaviors, tokens: Sequence[list[int]]) -> Floats:
        news = self._news(model, shown, tokens)
        starts = shown.candidates.starts
        found = []
        for first in range(0, len(shown.users), EVALUATION_IMPRESSIONS):
            rows = np.arange(first, min(first + EVALUATION_IMPRESSIONS, len(shown.users)))
            history, mask = shown.history.last(rows, HISTORY)
            sizes = np.diff(starts[first : rows[-1] + 2])
            candidates = shown.candidates.values[starts[first] : starts[rows[-1] + 1]]
            clicked, counts, repeats, places = (
                on_device(torch.from_numpy(one), news.device)
                for one in (history, mask, sizes, candidates)
            )
            users = model.users(news[clicked], counts)
            shown_to = users.repeat_interleave(repeats, 0)  # (candidates, 64)
            found.append((shown_to * news[places]).sum(1))
        return torch.cat(found).cpu().double().numpy()

    def _news(self, model: NewsModel, shown: Behaviors, tokens: Sequence[list[int]]) -> Tensor:
        """Encode each news that occurs once; rows as in the table of news."""
        used = np.union1d(shown.candidates.values, shown.history.values)
        order = sorted(used.tolist(), key=lambda row: len(tokens[row]))
        device = device_of(model)
        news: Tensor | None = None
        for start in range(0, len(order), EVALUATION_TITLES):
            part = order[start : start + EVALUATION_TITLES]
            inputs = self._encoder.inputs([tokens[row] for row in part])
            vectors = model.news(
                **{name: on_device(value, device) for name, value in inputs.items()}
            )
            if news is None:
                news = vectors.new_zeros(len(tokens), vectors.shape[1])
            news[torch.tensor(part, device=device)] = vectors
        assert news is not None
        return news

    def describe(self) -> dict[str, Any]:
        """Return sizes, and what ranking by clicks in training alone would score."""
        train, test = self._data["train"], self._data["test"]
        return {
            "samples_train": len(self._samples.candidates),
            "samples_test": len(test.users),
            "impressions_train": len(train.users),
            "users_train": len(set(train.users)),
            "news": len(set(train.news.ids) | set(test.news.ids)),
            "shards": self._options.partition or "iid",
            "popularity": _metrics(test, popularity_scores(train, test)),
        }

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        """Return the recipe of this task, for one method or for all."""
        return recipe(self.DEFAULTS, self.METHOD_DEFAULTS, method)

    @cached_property
    def _configs(self) -> dict[str, Any]:
        models = {"mentor": self.build_mentor(), "mentee": self.build_mentee()}
        return {role: cast(Any, model).encoder.config for role, model in models.items()}

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer and configurations of both encoders, of which the weights are beside."""
        for role, config in self._configs.items():
            config.save_pretrained(folder / ENCODERS / role)
        self._encoder.tokenizer.save_pretrained(folder / ENCODERS / "mentor")

    def predict(
        self, model: nn.Module, data: str | None, *, client: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Rank the candidates of impressions.

        Args:
            model: a trained model.
            client: has no meaning here.
            data: a file like ``behaviors.tsv``, with or without clicks, of the news in the
                ``news.tsv`` beside it or else those of the task; None takes the test impressions.

        Yields:
            Records of ``impression``, ``user``, ``label`` (the first candidate), its
            ``probability`` (softmax over the impression), ``ranking`` (candidates with their
            ``score``, best first), and ``truth`` (the clicked ones) where clicks are known.

        Raises:
            ValueError: a malformed row; names file and line.
            OSError: the file cannot be read.
        """
        if data is None:
            shown, tokens = self._data["test"], self._tokens["test"]
        else:
            shown = self._read_shown(Path(data))
            tokens = self._tokenise(shown.news.titles)
        scores = self._scores(model, shown, tokens)
        shares = impression_softmax(scores, shown.candidates.starts[:-1])
        for row, impression in enumerate(shown.impressions):
            start, end = shown.candidates.starts[row : row + 2]
            names = [shown.news.ids[index] for index in shown.candidates.row(row)]
            order = np.argsort(-scores[start:end], kind="stable")
            record = {
                "impression": impression,
                "user": shown.users[row],
                "label": names[order[0]],
                "probability": float(shares[start:end].max()),
                "ranking": [
                    {"news": names[place], "score": float(scores[start + place])} for place in order
                ],
            }
            if shown.labels is not None:
                clicked = np.flatnonzero(shown.labels[start:end])
                record["truth"] = [names[place] for place in clicked]
            yield record

    def _read_shown(self, path: Path) -> Behaviors:
        beside = [path.with_name(f"news.tsv{packed}") for packed in ("", ".gz")]
        news = next((read_news(one) for one in beside if one.is_file()), None)
        return read_behaviors(path, news or self._data["test"].news)


def _metrics(shown: Behaviors, scores: Floats) -> dict[str, float]:
    assert shown.labels is not None
    return ranking_metrics(scores, shown.labels, shown.candidates.starts[:-1])
