"""Classification of short texts with any pretrained encoder; the mentee is its first layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedkd_fast._files import read_text
from fedkd_fast._seeds import derived_seed
from fedkd_fast.models import build_text_classifier, load_config, load_tokenizer, run_model
from fedkd_fast.tasks import Batch, TaskOptions
from fedkd_fast.tasks.text_data import TEXT, Rows, check_text, read_rows, read_splits

# Batches are made of texts of similar length: texts are sorted by length within pools of this many
# batches, drawn at random. Larger pools pad less and mix less.
POOL_BATCHES = 20
EVALUATION_BATCH = 64

Indices = npt.NDArray[np.int64]


class _Split(NamedTuple):
    tokens: list[list[int]]
    labels: Indices  # (samples,)


class TextTask:
    """Classification of texts; the score is F1.

    F1 is that of the second class for two classes (in sorted order: 1 of 0 and 1), else the mean
    over the classes. The embeddings of both models are frozen and never sent. The training texts
    are dealt to clients at random, in shards of nearly equal size.

    Args:
        options: all of them are heeded; ``data`` and ``mentor`` must be given, ``mentee_layers``
            defaults to a third of the mentor's.

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
        # Matching hidden states and attention maps ties the deep mentor to the shallow mentee: on
        # sentences about side effects of drugs, one seed, the mentors reached F1 0.722 with both
        # and 0.757 with neither. They were not tried one by one.
        "hidden": False,
        "attention": False,
    }

    def __init__(self, options: TaskOptions) -> None:
        for field, what in (("data", "a folder of texts"), ("mentor", "a pretrained encoder")):
            if getattr(options, field) is None:
                raise ValueError(f"{field} must name {what} for task text, got None")
        if options.max_length < 3:
            raise ValueError(f"max_length must be at least 3, got {options.max_length}")
        self._options, self._source = options, str(options.mentor)

    @cached_property
    def _config(self) -> Any:
        config = load_config(self._source)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and self._options.max_length > positions:
            raise ValueError(
                f"max_length must be at most {positions}, the positions that {self._source} "
                f"knows, got {self._options.max_length}"
            )
        return config

    @cached_property
    def _tokenizer(self) -> Any:
        _ = self._config  # checks the length that texts are cut to
        return load_tokenizer(self._source)

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        return read_splits(str(self._options.data))

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
    def _train(self) -> _Split:
        return self._encode("train")

    @cached_property
    def _test(self) -> _Split:
        return self._encode("test")

    def _encode(self, split: str) -> _Split:
        rows = self._rows[split]
        index_of = {name: index for index, name in enumerate(self.labels)}
        for label, place in zip(rows.labels, rows.places, strict=True):
            if label not in index_of:
                raise ValueError(f"{place}: label {label!r} never occurs in training")
        labels = np.array([index_of[label] for label in rows.labels], dtype=np.int64)
        return _Split(self._tokenise(rows.texts), labels)

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._options.max_length)
        tokens: list[list[int]] = encoded["input_ids"]
        return tokens

    def _pad(self, tokens: Sequence[list[int]]) -> dict[str, Tensor]:
        """Pad to the longest text: ``input_ids`` and ``attention_mask``, both (N, L)."""
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def build_mentor(self) -> nn.Module:
        """Load the whole encoder, with a head whose weights the seed decides."""
        return self._build(None)

    def build_mentee(self) -> nn.Module:
        """Load the first layers of the encoder, with the same head."""
        if self._options.mentee_layers is not None:
            return self._build(self._options.mentee_layers)
        return self._build(max(1, self._config.num_hidden_layers // 3))

    def _build(self, layers: int | None) -> nn.Module:
        _ = self._config  # checks the length of texts before anything is trained
        seed = derived_seed(self._options.seed)
        return build_text_classifier(self._source, self.labels, layers=layers, seed=seed)

    def shards(self, clients: int, seed: int) -> list[Indices]:
        """Deal the training texts to clients at random.

        Raises:
            ValueError: fewer texts than clients.
        """
        count = len(self._rows["train"].texts)
        if clients > count:
            raise ValueError(f"clients must be at most {count}, the training texts, got {clients}")
        return np.array_split(np.random.default_rng(seed).permutation(count), clients)

    def merge(self, shards: Sequence[Indices]) -> Indices:
        """Put shards together."""
        return np.concatenate(list(shards))

    def batches(self, shard: Indices, seed: int) -> Iterable[Batch]:
        """Go through a shard once, texts of similar length together, batches in random order."""
        generator = np.random.default_rng(seed)
        size = self._options.batch_size
        order = generator.permutation(shard)
        parts: list[Indices] = []
        for start in range(0, len(order), size * POOL_BATCHES):
            pool = order[start : start + size * POOL_BATCHES]
            lengths = [len(self._train.tokens[index]) for index in pool]
            pool = pool[np.argsort(lengths, kind="stable")]
            parts += np.array_split(pool, math.ceil(len(pool) / size))
        for position in generator.permutation(len(parts)):
            index = parts[position]
            inputs = self._pad([self._train.tokens[sample] for sample in index])
            yield Batch(inputs, torch.from_numpy(self._train.labels[index]))

    def evaluate(self, model: nn.Module) -> float:
        """Return F1 on the test texts."""
        guesses = self._probabilities(model, self._test.tokens).argmax(1).numpy()
        return f1_score(self._test.labels, guesses, len(self.labels))

    @torch.inference_mode()
    def _probabilities(self, model: nn.Module, tokens: Sequence[list[int]]) -> Tensor:
        was_training = model.training
        model.eval()
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        found: list[Tensor] = []
        for start in range(0, len(order), EVALUATION_BATCH):
            part = [tokens[index] for index in order[start : start + EVALUATION_BATCH]]
            found.append(run_model(model, self._pad(part)).logits.softmax(1))
        model.train(was_training)
        probabilities = torch.cat(found)  # (samples, C), sorted by length
        probabilities[torch.tensor(order)] = probabilities.clone()
        return probabilities

    def describe(self) -> dict[str, Any]:
        """Return sizes, labels and the encoder."""
        return {
            "samples_train": len(self._rows["train"].texts),
            "samples_test": len(self._rows["test"].texts),
            "classes": len(self.labels),
            "labels": self.labels,
            "shards": "random, nearly equal",
            "score_of": self.labels[1] if len(self.labels) == 2 else "mean over classes",
        }

    def defaults(self) -> dict[str, Any]:
        """Return the recipe of this task."""
        return dict(self.DEFAULTS)

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer beside the weights."""
        self._tokenizer.save_pretrained(folder)

    def predict(self, model: nn.Module, data: str | None) -> Iterator[dict[str, Any]]:
        """Label texts.

        Args:
            model: a trained model.
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
        texts = [line for line in read_text(path).splitlines() if line.strip()]
    else:
        rows = read_rows(path, (TEXT,))
        texts = [check_text(row[TEXT], f"{path}, line {line}") for line, row in rows]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def f1_score(truth: Indices, guesses: Indices, classes: int) -> float:
    """Return F1: of class 1 for two classes, else the mean over classes.

    ``F1_c = 2·TP_c / (2·TP_c + FP_c + FN_c)``, and 0 for a class that neither occurs nor is
    guessed.

    Args:
        truth: (samples,) class indices.
        guesses: (samples,) class indices.
        classes: number of classes.
    """
    scores = []
    for label in [1] if classes == 2 else range(classes):
        hits = int(((truth == label) & (guesses == label)).sum())
        total = int((truth == label).sum() + (guesses == label).sum())
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))
