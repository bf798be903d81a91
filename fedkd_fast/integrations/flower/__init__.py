"""Flower (``pip install "fedkd-fast[flower]"``): small messages for any app, and FedKD as an app.

Two lines make an app's messages small, on either side one::

    app = ClientApp(mods=[compress_mod()])                       # the first of the mods
    class Strategy(CompressedStrategyMixin, FedAvg): ...         # the first of the bases
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkd_fast.integrations.flower.mod import compress_mod as compress_mod
    from fedkd_fast.integrations.flower.records import array_record as array_record
    from fedkd_fast.integrations.flower.strategy import (
        CompressedStrategyMixin as CompressedStrategyMixin,
    )
    from fedkd_fast.integrations.link import Compression as Compression

_HOMES = {
    "Compression": "link",
    "CompressedStrategyMixin": "flower.strategy",
    "array_record": "flower.records",
    "compress_mod": "flower.mod",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"fedkd_fast.integrations.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
