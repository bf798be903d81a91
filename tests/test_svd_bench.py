"""The bench of truncated_svd: what it says of results that are wrong, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from updates import powerlaw

pytest.importorskip("pytest_benchmark")

import bench_truncated_svd
import deltas
from svd_peers import METHODS, Case, Method, Product, cut
from svd_rounds import Rounds, judge

ENERGY = 0.9


def pair(rows: int = 96, cols: int = 128, seed: int = 0) -> deltas.Pair:
    before = powerlaw(rows, cols, seed=seed)
    after = before + 0.3 * powerlaw(rows, cols, seed=seed + 100)
    return deltas.Pair(f"matrix {seed}, round 1", before, after, "spectra")


def complete(case: Case, energy: float) -> Product:
    return Product(*torch.linalg.svd(case.matrix, full_matrices=False))


def best(case: Case, energy: float) -> Product:
    return cut(complete(case, energy), energy, case.squares)


def one_short(case: Case, energy: float) -> Product:
    u, s, vh = best(case, energy)
    assert s is not None
    return Product(u[:, :-1], s[:-1], vh[:-1])


def skewed(case: Case, energy: float) -> Product:
    u, s, vh = best(case, energy)
    return Product(u * 1.01, s, vh / 1.01)


def failing(case: Case, energy: float) -> Product:
    if case.name.startswith("matrix 1"):
        raise ValueError("no convergence")
    return best(case, energy)


def test_what_a_peer_does_wrong_is_counted() -> None:
    wrong = {
        "one short": Method(one_short),
        "all components": Method(complete),
        "skewed": Method(skewed),
        "failing": Method(failing, most_rounds=1),
        "complete": Method(complete, complete=True),
    }
    cases = [Case.of(pair(seed=seed), [ENERGY]) for seed in range(2)]
    rounds = Rounds(cases, [ENERGY], METHODS | wrong)
    rounds.check()
    rounds.run(2)
    found = rounds.summary(ENERGY)["methods"]
    assert found["one short"]["misses"] == 2 and found["one short"]["worst_lost_over_allowed"] > 1
    assert found["all components"]["too_wide"] == 2 and found["all components"]["misses"] == 0
    assert found["skewed"]["worst_skew"] == pytest.approx(0.02, rel=0.05)
    assert found["failing"]["failed"] == 1 and len(found["failing"]["round_ms"]) == 1
    assert found["failing"]["matrix_ms"][1] is None and found["failing"]["over_ours"]["warm"] > 0
    assert "no convergence" in rounds.errors["failing"]
    for name in ("complete", "ours, warm", "ours, hint", "ours, cold", "torch.linalg.svd, P >= Q"):
        assert found[name]["misses"] == found[name]["too_wide"] == found[name]["failed"] == 0
        assert found[name]["worst_skew"] < 1e-4 and len(found[name]["round_ms"]) == 2


def test_a_miss_is_strict() -> None:
    case = Case.of(deltas.Pair("two, round 1", torch.eye(2), torch.eye(2), "spectra"), [0.5])
    one, two = (Product(torch.eye(2)[:, :k], torch.ones(k), torch.eye(2)[:k]) for k in (1, 2))
    assert judge(case, 0.5, one).missed and not judge(case, 0.5, two).missed
    assert case.optimum[0.5] == 2 and cut(two, 0.5, case.squares).right.shape[0] == 2


def test_the_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = powerlaw(20, 64)
    sparse = deltas.SparseRows(torch.arange(20), rows, 1000, "spectra")
    monkeypatch.setattr(deltas, "load", lambda model: [pair(), pair(128, 96)])
    monkeypatch.setattr(deltas, "load_rows", lambda: sparse)
    monkeypatch.setattr(bench_truncated_svd, "GEMM_SIDE", 64)
    threads = torch.get_num_threads()
    out = tmp_path / "new" / "svd.json"
    options = ["--quick", "--models", "minilm", "--energies", "0.9", "--out", str(out)]
    try:
        bench_truncated_svd.main(options)
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert out.stat().st_size < 100_000 and result["provenance"]["commit"]
    model = result["models"]["minilm"]
    assert model["source"] == "spectra" and len(model["matrices"]) == 2
    assert {"methods", "ours_in_one_call", "floor", "ranks"} == set(model["energies"]["0.9"])
    assert {record["start"] for record in model["memory"]} == {"warm", "cold"}
    assert {record["codec"] for record in model["compressor"]} == {"wf1", "wf0", "factors-fp32"}
    assert len(model["two_threads"]) == 3 and len(result["row_sparse"]) == 2
    assert "minilm, spectra matrices" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named() -> None:
    assert Method(best, ("torch.linalg", "no_such_package.inside")).missing() == ["no_such_package"]
