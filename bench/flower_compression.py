"""A Flower app with and without small messages: accuracy, bytes and time a round.

    python bench/flower_compression.py --model mlp --out bench/results/flower_mlp.json
    python bench/flower_compression.py --model MINILM_FOLDER --data PSYTAR_FOLDER/by_review \
        --bf16 --rounds 3 --lr 5e-5 --out bench/results/flower_minilm.json

Needs Flower. The app is ``examples/flower_quickstart``. With ``--runtime simulation`` it runs by
``flwr run``, else its very apps, strategies and messages in this process, which takes less time and
counts the same bytes. Runs whose results are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit, facts

ROOT = Path(__file__).parent.parent
APP = ROOT / "examples" / "flower_quickstart"
KINDS = ("none", "energy", "default", "dense")
CLIENTS = 4


def local(config: dict[str, Any]) -> None:
    """Run in this process."""
    sys.path[:0] = [str(ROOT), str(APP)]
    from flwr.app import Context, RecordDict
    from quickstart import client_app, server_app

    from tests.in_flower.grid import LocalGrid

    logging.getLogger("flwr").setLevel(logging.ERROR)
    grid = LocalGrid(lambda node: client_app.app, CLIENTS)
    for context in grid.contexts.values():
        context.run_config = config
    server_app.app(grid, Context(1, 0, {}, RecordDict(), config))


def simulation(config: dict[str, Any]) -> None:
    """Run by ``flwr run``."""
    given = as_text(config)
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONPATH": str(ROOT),
        # Flower starts its other programs by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    nodes = f"num-supernodes={CLIENTS}"
    subprocess.run(
        ["flwr", "run", str(APP), "--stream", "--run-config", given, "--federation-config", nodes],
        check=True,
        env=os.environ | environment,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the app, and where results go."""
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--data", default="")
    parser.add_argument("--bf16", action="store_true", help="the encoder's products in bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)


def app_config(arguments: argparse.Namespace, kind: str, seed: int, found: Path) -> dict[str, Any]:
    """Return the app's configuration for one run, which writes what it found into a file."""
    return {
        "model": arguments.model,
        "data": arguments.data,
        "bf16": arguments.bf16,
        "rounds": arguments.rounds,
        "local-epochs": 1,
        "lr": arguments.lr,
        "seed": seed,
        "compress": kind,
        "out": str(found),
    }


def as_text(config: dict[str, Any]) -> str:
    """Return a configuration as ``flwr run`` takes it."""
    # JSON writes text, numbers and truth as TOML does.
    return " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runtime", choices=("local", "simulation"), default="local")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"runs": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            key = {"kind": kind, "seed": seed, "runtime": arguments.runtime}
            if any(key.items() <= run.items() for run in result["runs"]):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                found = Path(scratch) / "found.json"
                config = app_config(arguments, kind, seed, found)
                {"local": local, "simulation": simulation}[arguments.runtime](config)
                run = json.loads(found.read_text())
            del run["config"]
            result["runs"].append({**key, **run})
            model = "mlp" if arguments.model == "mlp" else "MINILM_FOLDER"
            result |= {
                "command": f"python bench/flower_compression.py --model {model} "
                f"{'--bf16 ' * arguments.bf16}--rounds {arguments.rounds} --lr {arguments.lr}",
                "clients": CLIENTS,
                "facts": facts(0),
                "commit": commit(),
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
