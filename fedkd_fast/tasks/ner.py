"""Medical named entities: the paper's NER scenario, with a dataset and a set of tags a client.

The paper's three clients have CADEC, ADE and SMM4H, of which two may not be passed on; `brat` says
where CADEC is. Corpora that may, such as PsyTAR, BC5CDR and NCBI Disease, ask the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from fedkd_fast.models import build_token_classifier, run_model
from fedkd_fast.tasks import IGNORED_LABEL, Batch, TaskOptions, recipe
from fedkd_fast.tasks.batching import EVALUATION_BATCH, POOL_BATCHES, bucketed, by_length, pad
from fedkd_fast.tasks.content import content_digest
from fedkd_fast.tasks.encoder import Encoder, check_labels
from fedkd_fast.tasks.ner_data import (
    Sample,
    Splits,
    as_words,
    find_datasets,
    read_dataset,
    read_samples,
)
from fedkd_fast.tasks.partition import Indices, deal
from fedkd_fast.tasks.tagging import first_type, tag_set
from fedkd_fast.tasks.text import TextTask
from fedkd_fast.tasks.text_data import Columns

# Position of a word that has no token: it lies beyond the length that sentences are cut to.
_CUT = -1
# The index of O in every set of tags, which is what such words get.
_OUTSIDE = 0


class _Encoded(NamedTuple):
    tokens: list[list[int]]
    firsts: list[list[int]]  # position of each word's first token, or _CUT


class _Training(NamedTuple):
    """The training sentences of all datasets, one behind the other."""

    tokens: list[list[int]]
    labels: list[list[int]]  # of each token; IGNORED_LABEL but for the first of a word
    types: list[str]  # of each sentence's first entity
    sizes: list[int]  # sentences of each dataset


class _Tagged(NamedTuple):
    choices: list[int]  # index of each word's tag
    shares: list[float]  # its probability


class NerTask:
    """Tags of words; the score is F1 of whole entities, averaged over all of a test set (micro).

    With several datasets each is a client, which is tested on its own test data. Where their tags
    differ, so do the heads over the encoders: they stay at the client, in both models. With a
    single dataset its training sentences are dealt to clients, who share the head as well. The
    embeddings of both models are frozen and never sent.

    A word is tagged by its first token. Words beyond ``max_length`` are tagged O, so they cost
    recall: cutting cannot improve a score.

    Args:
        options: all of them are heeded. ``data`` is one dataset, a folder of datasets, or several
            joined by commas, as `find_datasets` and `read_dataset` read them; it and ``mentor``
            must be given. ``mentee_layers`` defaults to a third of the mentor's, ``mentee`` must
            have the mentor's vocabulary.

    Raises:
        ValueError: options or data that make no sense.
        ImportError: transformers or seqeval is not installed.
    """

    name = "ner"
    metric = "F1"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **TextTask.DEFAULTS,
        "clients": 3,
        "max_length": 128,
        # What tables of tagged words call them.
        "text_column": "tokens",
        "label_column": "ner_tags",
        # Alone, MiniLM-L6 scored best with it, out of 5e-5, 1e-4, 2e-4 and 4e-4, on development
        # data of PsyTAR, BC5CDR and NCBI Disease, trained on a quarter of their sentences.
        "lr_mentor": 2e-4,
    }
    METHOD_DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **TextTask.METHOD_DEFAULTS,
        # Most tokens are outside of entities and soon cost next to nothing, so that D_i is small
        # and the divergence would rule: without it the mentee scores higher, and mentors no lower.
        # It also does where clients exchange four times an epoch.
        "fedkd": {
            **TextTask.METHOD_DEFAULTS["fedkd"],
            "lr_mentee": 3e-3,
            "rounds": 12,
            "local_epochs": 0.25,
            "distillation": {"denominator": "constant"},
        },
    }

    def __init__(self, options: TaskOptions) -> None:
        if options.data is None:
            raise ValueError(f"data must name tagged sentences for task {self.name}, got None")
        if importlib.util.find_spec("seqeval") is None:
            raise ImportError("task ner needs seqeval: pip install seqeval")
        self._options = options
        self._encoder = Encoder(options, self.name, build_token_classifier, prefix_space=True)
        self._tests: dict[tuple[int, str], _Encoded] = {}

    @cached_property
    def _sources(self) -> list[str]:
        return find_datasets(str(self._options.data))

    @cached_property
    def _datasets(self) -> list[Splits]:
        columns = Columns(self._options.text_column, self._options.label_column)
        return [read_dataset(source, columns) for source in self._sources]

    @cached_property
    def _tags(self) -> list[list[str]]:
        """Tags by dataset, in the order of their indices."""
        found = [tag_set(dataset["train"]) for dataset in self._datasets]
        for source, tags in zip(self._sources, found, strict=True):
            if len(tags) < 2:
                raise ValueError(f"data {source} hold no entities to train on")
        return found

    def _dataset(self, client: int) -> int:
        """Return the index of a client's dataset."""
        return client if self.own_tests else 0

    @property
    def own_tests(self) -> bool:
        """Whether each client has test data of its own."""
        return len(self._sources) > 1

    @property
    def poolable(self) -> bool:
        """Whether all clients have the same tags."""
        return all(tags == self._tags[0] for tags in self._tags)

    @property
    def private(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that stay at the client: heads of other tags."""
        return () if self.poolable else ("classifier.",)

    @property
    def has_dev(self) -> bool:
        """Whether every dataset has data to choose by."""
        return all("dev" in dataset for dataset in self._datasets)

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests of words and tags by split, over all datasets."""
        splits = dict.fromkeys(split for dataset in self._datasets for split in dataset)
        return {
            split: content_digest([dataset.get(split) for dataset in self._datasets])
            for split in splits
        }

    def _encode(self, sentences: Sequence[list[str]]) -> _Encoded:
        if not self._encoder.tokenizer.is_fast:
            raise ValueError(
                f"mentor must have a fast tokenizer, which knows the words of its tokens, for task "
                f"{self.name}, got {self._options.mentor!r}"
            )
        encoded = self._encoder.tokenise(sentences, is_split_into_words=True)
        firsts = []
        for index, words in enumerate(sentences):
            found = [_CUT] * len(words)
            for position, word in reversed([*enumerate(encoded.word_ids(index))]):
                if word is not None:
                    found[word] = position
            firsts.append(found)
        return _Encoded(encoded["input_ids"], firsts)

    @cached_property
    def _training(self) -> _Training:
        training = _Training([], [], [], [])
        for dataset, tags in zip(self._datasets, self._tags, strict=True):
            index_of = {tag: index for index, tag in enumerate(tags)}
            before = len(training.tokens)
            encoded = self._encode([sentence.words for sentence in dataset["train"]])
            for sentence, tokens, firsts in zip(dataset["train"], *encoded, strict=True):
                labels = [IGNORED_LABEL] * len(tokens)
                for tag, first in zip(sentence.tags, firsts, strict=True):
                    if first != _CUT:
                        labels[first] = index_of[tag]
                # The mean loss of a batch without any label is no number.
                if any(label != IGNORED_LABEL for label in labels):
                    training.tokens.append(tokens)
                    training.labels.append(labels)
                    training.types.append(first_type(sentence.tags))
            training.sizes.append(len(training.tokens) - before)
        return training

    def _encoded(self, dataset: int, split: str) -> _Encoded:
        """Return the tokens of a split, which models are scored on again and again."""
        if (dataset, split) not in self._tests:
            words = [sentence.words for sentence in self._datasets[dataset][split]]
            self._tests[dataset, split] = self._encode(words)
        return self._tests[dataset, split]

    def build_mentor(self, client: int = 0) -> nn.Module:
        """Load the whole encoder, with a head for the client's tags of weights that a seed decides.

        All but the head is the same for every client.
        """
        return self._encoder.build_mentor(self._tags[self._dataset(client)])

    def build_mentee(self, client: int = 0) -> nn.Module:
        """Load the first layers of the encoder, or another one, with a head likewise."""
        return self._encoder.build_mentee(self._tags[self._dataset(client)])

    def shards(self, clients: int, seed: int) -> list[Indices]:
        """Give each client its dataset, or deal the sentences of a single one.

        For a partition by class, the class of a sentence is the type of its first entity.

        Raises:
            ValueError: another number of clients than of datasets, fewer sentences than clients,
                or a partition that the data do not allow.
        """
        training, partition = self._training, self._options.partition
        if not self.own_tests:
            return deal(
                *(partition or "iid", clients, seed),
                samples=len(training.tokens),
                labels=training.types,
                keys={},
            )
        if partition not in (None, "file"):
            raise ValueError(
                f"partition must be file for {len(self._sources)} datasets, each a client, got "
                f"{partition!r}"
            )
        if clients != len(self._sources):
            raise ValueError(
                f"clients must be {len(self._sources)}, the datasets ({', '.join(self._sources)}), "
                f"got {clients}"
            )
        ends = np.cumsum(training.sizes)[:-1]
        return np.split(np.arange(len(training.tokens), dtype=np.int64), ends)

    def merge(self, shards: Sequence[Indices]) -> Indices:
        """Put shards together."""
        return np.concatenate(list(shards))

    def batches(self, shard: Indices, seed: int) -> Iterable[Batch]:
        """Go through a shard once, sentences of similar length together, batches in random order.

        Labels are (N, L): that of a word at its first token, else `IGNORED_LABEL`.
        """
        tokens, labels = self._training.tokens, self._training.labels
        for index in bucketed(shard, tokens, self._options.batch_size, seed):
            inputs = self._encoder.inputs([tokens[sample] for sample in index])
            yield Batch(inputs, pad([labels[sample] for sample in index], IGNORED_LABEL))

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        """Return F1, precision and recall of the entities of a client's split.

        Entities of types that the training data do not have are missed.

        Raises:
            ValueError: the model was made for other tags.
        """
        dataset = self._dataset(client)
        tags = self._tags[dataset]
        check_labels(model, tags)
        tagged = self._tag(model, self._encoded(dataset, split))
        guesses = [[tags[choice] for choice in one.choices] for one in tagged]
        truth = [sentence.tags for sentence in self._datasets[dataset][split]]
        return entity_metrics(truth, guesses)

    @torch.inference_mode()
    def _tag(self, model: nn.Module, encoded: _Encoded) -> list[_Tagged]:
        was_training = model.training
        model.eval()
        found: dict[int, _Tagged] = {}
        for part in by_length(encoded.tokens):
            inputs = self._encoder.inputs([encoded.tokens[index] for index in part])
            shares, choices = run_model(model, inputs).logits.softmax(-1).max(-1)  # (N, L) each
            rows = zip(part, choices.tolist(), shares.tolist(), strict=True)
            for index, choice, share in rows:
                firsts = encoded.firsts[index]
                found[index] = _Tagged(
                    [_OUTSIDE if first == _CUT else choice[first] for first in firsts],
                    [0.0 if first == _CUT else share[first] for first in firsts],
                )
        model.train(was_training)
        return [found[index] for index in range(len(found))]

    def describe(self) -> dict[str, Any]:
        """Return sizes, datasets with their types, and the share of test words that are cut."""
        counts = {
            f"samples_{split}": sum(len(dataset.get(split, [])) for dataset in self._datasets)
            for split in ("train", "test", "dev")
        }
        encoded = [self._encoded(index, "test") for index in range(len(self._sources))]
        firsts = [first for one in encoded for words in one.firsts for first in words]
        return {
            **counts,
            "datasets": self._sources,
            "types": [sorted({tag[2:] for tag in tags[1:]}) for tags in self._tags],
            "words_cut": firsts.count(_CUT) / max(1, len(firsts)),
            "shards": "file" if self.own_tests else self._options.partition or "iid",
            "score_of": "entities, micro average",
        }

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        """Return the recipe of this task, for one method or for all; several datasets are clients.

        Raises:
            ValueError: as `find_datasets`.
        """
        found = recipe(self.DEFAULTS, self.METHOD_DEFAULTS, method)
        return found | ({"clients": len(self._sources)} if self.own_tests else {})

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer beside the weights."""
        self._encoder.tokenizer.save_pretrained(folder)

    def predict(
        self, model: nn.Module, data: str | None, *, client: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Find entities.

        Args:
            model: a trained model.
            client: whose test data are meant.
            data: a .jsonl file with ``tokens`` (a list of words) or ``text``, a .tsv or .csv file
                with a column ``text``, or .txt with one text a line; None takes the test data.

        Yields:
            Records of ``text`` or ``tokens``, ``entities``, ``cut`` (how many words lie beyond the
            length that texts are cut to) and, for test data, ``truth``. An entity has ``type``,
            ``text``, ``start``, ``end`` (in characters of a text, or in words; end excluded), and,
            if found, the ``probability`` of its least probable tag.

        Raises:
            ValueError: a malformed row; names file and line.
            OSError: the file cannot be read.
        """
        if data is None:
            sentences = self._datasets[self._dataset(client)]["test"]
            samples = [as_words(sentence.words) for sentence in sentences]
            truth = [_entities(as_words(one.words), one.tags, None) for one in sentences]
        else:
            samples, truth = read_samples(Path(data)), []
        names = cast(Any, model).config.id2label
        chunk = EVALUATION_BATCH * POOL_BATCHES
        for start in range(0, len(samples), chunk):
            part = samples[start : start + chunk]
            encoded = self._encode([sample.words for sample in part])
            for offset, tagged in enumerate(self._tag(model, encoded)):
                tags = [names[choice] for choice in tagged.choices]
                record = {
                    **part[offset].content,
                    "entities": _entities(part[offset], tags, tagged.shares),
                    "cut": encoded.firsts[offset].count(_CUT),
                }
                yield record | ({"truth": truth[start + offset]} if data is None else {})


def _entities(
    sample: Sample, tags: Sequence[str], shares: Sequence[float] | None
) -> list[dict[str, Any]]:
    from seqeval.metrics.sequence_labeling import get_entities

    found = []
    for type_, first, last in get_entities(list(tags)):
        if sample.spans is None:
            start, end = first, last + 1
            text = " ".join(sample.words[start:end])
        else:
            start, end = sample.spans[first][0], sample.spans[last][1]
            text = sample.content["text"][start:end]
        entity = {"type": type_, "text": text, "start": start, "end": end}
        if shares is not None:
            entity["probability"] = min(shares[first : last + 1])
        found.append(entity)
    return found


def entity_metrics(
    truth: Sequence[Sequence[str]], guesses: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return F1, precision and recall of whole entities, by seqeval.

    ``P = TP/(TP + FP)``, ``R = TP/(TP + FN)``, ``F1 = 2·TP/(2·TP + FP + FN)``, each 0 where its
    denominator is. An entity counts if its type and both of its ends are right; counts are summed
    over types. As in CoNLL's evaluation, I-TYPE behind another type or O begins an entity.

    Args:
        truth: tags of each sentence.
        guesses: as many of each.
    """
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        *([list(tags) for tags in given] for given in (truth, guesses)),
        average="micro",
        zero_division=0,
    )
    return {"F1": float(f1), "precision": float(precision), "recall": float(recall)}
