"""The client of FedKD as a Flower app: what a message asks for, a `node.Node` does."""

from __future__ import annotations

import json
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkd_fast._device import require_device
from fedkd_fast.integrations.flower.messages import HELLO, pack_answer, read_order
from fedkd_fast.integrations.flower.seals import make_node
from fedkd_fast.integrations.flower.settings import partition, settings, state_folder
from fedkd_fast.node import Answer, Node

client_app = ClientApp()


def _node(context: Context) -> Node:
    """Make the client of this node from what Flower tells it."""
    own = context.node_config
    found = settings(context.run_config, own)
    require_device(found.config.device)
    if found.config.threads:
        torch.set_num_threads(found.config.threads)
    index = partition(own, found.config.clients)
    folder = state_folder(own, context.run_id, index)
    return make_node(found, index, folder, own, context.run_id)


@client_app.query(HELLO)
def hello(message: Message, context: Context) -> Message:
    """Say which client this is, or why it cannot be one."""
    try:
        facts: dict[str, Any] = _node(context).hello()
    except Exception as error:
        facts = {"error": str(error)}
    content = RecordDict({HELLO: ConfigRecord({"facts": json.dumps(facts)})})
    return Message(content, reply_to=message)


@client_app.train()
@client_app.evaluate()
def execute(message: Message, context: Context) -> Message:
    """Carry an order out."""
    try:
        answer = _node(context).execute(read_order(message))
    except Exception as error:
        answer = Answer({"error": str(error)})
    return Message(pack_answer(answer), reply_to=message)
