"""Methods: FedKD and what it is compared with; one file a method."""

from __future__ import annotations

from fedkd_fast.methods.base import Learner, LocalSettings, Losses, Method
from fedkd_fast.methods.central import CENTRAL
from fedkd_fast.methods.fedavg import FEDAVG, FEDAVG_MENTEE
from fedkd_fast.methods.fedkd import FEDKD
from fedkd_fast.methods.fedlora import FEDLORA
from fedkd_fast.methods.fedpaq import FEDPAQ
from fedkd_fast.methods.fedprox import FEDPROX
from fedkd_fast.methods.local import LOCAL
from fedkd_fast.methods.powersgd import POWERSGD
from fedkd_fast.methods.scaffold import SCAFFOLD
from fedkd_fast.methods.sparseloco import SPARSELOCO

__all__ = ["METHODS", "Learner", "LocalSettings", "Losses", "Method", "get_method"]

METHODS = {
    method.name: method
    for method in (
        *(FEDKD, LOCAL, CENTRAL, FEDAVG, FEDAVG_MENTEE, FEDLORA),
        *(FEDPROX, SCAFFOLD, FEDPAQ, POWERSGD, SPARSELOCO),
    )
}


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
