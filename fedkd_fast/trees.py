"""Nested state in one safetensors file: dicts and lists of tensors, bytes and plain values.

The tensors of a dtype lie in the file one after the other, as one: hundreds of small ones would
take ten times as long. The rest is JSON in the metadata, so nothing in it can be executed. Equal
trees give equal files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkd_fast._files import parse_json

# dict with keys that are str or int, list, tuple (read back as a list), Tensor, bytes, str, int,
# float, bool or None.
Tree: TypeAlias = Any

# One entry alone: the library writes several in any order.
_TREE = "tree"
# What stands for a value that JSON has no form of. Dicts are always written as pairs.
_TENSOR, _BYTES, _PAIRS = "tensor", "bytes", "pairs"


def write_tree(path: Path, tree: Tree) -> None:
    """Write a tree.

    Tensors that are one object stay one, whatever refers to them.

    Raises:
        TypeError: a value of a kind that a tree cannot hold; names its place.
        OSError: the file cannot be written; names it.
    """
    writer = _Writer()
    plain = writer.plain(tree, "")
    metadata = {_TREE: json.dumps([writer.places, plain])}
    try:
        save_file({name: torch.cat(parts) for name, parts in writer.parts.items()}, path, metadata)
    except SafetensorError as error:
        raise system_error(error, path) from error


def system_error(error: SafetensorError, path: Path) -> Exception:
    """Return the error of the system that the library has put into text, or else its own one."""
    number = re.search(r"os error ([0-9]+)", str(error))
    if number is None:
        return error
    code = int(number[1])
    return OSError(code, os.strerror(code), str(path))


def read_tree(path: Path) -> Tree:
    """Read what `write_tree` wrote.

    Raises:
        ValueError: the file is damaged or something else; names it.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if _TREE not in metadata:
        raise ValueError(f"{path} is damaged: it holds no tree")
    content = parse_json(metadata[_TREE], str(path))
    try:
        places, plain = content
        return _read(plain, [_part(flat[name], *place) for name, *place in places])
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r} in its tree") from error


def copied(tree: Tree) -> Tree:
    """Return a tree with tensors of its own, detached; what was one tensor stays one."""
    return _copied(tree, {})


def _copied(tree: Tree, known: dict[int, Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        if id(tree) not in known:
            known[id(tree)] = tree.detach().clone()
        return known[id(tree)]
    if isinstance(tree, Mapping):
        return {key: _copied(value, known) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_copied(value, known) for value in tree]
    return tree


def tensor_bytes(tree: Tree) -> int:
    """Return the bytes of all tensors in a tree, each object counted once."""
    found: dict[int, int] = {}
    left = [tree]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found[id(value)] = value.nbytes
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
    return sum(found.values())


class _Writer:
    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}  # by dtype, each flat
        self.places: list[tuple[str, int, list[int]]] = []  # dtype, first element, shape
        self._sizes: Counter[str] = Counter()
        self._numbers: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no other object gets the id of one that is gone

    def _number(self, value: Tensor) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.places)
            self._held.append(value)
            dtype = str(value.dtype).removeprefix("torch.")
            self.places.append((dtype, self._sizes[dtype], list(value.shape)))
            self.parts.setdefault(dtype, []).append(value.detach().to("cpu").reshape(-1))
            self._sizes[dtype] += value.numel()
        return number

    def plain(self, value: Tree, place: str) -> Any:
        if isinstance(value, Tensor):  # as most are
            return {_TENSOR: self._number(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, bytes):
            return {_BYTES: self._number(torch.from_numpy(np.frombuffer(value, np.uint8).copy()))}
        if isinstance(value, (list, tuple)):
            return [self.plain(one, f"{place}/{index}") for index, one in enumerate(value)]
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"keys at {place or '/'} must be str or int, got {key!r}")
            pairs = [[key, self.plain(one, f"{place}/{key}")] for key, one in value.items()]
            return {_PAIRS: pairs}
        raise TypeError(f"{place or '/'} must be tensors, bytes or plain values, got {type(value)}")


def _part(flat: Tensor, first: int, shape: list[int]) -> Tensor:
    """Return one of the tensors that lie in another, in memory of its own.

    What the library returns shows the file, which may be removed or become unreadable, and lies at
    odd addresses, which products may depend on.
    """
    size = math.prod(shape)
    if min([first, *shape], default=0) < 0 or first + size > len(flat):
        raise ValueError(f"{shape} from {first} on do not fit into {len(flat)} elements")
    # A copy in the end: a view of one would keep a second object for each tensor.
    return flat[first : first + size].reshape(shape).clone()


def _read(value: Any, tensors: Sequence[Tensor]) -> Tree:
    if isinstance(value, list):
        return [_read(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _PAIRS:
        return {key: _read(one, tensors) for key, one in content}
    if kind not in (_TENSOR, _BYTES):
        raise ValueError(f"unknown kind {kind!r}")
    found = tensors[content]
    return found if kind == _TENSOR else found.numpy().tobytes()
