"""A Flower grid within this process: real apps, strategies and messages, and no runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def through_proto(message: Message) -> Message:
    """Return what arrives of a message."""
    return message_from_proto(message_to_proto(message))


class LocalGrid(Grid):
    """Nodes 1 to n, each with an app and a context.

    Args:
        app: makes the app of a node.
        nodes: how many.
        tamper: changes the reply of a node, or drops it (None).
    """

    def __init__(
        self,
        app: Callable[[int], ClientApp],
        nodes: int = 2,
        tamper: Callable[[int, Message], Message | None] | None = None,
    ) -> None:
        self.apps = {node: app(node) for node in range(1, nodes + 1)}
        self.contexts = {node: self.context(node) for node in self.apps}
        self.tamper = tamper or (lambda node, message: message)
        self.down: list[Message] = []
        self.up: list[Message] = []
        self.frames_up = 0  # bytes

    def context(self, node: int) -> Context:
        config = {"partition-id": node - 1, "num-partitions": len(self.apps)}
        return Context(1, node, config, RecordDict(), {})

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.down.append(message)
            message = through_proto(message)
            try:
                reply = self.apps[node](message, self.contexts[node])
            except Exception as error:
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message
                )
            tampered = self.tamper(node, through_proto(reply))
            if tampered is not None:
                if tampered.has_content():
                    for record in tampered.content.array_records.values():
                        self.frames_up += sum(len(array.data) for array in record.values())
                self.up.append(tampered)
                replies.append(tampered)
        return replies

    def set_run(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def push_messages(self, *args: object, **kwargs: object) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, *args: object, **kwargs: object) -> Iterable[Message]:
        raise NotImplementedError
