"""Classification of short texts with any pretrained encoder; the mentee is its first layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedkd_fast.models import build_text_classifier, run_model
from fedkd_fast.tasks import Batch, TaskOptions, recipe
from fedkd_fast.tasks.batching import EVALUATION_BATCH, POOL_BATCHES, bucketed, by_length
from fedkd_fast.tasks.content import content_digest
from fedkd_fast.tasks.encoder import Encoder, check_labels
from fedkd_fast.tasks.partition import Indices, deal
from fedkd_fast.tasks.text_data import (
    TEXT,
    Columns,
    Rows,
    check_text,
    read_lines,
    read_rows,
    read_splits,
)


class _Split(NamedTuple):
    tokens: list[list[int]]
    labels: Indices  # (samples,)


class TextTask:
    """Classification of texts; the score is F1.

    F1, precision and recall are those of the second class for two classes (in sorted order: 1 of 0
    and 1), else means over the classes. The embeddings of both models are frozen and never sent.
    The training texts are dealt to clients at random, in shards of nearly equal size, unless
    another partition is asked for; columns beside text and label are keys.

    Args:
        options: all of them are heeded; ``data`` and ``mentor`` must be given, ``mentee_layers``
            defaults to a third of the mentor's, ``mentee`` must have the mentor's vocabulary.

    Raises:
        ValueError: options or data that make no sense.
        ImportError: transformers is not installed.
    """

    name = "text"
    metric = "F1"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "clients": 4,
        "rounds": 3,
        "local_epochs": 1,
        "batch_size": 16,
        "lr_mentor": 5e-5,
        "lr_mentee": 2e-4,
        "lr_end": 0.2,
        "weight_decay": 0.01,
        # Matching hidden states and attention maps ties the deep mentor to a shallow mentee: with
        # two of six layers, mentors scored lower with both than with neither. They were not tried
        # one by one, nor with a mentee as deep as the mentor.
        "hidden": False,
        "attention": False,
    }
    METHOD_DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # A mentee as deep as the mentor that trains and sends adapters alone: a thousandth of the
        # bytes of FedAvg, so that there can be more rounds. What a message leaves out comes with
        # the next, so each can be coarse. bench/results/adr.json has what this is worth.
        "fedkd": {
            "mentee_adapter": "lora:8",
            "lr_mentee": 1e-3,
            "rounds": 6,
            "energy_start": 0.9,
            "energy_end": 0.95,
            "feedback": "both",
        },
        "fedlora": {"lr_mentor": 1e-3},
    }

    def __init__(self, options: TaskOptions) -> None:
        if options.data is None:
            raise ValueError(f"data must name a folder of texts for task {self.name}, got None")
        self._options = options
        self._encoder = Encoder(options, self.name, build_text_classifier)

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        return self._read(str(self._options.data))

    def _read(self, data: str) -> dict[str, Rows]:
        """Read all splits."""
        columns = Columns(self._options.text_column, self._options.label_column)
        return read_splits(data, columns)

    @property
    def has_dev(self) -> bool:
        """Whether there are data to choose by."""
        return "dev" in self._rows

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests by split of texts and labels, and of the key that clients are dealt by."""
        kind, _, key = (self._options.partition or "").partition(":")
        return {
            split: content_digest(
                one.texts, one.labels, *([one.keys.get(key)] if kind == "key" else ())
            )
            for split, one in self._rows.items()
        }

    @cached_property
    def labels(self) -> list[str]:
        """Names of the classes in the order of their indices."""
        names = set(self._rows["train"].labels)
        if len(names) < 2:
            raise ValueError(f"data must hold at least two classes, got {sorted(names)}")
        numeric = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
        # The name decides between 1 and 01, which are equal numbers.
        return sorted(names, key=lambda name: (int(name) if numeric else 0, name))

    @cached_property
    def _splits(self) -> dict[str, _Split]:
        return {split: self._encode(split) for split in self._rows}

    def _encode(self, split: str) -> _Split:
        rows = self._rows[split]
        index_of = {name: index for index, name in enumerate(self.labels)}
        for label, place in zip(rows.labels, rows.places, strict=True):
            if label not in index_of:
                raise ValueError(f"{place}: label {label!r} never occurs in training")
        labels = np.array([index_of[label] for label in rows.labels], dtype=np.int64)
        return _Split(self._tokenise(rows.texts), labels)

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self._encoder.tokenise(texts)["input_ids"]
        return tokens

    def build_mentor(self, client: int = 0) -> nn.Module:
        """Load the whole encoder, with a head whose weights the seed decides."""
        return self._encoder.build_mentor(self.labels)

    def build_mentee(self, client: int = 0) -> nn.Module:
        """Load the first layers of the encoder, or another one, with a head of the same seed."""
        return self._encoder.build_mentee(self.labels)

    def shards(self, clients: int, seed: int) -> list[Indices]:
        """Deal the training texts to clients.

        Raises:
            ValueError: fewer texts than clients, or a partition that the data do not allow.
        """
        rows = self._rows["train"]
        return deal(
            *(self._options.partition or "iid", clients, seed),
            samples=len(rows.texts),
            labels=[self.labels.index(label) for label in rows.labels],
            keys=rows.keys,
        )

    def merge(self, shards: Sequence[Indices]) -> Indices:
        """Put shards together."""
        return np.concatenate(list(shards))

    def batches(self, shard: Indices, seed: int) -> Iterable[Batch]:
        """Go through a shard once, texts of similar length together, batches in random order."""
        tokens, labels = self._splits["train"]
        for index in bucketed(shard, tokens, self._options.batch_size, seed):
            inputs = self._encoder.inputs([tokens[sample] for sample in index])
            yield Batch(inputs, torch.from_numpy(labels[index]))

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        """Return F1, precision, recall and accuracy on the texts of a split.

        Raises:
            ValueError: the model was made for other labels.
        """
        check_labels(model, self.labels)
        found = self._splits[split]
        guesses = self._probabilities(model, found.tokens).argmax(1).numpy()
        return classification_metrics(found.labels, guesses, len(self.labels))

    @torch.inference_mode()
    def _probabilities(self, model: nn.Module, tokens: Sequence[list[int]]) -> Tensor:
        was_training = model.training
        model.eval()
        order: list[int] = []
        found: list[Tensor] = []
        for part in by_length(tokens):
            inputs = self._encoder.inputs([tokens[index] for index in part])
            found.append(run_model(model, inputs).logits.softmax(1))
            order += part
        model.train(was_training)
        probabilities = torch.cat(found).cpu()  # (samples, C), sorted by length
        probabilities[torch.tensor(order, device="cpu")] = probabilities.clone()
        return probabilities

    def describe(self) -> dict[str, Any]:
        """Return sizes, labels and the encoder."""
        return {
            "samples_train": len(self._rows["train"].texts),
            "samples_test": len(self._rows["test"].texts),
            "classes": len(self.labels),
            "labels": self.labels,
            "samples_dev": len(self._rows["dev"].texts) if self.has_dev else 0,
            "shards": self._options.partition or "iid",
            "score_of": self.labels[1] if len(self.labels) == 2 else "mean over classes",
        }

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        """Return the recipe of this task, for one method or for all."""
        return recipe(self.DEFAULTS, self.METHOD_DEFAULTS, method)

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer beside the weights."""
        self._encoder.tokenizer.save_pretrained(folder)

    def predict(
        self, model: nn.Module, data: str | None, *, client: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Label texts.

        Args:
            model: a trained model.
            client: has no meaning here: all have the same labels.
            data: a .jsonl, .tsv or .csv file with a column ``text``, or .txt with one text a line;
                None takes the test texts.

        Yields:
            Records of ``text``, ``label``, ``probability``, and ``truth`` for the test texts.

        Raises:
            ValueError: a malformed row; names file and line.
            OSError: the file cannot be read.
        """
        if data is None:
            rows = self._rows["test"]
            texts, truth = rows.texts, rows.labels
        else:
            texts, truth = read_texts(Path(data)), None
        names = cast(Any, model).config.id2label
        chunk = EVALUATION_BATCH * POOL_BATCHES
        for start in range(0, len(texts), chunk):
            part = texts[start : start + chunk]
            for offset, row in enumerate(self._probabilities(model, self._tokenise(part))):
                record = {
                    "text": part[offset],
                    "label": names[int(row.argmax())],
                    "probability": float(row.max()),
                }
                yield record if truth is None else record | {"truth": truth[start + offset]}


def read_texts(path: Path) -> list[str]:
    """Read texts to label.

    Raises:
        ValueError: a malformed row, or no texts; names file and line.
        OSError: the file cannot be read.
    """
    if path.suffix == ".txt":
        texts = [line for _, line in read_lines(path) if line.strip()]
    else:
        rows = read_rows(path, (TEXT,))
        texts = [check_text(row[TEXT], f"{path}, line {line}") for line, row in rows]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def classification_metrics(truth: Indices, guesses: Indices, classes: int) -> dict[str, float]:
    """Return F1, precision, recall and accuracy.

    ``P_c = TP_c / (TP_c + FP_c)``, ``R_c = TP_c / (TP_c + FN_c)``, ``F1_c = 2·TP_c / (2·TP_c + FP_c
    + FN_c)``, each 0 where its denominator is: of class 1 for two classes, else means over classes.

    Args:
        truth: (samples,) class indices.
        guesses: (samples,) class indices.
        classes: number of classes.
    """
    f1, precision, recall = [], [], []
    for label in [1] if classes == 2 else range(classes):
        hits = int(((truth == label) & (guesses == label)).sum())
        real, guessed = int((truth == label).sum()), int((guesses == label).sum())
        f1.append(2 * hits / (real + guessed) if real + guessed else 0.0)
        precision.append(hits / guessed if guessed else 0.0)
        recall.append(hits / real if real else 0.0)
    return {
        "F1": float(np.mean(f1)),
        "precision": float(np.mean(precision)),
        "recall": float(np.mean(recall)),
        "accuracy": float((truth == guesses).mean()),
    }
