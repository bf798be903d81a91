"""Matrices that stand for real updates: their spectra, the kinship of rounds, and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from updates import powerlaw

from bench import deltas
from fedkd_fast._files import read_json_object
from fedkd_fast.reference import select_rank

STORED = read_json_object(deltas.SPECTRA)
RECORDS = [
    next(record for record in STORED[model] if record["shape"] == shape)
    for model, shapes in {
        "minilm": ([384, 384], [1536, 384], [384, 1536]),
        "bert": ([768, 768],),
        deltas.EMBEDDING: (STORED[deltas.EMBEDDING][0]["shape"],),
    }.items()
    for shape in shapes
]


def held(pair: deltas.Pair) -> float:
    return deltas.captured(pair)[1][deltas.ENERGIES.index(deltas.ENERGY)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['shape']}")
def test_built_matrices_have_the_stored_spectra_and_kinship(record: dict[str, Any]) -> None:
    pair = deltas.build(record)
    for matrix, values in ((pair.previous, "previous"), (pair.current, "current")):
        assert list(matrix.shape) == record["shape"] and matrix.is_contiguous()
        sigma = torch.linalg.svdvals(matrix)
        kept = sigma[deltas.samples(min(matrix.shape)) - 1]
        torch.testing.assert_close(
            kept, torch.tensor(record[values]), rtol=1e-3, atol=1e-5 * float(sigma[0])
        )
    assert held(pair) == pytest.approx(record["captured"], abs=0.02)
    assert pair.source == "spectra"


def test_a_pair_is_built_like_the_one_described() -> None:
    new = powerlaw(96, 200, seed=1)
    previous = powerlaw(96, 200)
    pair = deltas.Pair("wide", previous, previous + 0.5 * new, "real")
    (record,) = deltas.describe([pair])
    built = deltas.build(record)
    assert held(built) == pytest.approx(held(pair), abs=0.02)
    ranks = [select_rank(torch.linalg.svdvals(one.current), deltas.ENERGY) for one in (pair, built)]
    assert abs(ranks[0] - ranks[1]) <= 2
    assert all(map(torch.equal, built[1:3], deltas.build(record)[1:3])), "built twice, equal"


def test_no_cache_no_real_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "read_json_object", lambda _: {"bert": RECORDS[:1]})
    (pair,) = deltas.load("bert", tmp_path)
    assert pair.name == RECORDS[0]["name"] and pair.source == "spectra"


def test_embedding_rows_without_a_cache(tmp_path: Path) -> None:
    found = deltas.load_rows(tmp_path)
    assert found.source == "spectra" and found.height == STORED[deltas.EMBEDDING][0]["height"]
    assert list(found.rows.shape) == STORED[deltas.EMBEDDING][0]["shape"]
    assert len(found.ids) == len(found.rows) and bool((found.ids.diff() > 0).all())
    assert int(found.ids[0]) >= 0 and int(found.ids[-1]) < found.height


def test_the_cache_comes_first(tmp_path: Path) -> None:
    rounds = {f"{number}/layer.0.weight": torch.full((3, 2), float(number)) for number in (3, 4, 5)}
    rows = {"ids": torch.tensor([4, 7]), "rows": torch.ones(2, 3), "height": torch.tensor(9)}
    for what, tensors in (("minilm", rounds), (deltas.EMBEDDING, rows)):
        path = deltas.cached(what, tmp_path)
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
    pairs = deltas.load("minilm", tmp_path)
    assert [(p.name, float(p.previous[0, 0]), float(p.current[0, 0])) for p in pairs] == [
        ("layer.0.weight, round 4", 3.0, 4.0),
        ("layer.0.weight, round 5", 4.0, 5.0),
    ]
    assert {pair.source for pair in pairs} == {"real"}
    assert deltas.load_rows(tmp_path).height == 9 and deltas.load_rows(tmp_path).source == "real"


def test_names_of_what_is_trained() -> None:
    assert str(deltas.Recipe("bert")) == "bert", "what the cache has had from the start"
    assert str(deltas.Recipe("minilm", "sgd", 2)) == "minilm-sgd-s2"
    names = [str(recipe) for recipe in deltas.recipes(["adam", "sgd"], [0, 1])]
    first = ["minilm", "bert", "embedding", "minilm-sgd", "bert-sgd"]
    assert names == first + [f"{name}-s1" for name in first]


def test_the_last_update_is_read(tmp_path: Path) -> None:
    rounds = {f"{number}/layer.weight": torch.full((3, 2), float(number)) for number in (9, 10)}
    rows = {"ids": torch.tensor([4, 7]), "rows": torch.ones(2, 3), "height": torch.tensor(9)}
    for recipe, tensors in ((deltas.Recipe("bert", "sgd", 1), rounds), ("embedding-s1", rows)):
        path = deltas.cached(str(recipe), tmp_path)
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
    found = deltas.last_update(deltas.Recipe("bert", "sgd", 1), tmp_path)
    assert found.keys() == {"layer.weight"} and bool((found["layer.weight"] == 10).all())
    assert deltas.last_update(deltas.Recipe("embedding", seed=1), tmp_path).keys() == {
        "word_embeddings"
    }
    with pytest.raises(FileNotFoundError, match=r"minilm\.safetensors is missing"):
        deltas.last_update(deltas.Recipe("minilm"), tmp_path)


def test_errors_name_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="model must be one of minilm, bert, got 'gpt'"):
        deltas.load("gpt", tmp_path)
    with pytest.raises(SystemExit) as left:
        deltas.main(["--cache", str(tmp_path)])
    assert left.value.code == 2
    assert f"data must name a folder of texts where {tmp_path} lacks" in capsys.readouterr().err
    path = deltas.cached("bert", tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"half a fi")
    with pytest.raises(ValueError, match=r"bert\.safetensors is damaged, remove it"):
        deltas.load("bert", tmp_path)
