"""Keys of a Flower run: whether what travels is sealed, and for whom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkd_fast._files import absolute_path
from fedkd_fast.config import TrainConfig
from fedkd_fast.envelopes import SealedCarrier, SealedNode
from fedkd_fast.integrations.flower.settings import KEY_FILES, Settings
from fedkd_fast.node import Node
from fedkd_fast.remote import Carrier
from fedkd_fast.sealing import PrivateKey, PublicKey, read_enrolment

_NODE_FILES = ("key", "server-key")
_HOW = (
    "make pairs of keys with `fedkd-fast keygen FILE` (examples/flower/README.md), or set the run "
    "config encrypt=false, and whoever runs the SuperLink can read all updates"
)


def sealed_carrier(
    carrier: Carrier, config: TrainConfig, run_config: Mapping[str, Any], run_id: int
) -> Carrier:
    """Return what brings orders under seal, or the carrier itself where the run is not sealed.

    Args:
        carrier: of the run.
        config: of the run; ``encrypt`` decides.
        run_config: has ``server-key``, the file of the server's private key, and ``enrolment``,
            that of the clients' public keys, both on the server's machine.
        run_id: of Flower.

    Raises:
        ValueError: files are not named, or hold something else; says how to make them.
        OSError: they cannot be read.
        ImportError: cryptography is not installed.
    """
    if not config.encrypt:
        return carrier
    own, enrolment = _files("run config", run_config, KEY_FILES)
    return SealedCarrier(carrier, PrivateKey.load(own), read_enrolment(enrolment), str(run_id))


def make_node(
    found: Settings, index: int, folder: Path, node_config: Mapping[str, Any], run_id: int
) -> Node:
    """Return the client of a node, which takes sealed orders alone unless the run says otherwise.

    Args:
        found: the run, as this node knows it.
        index: of the client.
        folder: for its state.
        node_config: has ``own-data``, and where the run is sealed ``key``, the file of the client's
            private key, and ``server-key``, that of the server's public key.
        run_id: of Flower.

    Raises:
        ValueError: files are not named, or hold something else; the run is not sealed, and the node
            has a key; data that cannot be dealt.
        OSError: they cannot be read.
        ImportError: cryptography is not installed.
    """
    own_data = node_config.get("own-data", False)
    if not isinstance(own_data, bool):
        raise ValueError(f"node config 'own-data' must be true or false, got {own_data!r}")
    given = found.config, found.task, index, folder
    if found.config.encrypt:
        own, server = _files("node config", node_config, _NODE_FILES)
        key, peer, run = PrivateKey.load(own), PublicKey.load(server), str(run_id)
        return SealedNode(*given, key=key, server=peer, run=run, own_data=own_data)
    if node_config.get("key"):
        # Whoever brings the run's configuration must not be able to switch this off.
        raise ValueError(
            "encrypt must be true for a node that has a 'key' in its node config, got false"
        )
    return Node(*given, own_data=own_data)


def _files(place: str, config: Mapping[str, Any], names: tuple[str, ...]) -> list[Path]:
    missing = [repr(name) for name in names if config.get(name, "") == ""]
    if missing:
        raise ValueError(f"encrypt is true, and {place} lacks {' and '.join(missing)}: {_HOW}")
    return [absolute_path(f"{place} {name!r}", config[name]) for name in names]
