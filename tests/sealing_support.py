"""Keys that everybody may know, channels between them, and how refusals are looked at."""

from __future__ import annotations

import pytest

pytest.importorskip("cryptography", reason="sealed frames need the extra [crypto]")

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedkd_fast.sealing import Channel, PrivateKey, PublicKey, SealError


def private_key(first: int) -> PrivateKey:
    """The key whose bytes count up from ``first``."""
    return PrivateKey(X25519PrivateKey.from_private_bytes(bytes(range(first, first + 32))))


SERVER, CLIENT, OTHER = private_key(0), private_key(32), private_key(64)
RUN = b"a run of the tests"


def client_side(
    run: bytes = RUN,
    client: int = 3,
    key: PrivateKey = CLIENT,
    peer: PublicKey = SERVER.public,
) -> Channel:
    return Channel(key, peer, run=run, client=client, side="client")


def server_side(run: bytes = RUN, client: int = 3) -> Channel:
    return Channel(SERVER, CLIENT.public, run=run, client=client, side="server")


def refusal(channel: Channel, sealed: bytes, round: int, reason: str) -> str:
    """Check that a message is refused for this reason and changes nothing; return the words."""
    before = channel.state()
    with pytest.raises(SealError) as refused:
        channel.open(sealed, round)
    assert refused.value.reason == reason
    assert refused.value.__cause__ is None
    assert channel.state() == before
    message = str(refused.value)
    assert message.startswith(f"sealed frame refused (client 3, round {round}, ")
    assert "expected" in message
    return message
