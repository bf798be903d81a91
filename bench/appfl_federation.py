"""A whole APPFL federation over gRPC, with and without frames: accuracy, bytes, time a round.

    python bench/appfl_federation.py --out bench/results/appfl_federation.json

In an environment with appfl, scikit-learn and this package. A server and its clients are processes
of their own, with APPFL's agents, communicators, schedulers and aggregators, on one machine; the
network and the data are those of ``examples/flower_quickstart``. Bytes are those of the gRPC
messages that carry models. Runs whose results are in the file already are not repeated.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from counted import Counted
from resumable import fill

ROOT = Path(__file__).parent.parent
TASK = ROOT / "examples" / "flower_quickstart" / "quickstart" / "task.py"
sys.path.append(str(TASK.parent.parent))
CLIENTS, ROUNDS, LR = 3, 10, 0.05
# APPFL's FedAvg takes what it gets for weights; of its aggregators that know gradients, FedBuff
# with a buffer of all clients is nearest to it.
WEIGHTS = {"scheduler": "SyncScheduler", "aggregator": "FedAvgAggregator"}
BUFFER = {
    "scheduler": "AsyncScheduler",
    "aggregator": "FedBuffAggregator",
    "aggregator_kwargs": {"K": CLIENTS, "alpha": 1.0, "client_weights_mode": "equal"},
}
FEEDBACK = {"energy": 0.95, "feedback": True}
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"server": WEIGHTS},
    "weights, error 0.01": {"server": WEIGHTS, "compressor": {"error": 0.01}},
    "gradients": {"server": BUFFER, "gradient": True},
    "gradients, energy 0.95": {"server": BUFFER, "gradient": True, "compressor": {"energy": 0.95}},
    "gradients, energy 0.95, feedback": {
        "server": BUFFER,
        "gradient": True,
        "compressor": FEEDBACK,
    },
    "gradients, FedAvg": {"server": WEIGHTS, "gradient": True},
}


def share(client: int, seed: int) -> tuple[Any, None]:
    """Return one client's part of the training images, for APPFL's data loader."""
    from quickstart.task import digits
    from torch.utils.data import TensorDataset

    (x, y), _ = digits(seed)
    return TensorDataset(x[client::CLIENTS], y[client::CLIENTS]), None


def rightly(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> float:
    """Return the share of rows that are classified rightly, for APPFL's trainer."""
    return float((scores.argmax(1) == labels).mean())


def serve(kind: str, seed: int, address: str, folder: Path) -> None:
    """Be the server until all clients are done, then score the model."""
    from appfl.agent import ServerAgent
    from appfl.comm.grpc import GRPCServerCommunicator
    from appfl.comm.grpc import serve as serve_grpc
    from appfl.config import ServerAgentConfig
    from omegaconf import OmegaConf
    from quickstart.task import accuracy, digits, digits_model

    from fedkd_fast.integrations import appfl as frames

    frames.register()
    gc.freeze()  # APPFL collects garbage at every step, which takes longer than training does
    chosen = KINDS[kind]
    synchronous = chosen["server"] is WEIGHTS
    train = {
        "trainer": "VanillaTrainer",
        "mode": "epoch",
        "num_local_epochs": 1,
        "optim": "SGD",
        "optim_args": {"lr": LR, "momentum": 0.9},
        "loss_fn": "CrossEntropyLoss",
        "train_batch_size": 32,
    }
    client: dict[str, Any] = {
        "train_configs": train | ({"send_gradient": True} if "gradient" in chosen else {}),
        "model_configs": {
            "model_path": str(TASK),
            "model_name": "digits_model",
            "model_kwargs": {"seed": seed},
        },
    }
    if "compressor" in chosen:
        settings = {"enable_compression": True, "lossy_compressor": "FrameCompressor"}
        client["comm_configs"] = {"compressor_configs": settings | chosen["compressor"]}
    server = chosen["server"] | {
        "num_clients": CLIENTS,
        # An asynchronous scheduler counts replies.
        "num_global_epochs": ROUNDS * (1 if synchronous else CLIENTS),
        "logging_output_dirname": str(folder),
        "logging_output_filename": "server",
    }
    agent = ServerAgent(ServerAgentConfig(OmegaConf.create(client), OmegaConf.create(server)))
    communicator = GRPCServerCommunicator(agent, logger=agent.logger)
    serve_grpc(communicator, server_uri=address, max_workers=2 * CLIENTS)
    model = digits_model(seed)
    model.load_state_dict(agent.aggregator.get_parameters())
    found = {"accuracy": accuracy(model, *digits(seed)[1])}
    (folder / "server.json").write_text(json.dumps(found))


def join(number: int, seed: int, address: str, folder: Path) -> None:
    """Be a client until the server says that training is done."""
    import torch
    from appfl.agent import ClientAgent
    from appfl.comm.grpc import GRPCClientCommunicator
    from omegaconf import OmegaConf

    from fedkd_fast.integrations import appfl as frames

    frames.register()
    gc.freeze()
    config = {
        "client_id": f"client {number}",
        "train_configs": {
            "metric_path": __file__,
            "metric_name": "rightly",
            "logging_output_dirname": str(folder),
            "logging_output_filename": "client",
        },
        "data_configs": {
            "dataset_path": __file__,
            "dataset_name": "share",
            "dataset_kwargs": {"client": number, "seed": seed},
        },
    }
    agent = ClientAgent(OmegaConf.create(config))
    link = GRPCClientCommunicator(agent.get_id(), server_uri=address, logger=agent.logger)
    first = link.stub.GetGlobalModel = Counted(link.stub.GetGlobalModel)
    update = link.stub.UpdateGlobalModel = Counted(link.stub.UpdateGlobalModel)
    agent.load_config(link.get_configuration())
    agent.load_parameters(link.get_global_model(init_model=True))
    link.invoke_custom_action(action="set_sample_size", sample_size=agent.get_sample_size())
    torch.manual_seed(1000 * seed + number)
    start = time.perf_counter()
    status = "RUNNING"
    while status != "DONE":
        agent.train()
        local, about = agent.get_parameters()
        model, answer = link.update_global_model(local, **about)
        agent.load_parameters(model)
        status = answer["status"]
    seconds = time.perf_counter() - start
    link.invoke_custom_action(action="close_connection")
    found = {
        "seconds": seconds,
        "up": update.sent,
        "down": update.received,
        "first": first.received,
    }
    (folder / f"client{number}.json").write_text(json.dumps(found))


def federation(kind: str, seed: int) -> dict[str, Any]:
    """Run one, and return what was measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["appfl.agent", "appfl.comm.grpc", "sklearn.datasets"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ends = [start.Process(target=serve, args=(kind, seed, address, folder))]
        ends += [
            start.Process(target=join, args=(number, seed, address, folder))
            for number in range(CLIENTS)
        ]
        for one in ends:
            one.start()
        # Without one of them, the others wait for ever.
        while any(one.is_alive() for one in ends) and not any(one.exitcode for one in ends):
            time.sleep(0.2)
        if any(one.exitcode for one in ends):
            for one in ends:
                one.terminate()
            raise SystemExit(f"{kind}, seed {seed}: an end of the federation failed")
        clients = [json.loads((folder / f"client{n}.json").read_text()) for n in range(CLIENTS)]
        accuracy = json.loads((folder / "server.json").read_text())["accuracy"]
    return {
        "accuracy": accuracy,
        "seconds_a_round": max(one["seconds"] for one in clients) / ROUNDS,
        "up_bytes": float(np.mean([size for one in clients for size in one["up"]])),
        "down_bytes": float(np.mean([size for one in clients for size in one["down"]])),
        "first_down_bytes": float(np.mean([size for one in clients for size in one["first"]])),
        "replies": [len(one["up"]) for one in clients],
    }


def main() -> None:
    about = {"clients": CLIENTS, "rounds": ROUNDS, "lr": LR, "appfl": version("appfl")}
    fill(Path(__file__).stem, __doc__, list(KINDS), federation, about)


if __name__ == "__main__":
    main()
