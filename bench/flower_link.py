"""Time of a round of a Flower app whose clients are behind links of a given rate.

    python bench/flower_link.py --megabits 20 100 --out bench/results/flower_link.json

Needs Flower. One SuperLink and a SuperNode a client run as processes of their own and talk over
loopback; a relay between each node and the SuperLink lets so many bits a second pass, either way.
The app is ``examples/flower_quickstart``. Runs whose results are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from flower_compression import APP, CLIENTS, ROOT, add_options, app_config, as_text
from provenance import commit, facts

sys.path.append(str(ROOT / "examples" / "flower"))
from deploy import HOST, START_S, Deployment, free_port

_PIECE = 16384  # bytes that pass at once
_BURST_S = 0.02  # of idle time that is made up for: sleeping is not that exact


class Relay:
    """TCP from a port to another one, at most so fast, each way; 0: as fast as it goes."""

    def __init__(self, target: int, megabits: float) -> None:
        self.port, self.bytes = free_port(), [0, 0]  # to the target, from it
        self._target, self._rate = target, megabits * 1e6 / 8
        self._free_at = [0.0, 0.0]

    def pause(self, count: int, way: int, now: float) -> float:
        """Return how long so many bytes wait until they have passed."""
        if not self._rate:
            return 0.0
        # All connections of a node share its link.
        start = max(now - _BURST_S, self._free_at[way])
        self._free_at[way] = start + count / self._rate
        return max(0.0, self._free_at[way] - now)

    async def listen(self) -> None:
        """Relay what comes from now on, until the loop ends."""
        await asyncio.start_server(self._connected, HOST, self.port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            there, back = await asyncio.open_connection(HOST, self._target)
            ends.append(back)
            await asyncio.gather(self._pump(reader, back, 0), self._pump(there, writer, 1))
        for end in ends:
            end.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int
    ) -> None:
        while piece := await reader.read(_PIECE):
            self.bytes[way] += len(piece)
            if wait := self.pause(len(piece), way, time.monotonic()):
                await asyncio.sleep(wait)
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


class Linked(Deployment):
    """A deployment without keys, each of whose nodes is behind a relay."""

    def superlink(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        self.start(
            *("superlink", "flower-superlink", "--host", HOST, "--port", str(self.port)),
            "--insecure",
        )
        self.listening("insecure = true")

    def supernode(self, node: int, relay: Relay) -> None:
        """Start a SuperNode on the other side of a relay."""
        config = f"partition-id={node} num-partitions={CLIENTS}"
        self.start(
            *(f"supernode-{node}", "flower-supernode", "--insecure"),
            *("--superlink", f"{HOST}:{relay.port}", "--port", str(free_port())),
            *("--node-config", config),
        )


@contextlib.contextmanager
def relayed(target: int, megabits: float) -> Iterator[list[Relay]]:
    """Yield one relay a client, all at work."""
    relays = [Relay(target, megabits) for _ in range(CLIENTS)]
    started: Future[asyncio.Event] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        try:
            for relay in relays:
                await relay.listen()
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(ended)
        await ended.wait()

    # Leaving the loop ends what is connected.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(loop, serve()), daemon=True)
    thread.start()
    ended = started.result()
    try:
        yield relays
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(START_S)


def _run(loop: asyncio.AbstractEventLoop, main: Coroutine[None, None, None]) -> None:
    try:
        loop.run_until_complete(main)
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
    finally:
        loop.close()


def measured(arguments: argparse.Namespace, kind: str, megabits: float) -> dict[str, Any]:
    """Run the app once, and return what it found and the bytes that passed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = folder / "found.json"
        given = as_text(app_config(arguments, kind, seed=0, found=found))
        deployment = Linked(folder)
        try:
            deployment.superlink()
            with relayed(deployment.port, megabits) as relays:
                for node, relay in enumerate(relays):
                    deployment.supernode(node, relay)
                if deployment.run(
                    *("flwr", "run", str(APP), "deployment", "--stream", "--run-config", given)
                ):
                    raise RuntimeError("flwr run failed")
                passed = [sum(relay.bytes[way] for relay in relays) for way in (0, 1)]
        finally:
            deployment.end_all()
        run: dict[str, Any] = json.loads(found.read_text())
    del run["config"]
    return {**run, "up_bytes": passed[0], "down_bytes": passed[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, nargs="+", default=[20, 100, 0])
    add_options(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # ends everything, too
    result: dict[str, Any] = {"runs": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    model = "mlp" if arguments.model == "mlp" else "MINILM_FOLDER"
    for megabits in arguments.megabits:
        for kind in arguments.kinds:
            key: dict[str, Any] = {"model": model, "kind": kind, "megabits": megabits}
            key |= {"rounds": arguments.rounds, "lr": arguments.lr}
            if any(key.items() <= run.items() for run in result["runs"]):
                continue
            run = measured(arguments, kind, megabits)
            result["runs"].append({**key, "commit": commit(), **run})
            result |= {
                "command": "python bench/flower_link.py --model … --megabits … --rounds … --lr …",
                "clients": CLIENTS,
                "facts": facts(0),
                "commit": commit(),
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            print(key, round(statistics.median(run["seconds"][1:]), 3), "s a round")


if __name__ == "__main__":
    main()
