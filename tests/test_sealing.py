"""Sealed frames: what is bound, what is refused and why, and the format computed a second time."""

from __future__ import annotations

import hashlib
import hmac
import json
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedkd_fast
from fedkd_fast.sealing import SEAL_BYTES, Channel, SealError

pytest.importorskip("cryptography", reason="sealed frames need the extra [crypto]")

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from sealing_support import CLIENT, OTHER, RUN, SERVER, client_side, refusal, server_side

PAGE = (Path(__file__).parent.parent / "docs" / "sealed-frames.md").read_text()
HEADER_BYTES = 30
COUNTER_AT, NONCE = 14, slice(18, 30)


# ---- what comes back -----------------------------------------------------------------------------


@given(frame=st.binary(max_size=2000), round=st.integers(0, 2**32 - 1))
def test_what_is_sealed_comes_back_both_ways(frame: bytes, round: int) -> None:
    client, server = client_side(), server_side()
    for sender, receiver in ((client, server), (server, client)):
        sealed = sender.seal(frame, round)
        assert len(sealed) == len(frame) + SEAL_BYTES
        assert receiver.open(sealed, round) == frame


def test_sizes_to_megabytes() -> None:
    client, server = client_side(), server_side()
    for size in (0, 1, 15, 16, 17, 2**16, 5 * 2**20 + 3):
        frame = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        sealed = client.seal(frame, 0)
        assert len(sealed) == size + SEAL_BYTES
        assert server.open(sealed, 0) == frame
    assert SEAL_BYTES == 46


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda b: memoryview(b + b"end")[:-3]])
def test_any_contiguous_bytes(kind: Callable[[bytes], Any]) -> None:
    sealed = client_side().seal(kind(b"frame"), 1)
    opened = server_side().open(kind(sealed), 1)
    assert type(opened) is bytes and opened == b"frame"


def test_what_is_no_bytes_is_named() -> None:
    with pytest.raises(TypeError, match="frame must be contiguous bytes"):
        client_side().seal("text", 1)
    with pytest.raises(TypeError, match="sealed must be contiguous bytes"):
        server_side().open(memoryview(bytes(200))[::2], 1)


def test_equal_frames_look_different_and_tell_nothing() -> None:
    frame, client = b"frame" * 100, client_side()
    nonces, bodies = set(), set()
    for _ in range(200):
        # Back to the start, as after a crash: the counter is the same, the nonce must not be.
        client.load({"sent": 0, "accepted": 0, "missed": []})
        sealed = client.seal(frame, 1)
        nonces.add(sealed[NONCE])
        bodies.add(sealed[HEADER_BYTES:])
        assert b"frame" not in sealed
    assert len(nonces) == len(bodies) == 200


# ---- the format, a second time -------------------------------------------------------------------

PRIME = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5: the ladder, in integers."""
    k = int.from_bytes(scalar, "little") & ~7 & (2**254 - 1) | 2**254
    x1 = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for t in reversed(range(255)):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = pow(d * a + c * b, 2, PRIME), x1 * pow(d * a - c * b, 2, PRIME) % PRIME
        e = (a * a - b * b) % PRIME
        x2, z2 = a * a * b * b % PRIME, e * (a * a + 121665 * e) % PRIME
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, PRIME) % PRIME).to_bytes(32, "little")


def expected_key(direction: int, run: bytes = RUN, client: int = 3) -> bytes:
    """The key of a direction by the page, between the keys of `sealing_support`."""
    base = (9).to_bytes(32, "little")
    server, own = bytes(range(32)), bytes(range(32, 64))
    shared = x25519(own, x25519(server, base))
    assert shared == x25519(server, x25519(own, base))
    names = x25519(server, base) + x25519(own, base) + struct.pack("<BI", direction, client)
    secret = hmac.digest(run, shared, hashlib.sha256)
    return hmac.digest(secret, b"fedkd_fast sealed frame 1" + names + run + b"\1", hashlib.sha256)


def open_by_page(sealed: bytes, key: bytes, run: bytes = RUN) -> bytes:
    header, body, tag = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:-16], sealed[-16:]
    decryptor = Cipher(algorithms.AES(key), modes.GCM(header[NONCE], tag)).decryptor()
    decryptor.authenticate_additional_data(header + run)
    return decryptor.update(body) + decryptor.finalize()


def test_the_format_is_that_of_the_page() -> None:
    client, server = client_side(), server_side()
    for direction, sender in enumerate((client, server)):
        for counter in (1, 2):
            sealed = sender.seal(b"some frame", 9)
            wanted = struct.pack("<4sBBIII", b"FKS1", 1, direction, 3, 9, counter)
            assert sealed[: NONCE.start] == wanted
            assert open_by_page(sealed, expected_key(direction)) == b"some frame"


def test_the_example_of_the_page() -> None:
    lines = re.findall(r"^    [0-9a-f]{2}  ((?:[0-9a-f]{2} ?)+)$", PAGE, re.MULTILINE)
    sealed = bytes.fromhex("".join(lines))
    assert {str(SERVER.public), str(CLIENT.public)} == set(re.findall(r"`([\w+/]{43}=)`", PAGE))
    assert server_side(b"run").open(sealed, 7) == b"frame"
    assert f"{SEAL_BYTES} bytes longer" in PAGE and f"header ({HEADER_BYTES} bytes)" in PAGE


def test_no_two_keys_are_the_same() -> None:
    # As salts alone the first two runs would be the same to HMAC, and so would the last two.
    runs = [b"r", b"r\0", b"long" * 30, hashlib.sha256(b"long" * 30).digest()]
    keys = [(d, run, c) for d in (0, 1) for run in runs for c in (3, 4)]
    assert len({expected_key(*names) for names in keys}) == len(keys)
    for direction, run, client in keys:
        side = (client_side, server_side)[direction]
        sealed = side(run, client).seal(b"frame", 1)
        assert open_by_page(sealed, expected_key(direction, run, client), run) == b"frame"


# ---- what is refused -----------------------------------------------------------------------------


def test_every_bit_of_a_sealed_frame_matters() -> None:
    sealed, server = client_side().seal(b"short frame", 1), server_side()
    reasons = set()
    for place in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(SealError) as refused:
            server.open(flipped, 1)
        at = place // 8
        wanted = "version" if at < 5 else "other direction" if at == 5 else "damaged"
        assert refused.value.reason == ("other client" if 6 <= at < 10 else wanted)
        reasons.add(refused.value.reason)
        assert server.state()["accepted"] == 0
    assert len(reasons) == 4
    assert server.open(sealed, 1) == b"short frame"


@given(data=st.data())
def test_any_change_is_refused(data: st.DataObject) -> None:
    sealed, server = client_side().seal(data.draw(st.binary(max_size=60)), 1), server_side()
    cut = slice(data.draw(st.integers(0, len(sealed))), data.draw(st.integers(0, len(sealed))))
    changed = sealed[: cut.start] + data.draw(st.binary(max_size=50)) + sealed[cut.stop :]
    if changed != sealed:
        with pytest.raises(SealError):
            server.open(changed, 1)
    assert server.state()["accepted"] == 0


@given(rubbish=st.binary(max_size=200))
def test_rubbish_is_refused(rubbish: bytes) -> None:
    with pytest.raises(SealError):
        server_side().open(rubbish, 1)


def test_all_lengths() -> None:
    sealed, server = client_side().seal(b"frame", 1), server_side()
    for size in range(len(sealed)):
        wanted = "short" if size < SEAL_BYTES else "damaged"
        refusal(server, sealed[:size], 1, wanted)
    refusal(server, sealed + b"\0", 1, "damaged")
    with pytest.raises(SealError, match="at most 50 bytes expected, got 51") as refused:
        server.open(sealed, 1, max_bytes=4)
    assert refused.value.reason == "long"
    assert server.open(sealed, 1, max_bytes=5) == b"frame"


def test_a_frame_that_is_not_sealed_is_told_apart() -> None:
    frame = fedkd_fast.wire.encode([])
    assert "not a sealed frame" in refusal(server_side(), frame, 1, "version")
    newer = b"FKS1\2" + client_side().seal(b"", 1)[5:]
    assert "version 1 expected, got 2" in refusal(server_side(), newer, 1, "version")


@pytest.mark.parametrize(
    ("sender", "reason", "words"),
    [
        (client_side(client=4), "other client", "client 3 expected, got 4"),
        (client_side(client=4, key=OTHER), "other client", "client 3 expected, got 4"),
        (server_side(), "other direction", "direction up (0) expected, got 1"),
        (client_side(run=b"another run"), "damaged", "expected run"),
        (client_side(run=RUN + b"\0"), "damaged", "expected run"),
        (client_side(key=OTHER), "damaged", "expected keys"),
        (client_side(peer=OTHER.public), "damaged", "expected keys"),
    ],
)
def test_messages_of_others(sender: Channel, reason: str, words: str) -> None:
    assert words in refusal(server_side(), sender.seal(b"secret", 7), 7, reason)


def test_a_message_comes_back_to_its_sender() -> None:
    client, server = client_side(), server_side()
    refusal(client, client.seal(b"frame", 1), 1, "other direction")
    refusal(server, server.seal(b"frame", 1), 1, "other direction")
    # Nor with the direction turned round: each has its own key.
    sealed = bytearray(client.seal(b"frame", 1))
    sealed[5] = 1
    refusal(client, sealed, 1, "damaged")


def test_header_of_another_client_does_not_help() -> None:
    sealed = bytearray(client_side(client=4, key=OTHER).seal(b"frame", 1))
    sealed[6] = 3
    refusal(server_side(), sealed, 1, "damaged")


def test_a_message_of_another_round_can_wait_for_it() -> None:
    client, server = client_side(), server_side()
    sealed = client.seal(b"frame", 2)
    assert "round 1 expected, got 2" in refusal(server, sealed, 1, "other round")
    assert server.open(sealed, 2) == b"frame"


def test_replays() -> None:
    client, server = client_side(), server_side()
    sealed = [client.seal(bytes([number]), number // 2) for number in range(100)]
    for number, message in enumerate(sealed):
        assert server.open(message, number // 2) == bytes([number])
        refusal(server, message, number // 2, "replayed")
    for number, message in enumerate(sealed):
        found = refusal(server, message, number // 2, "replayed")
        assert f"above 100 expected, message {number + 1} was accepted" in found


def test_late_messages() -> None:
    client, server = client_side(), server_side()
    first, second, third, fourth = (client.seal(b"frame", 1) for _ in range(4))
    server.open(first, 1)
    server.open(fourth, 1)
    assert "above 4 expected, message 3 came too late" in refusal(server, third, 1, "reordered")
    refusal(server, second, 1, "reordered")
    for again in (first, fourth):
        refusal(server, again, 1, "replayed")


def test_rubbish_cannot_look_like_a_replay() -> None:
    client, server = client_side(), server_side()
    server.open(client.seal(b"frame", 1), 1)
    forged = bytearray(client.seal(b"frame", 1))
    forged[COUNTER_AT] = 1
    refusal(server, forged, 1, "damaged")


@pytest.fixture(scope="module")
def messages() -> list[bytes]:
    sender = client_side()
    return [sender.seal(b"frame", 1) for _ in range(61)]


@given(order=st.lists(st.integers(0, 60), max_size=80))
def test_reasons_against_a_receiver_that_remembers_everything(
    messages: list[bytes], order: list[int]
) -> None:
    server, accepted = server_side(), set[int]()
    for number in order:
        message = messages[number]
        if number > max(accepted, default=-1):
            assert server.open(message, 1) == b"frame"
            accepted.add(number)
            continue
        with pytest.raises(SealError) as refused:
            server.open(message, 1)
        missed = [n for n in range(max(accepted)) if n not in accepted][-32:]
        assert refused.value.reason == ("reordered" if number in missed else "replayed")


def test_hostile_messages_cost_no_memory() -> None:
    client, server = client_side(), server_side()
    # The peer itself may jump: what is remembered of the gap stays small.
    client.load({"sent": 2**32 - 2, "accepted": 0, "missed": []})
    server.open(client.seal(b"", 1), 1)
    state = server.state()
    assert state["accepted"] == 2**32 - 1 and len(state["missed"]) == 32
    rubbish = bytes(2**24)
    sealed = client_side().seal(b"", 1)[:HEADER_BYTES] + rubbish
    for data, most in ((rubbish, 2**16), (sealed, 2**24 + 2**16)):
        tracemalloc.start()
        with pytest.raises(SealError):
            server.open(data, 1)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()


# ---- state ---------------------------------------------------------------------------------------


def test_state_goes_through_json() -> None:
    client, server = client_side(), server_side()
    messages = [client.seal(b"frame", 1) for _ in range(5)]
    server.open(messages[1], 1)
    server.open(messages[3], 1)
    server.seal(b"frame", 1)
    state = json.loads(json.dumps(server.state()))
    assert state == {"sent": 1, "accepted": 4, "missed": [1, 3]}
    again = server_side()
    again.load(state)
    refusal(again, messages[2], 1, "reordered")
    refusal(again, messages[3], 1, "replayed")
    assert again.open(messages[4], 1) == b"frame"
    assert again.seal(b"frame", 1)[COUNTER_AT] == 2
    server.state()["missed"].clear()
    assert server.state() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sent": -1}, "sent must be an integer from 0 to 4294967295, got -1"),
        ({"accepted": 2**32}, "accepted must be an integer"),
        ({"accepted": True}, "accepted must be an integer from 0 to 4294967295, got True"),
        ({"missed": 3}, "missed must be a list of at most 32 counters"),
        ({"missed": list(range(1, 34)), "accepted": 99}, "missed must be a list of at most 32"),
        ({"missed": [0]}, "missed must rise and stay below accepted"),
        ({"missed": [2, 1]}, "missed must rise"),
        ({"missed": [1, 5]}, "stay below accepted"),
        ({"missed": ["1"]}, "missed must be an integer"),
        ({"more": 1}, "state must hold sent, accepted and missed, got .*more"),
    ],
)
def test_states_that_are_none(change: dict[str, object], message: str) -> None:
    channel = server_side()
    with pytest.raises(ValueError, match=message):
        channel.load({"sent": 1, "accepted": 5, "missed": [], **change})
    assert channel.state() == {"sent": 0, "accepted": 0, "missed": []}


def test_the_last_counter_is_the_last_message() -> None:
    client = client_side()
    client.load({"sent": 2**32 - 1, "accepted": 0, "missed": []})
    with pytest.raises(ValueError, match="messages of this run must be .* got 4294967296"):
        client.seal(b"frame", 1)


# ---- arguments, secrets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "clients"}, "side must be server or client, got 'clients'"),
        ({"run": b""}, "run must be at least one byte, got bytes of 0"),
        ({"run": "run"}, "run must be at least one byte, got str of 3"),
        ({"client": -1}, "client must be an integer from 0 to 4294967295, got -1"),
        ({"client": 2**32}, "client must be an integer"),
        ({"client": "3"}, "client must be an integer .* got '3'"),
        ({"peer": CLIENT.public}, "peer must be the other side's key, got this side's own"),
    ],
)
def test_arguments_that_make_no_channel(change: dict[str, object], message: str) -> None:
    arguments = {"peer": SERVER.public, "run": RUN, "client": 3, "side": "client", **change}
    with pytest.raises(ValueError, match=message):
        Channel(CLIENT, arguments.pop("peer"), **arguments)


@pytest.mark.parametrize("round", [-1, 2**32, 1.0, True])
def test_rounds_that_are_none(round: object) -> None:
    channel = client_side()
    for call in (channel.seal, channel.open):
        with pytest.raises(ValueError, match="round must be an integer from 0 to 4294967295"):
            call(b"frame", round)
    assert channel.state()["sent"] == 0


def test_frames_have_a_longest() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="frame must be at most 2147483631 bytes, got 2147483632"):
        client_side().seal(numpy.zeros(2**31 - 16, numpy.uint8), 1)


def test_refusals_travel_between_processes() -> None:
    with pytest.raises(SealError) as refused:
        server_side().open(b"", 5)
    again = pickle.loads(pickle.dumps(refused.value))
    assert isinstance(again, ValueError) and again.reason == "short"
    assert str(again) == str(refused.value)
    assert str(again).startswith("sealed frame refused (client 3, round 5, up): ")
