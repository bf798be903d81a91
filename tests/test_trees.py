"""Nested state in files: what is read is what was written, and nothing else is believed."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from trees_alike import alike

from fedkd_fast.trees import read_tree, write_tree

FILE = "tree.safetensors"


def there_and_back(folder: Path, tree: Any) -> Any:
    write_tree(folder / FILE, tree)
    return read_tree(folder / FILE)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(3, 4, generator=generator)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    return {
        "matrix": plain,
        "transposed": plain.clone().T,
        "strided": torch.arange(20)[::3],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(2.5),
        "flag": torch.tensor([True, False]),
        "bf16": plain.to(torch.bfloat16),
        "half": plain.half(),
        "double": plain.double(),
        "byte": torch.arange(250, 256).to(torch.uint8),
        "special": special,
        "empty": torch.zeros(0),
        "empty rows": torch.zeros(0, 3, dtype=torch.int64),
        "empty columns": torch.zeros(3, 0),
    }


@pytest.mark.parametrize("name", tensors())
def test_tensors_of_every_kind(name: str, tmp_path: Path) -> None:
    value = tensors()[name]
    found = there_and_back(tmp_path, value)
    assert alike(found, value) and not found.requires_grad
    # All at once, too: each is where it belongs.
    assert alike(there_and_back(tmp_path, tensors()), tensors())


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, -(2**200), 1.5, 1e-320, math.inf, math.nan, "", "ß\0\n\"", "\ud800",
     b"", bytes(range(256)), [], {}, [[], {}, None], {"": 1},
     {"tensor": 1, "pairs": [], "a/b": {}}],
    ids=repr,
)  # fmt: skip
def test_plain_values(value: Any, tmp_path: Path) -> None:
    assert alike(there_and_back(tmp_path, value), value)


def test_keys_keep_their_kind_and_order(tmp_path: Path) -> None:
    tree = {2: "two", "2": "text", -1: {10**30: None}, "b": 0, "a": 1}
    assert alike(there_and_back(tmp_path, tree), tree)
    assert alike(there_and_back(tmp_path, OrderedDict(tree)), tree)


def test_parameters_and_tuples_become_plain(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    found = there_and_back(tmp_path, (layer.weight, (1, 2)))
    assert type(found) is list and type(found[0]) is torch.Tensor and found[1] == [1, 2]
    assert not found[0].requires_grad and torch.equal(found[0], layer.weight)


def test_what_is_one_object_stays_one(tmp_path: Path) -> None:
    """Error feedback says so which tensors are tied."""
    one, equal = torch.ones(3), torch.ones(3)
    found = there_and_back(tmp_path, {"a": one, "b": [one, equal], 3: {"c": one}})
    assert found["a"] is found["b"][0] is found[3]["c"]
    assert found["b"][1] is not found["a"]
    assert found["b"][1].data_ptr() != found["a"].data_ptr()


def test_views_of_one_memory_become_tensors_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tree = [whole, whole.view(3, 4), whole[2:5], whole[:3], whole.view(3, 4).T, whole.detach()]
    for some in (tree, tree[::-1]):
        found = there_and_back(tmp_path, some)
        assert alike(found, some)
        assert len({one.data_ptr() for one in found}) == len(found)
        found[0].zero_()
        assert alike(found[1:], some[1:])


def test_many_empty_tensors(tmp_path: Path) -> None:
    """They all lie at the same address, which is none."""
    tree = [torch.zeros(0) for _ in range(5)] + [torch.zeros(0, 2), torch.ones(3)[:0]]
    assert alike(there_and_back(tmp_path, tree), tree)


def test_what_was_read_does_not_need_the_file(tmp_path: Path) -> None:
    """It may be cut, written anew or removed, as an older checkpoint is."""
    tree = {"x": torch.arange(100_000.0), "b": bytes(5000), "s": torch.tensor(1)}
    found = there_and_back(tmp_path, tree)
    path = tmp_path / FILE
    path.write_bytes(bytes(path.stat().st_size))
    assert alike(found, tree)
    path.write_bytes(b"")
    path.unlink()
    assert alike(found, tree)
    # And it lies as any other tensor does: products may differ where it does not.
    fresh = torch.empty(1).data_ptr() % 64
    assert {one.data_ptr() % 64 for one in (found["x"], found["s"])} == {fresh}
    assert found["s"].untyped_storage().nbytes() == found["s"].nbytes


def test_writing_changes_nothing(tmp_path: Path) -> None:
    tree = tensors()
    before = {name: value.clone() for name, value in tree.items()}
    storages = {name: value.data_ptr() for name, value in tree.items()}
    write_tree(tmp_path / FILE, tree)
    assert alike(tree, before)
    assert storages == {name: value.data_ptr() for name, value in tree.items()}


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.builds(
        lambda shape, seed, dtype: torch.testing.make_tensor(shape, dtype=dtype, device="cpu")
        if seed
        else torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.booleans(),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    )
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(TREES)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tree_comes_back_and_has_one_file(tmp_path: Path, tree: Any) -> None:
    found = there_and_back(tmp_path, tree)
    assert alike(found, tree)
    once = (tmp_path / FILE).read_bytes()
    assert alike(there_and_back(tmp_path, found), tree)
    assert (tmp_path / FILE).read_bytes() == once


def test_different_trees_have_different_files(tmp_path: Path) -> None:
    one = torch.ones(2)
    trees = [
        {"a": one}, {"b": one}, {1: one}, {"1": one}, [one], one, [one, one], [one, one.clone()],
        one.double(), one.view(1, 2), torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]), 1, True,
        1.0, "1", b"1", None, {}, [], {"a": 1, "b": 2}, {"b": 2, "a": 1},
    ]  # fmt: skip
    files = []
    for tree in trees:
        write_tree(tmp_path / FILE, tree)
        files.append((tmp_path / FILE).read_bytes())
    assert len(set(files)) == len(trees)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [0, {"b": {1, 2}}]}, "^/a/1/b must be .*set"),
        ([object()], "^/0 must be .*object"),
        (len, "^/ must be"),
        ({"a": {None: 1}}, "keys at /a must be str or int, got None"),
        ({1.5: 1}, "keys at / must be str or int, got 1.5"),
        ({True: 1}, "keys at / must be str or int, got True"),
        ({"x": {3: bytearray(1)}}, "^/x/3 must be"),
        ({"x": torch.ones(2, 2).to_sparse()}, "^/x must be a dense tensor .*sparse"),
        ({"x": torch.ones(2, device="meta")}, "^/x must be a dense tensor .*meta"),
        ([torch.ones(2, dtype=torch.complex128)], "^/0 must be a dense tensor .*complex128"),
    ],
)
def test_what_no_file_can_hold_is_named(tree: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=words):
        write_tree(tmp_path / FILE, tree)
    assert not (tmp_path / FILE).exists()


def test_files_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path / "no" / FILE)) as caught:
        write_tree(tmp_path / "no" / FILE, {})
    assert isinstance(caught.value, FileNotFoundError) and caught.value.errno
    with pytest.raises(OSError):
        read_tree(tmp_path / FILE)
    with pytest.raises(OSError):
        read_tree(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write_tree(path, {"x": torch.arange(9.0), "b": b"bytes"})
    content = path.read_bytes()
    for cut in (0, 1, 7, 8, 30, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            read_tree(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_tree(path)


NESTED = json.dumps({"bytes": 0})
for _ in range(400):
    NESTED = f"[{NESTED}]"


PLACES = '[["float32", [2]], ["bfloat16", []], ["bfloat16", [1]]]'


@pytest.mark.parametrize(
    "content",
    [None, "", "no JSON", "{}", "[]", "3", *(f"[{PLACES}, {tree}]" for tree in (
        '{"what": 0}', '{"tensor": 9}', '{"tensor": [0]}', '{"tensor": "0"}',
        '{"tensor": 0, "bytes": 0}', '{"pairs": 1}', '{"pairs": [1]}', '{"pairs": [[1]]}',
        '{"pairs": [[["a"], 1]]}', '{"pairs": [[null, 1]]}', '{"pairs": [["a", 1], ["a", 1]]}',
        '{"tensor": -1}', '{"pairs": [["a", {"tensor": 3}]]}', '{"bytes": 1}',
        "[" * 5000 + "]" * 5000,
    )), *(f'[{places}, {{"tensor": 0}}]' for places in (
        "[]", "3", "[[]]", *(f'[["float32", {one}], ["bfloat16", [2]]]' for one in (
            "[1]", "[3]", "[]", '["2"]', "2", "null", "[-1, -2]", "[0.5, 4]", "[2.0]", "[1, 2.0]",
            f"[2], [{2**70}, 0]", f"[2], [{2**63 - 1}, {2**63 - 1}, 0]", "[2], 1",
        )), '[["int8", [2]], ["bfloat16", [2]]]',
        '[["int8", [0]], ["float32", [2]], ["bfloat16", [2]]]',
    ))],
    ids=lambda text: str(text)[:60],
)  # fmt: skip
def test_foreign_files_are_refused_by_name(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / FILE
    tensors = {"float32": torch.zeros(2), "bfloat16": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(tensors, path, {} if content is None else {"tree": content})
    with pytest.raises(ValueError, match=str(path)):
        read_tree(path)


def test_the_file_that_foreign_ones_are_made_of_can_be_read(tmp_path: Path) -> None:
    tensors = {"float32": torch.ones(2), "bfloat16": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / FILE, {"tree": f'[{PLACES}, [{{"tensor": 2}}, {{"tensor": 0}}]]'})
    assert alike(read_tree(tmp_path / FILE), [tensors["bfloat16"][:1], tensors["float32"]])


def test_deep_trees(tmp_path: Path) -> None:
    """Ones as deep as nobody needs either come back or are refused, and do not end the process."""
    path = tmp_path / FILE
    content = f'[[["uint8", [2]]], {NESTED}]'
    save_file({"uint8": torch.zeros(2, dtype=torch.uint8)}, path, {"tree": content})
    try:
        found = read_tree(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        while isinstance(found, list):
            (found,) = found
        assert found == bytes(2)
