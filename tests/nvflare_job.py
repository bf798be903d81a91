"""What needs NVFLARE itself: recipes, exported jobs, its FedAvg. See `test_nvflare_runtime.py`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import test_nvflare as unit
import torch
from nvflare.apis.dxo import DataKind
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType

from fedkd_fast.integrations.link import Compression
from fedkd_fast.integrations.nvflare import add_compression

ENDS = {
    ("server", "task_data_filters"): "CompressBroadcast",
    ("server", "task_result_filters"): "RestoreReply",
    ("client", "task_data_filters"): "RestoreBroadcast",
    ("client", "task_result_filters"): "CompressReply",
}


MODEL = """
from torch import nn

class Tiny(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
"""


def exported(folder: Path, transfer: TransferType, **options: Any) -> dict[tuple[str, str], Any]:
    """Export a job with compression; return the filters that its JSON files name, built again."""
    script = folder / "client.py"
    script.write_text("")
    # NVFLARE copies the module of the model, and what it imports from beside it.
    (folder / "tiny_network.py").write_text(MODEL)
    recipe = FedAvgRecipe(
        name="job",
        model={"class_path": "tiny_network.Tiny", "args": {}},
        min_clients=2,
        train_script=str(script),
        params_transfer_type=transfer,
    )
    add_compression(recipe, **options)
    recipe.export(str(folder / "export"))
    (app,) = (folder / "export" / "job").glob("app*")
    assert not list(app.rglob("fedkd_fast")), "the package was copied into the job"
    found = {}
    for end, part in ENDS:
        config = json.loads((app / "config" / f"config_fed_{end}.json").read_text())
        (chain,) = config[part]
        assert chain["tasks"] == ["train"]
        (one,) = chain["filters"]
        module, _, name = one["path"].rpartition(".")
        found[end, part] = getattr(importlib.import_module(module), name)(**one["args"])
    return found


@pytest.fixture(autouse=True)
def found_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)


def test_an_exported_job_has_the_same_filters(tmp_path: Path) -> None:
    up = Compression(energy=0.9, feedback=False, codec="wf0", warm=False)
    found = exported(tmp_path, TransferType.DIFF, up=up, refused="fail")
    assert {key: type(one).__name__ for key, one in found.items()} == ENDS
    down, reply = (
        found["server", "task_data_filters"],
        found["client", "task_result_filters"],
    )
    assert down._compression() == Compression(feedback=False)
    assert reply._compression() == up
    assert found["server", "task_result_filters"].refused == "fail"


def test_whole_weights_get_feedback_down(tmp_path: Path) -> None:
    found = exported(tmp_path, TransferType.FULL)
    assert found["server", "task_data_filters"]._compression() == Compression()
    assert found["client", "task_result_filters"]._compression() == Compression()


@pytest.mark.parametrize("sent", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_a_refused_reply_has_no_weight_in_the_mean(sent: str) -> None:
    at, sites = unit.server(), [unit.client("site-1"), unit.client("site-2")]
    # Of tensors NVFLARE cannot average integers.
    start = unit.as_kind(unit.model(), "numpy")
    got = [unit.as_torch(unit.received(site, unit.broadcast(at, start, 0, site))) for site in sites]
    good = unit.reply(sites[0], unit.moved(got[0], 1), sent)
    bad = unit.harm(unit.reply(sites[1], unit.moved(got[1], 2), sent), "cut")
    for results in ([good, bad], [bad, good], [bad]):
        helper, kept = WeightedAggregationHelper(), None
        for result, site in zip(
            results, sites if results[0] is good else sites[::-1], strict=False
        ):
            dxo = unit.taken(at, result, site)
            weight = dxo.get_meta_prop("NUM_STEPS_CURRENT_ROUND")
            helper.add(dxo.data, weight, "site-1" if result is good else "site-2", 0)
            kept = dxo.data if result is good else kept
        mean = helper.get_result()
        if kept is None:
            still = unit.held(at)
            kept = still if sent == DataKind.WEIGHTS else {k: v - v for k, v in still.items()}
        for name in ("matrix", "bias"):
            torch.testing.assert_close(torch.as_tensor(mean[name]), torch.as_tensor(kept[name]))
