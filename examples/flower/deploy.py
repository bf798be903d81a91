"""Run the app as it is deployed, on one machine: a SuperLink, two SuperNodes, TLS, keys, seals.

    python deploy.py FOLDER [--kill-round N] [--run-config 'rounds=3 …']

Everything lies in FOLDER, which must not exist: certificates, states of the clients, logs, and the
run folder ``run``. With ``--kill-round``, SuperNode 1 is killed (kill -9) while it trains in that
round, and started again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent  # of the environment that has Flower
NODES = 2
HOST = "127.0.0.1"
START_S = 180.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Deployment:
    """Processes of one deployment, ended together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self.port, self.grpc_port = free_port(), free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock, self._over = threading.Lock(), False
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the environment has it all
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, name: str, *command: str) -> None:
        """Start a process with a log of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                cwd=self.folder,
                start_new_session=True,  # so that it ends with all that it started
            )

    def run(self, *command: str) -> int:
        """Run a process to its end, its output on ours."""
        full = [str(BIN / command[0]), *command[1:]]
        return subprocess.run(full, env=self._environment, cwd=self.folder, check=False).returncode

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a process and all that it started."""
        process = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def end_all(self) -> None:
        """End everything, the SuperLink last."""
        with self._lock:
            self._over = True
            for name in reversed(list(self._running)):
                self.end(name)

    def superlink(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        self.start(
            *("superlink", "flower-superlink", "--host", HOST, "--port", str(self.port)),
            *("--fleet-api-address", f"{HOST}:{self.grpc_port}"),
            *("--ssl-ca-certfile", str(self.keys / "ca.crt")),
            *("--ssl-certfile", str(self.keys / "superlink.crt")),
            *("--ssl-keyfile", str(self.keys / "superlink.key")),
            "--enable-supernode-auth",
        )
        self.listening(f'root-certificates = "{self.keys / "ca.crt"}"')

    def listening(self, secured_by: str) -> None:
        """Wait until the SuperLink listens, and let `flwr run` know of it."""
        until = time.monotonic() + START_S
        while socket.socket().connect_ex((HOST, self.port)):
            if self._running["superlink"].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the SuperLink does not come: {self.folder}/superlink.log")
            time.sleep(0.5)
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n'
            f'address = "{HOST}:{self.port}"\n{secured_by}\n'
        )

    def register(self, node: int) -> None:
        """Let the SuperLink know the key of a SuperNode."""
        key = str(self.keys / f"node-{node}.pub")
        if self.run("flwr", "supernode", "register", key, "deployment"):
            raise RuntimeError(f"SuperNode {node} cannot be registered")

    def supernode(self, node: int) -> None:
        """Start a SuperNode; its client keeps its state in ``state``."""
        config = (
            f"partition-id={node} num-partitions={NODES} state-dir='{self.folder / 'state'}' "
            f"key='{self.keys / f'client-{node}.key'}' server-key='{self.keys / 'server.key.pub'}'"
        )
        # SuperNodes of Flower 1.39 speak gRPC, for which the SuperLink has a port of its own.
        grpc = importlib.metadata.version("flwr").startswith("1.39.")
        port = self.grpc_port if grpc else self.port
        self.start(
            *(f"supernode-{node}", "flower-supernode", "--superlink", f"{HOST}:{port}"),
            *("--root-certificates", str(self.keys / "ca.crt")),
            *("--auth-supernode-private-key", str(self.keys / f"node-{node}")),
            *("--port", str(free_port()), "--node-config", config),
        )

    def kill_in(self, round_number: int) -> None:
        """Kill SuperNode 1 while its client trains in a round, and start it again."""
        journal = self.folder / ".run.partial" / "run" / "journal.jsonl"
        while rounds_done(journal) < round_number - 1:
            time.sleep(0.2)
        while not any(map(busy, (self.folder / "state").glob("run-*/client-1/lock"))):
            time.sleep(0.02)
        self.end("supernode-1", signal.SIGKILL)
        print(f"deploy: killed SuperNode 1 in round {round_number}", flush=True)
        # The SuperLink refuses a node that it believes connected, for up to a minute; whoever runs
        # a node tries again until it is accepted, as service managers do.
        self.supernode(1)
        while not self._over:
            time.sleep(5.0)
            with self._lock:
                if not self._over and self._running["supernode-1"].poll() is not None:
                    self.end("supernode-1", signal.SIGKILL)
                    self.supernode(1)


def rounds_done(journal: Path) -> int:
    """Return how many rounds a journal tells of."""
    with contextlib.suppress(FileNotFoundError):
        lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
        return sum(json.loads(line)["event"] == "round" for line in lines)
    return 0


def busy(lock: Path) -> bool:
    """Tell whether a client is at work."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Yield a deployment that is up, and end it."""
    folder.mkdir(parents=True)
    found = Deployment(folder)
    subprocess.run(
        ["sh", str(HERE / "certificates.sh"), str(found.keys), HOST, str(NODES)],
        check=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FEDKD_FAST": f"{sys.executable} -m fedkd_fast"},
    )
    try:
        found.superlink()
        for node in range(NODES):
            found.register(node)
            found.supernode(node)
        yield found
    finally:
        found.end_all()


def main() -> int:
    """Deploy, run the app, and end everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-round", type=int, metavar="N")
    parser.add_argument("--run-config", default="", metavar="'KEY=VALUE …'")
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # ends everything, too
    with deployed(folder) as deployment:
        if args.kill_round is not None:
            killing = (args.kill_round,)
            threading.Thread(target=deployment.kill_in, args=killing, daemon=True).start()
        keys = deployment.keys
        seals = (
            f"encrypt=true server-key='{keys / 'server.key'}' enrolment='{keys / 'clients.json'}'"
        )
        options = f"out='{folder / 'run'}' {seals} {args.run_config}"
        deployment.run("flwr", "run", str(HERE), "deployment", "--stream", "--run-config", options)
    return 0 if (folder / "run" / "summary.json").is_file() else 1


if __name__ == "__main__":
    sys.exit(main())
