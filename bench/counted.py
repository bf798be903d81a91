"""The bytes that a call of a gRPC stub sends and receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Counted:
    """A call of a stub that notes the bytes of its messages, a number for each call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.sent, self.received = call, list[int](), list[int]()

    def __call__(self, request: Any, **options: Any) -> Any:
        """Send a message or a stream of them, and return what comes back."""
        answer = self.call(_counted(self.sent, request), **options)
        return _counted(self.received, answer)


def _counted(sizes: list[int], message: Any) -> Any:
    """Add a number to the sizes: of one message, or of a stream as it passes."""
    if hasattr(message, "ByteSize"):
        sizes.append(message.ByteSize())
        return message
    sizes.append(0)
    return _passing(sizes, message)


def _passing(sizes: list[int], messages: Iterable[Any]) -> Iterator[Any]:
    for message in messages:
        sizes[-1] += message.ByteSize()
        yield message
