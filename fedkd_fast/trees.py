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
# Those that the library writes whatever its version, by their names in files.
_NAMES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
)
_DTYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in _NAMES}


def write_tree(path: Path, tree: Tree) -> None:
    """Write a tree.

    Tensors that are one object stay one, whatever refers to them.

    Raises:
        TypeError: a value of a kind that a tree cannot hold; names its place.
        OSError: the file cannot be written; names it.
    """
    writer = _Writer()
    plain = writer.plain(tree, "")
    parts, places = writer.packed()
    try:
        save_file(parts, path, {_TREE: json.dumps([places, plain])})
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
            flat = {name: file.get_tensor(name).reshape(-1) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if _TREE not in metadata:
        raise ValueError(f"{path} is damaged: it holds no tree")
    content = parse_json(metadata[_TREE], str(path))
    try:
        places, plain = content
        return _read(plain, _taken_apart(flat, places))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
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
    """Takes a tree apart: what JSON can hold, and tensors, whose numbers stand in it."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # held, so that no other object gets the id of one
        self._numbers: dict[int, int] = {}

    def packed(self) -> tuple[dict[str, Tensor], list[tuple[str, torch.Size]]]:
        """Return all tensors of each dtype as one, and the dtype and shape of each."""
        parts: dict[str, list[Tensor]] = {}
        places = []
        with torch.no_grad():
            for value in self._tensors:
                name = _DTYPES[value.dtype]
                places.append((name, value.shape))
                parts.setdefault(name, []).append(value.reshape(-1).cpu())
            return {name: torch.cat(part) for name, part in parts.items()}, places

    def plain(self, value: Tree, place: str) -> Any:
        if isinstance(value, Tensor):  # as most are
            if not _holdable(value):
                kind = f"{value.layout} {value.dtype} on {value.device}"
                raise TypeError(f"{place or '/'} must be a dense tensor with data, got {kind}")
            number = self._numbers.setdefault(id(value), len(self._tensors))
            if number == len(self._tensors):
                self._tensors.append(value)
            return {_TENSOR: number}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, bytes):
            content = torch.from_numpy(np.frombuffer(value, np.uint8).copy())
            return {_BYTES: self.plain(content, place)[_TENSOR]}
        if isinstance(value, (list, tuple)):
            return [self.plain(one, f"{place}/{index}") for index, one in enumerate(value)]
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"keys at {place or '/'} must be str or int, got {key!r}")
            pairs = [[key, self.plain(one, f"{place}/{key}")] for key, one in value.items()]
            return {_PAIRS: pairs}
        raise TypeError(f"{place or '/'} must be tensors, bytes or plain values, got {type(value)}")


def _holdable(value: Tensor) -> bool:
    dense = value.layout == torch.strided and not value.is_nested
    return dense and not value.is_meta and value.dtype in _DTYPES


def _taken_apart(flat: Mapping[str, Tensor], places: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that lie in others, one behind the other, in memory of their own.

    What the library returns shows the file, which may be removed or become unreadable, and lies at
    odd addresses, which products may depend on.

    Args:
        flat: what lies there, by dtype.
        places: dtype and shape of each.

    Raises:
        ValueError: they are not what lies there.
    """
    for name, value in flat.items():
        if _DTYPES.get(value.dtype) != name:
            raise ValueError(f"{name} holds {value.dtype}")
    sizes: dict[str, list[int]] = {name: [] for name in flat}
    for name, shape in places:
        if min(shape, default=0) < 0:
            raise ValueError(f"{shape} is no shape")
        sizes[name].append(math.prod(shape))
    for name, value in flat.items():
        if sum(sizes[name]) != len(value):
            raise ValueError(f"{len(value)} elements of {name} are not {sum(sizes[name])}")
    parts = {name: iter(torch.split(value, sizes[name])) for name, value in flat.items()}
    # Shapes are given in place: of a view, a second object would be kept for each tensor.
    return [next(parts[name]).clone().resize_(shape) for name, shape in places]


def _read(value: Any, tensors: Sequence[Tensor]) -> Tree:
    if isinstance(value, list):
        return [_read(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _PAIRS:
        pairs = {key: _read(one, tensors) for key, one in content}
        if len(pairs) < len(content) or any(type(key) not in (str, int) for key in pairs):
            raise ValueError(f"keys must differ and be str or int, got {[*pairs][:3]}")
        return pairs
    if kind not in (_TENSOR, _BYTES):
        raise ValueError(f"unknown kind {kind!r}")
    if not 0 <= content < len(tensors):
        raise ValueError(f"there are {len(tensors)} tensors, and no {content}")
    found = tensors[content]
    return found if kind == _TENSOR else found.numpy().tobytes()
