"""What callers pass in, checked: mappings of names to tensors or arrays, ties, schemas, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedkd_fast.codec.common import DTYPES, all_finite, byte_view
from fedkd_fast.wire import TensorSpec


def is_buffer(value: Any) -> bool:
    """Tell whether a value is bytes, or shows memory as these do, and so may be a frame."""
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


class Shaped(Protocol):
    """Anything with a shape and a dtype: tensors, arrays, meta tensors, wire entries."""

    @property
    def shape(self) -> Sequence[int]:
        """Extents."""

    @property
    def dtype(self) -> Any:
        """A torch or numpy dtype, or its name."""


def _from_numpy(label: str, value: np.ndarray[Any, Any] | np.generic) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{label} is a masked array: pass value.filled(…)")
    try:
        # A copy in native byte order: torch refuses read-only arrays and negative strides.
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise TypeError(f"{label} has dtype {value.dtype}, which torch does not know") from error


def _has_sparse_rows(tensor: Tensor) -> bool:
    return tensor.layout == torch.sparse_coo and tensor.sparse_dim() == 1 and tensor.dense_dim() > 0


def _as_tensor(label: str, value: object, sparse: bool, finite: bool) -> Tensor:
    if isinstance(value, (np.ndarray, np.generic)):
        value = _from_numpy(label, value)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{label} must be a torch.Tensor or numpy.ndarray, got {type(value).__name__}"
        )
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{label} is a DTensor: pass value.full_tensor() or the local shard")
    if value.layout != torch.strided and not (sparse and _has_sparse_rows(value)):
        raise TypeError(f"{label} has layout {value.layout}: pass value.to_dense()")
    if value.is_nested:
        raise TypeError(f"{label} is a nested tensor: pass its parts under names of their own")
    if value.device.type == "meta":
        raise TypeError(f"{label} is on the meta device and has no data")
    if value.is_quantized or value.dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise TypeError(f"{label} has dtype {value.dtype}; the wire carries {known}: cast it first")
    if value.layout != torch.strided:
        tensor = value.detach().cpu().coalesce()
        elements = tensor.values()
    else:
        # Negation can be a mark on a view; elements are read as they are stored.
        tensor = elements = value.detach().resolve_neg().cpu()
    if finite and elements.is_floating_point() and not all_finite(elements):
        raise ValueError(f"{label} holds NaN or Inf")
    return tensor


def as_tensors(
    values: Mapping[str, object], argument: str, *, sparse: bool = False, finite: bool = True
) -> dict[str, Tensor]:
    """Turn a mapping into strided CPU tensors of dtypes that the wire carries.

    With `sparse`, tensors whose rows are sparse, as the gradient of ``nn.Embedding(sparse=True)``,
    stay so, coalesced. Without `finite`, the caller looks for NaN and Inf in what it makes of them.

    Raises:
        TypeError: no mapping, a name that is no non-empty str, or a value that is no dense tensor
            or array of a known dtype; names the tensor.
        ValueError: with `finite`, NaN or Inf; names the tensor.
    """
    return {
        name: _as_tensor(f"{argument}[{name!r}]", value, sparse, finite)
        for name, value in as_mapping(values, argument).items()
    }


def as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Return what `decompress` or `aggregate` gave as numpy arrays.

    Args:
        tensors: dense tensors by name. What `decompress_from` yields goes in as a dict.

    Returns:
        Arrays by name, in the same order. They share the memory of tensors on the CPU, and tied
        tensors theirs, so that `Compressor.compress` sends them once. numpy knows no bfloat16:
        such tensors become float32, which holds each of their values. A frame made of that says
        float32; a receiver whose schema or base has bfloat16 refuses it, and
        `Aggregate.recompress` keeps bfloat16.

    Raises:
        TypeError: a value is no tensor.
    """
    arrays: dict[int, np.ndarray[Any, Any]] = {}
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}"
            )
        if id(tensor) not in arrays:
            plain = tensor.detach().cpu()
            arrays[id(tensor)] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        found[name] = arrays[id(tensor)]
    return found


def as_mapping(values: Mapping[str, object], argument: str) -> Mapping[str, object]:
    """Return what is a mapping with names.

    Raises:
        TypeError: no mapping, or a name that is no non-empty str.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{argument} must be a mapping of names to tensors, got {type(values).__name__}"
        )
    for name in values:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument} must have non-empty str names, got {name!r}")
    return values


def check_schema(schema: Mapping[str, Shaped]) -> None:
    """Refuse what does not say names, shapes and dtypes.

    Raises:
        TypeError: no mapping with names, or a value without a shape or a dtype; names it.
    """
    for name, one in as_mapping(schema, "schema").items():
        if not (hasattr(one, "shape") and hasattr(one, "dtype")):
            raise TypeError(f"schema[{name!r}] must have a shape and a dtype, got {one!r}")


def endings_of(values: object, argument: str) -> frozenset[str]:
    """Return endings of names as a set.

    Raises:
        TypeError: a single one, or something else than text.
    """
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes)):
        endings = list(values)
        if all(isinstance(one, str) for one in endings):
            return frozenset(endings)
    raise TypeError(f"{argument} must be a collection of endings of names, got {values!r}")


def _memory(value: object) -> tuple[object, ...] | None:
    """Identify the memory that a value shows and how; None for values without any."""
    if isinstance(value, np.ndarray) and value.size:
        pointer = value.__array_interface__["data"][0]
        return (pointer, value.shape, value.strides, value.dtype)
    if (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and value.numel()
    ):
        view = value.shape, value.stride(), value.dtype, value.is_neg()
        return (value.device, value.data_ptr(), *view)
    return None


def tied_names(values: Mapping[str, object]) -> dict[str, str]:
    """Map every name whose value shows the same memory as an earlier one to that earlier name."""
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in values.items():
        memory = _memory(value)
        if memory is not None:
            owner = first.setdefault(memory, name)
            if owner != name:
                tied[name] = owner
    return tied


def cloned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies; what shows the same memory is one tensor again."""
    tied, copies = tied_names(values), dict[str, Tensor]()
    for name, value in values.items():
        copies[name] = copies[tied[name]] if name in tied else value.clone()
    return copies


def check_same_names(found: Mapping[str, object], wanted: Mapping[str, object], what: str) -> None:
    """Refuse tensors with other names than a base or schema has, which messages call `what`.

    Raises:
        ValueError: names some that differ.
    """
    only = [name for name in wanted if name not in found]
    lacking = [name for name in found if name not in wanted]
    if only or lacking:
        parts = [(only, "only in it"), (lacking, "not in it")]
        said = [f"{', '.join(map(repr, names[:3]))} {where}" for names, where in parts if names]
        raise ValueError(f"{what} does not match: {', '.join(said)}")


def check_same_tensors(
    found: Mapping[str, Shaped], wanted: Mapping[str, Shaped], what: str
) -> None:
    """Refuse a base or schema whose names, shapes or dtypes differ.

    Raises:
        ValueError: names the first difference.
    """
    check_same_names(found, wanted, what)
    for name, tensor in found.items():
        ours, theirs = (
            (tuple(one.shape), str(one.dtype).removeprefix("torch."))
            for one in (tensor, wanted[name])
        )
        if ours != theirs:
            raise ValueError(
                f"{what} does not match: {name!r} is {ours[0]} {ours[1]}, "
                f"{what} has {theirs[0]} {theirs[1]}"
            )


def specs_of(schema: Mapping[str, Shaped]) -> list[TensorSpec]:
    """Return a schema as the wire knows it."""
    return [
        TensorSpec(name, str(one.dtype).removeprefix("torch."), tuple(one.shape))
        for name, one in schema.items()
    ]


def digest_of(base: Mapping[str, object]) -> bytes:
    """Return the 16 bytes that identify a base: BLAKE2b over names, dtypes, shapes and elements.

    Values are looked at one after the other, by name.

    Raises:
        TypeError, ValueError: as `as_tensors`.
        ValueError: a name with half a surrogate pair, which no bytes stand for.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(as_mapping(base, "base")):
        tensor = as_tensors({name: base[name]}, "base")[name]
        try:
            digest.update(f"{name}\0{DTYPES[tensor.dtype]}\0{tuple(tensor.shape)}\0".encode())
        except UnicodeEncodeError:
            raise ValueError(f"base must have names of utf-8, got {name!r}") from None
        # The elements where they lie: a copy would take longer than the digest leaves.
        digest.update(byte_view(tensor).data)
    return digest.digest()
