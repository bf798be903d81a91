"""Orders and answers as messages of Flower: one record, text and FedKD's frames as bytes."""

from __future__ import annotations

import contextlib
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from fedkd_fast._files import parse_json
from fedkd_fast.node import Answer, Order
from fedkd_fast.remote import ClientError, NoAnswerError, read_answer


class GoneError(NoAnswerError):
    """The node of a client is not connected."""


HELLO = "hello"
_RECORD, _TEXT, _FRAME = "fedkd", "text", "frame"


def pack_order(order: Order) -> RecordDict:
    """Return the content of the message that brings an order."""
    # One value a frame: what Flower says of sizes is wrong for lists without an element.
    frames = {f"{_FRAME}-{number}": frame for number, frame in enumerate(order.frames)}
    return RecordDict({_RECORD: ConfigRecord({_TEXT: order.text(), **frames})})


def kind(order: Order) -> str:
    """Return the type of message that an order is."""
    scores = bool(order.steps) and order.steps[-1][0] == "score"
    return str(MessageType.EVALUATE if scores else MessageType.TRAIN)


def read_order(message: Message) -> Order:
    """Return the order in a message.

    Raises:
        ValueError: there is none.
    """
    record: dict[str, Any] = dict(_record(message))
    count = sum(name.startswith(_FRAME) for name in record)
    frames = [record[f"{_FRAME}-{number}"] for number in range(count)]
    return Order.read(str(record.get(_TEXT)), frames)


def pack_answer(answer: Answer) -> RecordDict:
    """Return the content of the message that brings an answer."""
    frame = {_FRAME: answer.frame} if answer.frame else {}
    return RecordDict({_RECORD: ConfigRecord({_TEXT: answer.text(), **frame})})


def answer_of(client: int, message: Message) -> Answer:
    """Return the answer in a message.

    Raises:
        NoAnswerError: Flower says that there is none; `GoneError` where the node is gone.
        ClientError: it is none.
    """
    if message.has_error():
        gone = message.error.code == ErrorCode.NODE_UNAVAILABLE
        text = f"client {client}: {message.error.reason or message.error.code}"
        raise GoneError(text) if gone else NoAnswerError(text)
    try:
        record: dict[str, Any] = dict(_record(message))
    except ValueError as error:
        raise ClientError(f"client {client}: {error}") from error
    return read_answer(client, record.get(_TEXT), record.get(_FRAME, b""))


def facts_of(message: Message) -> dict[str, Any]:
    """Return what a node says of itself.

    Raises:
        ValueError: it says why it cannot be a client, or nothing that makes sense.
    """
    record: dict[str, Any] = dict(_record(message, HELLO))
    facts = parse_json(str(record.get("facts")), "hello")
    if not isinstance(facts, dict):
        raise ValueError(f"hello must be a JSON object, got {facts!r}")
    if "error" in facts:
        raise ValueError(str(facts["error"]))
    return facts


def _record(message: Message, name: str = _RECORD) -> ConfigRecord:
    found = message.content.config_records.get(name)
    if found is None:
        raise ValueError(f"message must have a record {name!r}, got {list(message.content)}")
    return found


def size_of(content: RecordDict) -> int:
    """Return the bytes of a message as Flower counts them; of what it cannot count, none."""
    total = 0
    for record in content.values():
        # It fails for empty texts and lists, and messages are made by strangers.
        with contextlib.suppress(Exception):
            total += record.count_bytes()
    return total
