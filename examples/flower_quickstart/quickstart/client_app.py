"""The clients: a Flower app as in its quickstart, and one more line."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd_fast.integrations.flower import compress_mod
from quickstart.task import make_data, make_model, train


def first_model(context: Context) -> dict[str, torch.Tensor]:
    """Make the first model from the seed, so that it need not travel."""
    return dict(make_model(context.run_config).state_dict())


MODS = {
    "default": compress_mod(initial=first_model),
    "energy": compress_mod(energy=0.95, feedback=False),
    "dense": compress_mod(codec="dense", initial=first_model),
    "none": lambda message, context, call_next: call_next(message, context),
}


def small(message: Message, context: Context, call_next: Any) -> Message:
    """Let the run's configuration choose, which an app of one's own need not."""
    return MODS[str(context.run_config["compress"])](message, context, call_next)


# In an app of one's own: ClientApp(mods=[compress_mod()]).
app = ClientApp(mods=[small])


@app.train()
def train_on_part(message: Message, context: Context) -> Message:
    """Train on the client's part of the data."""
    config = context.run_config
    part, parts = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    (x, y), _ = make_data(config)
    net = make_model(config)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    torch.manual_seed(1000 * int(message.content["config"]["server-round"]) + part)
    loss = train(net, x[part::parts], y[part::parts], config)
    metrics = MetricRecord({"loss": loss, "num-examples": len(y[part::parts])})
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)
