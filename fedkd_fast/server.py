"""The server: averages the clients' updates and broadcasts the mean, compressed once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedkd_fast.aggregation import aggregate
from fedkd_fast.compress import Compressor
from fedkd_fast.decompression import decompress
from fedkd_fast.tensors import digest_of, specs_of
from fedkd_fast.wire import Base, TensorSpec


class Server:
    """Keeps the shared parameters in step with the clients.

    Args:
        parameters: the shared parameters at the start, the same at every client.
        compressor: encodes the broadcast.
    """

    def __init__(self, parameters: Mapping[str, Tensor], compressor: Compressor) -> None:
        self._parameters: Mapping[str, Tensor] = dict(parameters)
        self._compressor = compressor

    @property
    def schema(self) -> list[TensorSpec]:
        """Names, dtypes and shapes of the shared parameters, as frames have them."""
        return specs_of(self._parameters)

    def step(self, frames: Sequence[bytes], energy: float) -> bytes:
        """Turn one round's uploads into the broadcast.

        ``g = mean_i decode(frame_i)``, unweighted as in Algorithm 1 of the paper; the broadcast
        is g encoded with the same energy, and what it decodes to is what server and clients add.

        Raises:
            WireError: a frame is damaged.
            ValueError: a frame does not fit the shared parameters.
        """
        base = Base(digest=self.digest())
        mean = aggregate(frames, schema=self._parameters, relative_to=base, strict=True)
        broadcast = mean.recompress(self._compressor, energy=energy)
        self._parameters = decompress(broadcast, schema=self._parameters, base=self._parameters)
        return broadcast

    def digest(self) -> bytes:
        """Return 16 bytes that identify the shared parameters."""
        return digest_of(self._parameters)
