"""The relay before a Flower node: nothing lost, all counted, no faster than it was told."""

from __future__ import annotations

import socket
import threading

import flower_link
import pytest
from flower_link import Relay, relayed


@pytest.fixture
def echo() -> int:
    """Return the port of a server that sends back what comes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=back, args=(connection,), daemon=True).start()

    def back(connection: socket.socket) -> None:
        with connection:
            while piece := connection.recv(65536):
                connection.sendall(piece)

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def exchanged(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as end:

        def send() -> None:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        found = b""
        while piece := end.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("megabits", [0.0, 40.0])
def test_what_is_sent_arrives_and_is_counted(echo: int, megabits: float) -> None:
    data = bytes(range(256)) * 1000
    with relayed(echo, megabits) as relays:
        assert exchanged(relays[0].port, data) == data
        assert exchanged(relays[1].port, data[:7]) == data[:7]
        assert [relay.bytes for relay in relays[:2]] == [[256_000, 256_000], [7, 7]]


def test_a_piece_passes_when_its_turn_has_come(echo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(flower_link.asyncio, "sleep", sleep)
    with relayed(echo, 1.0) as relays:
        exchanged(relays[0].port, bytes(100_000))
    # Nobody slept, so what is left to wait grows to the time that all take, 0.8 s.
    assert len(waited) >= 2 * 6 and 0.5 < max(waited) <= 0.8


def test_a_port_that_is_taken_is_an_error(echo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_link, "free_port", lambda: echo)
    with pytest.raises(OSError, match="address already in use"), relayed(echo, 1.0):
        pass


def test_bytes_wait_for_their_turn() -> None:
    relay = Relay(1, megabits=8.0)  # a byte a microsecond
    times = [relay.pause(count, way=0, now=now) for count, now in ((1000, 5.0), (500, 5.0))]
    # Idle time before the first is made up for, by as much as the burst.
    assert times == pytest.approx([0.0, 0.0], abs=1e-9)
    assert relay.pause(30_000, way=0, now=5.0) == pytest.approx(0.0115)
    assert relay.pause(1_000, way=0, now=5.0) == pytest.approx(0.0125)
    assert relay.pause(1_000, way=1, now=5.0) == 0.0  # the other way is another link
    assert Relay(1, megabits=0.0).pause(10**9, way=0, now=0.0) == 0.0
