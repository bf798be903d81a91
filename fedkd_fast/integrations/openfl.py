"""OpenFL: a compression pipeline whose tensors travel as frames.

In ``plan.yaml``::

    compression_pipeline:
      template: fedkd_fast.integrations.openfl.FramePipeline
      settings: {energy: 0.95}

    collaborator:
      template: fedkd_fast.integrations.openfl_collaborator.DeltaCollaborator

OpenFL compresses deltas, one tensor at a time and without its name, so there is no error feedback
here. Everything about a tensor is in its frame; the metadata stay empty. Collaborators of OpenFL
1.9 send deltas in the first round and whole weights later, which `DeltaCollaborator` mends. Tried
with openfl 1.9, which needs numpy below 2.4.
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
        exact_vectors: lose nothing of vectors and numbers, whatever the energy. Among them may be
            running variances, and one that became zero or less would ruin the model. A model
            without batch normalisation can do without.

    Attributes:
        lossy: whether something is lost.

    Raises:
        ValueError: an energy out of its range.
    """

    def __init__(
        self,
        energy: float = 0.95,
        max_bytes: int = DEFAULT_MAX_BYTES,
        exact_vectors: bool = True,
    ) -> None:
        self._compressor, self._max_bytes = Compressor(energy, stateless=True), max_bytes
        self._exact, self._exact_vectors = Compressor(1.0, stateless=True), exact_vectors
        self.lossy = energy < 1.0

    def forward(
        self, data: Any, exact: bool = False, **kwargs: Any
    ) -> tuple[bytes, dict[str, Any]]:
        """Encode one array.

        Args:
            data: an array or number; float64 becomes float32, as in OpenFL's own pipelines.
            exact: lose nothing.
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
        exact = exact or (self._exact_vectors and array.ndim < 2)
        return (self._exact if exact else self._compressor).compress({_NAME: array}), {}

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
        exact_vectors: as in `FrameTransformer`.
        **kwargs: what OpenFL passes to any pipeline.
    """

    def __init__(
        self,
        energy: float = 0.95,
        max_bytes: int = DEFAULT_MAX_BYTES,
        exact_vectors: bool = True,
        **kwargs: Any,
    ) -> None:
        transformer = FrameTransformer(energy, max_bytes, exact_vectors)
        super().__init__(transformers=[transformer], **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[bytes, list[dict[str, Any]]]:
        """Encode one array, without loss where it is stored.

        OpenFL writes the first, the best and the last model by the same pipeline by which deltas
        travel. It gives the weights of these as ``data=…``, and what travels by position.

        Args:
            *args: the array, where it travels.
            **kwargs: the array as ``data``, where it is stored; ``lossless`` as OpenFL's aggregator
                says it.

        Returns:
            The frame, and a list of metadata with nothing in them.

        Raises:
            ValueError: NaN or Inf.
            TypeError: an array of a dtype that frames cannot carry.
        """
        exact = "data" in kwargs or bool(kwargs.get("lossless"))
        found: tuple[bytes, list[dict[str, Any]]] = super().forward(*args, exact=exact, **kwargs)
        return found
