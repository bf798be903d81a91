"""Flower (``pip install "fedkd-fast[flower]"``): small messages for any app, and FedKD as an app.

Two lines make an app's messages small, one on either side::

    app = ClientApp(mods=[compress_mod()])                       # the first of the mods
    class Strategy(CompressedStrategyMixin, FedAvg): ...         # the first of the bases

``server_app`` and ``client_app`` are components of a Flower app that trains by FedKD.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fedkd_fast._extras import needed

if TYPE_CHECKING:
    from fedkd_fast.integrations.flower.mod import compress_mod as compress_mod
    from fedkd_fast.integrations.flower.records import array_record as array_record
    from fedkd_fast.integrations.flower.strategy import (
        CompressedStrategyMixin as CompressedStrategyMixin,
    )
    from fedkd_fast.integrations.link import Compression as Compression

# Flower looks for components by reading this, without importing anything.
__all__ = (
    "CompressedStrategyMixin",
    "Compression",
    "array_record",
    "client_app",
    "compress_mod",
    "server_app",
)

_HOMES = {
    "CompressedStrategyMixin": "flower.strategy",
    "Compression": "link",
    "array_record": "flower.records",
    "client_app": "flower.app_client",
    "compress_mod": "flower.mod",
    "server_app": "flower.app_server",
}
_OLDEST, _TOO_NEW = (1, 39), (2, 0)


def check_version(found: str) -> None:
    """Refuse versions of Flower whose messages are others.

    Raises:
        ImportError: too old or too new; names both versions.
    """
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not _OLDEST <= numbers < _TOO_NEW:
        raise ImportError(
            f'{__name__} needs flwr>=1.39,<2, got {found}: pip install "fedkd-fast[flower]"'
        )


def __getattr__(name: str) -> Any:
    """Import what is asked for.

    Raises:
        ImportError: Flower is not installed, or of a version that is not known.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed("flwr", __name__, "Flower", "flower")
    check_version(version("flwr"))
    return getattr(import_module(f"fedkd_fast.integrations.{_HOMES[name]}"), name)
