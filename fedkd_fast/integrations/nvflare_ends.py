"""What NVFLARE's filters of one end share, and what their messages hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fedkd_fast.integrations.link import Broadcaster, Compression, Letter

_WHAT = "fedkd_fast.integrations.nvflare"
try:
    from nvflare import __version__ as VERSION
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReturnCode
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
except ImportError as error:
    raise ImportError(f'{_WHAT} needs nvflare: pip install "fedkd-fast[nvflare]"') from error
if not re.match(r"2\.(9|[1-9]\d)", VERSION):
    raise ImportError(f"{_WHAT} needs nvflare>=2.9,<3, found {VERSION}")

__all__ = [
    "CLIENT",
    "DXO",
    "SAID",
    "SERVER",
    "Compressing",
    "DataKind",
    "EventType",
    "FLContext",
    "Filter",
    "MetaKey",
    "ReturnCode",
    "ServerLink",
    "Shareable",
    "content_of",
    "link_of",
    "packed",
    "peer_of",
    "restored",
]

ALGORITHM = "fedkd_fast"  # NVFLARE's own aggregators refuse data that are marked as processed
SERVER, CLIENT = "fedkd_fast.server", "fedkd_fast.client"  # properties of this end's context
SAID = "fedkd_fast.said"  # what a client tells the server of itself


class ServerLink:
    """What both filters of the server share."""

    def __init__(self, compression: Compression) -> None:
        self.lock = Lock()  # NVFLARE asks for each client, from many threads
        self.broadcaster = Broadcaster(compression)
        self.feedback = compression.feedback
        self.arrays = True  # that the server's own weights are numpy arrays
        self._seen: tuple[object, ...] = ()

    def publish(self, weights: Mapping[str, object], number: object) -> None:
        """Make the weights of this round the newest version, once for all clients.

        Raises:
            TypeError, ValueError: see `Broadcaster.publish`.
        """
        seen = (number, *weights.values())
        same = number is not None and len(seen) == len(self._seen)
        # Within a round the same objects hold the same values; else the digests are compared.
        if same and all(one is two for one, two in zip(seen, self._seen, strict=True)):
            return
        self.broadcaster.publish(weights)
        self.arrays = not any(isinstance(value, Tensor) for value in weights.values())
        self._seen = seen

    def letter(self, client: str, said: object) -> Letter:
        """Return what this client lacks of the newest version, going by what it says it holds."""
        found = said if isinstance(said, dict) else {}
        run, version = found.get("run"), found.get("version")
        self.broadcaster.forget(client)
        if run == self.broadcaster.run and isinstance(version, int):
            with suppress(ValueError):
                self.broadcaster.confirm(client, version)
        return self.broadcaster.letter(client)

    def weights(self, dxo: DXO) -> dict[str, Tensor]:
        """Return the weights, or differences, that a reply stands for."""
        frame = content_of(dxo, "frame", bytes, "CompressReply in the client's task_result_filters")
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            return self.broadcaster.differences(frame)
        return self.broadcaster.weights(frame)

    def nothing_learned(self, dxo: DXO) -> dict[str, Tensor]:
        """Return the reply of a client whose training changed nothing."""
        made = torch.zeros_like if dxo.data_kind == DataKind.WEIGHT_DIFF else torch.clone
        return {name: made(value) for name, value in self.broadcaster.held.items()}


class Filter(DXOFilter):  # type: ignore[misc]
    """A filter of weights and of differences to them."""

    def __init__(self) -> None:
        kinds = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)


class Compressing(Filter):
    """The filter whose end sends; its arguments are those of `Compression`."""

    def __init__(
        self,
        energy: float = Compression.energy,
        feedback: bool = True,
        codec: str = "wf1",
        scope: str = "tensor",
        warm: bool = True,
    ) -> None:
        super().__init__()
        # NVFLARE reads the arguments back from attributes of their names when it exports a job.
        self.energy, self.feedback = energy, feedback
        self.codec, self.scope, self.warm = codec, scope, warm
        self._compression()

    def _compression(self) -> Compression:
        return Compression(self.energy, self.feedback, self.codec, self.scope, self.warm)


def link_of(fl_ctx: FLContext, key: str, maker: str) -> Any:
    """Return what this end's filters share.

    Raises:
        ValueError: the filter that makes it is not in the job.
    """
    link = fl_ctx.get_prop(key)
    if link is None:
        raise ValueError(f"{maker} is missing among the filters of {fl_ctx.get_identity_name()}")
    return link


def peer_of(fl_ctx: FLContext) -> tuple[str, Any]:
    """Return the other end's name, and what it said of itself."""
    peer = fl_ctx.get_peer_context()
    return ("?", None) if peer is None else (peer.get_identity_name(), peer.get_prop(SAID))


def packed(dxo: DXO, content: dict[str, object]) -> DXO:
    """Replace data, which may be shared with other messages, by what stands for them."""
    dxo.data = content
    dxo.meta = {**dxo.meta, MetaKey.PROCESSED_ALGORITHM: ALGORITHM}
    return dxo


def content_of(dxo: DXO, name: str, kind: type, missing: str) -> Any:
    """Return a part of a message that the other end's filter made.

    Raises:
        ValueError: no such filter was there; `missing` names it.
        TypeError: the part is missing, or of another type.
    """
    if dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) != ALGORITHM:
        raise ValueError(f"the message is not compressed: is {missing}?")
    found = dxo.data.get(name)
    if not isinstance(found, kind):
        raise TypeError(f"the message must hold {name!r} as {kind.__name__}, got {type(found)}")
    return found


def restored(dxo: DXO, weights: Mapping[str, Tensor], numpy: bool) -> DXO:
    """Replace what stands for data by the data."""
    dxo.data = {name: value.numpy() if numpy else value for name, value in weights.items()}
    dxo.meta = {k: v for k, v in dxo.meta.items() if k != MetaKey.PROCESSED_ALGORITHM}
    return dxo
