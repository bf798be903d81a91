"""The bench of bytes at a given error: peers do what is claimed, and are counted rightly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import rate_distortion
import torch
from rate_case import Case, Coded, Peer
from rate_dense import DENSE_CODECS, DENSE_POINTS, entropy_bytes, index_bytes, uniform
from rate_distortion import PEERS, POINTS, Sum, measure, ours
from rate_factors import FACTOR_CODECS, FP32, rounded
from rate_packages import PACKAGE_CODECS, PACKAGE_POINTS
from torch import Tensor
from updates import powerlaw

from bench import deltas

TARGETS = (0.90, 0.98, 0.995)
ROWS, COLS = 96, 160


def heavy(seed: int = 0) -> Tensor:
    """Return a matrix of falling spectrum whose rows differ in scale."""
    scales = torch.linspace(-2, 2, ROWS).exp()[:, None]
    return 1e-4 * scales * powerlaw(ROWS, COLS, seed=seed)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("heavy", heavy())


def installed(peers: dict[str, Peer]) -> list[Any]:
    params = []
    for name, peer in peers.items():
        missing = ", ".join(peer.missing())
        mark = pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")
        params.append(pytest.param(name, id=name, marks=mark))
    return params


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", installed(PEERS))
def test_targets_are_met_and_used(case: Case, name: str, target: float) -> None:
    coded = PEERS[name].call(case, 1 - target)
    assert coded is not None and coded.decoded.shape == case.matrix.shape
    share = case.share(coded.decoded)
    assert share <= (1 - target) * (1 + 1e-6)
    assert 0 < coded.size <= 4 * case.matrix.numel()
    if (name in DENSE_CODECS or name in PACKAGE_CODECS) and "top-k" not in name:
        # EDEN's knob are whole rows, and they are long in this small matrix.
        least = 0.8 if "EDEN" in name else 0.95
        assert share >= least * (1 - target), "bytes are wasted on an error that nobody asked for"


@pytest.mark.parametrize("name", installed(POINTS))
def test_points_decode_to_something_near(case: Case, name: str) -> None:
    coded = POINTS[name].call(case)
    assert coded.decoded.shape == case.matrix.shape
    bits = 8 * coded.size / case.matrix.numel()
    share = case.share(coded.decoded)
    known = {"int8,": (8, 9), "int4,": (4, 5), "nf4,": (4, 5), "sign": (1, 1.1)}
    low, high = known.get(name.split()[0], (0, 4))
    assert low <= bits <= high and 0 < share < 1
    if name in PACKAGE_POINTS:
        assert share < (1e-3 if low == 8 else 0.03)


# ---- one by one ----------------------------------------------------------------------------------


def test_the_paper_s_payload_has_the_smallest_rank(case: Case) -> None:
    coded = FACTOR_CODECS[FP32].call(case, 0.05)
    rank, rest = divmod(coded.size, 4 * (ROWS + COLS + 1))
    assert rest == 0 and coded.kind == "factors"
    left, sigma, right = case.svd
    fewer = (left[: int(rank) - 1].mT * sigma[: int(rank) - 1]) @ right[: int(rank) - 1]
    assert case.share(coded.decoded) < 0.05 <= case.share(fewer)


def test_a_flat_matrix_travels_whole() -> None:
    flat = Case("flat", torch.linalg.qr(torch.randn(64, 64)).Q)
    for name, bits in ((FP32, 32), ("FedKD factors, fp16", 16)):
        coded = FACTOR_CODECS[name].call(flat, 0.05)
        assert coded.kind == "dense" and coded.size == pytest.approx(bits / 8 * 64 * 64, abs=4)
    assert FACTOR_CODECS["FedKD factors, int8 a column"].call(flat, 0.05).kind == "dense int8"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_all_ranks_of_rounded_factors_at_once(case: Case, bits: int) -> None:
    u, v, shares = rounded(case, bits)
    for rank in (1, 7, 40, 96):
        expected = case.share(u[:rank].mT @ v[:rank])
        assert float(shares[rank - 1]) == pytest.approx(expected, rel=2e-3)
    assert len(torch.unique(u[5])) <= 2**bits and len(torch.unique(v[5])) <= 2**bits


def test_too_few_bits_become_eight(case: Case) -> None:
    coded = FACTOR_CODECS["FedKD factors, int4 a column"].call(case, 1e-3)
    assert coded.kind.endswith("int8") and case.share(coded.decoded) <= 1e-3


def test_entropy() -> None:
    symbols = torch.tensor([-3, -3, 0, 0, 5, 5, 7, 7])
    assert entropy_bytes(symbols) == pytest.approx(8 * 2 / 8)
    assert entropy_bytes(symbols, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])) == pytest.approx(0)
    assert entropy_bytes(symbols, torch.zeros(8)) == pytest.approx(2)
    assert entropy_bytes(torch.zeros(9)) == 0


def test_codes_say_what_is_decoded(case: Case) -> None:
    found = uniform(case, 0.05)
    assert found is not None
    levels = torch.unique(
        torch.stack([found.codes.flatten().float(), found.decoded.flatten()]), dim=1
    )
    assert levels.shape[1] == len(torch.unique(found.codes)), "one value a code"
    assert float((found.decoded - found.step * found.codes).abs().max()) <= 0.5 * found.step
    plain = DENSE_CODECS["dense ECSQ, ideal entropy"].call(case, 0.05).size
    by_row = DENSE_CODECS["dense ECSQ, ideal entropy by row"].call(case, 0.05).size
    assert by_row < 0.9 * plain, "rows of this matrix differ"


def test_random_rounding_is_unbiased(case: Case) -> None:
    coded = DENSE_CODECS["QSGD, ideal entropy"].call(case, 0.05)
    assert coded is not None
    error = (coded.decoded - case.matrix).double()
    deviation = float(error.std()) / math.sqrt(error.numel())
    assert abs(float(error.mean())) < 4 * deviation


def test_places_of_the_largest() -> None:
    assert index_bytes(3, 4096) == pytest.approx(0, abs=1e-9)
    assert index_bytes(1, 1) == pytest.approx(12 / 8)
    assert index_bytes(2, 2048) == pytest.approx(2 * 4096 / 8, rel=2e-3), "nearly a bit each"


def test_top_k_keeps_the_largest_of_each_chunk(case: Case) -> None:
    coded = DENSE_POINTS["chunked top-k, 2 bits, 64 of 4096"].call(case)
    kept = coded.decoded != 0
    flat, size = kept.flatten(), case.matrix.abs().flatten()
    for begin in range(0, len(flat), 4096):
        chosen, sizes = flat[begin : begin + 4096], size[begin : begin + 4096]
        assert int(chosen.sum()) == 64
        assert float(sizes[chosen].min()) >= float(sizes[~chosen].max())
    assert len(torch.unique(coded.decoded)) == 5


# ---- the script ----------------------------------------------------------------------------------


def test_a_missed_target_and_an_unreachable_one_are_said(case: Case) -> None:
    total = Sum()
    total.add(case, Coded(10, 0.5 * case.matrix, "half"), 0.1)
    record = total.record()
    assert record["missed"] == 1 and record["worst"] == pytest.approx(2.5)
    assert record["error"] == pytest.approx(0.5) and record["kinds"] == {"half": 1}
    total.add(case, None, 0.1)
    assert total.record() == {"unreachable": 1}


def test_ours_are_whole_frames(case: Case) -> None:
    record = ours([case, Case("other", heavy(1))], 0.95, {"codec": "wf0"})
    assert record["missed"] == 0 and record["error"] <= 0.05**0.5
    assert sum(record["kinds"].values()) == 2


def test_the_script_runs_and_keeps_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {"minilm": 0, "minilm-s1": 1}
    monkeypatch.setattr(rate_distortion.deltas, "last_update", lambda r: {"a": heavy(r.seed)})
    monkeypatch.setattr(
        rate_distortion, "there", lambda _: [deltas.Recipe("minilm", "adam", s) for s in (0, 1)]
    )
    few = {name: PEERS[name] for name in (FP32, "dense ECSQ, ideal entropy")}
    absent = {"nobody's": Peer(None, ("no_such_package",))}
    monkeypatch.setattr(rate_distortion, "PEERS", few | absent)
    monkeypatch.setattr(rate_distortion, "POINTS", {"sign and scale": POINTS["sign and scale"]})
    out = tmp_path / "new" / "rate.json"
    threads = torch.get_num_threads()
    try:
        rate_distortion.main(["--out", str(out), "--targets", "0.9", "0.95"])
        first = json.loads(out.read_text())
        monkeypatch.setattr(rate_distortion, "measure", None)
        rate_distortion.main(["--out", str(out), "--keep-peers"])
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert result["sets"] == first["sets"] and set(result["sets"]) == set(trained)
    assert result["not_installed"] == {"nobody's": ["no_such_package"]}
    assert result["provenance"]["commit"] and result["command"].endswith("--keep-peers")
    records = result["sets"]["minilm"]["targets"]["0.95"]
    assert {FP32, "ours, wf0", "ours, factors-fp32"} < set(records)
    paper = records[FP32]["bytes"] / records["ours, wf0"]["bytes"]
    assert records["ours, wf0"]["fp32_factors_over_this"] == pytest.approx(paper, abs=1e-3)
    shown = capsys.readouterr().out
    assert "### minilm, adam: 1 matrices" in shown and "2 seeds" in shown
    assert "nobody's left out: not installed: no_such_package" in shown


def test_measured_sets_add_up() -> None:
    update = {"a": heavy(0), "b": heavy(1)}
    few = {FP32: PEERS[FP32]}
    both = measure(update, [0.95], few, {})["targets"]["0.95"][FP32]["bytes"]
    alone = [
        measure({name: matrix}, [0.95], few, {})["targets"]["0.95"][FP32]["bytes"]
        for name, matrix in update.items()
    ]
    assert both == sum(alone)


def test_sets_that_nobody_trained_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rate_distortion.main(["--out", "x.json", "--sets", "gpt"])
    assert "sets must have been trained by bench/deltas.py, got ['gpt']" in capsys.readouterr().err
