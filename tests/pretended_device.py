"""A GPU that is not there: CPU tensors that say they lie on one, and refuse to meet others.

What is moved or made on ``cuda`` within `pretended_gpu` is computed on the CPU by the same kernels,
and so is what follows from it. Every operation, those of backward and of this package among them,
is held to what CUDA allows: all tensors on one device, but for single numbers that are only read,
copies between devices and indices. numpy gets none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda")
_CPU = torch.device("cpu")
# Indices, the second argument, may lie on the CPU.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Ledger:
    """Which memory lies on the pretended GPU."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being used again.
        self._there: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._there

    def put(self, result: Any, there: bool) -> Any:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if there:
                    self._there[reference.cdata] = reference
                else:
                    self._there.pop(reference.cdata, None)
        return result


class _Kernels(TorchDispatchMode):
    """Checks every operation, and says where its results lie."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        checked = args
        if name in _INDEXING:
            ours = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
            checked = (args[0], [one for one in ours if one in self._ledger], *args[2:])
        given = [one for one in tree_leaves((checked, kwargs)) if isinstance(one, Tensor)]
        there = [one in self._ledger for one in given]
        if any(there) and name != "aten::copy_":
            self._check(func, args, given, there)
        result = func(*args, **kwargs)
        if any(there) and name != "aten::copy_":
            self._ledger.put(result, there=True)
        return result

    def _check(self, func: Any, args: Any, given: list[Tensor], there: list[bool]) -> None:
        """Refuse tensors on both sides, but for single numbers that are only read."""
        schema = func._schema
        written = [
            id(leaf)
            for value, about in zip(args, schema.arguments, strict=False)
            if about.alias_info is not None and about.alias_info.is_write
            for leaf in tree_leaves(value)
        ]
        # Our own kernels take no such numbers either.
        own = schema.name.startswith("fedkd_fast")
        if any(
            not on_gpu and (own or one.dim() or id(one) in written)
            for one, on_gpu in zip(given, there, strict=True)
        ):
            places = [
                f"{tuple(one.shape)} on {'cuda' if on_gpu else 'cpu'}"
                for one, on_gpu in zip(given, there, strict=True)
            ]
            raise RuntimeError(f"{schema.name}: all tensors on one device wanted, got {places}")


class _Front(TorchFunctionMode):
    """Takes what names a device, or asks for it."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        here = bool(args) and isinstance(args[0], Tensor) and args[0] in self._ledger
        if func == torch.Tensor.device.__get__:
            return GPU if here else func(*args)
        if func == torch.Tensor.is_cpu.__get__:
            return not here
        if func == torch.Tensor.is_cuda.__get__:
            return here
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and here:
            raise TypeError("can't convert a tensor on cuda to numpy")
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], _CPU)
        if func is torch.Tensor.to and not any(isinstance(one, Tensor) for one in args[1:]):
            return self._to(here, *args, **kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in (_CPU.type, GPU.type):
            return func(*args, **kwargs)
        there = torch.device(device).type == GPU.type
        return self._ledger.put(func(*args, **kwargs | {"device": _CPU}), there)

    def _to(self, here: bool, value: Tensor, *args: Any, copy: bool = False, **how: Any) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **how)
        if device is not None and device.type not in (_CPU.type, GPU.type):
            return value.to(*args, copy=copy, **how)
        there = here if device is None else device.type == GPU.type
        result = value.to(dtype or value.dtype, copy=copy or there != here)
        return result if result is value else self._ledger.put(result, there)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Ledger]:
    """Let ``cuda`` be a device within the body; yields the ledger of what lies there."""
    ledger = Ledger()
    with _Kernels(ledger), _Front(ledger):
        yield ledger
