"""The few classes of NVFLARE that its filters see, for tests where it is not installed.

`test_nvflare_runtime.py` runs the same tests on NVFLARE's own classes, where they are.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REAL = find_spec("nvflare") is not None
OURS = ("fedkd_fast.integrations.nvflare", "fedkd_fast.integrations.nvflare_ends")


class DataKind:
    WEIGHTS, WEIGHT_DIFF = "WEIGHTS", "WEIGHT_DIFF"


class MetaKey:
    NUM_STEPS_CURRENT_ROUND, PROCESSED_ALGORITHM = "NUM_STEPS_CURRENT_ROUND", "PROCESSED_ALGORITHM"


class ReturnCode:
    OK, TASK_DATA_FILTER_ERROR = "OK", "TASK_DATA_FILTER_ERROR"


class EventType:
    START_RUN = "_start_run"


class Shareable(dict[str, Any]):
    def __init__(self) -> None:
        super().__init__({"__headers__": {}})

    def set_header(self, key: str, value: object) -> None:
        self["__headers__"][key] = value

    def get_header(self, key: str, default: object = None) -> Any:
        return self["__headers__"].get(key, default)

    def set_return_code(self, code: str) -> None:
        self.set_header("__rc__", code)

    def get_return_code(self) -> Any:
        return self.get_header("__rc__", ReturnCode.OK)


class DXO:
    def __init__(self, data_kind: str, data: dict[str, Any], meta: dict[str, Any] | None = None):
        self.data_kind, self.data, self.meta = data_kind, data, meta or {}

    def get_meta_prop(self, key: str, default: object = None) -> Any:
        return self.meta.get(key, default)

    def update_shareable(self, shareable: Shareable) -> Shareable:
        shareable["DXO"] = {"kind": self.data_kind, "data": self.data, "meta": self.meta}
        return shareable

    def to_shareable(self) -> Shareable:
        return self.update_shareable(Shareable())


def from_shareable(shareable: Shareable) -> DXO:
    found = shareable["DXO"]
    return DXO(found["kind"], found["data"], found["meta"])


class DXOFilter:
    def __init__(self, supported_data_kinds: list[str], data_kinds_to_filter: list[str]) -> None:
        self.data_kinds = data_kinds_to_filter
        self.logger = logging.getLogger("nvflare")

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        dxo = from_shareable(shareable)
        if dxo.data and dxo.data_kind in self.data_kinds:
            dxo = self.process_dxo(dxo, shareable, fl_ctx) or dxo
        return dxo.update_shareable(shareable)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        raise NotImplementedError

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        pass

    def log_info(self, fl_ctx: FLContext, text: str) -> None:
        self.logger.info(text)

    def log_warning(self, fl_ctx: FLContext, text: str) -> None:
        self.logger.warning(text)

    def log_error(self, fl_ctx: FLContext, text: str) -> None:
        self.logger.error(text)

    def system_panic(self, reason: str, fl_ctx: FLContext) -> None:
        self.logger.error(reason)


class FLContext:
    """Properties of one call; sticky ones are the run's."""

    def __init__(self, stickers: dict[str, Any] | None = None, name: str = "") -> None:
        self._stickers = {} if stickers is None else stickers
        self._name, self._peer = name, None

    def set_prop(self, key: str, value: object, private: bool = True, sticky: bool = True) -> None:
        self._stickers[key] = (value, private)

    def get_prop(self, key: str, default: object = None) -> Any:
        return self._stickers.get(key, (default, True))[0]

    def get_identity_name(self) -> str:
        return self._name

    def set_peer_context(self, peer: Any) -> None:
        self._peer = peer

    def get_peer_context(self) -> Any:
        return self._peer


class FLContextManager:
    def __init__(self, engine: object, identity_name: str, job_id: str) -> None:
        self._name, self._stickers = identity_name, dict[str, Any]()

    def new_context(self) -> FLContext:
        return FLContext(self._stickers, self._name)


def gen_new_peer_ctx(fl_ctx: FLContext) -> FLContext:
    public = {key: one for key, one in fl_ctx._stickers.items() if not one[1]}
    return FLContext(public, fl_ctx.get_identity_name())


def stand_ins(version: str = "2.9.0") -> dict[str, ModuleType]:
    own = sys.modules[__name__]
    names = "dxo dxo_filter event_type fl_constant fl_context shareable utils.fl_context_utils"
    made = {f"nvflare.apis.{name}": own for name in names.split()}
    top = ModuleType("nvflare")
    top.__version__ = version  # type: ignore[attr-defined]
    return {"nvflare": top, "nvflare.apis": ModuleType("nvflare.apis"), **made}


def put(modules: Mapping[str, ModuleType | None]) -> None:
    """Make these what is imported; None for what is not."""
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
        if name in OURS and module is None:
            sys.modules[parent].__dict__.pop(last, None)
        elif name in OURS:
            setattr(sys.modules[parent], last, module)


def load(version: str | None = None) -> Any:
    """Import the adapter on NVFLARE's classes, or on those above; a version is pretended."""
    if REAL and version is None:
        return importlib.import_module(OURS[0])
    importlib.import_module("fedkd_fast.integrations")
    before = {name: sys.modules.get(name) for name in (*stand_ins(), *OURS)}
    put({**stand_ins(version or "2.9.0"), **dict.fromkeys(OURS)})
    try:
        return importlib.import_module(OURS[0])
    finally:
        put(before)


def travelled(shareable: Any) -> Any:
    """Return what the other end gets of a message."""
    if not REAL:
        return copy.deepcopy(shareable)
    from nvflare.fuel.utils import fobs

    return fobs.loads(fobs.dumps(shareable))
