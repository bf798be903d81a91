"""Task ner: scores, batches, shards, models and predictions, on data made here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_encoder import SPECIAL
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("seqeval", reason="seqeval is not installed")

from tiny_ner import (
    DATASETS,
    DRUGS,
    PLAIN,
    POSITIONS,
    VOCABULARY,
    data,
    encoder,
    make_rows,
    ner_task,
    single,
    spans,
    write_conll,
)

from fedkd_fast.models import load_tokenizer, trainable_parameters
from fedkd_fast.tasks import IGNORED_LABEL, PredictingTask
from fedkd_fast.tasks.ner import entity_metrics
from fedkd_fast.tasks.ner_data import read_conll

__all__ = ["data", "encoder", "single"]


def f1_of(truth: Sequence[Sequence[str]], guesses: Sequence[Sequence[str]]) -> tuple[float, ...]:
    pairs = [(spans(one), spans(two)) for one, two in zip(truth, guesses, strict=True)]
    hits = sum(len(one & two) for one, two in pairs)
    real, guessed = sum(len(one) for one, _ in pairs), sum(len(two) for _, two in pairs)
    return (
        2 * hits / (real + guessed) if real + guessed else 0.0,
        hits / guessed if guessed else 0.0,
        hits / real if real else 0.0,
    )


@pytest.mark.parametrize("seed", range(5))
def test_score_against_one_computed_here(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tags = ["O", "B-X", "I-X", "B-of-two", "I-of-two"]
    truth, guesses = [], []
    for length in generator.integers(1, 12, size=40):
        row = generator.integers(len(tags), size=length)
        kept = generator.random(length) < 0.8
        other = np.where(kept, row, generator.integers(len(tags), size=length))
        truth.append([tags[i] for i in row])
        guesses.append([tags[i] for i in other])
    found = entity_metrics(truth, guesses)
    assert (found["F1"], found["precision"], found["recall"]) == pytest.approx(
        f1_of(truth, guesses)
    )
    assert 0.0 < found["F1"] < 1.0


def test_score_of_nothing() -> None:
    zeros = {"F1": 0.0, "precision": 0.0, "recall": 0.0}
    assert entity_metrics([["O"]], [["O"]]) == zeros
    assert entity_metrics([["B-X"]], [["O"]]) == zeros
    assert entity_metrics([["O"]], [["B-X"]]) == zeros
    # Half of an entity is none, nor is one of another type.
    assert entity_metrics([["B-X", "I-X"]], [["B-X", "O"]]) == zeros
    assert entity_metrics([["B-X"]], [["B-Y"]]) == zeros


class Oracle(nn.Module):
    """Tags the first drug as the begin of an entity and the second as the rest of one."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = [[*SPECIAL, *VOCABULARY].index(drug) for drug in DRUGS]
        self.config = SimpleNamespace(id2label={0: "O", 1: "B-Drug", 2: "I-Drug"})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tags = sum(((input_ids == id_).long() * tag for tag, id_ in enumerate(self.ids, 1)))
        return 9.0 * nn.functional.one_hot(torch.as_tensor(tags), 3)


@pytest.mark.parametrize(("max_length", "share"), [(16, 1.0), (7, 5 / 8), (3, 1 / 8)])
def test_cut_words_are_missed(max_length: int, share: float, tmp_path: Path, encoder: str) -> None:
    (tmp_path / "data").mkdir()
    rows = [(["aspirin"] * 8, ["B-Drug"] * 8)] * 3
    for split in ("train", "test"):
        write_conll(tmp_path / "data" / f"{split}.txt", rows)
    task = ner_task(tmp_path / "data", encoder, max_length=max_length)
    found = task.evaluate(Oracle())
    assert found["precision"] == 1.0
    assert found["recall"] == share
    assert found["F1"] == pytest.approx(2 * share / (1 + share))
    assert task.describe()["words_cut"] == 1 - share


def test_score_of_a_model_against_one_computed_here(data: Path, encoder: str) -> None:
    """Tag word by word without padding, other sentences or code of the task."""
    task = ner_task(data, encoder)
    tokenizer = load_tokenizer(encoder)
    best_score = 0.0
    for client, name in enumerate(DATASETS):
        model = task.build_mentor(client)
        generator = torch.Generator().manual_seed(client)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
        tags = model.eval().config.id2label  # type: ignore[union-attr,operator]
        rows = read_conll(data / name / "test.conll")
        guesses = []
        for words, _ in rows:
            ids, firsts = [tokenizer.cls_token_id], []
            for word in words:
                firsts.append(len(ids))
                ids += tokenizer(word, add_special_tokens=False)["input_ids"]
            ids = [*ids[:15], tokenizer.sep_token_id]
            with torch.inference_mode():
                best = model(torch.tensor([ids])).logits[0].argmax(1).tolist()
            guesses.append([tags[best[first]] if first < 15 else "O" for first in firsts])
        found = task.evaluate(model, client=client)
        wanted = f1_of([row.tags for row in rows], guesses)
        assert (found["F1"], found["precision"], found["recall"]) == pytest.approx(wanted)
        best_score = max(best_score, wanted[0])
    assert best_score > 0.0


def test_labels_stand_at_the_first_token_of_a_word(single: Path, encoder: str) -> None:
    task = ner_task(single, encoder, batch_size=4)
    (shard,) = task.shards(1, 0)
    tags = task.build_mentee().config.id2label  # type: ignore[union-attr]
    names = [*SPECIAL, *VOCABULARY]
    found = []
    for batch in task.batches(shard, 0):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert batch.labels.shape == ids.shape
        assert batch.labels.dtype == torch.int64
        assert int(mask.sum(1).max()) == ids.shape[1]
        for row, labels, counts in zip(ids, batch.labels, mask, strict=True):
            words: list[str] = []
            for token, label, counted in zip(row, labels, counts, strict=True):
                name = names[token]
                assert (name == "[PAD]") == (not counted)
                if name in SPECIAL or name.startswith("##"):
                    assert label == IGNORED_LABEL
                    words += [words.pop() + name[2:]] if name.startswith("##") else []
                else:
                    words.append(name)
            chosen = [tags[int(label)] for label in labels if label != IGNORED_LABEL]
            found.append((words, chosen))
    assert sorted(found) == sorted(
        (row.words, row.tags) for row in read_conll(single / "train.conll")
    )


def test_sentences_without_tokens_are_not_trained_on(tmp_path: Path, encoder: str) -> None:
    """A batch of them would have no loss; tested, their words are O."""
    (tmp_path / "data").mkdir()
    rows = [(["\u200b"], ["B-Drug"]), (["aspirin", "\u200b"], ["B-Drug", "I-Drug"])]
    for split in ("train", "test"):
        write_conll(tmp_path / "data" / f"{split}.txt", rows)
    task = ner_task(tmp_path / "data", encoder, batch_size=1)
    (shard,) = task.shards(1, 0)
    assert [batch.labels.tolist() for batch in task.batches(shard, 0)] == [[[-100, 1, -100]]]
    assert task.evaluate(Oracle()) == {"F1": 0.0, "precision": 0.0, "recall": 0.0}


def test_each_dataset_is_a_client(data: Path, encoder: str) -> None:
    task = ner_task(data, encoder)
    assert isinstance(task, PredictingTask)
    assert (task.own_tests, task.poolable, task.private) == (True, False, ("classifier.",))
    assert task.defaults()["clients"] == 3
    shards = task.shards(3, 0)
    assert [len(shard) for shard in shards] == [30, 30, 30]
    assert sorted(task.merge(shards)) == list(range(90))
    heads = [len(task.build_mentor(client).config.id2label) for client in range(3)]  # type: ignore[union-attr,arg-type]
    assert heads == [3, 3, 5]
    assert task.describe()["types"] == [["Drug"], ["Disease"], ["Drug", "Reaction"]]
    with pytest.raises(
        ValueError, match=r"clients must be 3, the datasets \(.*a, .*b, .*c\), got 4"
    ):
        task.shards(4, 0)
    with pytest.raises(ValueError, match="partition must be file for 3 datasets, .* got 'iid'"):
        ner_task(data, encoder, partition="iid").shards(3, 0)


def test_a_single_dataset_is_dealt(single: Path, encoder: str) -> None:
    task = ner_task(single, encoder)
    assert (task.own_tests, task.poolable, task.private, task.has_dev) == (False, True, (), True)
    shards = task.shards(4, 1)
    assert sorted(task.merge(shards)) == list(range(30))
    assert {len(shard) for shard in shards} == {7, 8}
    by_class = ner_task(single, encoder, partition="dirichlet:0.01").shards(3, 1)
    assert sorted(task.merge(by_class)) == list(range(30))
    types = [
        next((t[2:] for t in row.tags if t != "O"), "")
        for row in read_conll(single / "train.conll")
    ]
    # So small a concentration leaves a class at one client, but for one sentence each
    # of clients that would have none.
    largest = [max(sum(types[i] == one for i in shard) for shard in by_class) for one in set(types)]
    assert sum(largest) >= 28
    with pytest.raises(ValueError, match="clients must be at most 30, .* got 31"):
        task.shards(31, 0)
    with pytest.raises(ValueError, match="partition 'file' needs data in several files"):
        ner_task(single, encoder, partition="file").shards(3, 0)


def test_models_differ_in_their_heads_alone(data: Path, encoder: str) -> None:
    task = ner_task(data, encoder)
    for build in (task.build_mentor, task.build_mentee):
        states = [build(client).state_dict() for client in range(3)]
        for name, value in states[0].items():
            if not name.startswith("classifier."):
                assert all(torch.equal(value, state[name]) for state in states), name
        trained = trainable_parameters(build(0))
        assert not [name for name in trained if "embeddings" in name]
        assert {"classifier.weight", "classifier.bias"} < set(trained)


def test_words_are_tokenised_as_within_a_text(tmp_path: Path) -> None:
    """Tokenizers of bytes tell words behind a space from those at the start."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    learner = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator([f" {' '.join(PLAIN)}"] * 9, 300, special_tokens=special)
    learner.save_model(str(tmp_path))
    folder = tmp_path / "roberta"
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    RobertaTokenizerFast(*files).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
    )
    RobertaModel(config).save_pretrained(folder)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_conll(tmp_path / "data" / f"{split}.txt", [(["took", "took"], ["B-X", "O"])])
    task = ner_task(tmp_path / "data", str(folder))
    (batch,) = task.batches(*task.shards(1, 0), 0)
    ids = batch.inputs["input_ids"][0, 1:-1]
    assert len(ids) % 2 == 0
    assert torch.equal(ids[: len(ids) // 2], ids[len(ids) // 2 :])


def test_predictions(single: Path, encoder: str, tmp_path: Path) -> None:
    task = ner_task(single, encoder)
    text = "took aspirin  zoloft, my head-ache (aspirin)!"
    rows = [{"text": text}, {"tokens": ["took", "aspirin"]}, {"tokens": ["the"] * 20}]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"tokens": []}]))
    first, second, third, fourth = task.predict(Oracle(), str(samples))
    assert [(one["type"], one["text"], one["start"]) for one in first["entities"]] == [
        ("Drug", "aspirin  zoloft", 5),
        ("Drug", "aspirin", text.rindex("aspirin")),
    ]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in first["entities"])
    (drug,) = second["entities"]
    likely = math.exp(9) / (math.exp(9) + 2)
    assert drug.pop("probability") == pytest.approx(likely)
    assert drug == {"type": "Drug", "text": "aspirin", "start": 1, "end": 2}
    assert (first["text"], second["tokens"], third["tokens"]) == (
        text,
        *[["took", "aspirin"], ["the"] * 20],
    )
    assert (first["cut"], third["cut"], fourth) == (0, 6, {"tokens": [], "entities": [], "cut": 0})
    tests = read_conll(single / "test.conll")
    for record, row in zip(task.predict(Oracle(), None), tests, strict=True):
        assert record["tokens"] == row.words
        assert {(one["type"], one["start"], one["end"]) for one in record["truth"]} == spans(
            row.tags
        )
        assert not [one for one in record["truth"] if "probability" in one]
    texts = tmp_path / "texts.txt"
    texts.write_text("took aspirin\n\nmy doctor\n")
    found = [record["entities"] for record in task.predict(Oracle(), str(texts))]
    assert [len(entities) for entities in found] == [1, 0]


def test_dev_data_of_some_are_none(data: Path, encoder: str) -> None:
    write_conll(data / "a" / "dev.conll", make_rows(DATASETS["a"], 5, 0))
    assert not ner_task(data, encoder).has_dev
    for name in ("b", "c"):
        write_conll(data / name / "valid.txt", make_rows(DATASETS[name], 5, 0))
    task = ner_task(data, encoder)
    assert task.has_dev
    assert task.describe()["samples_dev"] == 15


def test_encoders_with_another_head(
    monkeypatch: pytest.MonkeyPatch, single: Path, encoder: str
) -> None:
    from transformers import AutoModelForTokenClassification

    class Other(nn.Module):
        score = nn.Linear(1, 1)

    monkeypatch.setattr(
        AutoModelForTokenClassification, "from_pretrained", lambda *_, **__: Other()
    )
    with pytest.raises(ValueError, match="head for tokens is called classifier, .* of class Other"):
        ner_task(single, encoder).build_mentor()


def test_without_seqeval(monkeypatch: pytest.MonkeyPatch, single: Path, encoder: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs seqeval: pip install seqeval"):
        ner_task(single, encoder)
