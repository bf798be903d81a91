"""What makes a job of NVFLARE: arguments of the filters, the helper for recipes, versions."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import nvflare_stand_in as stand_in
import pytest

from fedkd_fast.integrations.link import Compression

adapter = stand_in.load()


class Recipe:
    """What `add_compression` asks of a recipe."""

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)
        self.added: list[tuple[str, Any, list[str]]] = []
        self.packages = ["own"]
        self._job = self.job = self

    @property
    def app_packages(self) -> list[str]:
        return self.packages

    def set_app_packages(self, packages: list[str]) -> None:
        self.packages = packages

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("add_"):
            raise AttributeError(name)
        return lambda one, tasks: self.added.append((name, one, tasks))


@pytest.mark.parametrize(("transfer", "feedback"), [("FULL", True), ("DIFF", False)])
def test_four_filters_are_added(transfer: str, feedback: bool) -> None:
    recipe = Recipe(params_transfer_type=transfer)
    adapter.add_compression(recipe, up=Compression(0.9), refused="fail")
    found = {name: one for name, one, _ in recipe.added}
    assert {name: type(one).__name__ for name, one in found.items()} == {
        "add_server_output_filter": "CompressBroadcast",
        "add_client_input_filter": "RestoreBroadcast",
        "add_client_output_filter": "CompressReply",
        "add_server_input_filter": "RestoreReply",
    }
    assert all(tasks == ["train"] for _, _, tasks in recipe.added)
    assert found["add_server_output_filter"].feedback is feedback
    assert found["add_client_output_filter"].energy == 0.9
    assert found["add_server_input_filter"].refused == "fail"
    assert recipe.packages == ["own", "fedkd_fast"]


def test_arguments_are_attributes_and_are_checked() -> None:
    for made in (
        adapter.CompressBroadcast(0.7, False, "wf0", "tensor", False),
        adapter.CompressReply(energy=0.9),
        adapter.RestoreReply("fail"),
    ):
        names = inspect.signature(type(made).__init__).parameters.keys() - {"self"}
        again = type(made)(**{name: getattr(made, name) for name in names})
        assert all(getattr(again, name) == getattr(made, name) for name in names)
    with pytest.raises(ValueError, match="energy"):
        adapter.CompressReply(energy=2.0)
    with pytest.raises(ValueError, match="refused must be one of .* got 'panic'"):
        adapter.RestoreReply("panic")
    with pytest.raises(ValueError, match="Recipe has no params_transfer_type: pass down="):
        adapter.add_compression(Recipe())


@pytest.mark.parametrize("version", ["2.8.4", "3.0.0", "1.9.0"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs nvflare>=2\.9,<3, found {version}"):
        stand_in.load(version)


@pytest.mark.skipif(stand_in.REAL, reason="nvflare is installed")
def test_without_nvflare_the_message_says_what_to_install() -> None:
    assert "nvflare" not in sys.modules
    with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[nvflare\]"'):
        importlib.import_module("fedkd_fast.integrations.nvflare")
