"""APPFL: a compressor that its loader finds by name.

In the program that starts a client, and in the one that starts the server::

    from fedkd_fast.integrations import appfl
    appfl.register()

and in both configurations, under ``comm_configs``::

    compressor_configs:
      enable_compression: True
      lossy_compressor: FrameCompressor
      error: 0.01

APPFL's own compressors unpickle what clients send. Here nothing is evaluated: bytes are a frame,
and before it the form of models that are more than tensors by name, in JSON. Tried with appfl
1.12.0.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkd_fast import wire
from fedkd_fast._extras import needed
from fedkd_fast._files import parse_json
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decompress
from fedkd_fast.wire import WireError

_LENGTH = struct.Struct("<I")  # of the form, in bytes; 0 where the frame says everything
_DEFAULT_ERROR = 0.01
# In a message: weights, and for some algorithms control variates beside them; in float64.
_MOST_MODELS, _MOST_ITEM = 4, 8


class FrameCompressor:
    """APPFL's ``compress_model`` and ``decompress_model`` over a `Compressor`.

    Args:
        compressor_config: of APPFL's configuration, a mapping. It may have ``error`` or ``energy``,
            as in `Compressor`; the largest relative error of each tensor is 0.01 otherwise, which
            suits trained weights. Where clients send what they have changed (``send_gradient`` in
            ``train_configs``), ``energy: 0.95`` is enough, and ``feedback: True`` sends what one
            message leaves out with the next; it would be wrong for weights. APPFL's FedAvg takes
            what was changed for weights too; FedBuff, for one, does not. Running means and
            variances of batch normalisation are sent as they are. A message may decode to
            ``max_bytes``: four times the model in float64, or 4 GiB where that is not known or
            several come.

    Raises:
        ValueError: a value out of its range, or both error and energy.
    """

    def __init__(self, compressor_config: Mapping[str, Any]) -> None:
        energy, error = compressor_config.get("energy"), compressor_config.get("error")
        if energy is None and error is None:
            error = _DEFAULT_ERROR
        feedback = bool(compressor_config.get("feedback", False))
        self._compressor = Compressor(energy, error=error, feedback=feedback)
        found = compressor_config.get("max_bytes")
        if found is not None and (type(found) is not int or found < 1):
            raise ValueError(f"max_bytes must be an integer above 0, got {found!r}")
        self._max_bytes: int | None = found

    def compress_model(self, model: Any, batched: bool = False) -> bytes:
        """Encode a model's tensors.

        Args:
            model: tensors by name; or such dicts by name, beside numbers, strings and None; or,
                where it is batched, a list or dict of models.
            batched: not looked at: bytes say what they hold.

        Raises:
            TypeError: a value of another kind, or a tensor that frames cannot carry.
            ValueError: NaN or Inf, or two tensors of one name; names the tensor.
        """
        tensors: dict[str, Tensor] = {}
        form = _taken_apart(model, "", tensors)
        text = b"" if form == _flat(tensors) else json.dumps(form).encode()
        return _LENGTH.pack(len(text)) + text + self._compressor.compress(tensors)

    def decompress_model(
        self, compressed_model: bytes, model: nn.Module | None, batched: bool = False
    ) -> Any:
        """Decode what `compress_model` made.

        Args:
            compressed_model: the bytes.
            model: whose state dict has the names and shapes that are accepted, and booleans where
                it has them, checked before anything is decoded; None accepts all.
            batched: whether it may be more than a model and what belongs to it.

        Returns:
            What was encoded, with tensors on the CPU; dicts are ordered ones.

        Raises:
            WireError: anything wrong with the bytes, or more than `max_bytes`.
            ValueError: a tensor that the model lacks or has in another shape, or booleans in the
                place of numbers; names it.
        """
        text, frame = _split(compressed_model)
        entries = {info.name: info for info in wire.inspect(frame)}
        shapes = {name: info.shape for name, info in entries.items()}
        known = None if model is None else model.state_dict()
        used: set[str] = set()

        def check(place: str, name: str) -> None:
            if place not in shapes:
                raise WireError(f"form of the model is damaged: {place!r} is not in the frame")
            used.add(place)
            if known is None:
                return
            if name not in known:
                raise ValueError(f"tensor {name!r} is none of the model's")
            if shapes[place] != (wanted := tuple(known[name].shape)):
                raise ValueError(f"tensor {name!r} must have shape {wanted}, got {shapes[place]}")
            if (entries[place].dtype == "bool") != (known[name].dtype == torch.bool):
                raise ValueError(
                    f"tensor {name!r} must hold numbers as {known[name].dtype} does, got "
                    f"{entries[place].dtype}"
                )

        form = _parsed(text) if text else _flat(shapes)
        try:
            _put_together(form, "", check)
        except RecursionError as error:
            raise WireError("form of the model is damaged: nested too deeply") from error
        if unused := sorted(set(shapes) - used):
            raise WireError(f"form of the model is damaged: it has no place for {unused[:3]}")
        most = self._max_bytes or wire.DEFAULT_MAX_BYTES
        if self._max_bytes is None and known is not None and not batched:
            sizes = [one.numel() for one in known.values() if isinstance(one, Tensor)]
            most = max(_MOST_MODELS * _MOST_ITEM * sum(sizes), 1)
        tensors = decompress(frame, max_bytes=most)
        return _put_together(form, "", lambda place, _: tensors[place])


def _split(message: bytes) -> tuple[bytes, memoryview]:
    """Return the form and the frame of a message."""
    if len(message) < _LENGTH.size:
        raise WireError(f"model must have at least {_LENGTH.size} bytes, got {len(message)}")
    end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    return bytes(message[_LENGTH.size : end]), memoryview(message)[end:]


def _parsed(text: bytes) -> Any:
    try:
        return parse_json(text.decode(), "form of the model")
    except ValueError as error:
        raise WireError(str(error)) from error


def _flat(names: Mapping[str, object]) -> list[Any]:
    return ["dict", [[name, ["tensor", name]] for name in names]]


def _taken_apart(value: Any, place: str, tensors: dict[str, Tensor]) -> list[Any]:
    """Return the form of a model, and collect its tensors by where they stand."""
    if isinstance(value, Tensor):
        if place in tensors:
            raise ValueError(f"model has two tensors that would be called {place!r}")
        tensors[place] = value
        return ["tensor", place]
    prefix = f"{place}/" if place else ""
    if isinstance(value, dict):
        pairs = [
            [key, _taken_apart(part, f"{prefix}{key}", tensors)] for key, part in value.items()
        ]
        return ["dict", pairs]
    if isinstance(value, list):
        parts = [_taken_apart(part, f"{prefix}{i}", tensors) for i, part in enumerate(value)]
        return ["list", parts]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    raise TypeError(f"model[{place!r}] must be a tensor, dict, list or plain value, got {value!r}")


def _put_together(form: Any, name: str, leaf: Callable[[str, str], Any]) -> Any:
    """Build a model of a form; `leaf` makes a value of a tensor's place and its own name."""
    match form:
        case ["tensor", str(place)]:
            return leaf(place, name)
        case ["plain", None | bool() | int() | float() | str() as value]:
            return value
        case ["list", list(parts)]:
            return [_put_together(part, name, leaf) for part in parts]
        case ["dict", list(pairs)]:
            return OrderedDict(_pair(pair, leaf) for pair in pairs)
    raise WireError(f"form of the model is damaged: {str(form)[:60]}")


def _pair(pair: Any, leaf: Callable[[str, str], Any]) -> tuple[Any, Any]:
    match pair:
        case [int() | str() as key, part]:
            return key, _put_together(part, str(key), leaf)
    raise WireError(f"form of the model is damaged: {str(pair)[:60]}")


def register() -> None:
    """Let APPFL find `FrameCompressor` by its name.

    Raises:
        ImportError: APPFL is not installed; the message says how to get it.
    """
    module = needed("appfl.compressor", "register", "appfl", "appfl")
    module.FrameCompressor = FrameCompressor
