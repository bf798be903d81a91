"""The site: it builds without a warning, needs no network, has every public name, and runs."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from argparse import _SubParsersAction
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from tiny_task import TinyTask

import fedkd_fast
from fedkd_fast.__main__ import build_parser

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STYLE_LINK = re.compile(r"(?:url\(|@import)\s*['\"]?(?!data:)([^'\")\s]+)")
# What a block may import and skip where it is missing; everything else must be there.
FRAMEWORKS = {"flwr", "nvflare", "openfl", "appfl"}


@dataclass
class Page(HTMLParser):
    """What of a page other pages and the network have to do with."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)  # for readers to follow
    loads: list[str] = field(default_factory=list)  # what a browser fetches by itself
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        self.loads += [values[name] for name in ("src", "srcset", "poster") if name in values]
        self.loads += _STYLE_LINK.findall(values.get("style", ""))
        if "href" in values and tag in ("a", "link"):
            (self.links if tag == "a" else self.loads).append(values["href"])

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        """What it says, words apart by one space."""
        return " ".join("".join(self.said).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    made = folder / "site"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going"),
            *("-d", str(folder / "doctrees"), str(ROOT / "docs"), str(made)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return made


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {}
    for file in sorted(site.rglob("*.html")):
        found[file] = Page()
        found[file].feed(file.read_text(encoding="utf-8"))
    return found


def test_every_source_is_a_page(site: Path, pages: dict[Path, Page]) -> None:
    docs = ROOT / "docs"
    wanted = {source.relative_to(docs).with_suffix(".html") for source in docs.rglob("*.md")}
    assert wanted <= {file.relative_to(site) for file in pages}


def test_pages_load_nothing_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {(file, address) for file, page in pages.items() for address in page.loads}
    assert len(loaded) > len(pages)
    for file in site.rglob("*.css"):
        loaded |= {(file, one) for one in _STYLE_LINK.findall(file.read_text(encoding="utf-8"))}
    for file, address in loaded:
        parts = urlsplit(address)
        if parts.scheme != "data":
            assert not parts.scheme and not parts.netloc, f"{file} loads {address}"
            assert not parts.path or (file.parent / parts.path).is_file(), f"{file}: {address}"


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    followed = 0
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), f"{file} links to {link}"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target in pages, f"{file} links to {link}"
            anchor = unquote(parts.fragment)
            assert not anchor or anchor in pages[target].ids, f"{file} links to {link}"
            followed += 1
    assert followed > 500


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    text = (site / "concepts.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20
    assert "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    numbers = re.findall(r'<span class="number">\((\d+)\)</span>', text)
    assert numbers == [str(number) for number in range(1, 10)]  # those of the paper


def public_names() -> Iterator[tuple[str, object]]:
    """Every name that users may build on, as the API pages call it."""
    for name in fedkd_fast.__all__:
        yield f"fedkd_fast.{name}", getattr(fedkd_fast, name)
    for room in ("ops", "sealing", "wire"):
        module = import_module(f"fedkd_fast.{room}")
        for name in getattr(module, "__all__", [one for one in vars(module) if one[0] != "_"]):
            value = getattr(module, name)
            if name in fedkd_fast.__all__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"fedkd_fast.{room}.{name}", value


def test_every_public_name_is_explained(site: Path) -> None:
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    listed = {line.split(" ", 1)[0] for line in entries.splitlines()}
    names = dict(public_names())
    assert len(names) > 40
    for name, value in names.items():
        assert name in listed, f"{name} is on no page of docs/api"
        assert (getattr(value, "__doc__", None) or "").strip(), f"{name} has no docstring"
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if isinstance(function, FunctionType) and method[0] != "_" and function.__doc__:
                assert f"{name}.{method}" in listed, f"{name}.{method} is on no page of docs/api"


@pytest.mark.parametrize("name", ["TrainConfig", "DistillationConfig"])
def test_every_field_is_explained(
    name: str, pages: dict[Path, Page], site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    kind = getattr(fedkd_fast, name)
    fields = import_module("commented_fields").fields_of(kind)
    assert [one.name for one in fields] == list(kind.__dataclass_fields__)
    assert [one.name for one in fields if not one.meaning] == []
    page = pages[site / "api" / ("training.html" if name == "TrainConfig" else "losses.html")]
    for one in fields:
        assert f"{one.name}: {' '.join(one.kind.split())}" in page.text


def test_the_page_of_the_command_line_is_complete(pages: dict[Path, Page], site: Path) -> None:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, _SubParsersAction))
    text = pages[site / "cli.html"].text
    for name, command in commands.choices.items():
        assert f"usage: fedkd-fast {name} " in text
        for action in command._actions:
            for option in action.option_strings:
                assert option in text, f"{name} {option}"


def test_results_name_their_commands(pages: dict[Path, Page], site: Path) -> None:
    text = pages[site / "benchmarks.html"].text
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert files
    for file in files:
        assert file.name in text
        content = json.loads(file.read_text())
        if isinstance(content, dict) and "command" in content:
            assert " ".join(content["command"].split()) in text, file.name
    for script in re.findall(r"bench/[\w/]+\.(?:py|yaml)\b", text):
        assert (ROOT / script).is_file(), f"{script} made a result and is not there"


def stand_ins() -> dict[str, Any]:
    """What the blocks of the README take for granted, small."""
    torch.manual_seed(0)
    update, old = ({"w": torch.randn(24, 16), "b": torch.randn(24)} for _ in range(2))
    compressor = fedkd_fast.Compressor(0.95)

    def model(width: int, layers: int) -> Any:
        def states(*shape: int) -> tuple[torch.Tensor, ...]:
            return tuple(torch.randn(*shape).requires_grad_() for _ in range(layers))

        logits = torch.randn(2, 3).requires_grad_()
        hidden = (torch.randn(2, 4, width), *states(2, 4, width))
        maps = states(2, 2, 4, 4)
        return lambda **_: SimpleNamespace(logits=logits, hidden_states=hidden, attentions=maps)

    return {
        "Path": Path,
        "MyTask": TinyTask,
        "fedkd_fast": fedkd_fast,
        "update": update,
        "old_weights": old,
        "new_weights": {name: value + update[name] for name, value in old.items()},
        "lazily_loaded_weights": update,
        "frame": compressor.compress(update),
        "frames": [compressor.compress(update) for _ in range(2)],
        "sample_counts": [10, 20],
        "run_id": b"a run",
        "round": 1,
        "mentor": model(768, 12),
        "mentee": model(384, 4),
        "batch": {},
        "labels": torch.tensor([0, 2]),
        "attention_mask": torch.ones(2, 4),
    }


def make_keys(folder: Path) -> None:
    sealing = fedkd_fast.sealing
    keys = {name: sealing.PrivateKey.generate() for name in ("server", "client3")}
    for name, key in keys.items():
        key.save(folder / f"{name}.key")
        (folder / f"{name}.key.pub").write_text(f"{key.public}\n")
    (folder / "clients.json").write_text(json.dumps({"3": str(keys["client3"].public)}))


def blocks() -> Iterator[Any]:
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(match[1], id=f"{source.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("block", [*blocks()])
def test_blocks_of_python_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "sealing" in block:
        pytest.importorskip("cryptography", reason="sealed frames need the extra [crypto]")
        make_keys(tmp_path)
    train = fedkd_fast.train
    monkeypatch.setattr(
        fedkd_fast, "train", lambda *args, **fields: train(*args, **{**fields, "rounds": 1})
    )
    code = compile(block, "<block>", "exec")
    # What imports and says all that it needs by itself must not lean on what others are given.
    given = {} if "import fedkd_fast\n" in block and "import torch\n" in block else stand_ins()
    try:
        exec(code, given)
    except ImportError as error:
        if "fedkd-fast[" not in str(error) and str(error.name).split(".")[0] not in FRAMEWORKS:
            raise
        pytest.skip(str(error))
