"""A whole OpenFL federation over gRPC, with and without frames: accuracy, bytes, time a round.

    python bench/openfl_federation.py --out bench/results/openfl_federation.json

In an environment with openfl 1.9, numpy below 2.4, scikit-learn and this package. The aggregator
serves gRPC on one machine, in a thread; the collaborators take turns, so that nobody sleeps. Plan,
task runner, codec and messages are OpenFL's; the network and the data are those of
``examples/flower_quickstart``. Bytes are those of the gRPC messages that carry models. Runs whose
results are in the file already are not repeated.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from counted import Counted
from openfl.federated import Plan, PyTorchDataLoader, PyTorchTaskRunner
from openfl.protocols import utils
from openfl.utilities import TensorKey
from resumable import fill
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "examples" / "flower_quickstart"))
from quickstart.task import accuracy, digits, digits_model

COLLABORATORS, ROUNDS, LR = 3, 10, 0.05
OURS = "fedkd_fast.integrations.openfl.FramePipeline"
THEIRS = "openfl.component.collaborator.Collaborator"
DELTAS = "fedkd_fast.integrations.openfl_collaborator.DeltaCollaborator"


class Kind(NamedTuple):
    """A pipeline, and the collaborator that uses it."""

    template: str
    settings: dict[str, Any]
    collaborator: str = DELTAS


KINDS = {
    "none": Kind("openfl.pipelines.NoCompressionPipeline", {}, THEIRS),
    "frames, T = 0.95": Kind(OURS, {"energy": 0.95}),
    "frames, T = 0.95, vectors too": Kind(OURS, {"energy": 0.95, "exact_vectors": False}),
    "frames, T = 0.95, OpenFL's collaborator": Kind(OURS, {"energy": 0.95}, THEIRS),
    "Eden, 8 bits": Kind("openfl.pipelines.EdenPipeline", {"n_bits": 8}),
}


class Digits(PyTorchDataLoader):  # type: ignore[misc]
    """One collaborator's part of the training images, and all test images."""

    def __init__(self, data_path: str, seed: int, **settings: Any) -> None:
        super().__init__(batch_size=32, **settings)
        (x, y), test = digits(seed)
        own = slice(int(data_path), None, COLLABORATORS)
        self.X_train, self.y_train = x[own].numpy(), y[own].numpy()
        self.X_valid, self.y_valid = (one.numpy() for one in test)

    def get_feature_shape(self) -> list[int]:
        """Return the shape of an image."""
        return [8, 8]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the loss, by the names that OpenFL calls it with."""
    return nn.functional.cross_entropy(output, target)


class Runner(PyTorchTaskRunner):  # type: ignore[misc]
    """The network, trained by OpenFL's own loop; the optimizer is new in each round."""

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(device="cpu", loss_fn=cross_entropy, **settings)
        self.model = digits_model(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)

    def reset_opt_vars(self) -> None:
        """Forget the momentum."""
        self.optimizer.state.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x)  # type: ignore[no-any-return]


def write_plan(kind: str, seed: int) -> None:
    """Write what a workspace holds, into the current folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    name, chosen = Path(__file__).stem, KINDS[kind]
    plan = {
        "aggregator": {
            "defaults": "plan/defaults/aggregator.yaml",
            "settings": {"rounds_to_train": ROUNDS, "persist_checkpoint": False},
        },
        "collaborator": {
            "defaults": "plan/defaults/collaborator.yaml",
            "template": chosen.collaborator,
            "settings": {"opt_treatment": "RESET"},
        },
        "assigner": {"defaults": "plan/defaults/assigner.yaml"},
        "tasks": {"defaults": "plan/defaults/tasks_torch.yaml"},
        "data_loader": {"template": f"{name}.Digits", "settings": {"seed": seed}},
        "task_runner": {"template": f"{name}.Runner", "settings": {"seed": seed}},
        "network": {
            "defaults": "plan/defaults/network.yaml",
            "settings": {"agg_addr": "localhost", "agg_port": port, "use_tls": False},
        },
        "compression_pipeline": {"template": chosen.template, "settings": chosen.settings},
    }
    names = [f"collaborator{number}" for number in range(COLLABORATORS)]
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    Path("cols.yaml").write_text(yaml.safe_dump({"collaborators": names}))
    Path("data.yaml").write_text("".join(f"{one},{n}\n" for n, one in enumerate(names)))
    Path("save").mkdir()


def parsed() -> Any:
    """Return the plan as each end reads it."""
    return Plan.parse(Path("plan.yaml"), Path("cols.yaml"), Path("data.yaml"))


def score(tensors: dict[str, Any], seed: int) -> float:
    """Return the accuracy of OpenFL's tensors on the test images."""
    model = digits_model(seed)
    wanted = model.state_dict()
    model.load_state_dict({name: torch.tensor(tensors[f"model.{name}"]) for name in wanted})
    return accuracy(model, *digits(seed)[1])


def federation(kind: str, seed: int) -> dict[str, Any]:
    """Run one in the current folder, and return what was measured."""
    write_plan(kind, seed)
    first, plan = parsed(), parsed()
    state = first.get_task_runner(first.get_data_loader("collaborator0")).get_tensor_dict()
    first.save_model_to_state_file(state, 0, "save/init.pbuf")
    aggregator, server = plan.get_aggregator(), plan.get_server()
    serving = threading.Thread(target=server.serve)
    serving.start()
    torch.manual_seed(seed)
    np.random.seed(seed)
    ends, up, down, seconds = [], [], [], []
    for name in plan.authorized_cols:
        ends.append(one := parsed().get_collaborator(name))
        stub = one.client.stub
        stub.SendLocalTaskResults = Counted(stub.SendLocalTaskResults)
        stub.GetAggregatedTensor = Counted(stub.GetAggregatedTensor)
        up.append(stub.SendLocalTaskResults.sent)
        down.append(stub.GetAggregatedTensor.received)
    received = [0]
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for one in ends:  # as Collaborator.run does
            tasks, number, _, _ = one.client.get_tasks()
            for task in tasks:
                one.do_task(task, number)
            one.tensor_db.clean_up(one.db_store_rounds)
        seconds.append(time.perf_counter() - start)
        received.append(sum(map(sum, down)))
    for one in ends:
        assert one.client.get_tasks()[3], "training must be over"
    serving.join()
    saved, _ = utils.deconstruct_model_proto(
        utils.load_proto("save/last.pbuf"), plan.get_tensor_pipe()
    )
    held = aggregator.last_tensor_dict
    model = {
        name: aggregator.tensor_db.get_tensor_from_cache(
            TensorKey(name, aggregator.uuid, ROUNDS, False, ("model",))
        )
        for name in held
    }
    weight = "model.6.weight"
    error = np.linalg.norm(saved[weight] - held[weight]) / np.linalg.norm(held[weight])
    replies = COLLABORATORS * ROUNDS
    return {
        "accuracy": score(model, seed),
        "seconds_a_round": float(np.mean(seconds)),
        "up_bytes": sum(map(sum, up)) / replies,
        "first_down_bytes": received[1] / COLLABORATORS,
        "down_bytes": (received[-1] - received[1]) / (replies - COLLABORATORS),
        "held_accuracy": score(held, seed),  # of the round before, which OpenFL saves
        "saved_accuracy": score(saved, seed),
        "saved_error": float(error),
    }


def in_a_folder(kind: str, seed: int) -> dict[str, Any]:
    """Run one where OpenFL may write."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            return federation(kind, seed)
        finally:
            os.chdir(before)


def main() -> None:
    torch.set_num_threads(1)
    about = {
        "collaborators": COLLABORATORS,
        "rounds": ROUNDS,
        "lr": LR,
        "openfl": version("openfl"),
    }
    fill(Path(__file__).stem, __doc__, list(KINDS), in_a_folder, about)


if __name__ == "__main__":
    main()
