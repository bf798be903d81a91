"""A model of one matrix, Flower apps that pull it somewhere, and their strategy."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedkd_fast.integrations.flower import CompressedStrategyMixin, array_record, compress_mod

GOAL = torch.Generator().manual_seed(9)
TARGET = torch.randn(32, 48, generator=GOAL)
# Where each node pulls, in targets. Krum keeps the update whose neighbours are nearest: of three,
# the nearest two always tie, and the order in which Flower samples would choose; of these four,
# node 2 wins by half.
PULLS = {1: 2 / 3, 2: 4 / 3, 3: 2.0, 4: 5.0}


class Compressed(CompressedStrategyMixin, FedAvg):
    pass


class Net(nn.Module):
    """A matrix to be learned, and a counter as batch norm has."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(32, 48, generator=made))
        self.norm = nn.BatchNorm1d(48)


def app_of(node: int, *mods: object, dtype: torch.dtype = torch.float32) -> ClientApp:
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(message: Message, context: object) -> Message:
        net = Net(seed=5).to(dtype)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        with torch.no_grad():
            net.weight += 0.3 * (TARGET.to(dtype) * PULLS[node] - net.weight)
            net.norm.num_batches_tracked += node
        metrics = MetricRecord({"num-examples": 10 * node})
        content = {"arrays": array_record(net.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: object) -> Message:
        weight = message.content["arrays"].to_torch_state_dict()["weight"]
        gap = float((weight - TARGET).norm())
        metrics = MetricRecord({"num-examples": 10 * node, "gap": gap})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def plain(node: int) -> ClientApp:
    return app_of(node)


def small(node: int) -> ClientApp:
    return app_of(node, compress_mod())


def start() -> ArrayRecord:
    return ArrayRecord(Net().state_dict())


def weights(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}
