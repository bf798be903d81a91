"""News recommendation with an encoder and clicks made on the spot."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkd_fast.adapters import add_adapter
from fedkd_fast.models import MeanOfModels, run_model, trainable_parameters
from fedkd_fast.runs import evaluate_run, load_run, predict_run
from fedkd_fast.tasks import PredictingTask, TaskOptions, build_task, task_defaults
from fedkd_fast.trainer import train

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_news import write_encoder, write_news

from fedkd_fast.methods import METHODS
from fedkd_fast.tasks.mind import HISTORY, NEGATIVES, MindTask
from fedkd_fast.tasks.mind_data import read_mind
from fedkd_fast.tasks.mind_metrics import impression_softmax
from fedkd_fast.tasks.mind_model import AdditiveAttention, NewsModel
from fedkd_fast.tasks.partition import deal

METRICS = {"AUC", "MRR", "nDCG@5", "nDCG@10"}
# Sums of some dozen float32 products in another order.
TOLERANCE = 1e-5
# Of an untrained model, and of one that has learned which topic is whose.
LEARNED = 0.8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_news(tmp_path_factory.mktemp("news") / "data")


def mind(data: Path, encoder: str, **options: Any) -> MindTask:
    fields = {"max_length": 24, "batch_size": 8} | options
    return MindTask(TaskOptions(data=str(data), mentor=encoder, **fields))


def fields(data: Path, encoder: str, **others: Any) -> dict[str, Any]:
    return {"data": str(data), "mentor": encoder, "clients": 2, "rounds": 1} | others


# The model


def test_attention_is_the_weighted_mean_of_what_counts() -> None:
    torch.manual_seed(0)
    pool = AdditiveAttention(4, 3).double()
    vectors = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    found = pool(vectors, mask)
    kept = vectors[0][mask[0]]
    logits = torch.tanh(kept @ pool.hidden.weight.T + pool.hidden.bias) @ pool.weight.weight[0]
    assert torch.allclose(found[0], logits.softmax(0) @ kept)
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))
    found.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in pool.parameters() if p.grad is not None)


def test_scores_are_products_of_users_and_news(data: Path, encoder: str) -> None:
    """One sample at a time, each title by itself, without padding."""
    task = mind(data, encoder)
    model = task.build_mentor().eval()
    assert isinstance(model, NewsModel)
    (shard,) = task.shards(1, 0)
    batch = next(iter(task.batches(shard, 0)))
    outputs = run_model(model, batch.inputs, layers=True)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    titles, length = ids.shape
    assert outputs.logits.shape == (len(batch.labels), NEGATIVES + 1)
    assert outputs.hidden_states is not None and outputs.attentions is not None
    assert [state.shape for state in outputs.hidden_states] == [(titles, length, 16)] * 4
    assert [one.shape for one in outputs.attentions] == [(titles, 2, length, length)] * 3
    assert run_model(model, batch.inputs).hidden_states is None

    def news(title: int) -> Tensor:
        count = int(mask[title].sum())
        states = model.encoder(input_ids=ids[title : title + 1, :count]).last_hidden_state[0]
        return model.projection(pooled(model.pooling, states))

    def pooled(pool: nn.Module, vectors: Tensor) -> Tensor:
        return pool(vectors[None], torch.ones(1, len(vectors), dtype=torch.bool))[0]

    for n in range(len(batch.labels)):
        clicked = batch.inputs["history"][n][batch.inputs["history_mask"][n]]
        user = torch.zeros(64)
        if len(clicked):
            user = pooled(model.user, torch.stack([news(int(title)) for title in clicked]))
        scores = torch.stack([news(int(title)) @ user for title in batch.inputs["candidates"][n]])
        assert torch.allclose(outputs.logits[n], scores, atol=TOLERANCE)


def test_models_share_what_is_frozen(data: Path, encoder: str) -> None:
    task = mind(data, encoder)
    assert isinstance(task, PredictingTask)
    mentor, mentee = task.build_mentor(), task.build_mentee()
    states = mentor.state_dict()
    assert len(mentee.state_dict()) < len(states)
    for name, value in mentee.state_dict().items():
        assert torch.equal(value, states[name]), name
    names = set(trainable_parameters(mentee))
    assert not [name for name in names if "embeddings" in name or "pooler" in name]
    # Nothing is sent that never learns.
    batch = next(iter(task.batches(task.shards(1, 0)[0], 0)))
    loss = nn.functional.cross_entropy(run_model(mentee, batch.inputs).logits, batch.labels)
    loss.backward()
    assert not [n for n, p in trainable_parameters(mentee).items() if p.grad is None]


def test_recomputed_activations_give_the_same_gradients(data: Path, encoder: str) -> None:
    task = mind(data, encoder)
    batch = next(iter(task.batches(task.shards(1, 0)[0], 0)))
    found = []
    for checkpoint in (False, True):
        model = task.build_mentee().train()
        if checkpoint:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(0)
        run_model(model, batch.inputs).logits.square().sum().backward()
        found.append([p.grad for p in trainable_parameters(model).values()])
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(*found, strict=True))


def test_an_adapter_leaves_the_head_to_train(data: Path, encoder: str) -> None:
    model = mind(data, encoder).build_mentee()
    before = set(trainable_parameters(model))
    heads = {name for name in before if not name.startswith("encoder.")}
    assert {name.split(".")[0] for name in heads} == {"pooling", "projection", "user"}
    add_adapter(model, "lora:4", 0)
    names = set(trainable_parameters(model))
    assert heads < names
    assert all("lora_" in name for name in names - heads)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names - heads} == {
        "query",
        "value",
    }


# Batches


@pytest.mark.parametrize("official", [False, True])
def test_batches_hold_each_title_once(official: bool, tmp_path: Path, encoder: str) -> None:
    folder = write_news(tmp_path / "data", official=official)
    task, shown = mind(folder, encoder), read_mind(str(folder))["train"]
    assert shown.labels is not None
    shards = task.shards(3, 0)
    everything = np.sort(task.merge(shards))
    assert list(everything) == list(range(task.describe()["samples_train"]))
    clicks = np.add.reduceat(shown.labels, shown.candidates.starts[:-1])
    learnable = clicks < np.diff(shown.candidates.starts)
    assert clicks[learnable].sum() == len(everything) < clicks.sum()
    epoch, again, other = (list(task.batches(shards[0], seed)) for seed in (4, 4, 5))
    assert sum(len(batch.labels) for batch in epoch) == len(shards[0])
    for batch, twin in zip(epoch, again, strict=True):
        assert all(torch.equal(value, twin.inputs[name]) for name, value in batch.inputs.items())
        assert torch.equal(batch.labels, twin.labels)
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(epoch, other, strict=True))
    assert len({int(label) for batch in epoch for label in batch.labels}) > 2
    words = sorted(len(batch.labels) for batch in epoch)
    assert words[-1] - words[0] <= 1
    for batch in epoch:
        mask, history = batch.inputs["history_mask"], batch.inputs["history"]
        assert history.shape == mask.shape == (len(batch.labels), HISTORY)
        used = torch.cat([batch.inputs["candidates"].flatten(), history[mask]])
        titles = len(batch.inputs["input_ids"])
        assert sorted(used.unique().tolist()) == list(range(titles))
        assert batch.layer_share is not None
        assert batch.layer_share.shape == (len(batch.labels), titles)
        for n, row in enumerate(batch.layer_share):
            own = [*batch.inputs["candidates"][n].tolist(), *history[n][mask[n]].tolist()]
            for title, count in Counter(own).items():
                assert float(row[title]) == pytest.approx(count / len(own))
            assert float(row.sum()) == pytest.approx(1.0)


def test_candidates_are_of_one_impression(data: Path, encoder: str) -> None:
    """Titles name their topic: the clicked one is of the user's, the others are not."""
    task, shown = mind(data, encoder, batch_size=1), read_mind(str(data))["train"]
    assert shown.labels is not None
    tokens = task._tokens["train"]
    places = np.flatnonzero(shown.labels)
    rows = np.searchsorted(shown.candidates.starts, places, side="right") - 1
    kept = [
        (place, row)
        for place, row in zip(places, rows, strict=True)
        if not shown.labels[slice(*shown.candidates.starts[row : row + 2])].all()
    ]
    few = 0
    for sample, (place, row) in enumerate(kept):
        (batch,) = task.batches(np.array([sample]), sample)
        texts = [
            [token for token in title.tolist() if token]
            for title in batch.inputs["input_ids"][batch.inputs["candidates"][0]]
        ]
        label = int(batch.labels[0])
        assert texts[label] == tokens[shown.candidates.values[place]]
        start, end = shown.candidates.starts[row : row + 2]
        others = shown.candidates.values[start:end][shown.labels[start:end] == 0]
        negatives = texts[:label] + texts[label + 1 :]
        assert all(text in [tokens[news] for news in others] for text in negatives)
        distinct = batch.inputs["candidates"].unique().numel()
        assert distinct == 1 + NEGATIVES if len(others) >= NEGATIVES else distinct >= 2
        few += len(others) < NEGATIVES
    assert few


def test_shards_by_user_and_by_category(data: Path, encoder: str) -> None:
    task = mind(data, encoder, partition="key:user")
    shown = read_mind(str(data))["train"]
    owners = [
        {shown.users[row] for row in task._samples.impressions[shard]}
        for shard in task.shards(5, 0)
    ]
    assert sum(map(len, owners)) == len(set.union(*owners))
    with pytest.raises(ValueError, match="clients must be at most 12, the values of key:user"):
        task.shards(13, 0)
    categories = np.array(shown.news.categories)[shown.candidates.values[task._samples.candidates]]
    wanted = deal("dirichlet:0.5", 3, 0, samples=len(categories), labels=categories, keys={})
    found = mind(data, encoder, partition="dirichlet:0.5").shards(3, 0)
    assert all(np.array_equal(one, two) for one, two in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match=r"name a key of the data \(user\), got 'key:day'"):
        mind(data, encoder, partition="key:day").shards(2, 0)


# Training


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_loads_again(
    method: str, data: Path, encoder: str, tmp_path: Path
) -> None:
    if "lora" in method:
        pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path / "run"
    run = train("mind", method, out=str(folder), **fields(data, encoder, local_steps=2))
    assert run.summary["metric"] == "AUC"
    for role in ("mentor", "mentee", "mean"):
        assert set(run.summary["metrics"][role]) in (set(), METRICS)
    again = evaluate_run(folder)
    for name in ("score_mentor", "score_mentee", "score_mean", "metrics"):
        assert again[name] == run.summary[name], name
    loaded = load_run(folder)
    pairs = [*zip(run.mentors, loaded.mentors, strict=True)]
    if run.mentee is not None:
        pairs.append((run.mentee, loaded.mentees[0]))
    assert pairs
    for one, two in pairs:
        states = two.state_dict()
        assert all(torch.equal(value, states[name]) for name, value in one.state_dict().items())


def test_a_run_needs_no_encoder_any_more(data: Path, encoder: str, tmp_path: Path) -> None:
    """Also where mentor and mentee are encoders of different kinds."""
    sources = tmp_path / "sources"
    shutil.copytree(encoder, sources / "mentor")
    mentee = write_encoder(sources / "mentee", hidden=8, layers=2)
    scores = {}
    for name, method, more in (
        ("first", "fedkd", {}),
        ("other", "fedkd", {"mentee": mentee, "hidden": True}),
        ("alone", "fedavg-mentee", {"mentee_layers": 2}),
    ):
        given = fields(data, str(sources / "mentor"), local_steps=1, **more)
        scores[name] = train("mind", method, out=str(tmp_path / name), **given).summary
    shutil.rmtree(sources)
    for name, summary in scores.items():
        assert evaluate_run(tmp_path / name)["metrics"] == summary["metrics"]
        records = list(predict_run(tmp_path / name))
        assert len(records) == 25
    with pytest.raises(ValueError, match="mentor must be a pretrained encoder for training, got"):
        train("mind", "fedkd", **fields(data, str(tmp_path / "first" / "mentors" / "0")))


@pytest.mark.parametrize("preset", ["paper", "public_code"])
def test_layers_of_titles_teach(preset: str, data: Path, encoder: str) -> None:
    given = fields(data, encoder, preset=preset, local_steps=3, lr_mentor=1e-3, lr_mentee=1e-3)
    with_layers = train("mind", "fedkd", **given)
    without = train("mind", "fedkd", **given, hidden=False, attention=False)
    assert with_layers.mentee is not None and without.mentee is not None
    assert any(
        not torch.equal(one, two)
        for one, two in zip(
            with_layers.mentee.parameters(), without.mentee.parameters(), strict=True
        )
    )


def test_an_adapter_of_the_mentee_is_what_travels(data: Path, encoder: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    given = fields(data, encoder, local_steps=2, mentee_layers=2)
    run = train("mind", "fedkd", **given, mentee_adapter="lora:4")
    width, query, news = 16, 200, 64
    adapters = 2 * 2 * 4 * 2 * width  # layers, projections, rank, both factors
    pooling = width * query + 2 * query
    head = width * news + news + news * query + 2 * query
    assert run.summary["parameters_shared"] == adapters + pooling + head


def test_clients_of_users_take_turns(data: Path, encoder: str) -> None:
    given = fields(data, encoder, local_steps=1, rounds=2) | {"clients": 8}
    run = train("mind", "fedkd", **given, partition="key:user", participation=0.25)
    assert run.summary["clients"] == 8


def test_whose_topic_is_learned(data: Path, encoder: str) -> None:
    given = fields(data, encoder, rounds=2, lr_mentor=1e-2, lr_mentee=1e-2, local_epochs=4)
    scores = train("mind", "fedkd", **given).summary
    assert scores["score_mentor"] > LEARNED
    assert scores["score_mentee"] > LEARNED


# Evaluation and prediction


def test_two_models_together_average_their_probabilities(data: Path, encoder: str) -> None:
    task = mind(data, encoder)
    one, two = task.build_mentor(), mind(data, encoder, seed=1).build_mentee()
    shown, tokens = task._data["test"], task._tokens["test"]
    starts = shown.candidates.starts[:-1]
    shares = [
        impression_softmax(task._scores(model, shown, tokens), starts) for model in (one, two)
    ]
    found = task._scores(MeanOfModels([one, two]), shown, tokens)
    assert np.array_equal(found, (shares[0] + shares[1]) / 2)
    assert task.evaluate(MeanOfModels([one, one])) == pytest.approx(task.evaluate(one))


def test_evaluation_scores_as_training_does(data: Path, encoder: str) -> None:
    task = mind(data, encoder)
    model = task.build_mentor()
    model.train()
    shown, tokens = task._data["test"], task._tokens["test"]
    found = np.split(task._scores(model, shown, tokens), shown.candidates.starts[1:-1])
    assert model.training
    model.eval()
    for row, scores in enumerate(found):
        history, mask = shown.history.last(np.array([row]), HISTORY)
        inputs = task._encoder.inputs(tokens) | {
            "candidates": torch.from_numpy(shown.candidates.row(row))[None],
            "history": torch.from_numpy(history),
            "history_mask": torch.from_numpy(mask),
        }
        wanted = run_model(model, inputs).logits[0].detach().numpy()
        assert np.abs(scores - wanted).max() <= TOLERANCE


def test_predictions_rank_candidates(data: Path, encoder: str, tmp_path: Path) -> None:
    task = mind(data, encoder)
    model = task.build_mentee()
    records = list(task.predict(model, None))
    shown = read_mind(str(data))["test"]
    assert [record["impression"] for record in records] == shown.impressions
    hits = []
    for row, record in enumerate(records):
        scores = [one["score"] for one in record["ranking"]]
        assert scores == sorted(scores, reverse=True)
        names = [one["news"] for one in record["ranking"]]
        assert sorted(names) == sorted(shown.news.ids[n] for n in shown.candidates.row(row))
        assert record["label"] == names[0]
        assert record["probability"] >= 1 / len(names) * (1 - TOLERANCE)
        hits.append(set(record["truth"]) <= set(names))
    assert all(hits)
    json.dumps(records)
    # The file of a test split whose clicks are hidden, with and without news of its own.
    path = tmp_path / "behaviors.tsv"
    path.write_text("7\tU1\tnow\tN1 N2\tN3 N4 N5\n")
    (record,) = task.predict(model, str(path))
    assert record["impression"] == "7" and "truth" not in record
    (tmp_path / "news.tsv").write_text("X1\ta\tb\tgoal\nX2\ta\tb\tfilm star\n")
    path.write_text("8\tU1\tnow\tX1\tX1 X2\n")
    (record,) = task.predict(model, str(path))
    assert {one["news"] for one in record["ranking"]} == {"X1", "X2"}


def test_facts_tell_what_popularity_scores(data: Path, encoder: str) -> None:
    facts = mind(data, encoder).describe()
    assert set(facts["popularity"]) == METRICS
    assert facts["samples_test"] == 25
    assert facts["impressions_train"] == 40
    json.dumps(facts)


def test_the_recipe_is_that_of_the_paper() -> None:
    assert task_defaults("mind")["max_length"] == 24
    assert task_defaults("mind")["clients"] == 4
    assert task_defaults("mind", "fedlora")["lr_mentor"] > task_defaults("mind")["lr_mentor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, r"data must name a folder of MIND \(https://msnews.github.io\) for task"),
        ({"mentor": None}, "mentor must name a pretrained encoder for task mind, got None"),
        ({"max_length": 25}, "max_length must be at most 24, the positions"),
        ({"mentee_layers": 4}, r"mentee_layers must lie in 1\.\.3, .* got 4"),
    ],
)
def test_options(options: dict[str, Any], message: str, data: Path, encoder: str) -> None:
    known = {"data": str(data), "mentor": encoder, "max_length": 24} | options
    with pytest.raises(ValueError, match=message):
        build_task("mind", TaskOptions(**known)).build_mentee()
