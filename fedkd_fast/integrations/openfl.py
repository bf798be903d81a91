"""OpenFL: a compression pipeline whose tensors travel as frames.

In ``plan.yaml``::

    compression_pipeline:
      template: fedkd_fast.integrations.openfl.FramePipeline
      settings: {energy: 0.95}

OpenFL compresses the deltas that collaborators send, one tensor at a time and without its name, so
there is no error feedback here. Everything about a tensor is in its frame; the metadata stay empty.
Tried with openfl 1.9, which needs numpy below 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openfl.pipelines.pipeline import TransformationPipeline, Transformer

from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decompress
from fedkd_fast.tensors import as_numpy
from fedkd_fast.wire import DEFAULT_MAX_BYTES, WireError

_NAME = "tensor"


class FrameTransformer(Transformer):  # type: ignore[misc]
    """An array becomes the bytes of a frame, and these an array.

    Args:
        energy: share of the squared norm of each tensor to keep, in (0, 1]; larger means more
            bytes. With 1 nothing is lost, and OpenFL uses the pipeline for all tensors.
        max_bytes: refuse bytes that would decode to more.

    Attributes:
        lossy: whether something is lost.

    Raises:
        ValueError: an energy out of its range.
    """

    def __init__(self, energy: float = 0.95, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._compressor, self._max_bytes = Compressor(energy, stateless=True), max_bytes
        self.lossy = energy < 1.0

    def forward(self, data: Any, **kwargs: Any) -> tuple[bytes, dict[str, Any]]:
        """Encode one array.

        Args:
            data: an array or number; float64 becomes float32, as in OpenFL's own pipelines.
            **kwargs: not looked at.

        Returns:
            The frame, and metadata with nothing in them.

        Raises:
            ValueError: NaN or Inf.
            TypeError: an array of a dtype that frames cannot carry.
        """
        array = np.asarray(data)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        return self._compressor.compress({_NAME: array}), {}

    def backward(self, data: bytes, metadata: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """Decode what `forward` made.

        Args:
            data: the frame.
            metadata: not looked at.
            **kwargs: not looked at.

        Raises:
            WireError: anything wrong with the bytes, or not one tensor in them.
        """
        arrays = as_numpy(decompress(data, max_bytes=self._max_bytes))
        if list(arrays) != [_NAME]:
            raise WireError(f"frame must hold one tensor, {_NAME!r}, got {list(arrays)[:3]}")
        return arrays[_NAME]


class FramePipeline(TransformationPipeline):  # type: ignore[misc]
    """A pipeline of a `FrameTransformer` alone, for ``plan.yaml``.

    Args:
        energy: as in `FrameTransformer`.
        max_bytes: as in `FrameTransformer`.
        **kwargs: what OpenFL passes to any pipeline.
    """

    def __init__(
        self, energy: float = 0.95, max_bytes: int = DEFAULT_MAX_BYTES, **kwargs: Any
    ) -> None:
        super().__init__(transformers=[FrameTransformer(energy, max_bytes)], **kwargs)
