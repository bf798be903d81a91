"""The server's side: weights go out as frames, replies come back as weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd_fast.integrations.flower.records import (
    CONTROL,
    app,
    array_record,
    only,
    opened,
    weights_of,
    written,
)
from fedkd_fast.integrations.link import Broadcaster, Compression, MissingBaseError

_log = logging.getLogger("flwr")


@dataclass
class Traffic:
    """Bytes of one round.

    Args:
        round: its number.
        down: of the frames that went to clients, for training and evaluation.
        up: of the frames that came back.
        dense_down: what the same messages would have had as plain arrays.
        dense_up: likewise.
        refused: why replies do not count, by node.
    """

    round: int
    down: int
    up: int
    dense_down: int
    dense_up: int
    refused: dict[int, str]


class CompressedStrategyMixin:
    """Make any Flower strategy send and receive frames.

    ``class Strategy(CompressedStrategyMixin, FedAvg): ...`` is all there is to write. The strategy
    goes on seeing weights: those that clients hold, which differ from what it made by what a
    message leaves out; that is added to the next one. Each version of the weights is encoded once.
    Clients need `compress_mod`. A reply that is damaged, made from other weights or for another
    model is dropped, by name in the log; nothing of it is sent again.

    Strategies that average weights will do. FedAvgM goes on from weights of its own instead of
    those that clients hold, so it takes what a message left out into account twice: give it
    ``Compression(feedback=False)``.

    Args:
        args: of the strategy.
        compression: of what the server sends.
        shared_start: clients make the first weights themselves (``compress_mod(initial=…)``), so
            they are not sent.
        options: of the strategy.

    Attributes:
        traffic: bytes, by round.
    """

    def __init__(
        self,
        *args: Any,
        compression: Compression | None = None,
        shared_start: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._compression, self._shared_start = compression, shared_start
        self._begin()

    def _begin(self) -> None:
        self._link = Broadcaster(self._compression, shared_start=self._shared_start)
        self._given: list[tuple[str, Any]] = []  # the last weights of the strategy …
        self._held: Any = None  # … and what clients hold of them
        self.traffic: list[Traffic] = []

    def start(self, *args: Any, **options: Any) -> Any:
        """Run, with a link of its own: what was sent in another run of this object is over."""
        self._begin()
        return super().start(*args, **options)  # type: ignore[misc]

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Any]:
        """Send frames to the clients that the strategy chooses."""
        held = self._publish(server_round, arrays)
        messages = super().configure_train(server_round, held, config, grid)  # type: ignore[misc]
        return self._addressed(server_round, messages)

    def configure_evaluate(
        self, server_round: int, arrays: Any, config: Any, grid: Any
    ) -> list[Any]:
        """Send frames to the clients that the strategy chooses."""
        held = self._publish(server_round, arrays)
        messages = super().configure_evaluate(  # type: ignore[misc]
            server_round, held, config, grid
        )
        return self._addressed(server_round, messages)

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        """Hand the strategy what clients trained, as weights."""
        counting = self._counting(server_round, replies, trained=True)
        arrays, metrics = super().aggregate_train(server_round, counting)  # type: ignore[misc]
        if arrays is not None and not all(
            np.isfinite(one).all() for one in weights_of(arrays).values()
        ):
            # Of finite replies as well: they may add up to more than a float holds.
            _log.error(
                "fedkd_fast: round %d: the mean is not finite and does not count", server_round
            )
            arrays = None
        sent = self._row(server_round)
        _log.info(
            "fedkd_fast: round %d: %s bytes down of %s, %s up of %s",
            server_round,
            *(f"{one:,}" for one in (sent.down, sent.dense_down, sent.up, sent.dense_up)),
        )
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """Note what clients hold."""
        counting = self._counting(server_round, replies, trained=False)
        return super().aggregate_evaluate(server_round, counting)  # type: ignore[misc]

    def _publish(self, server_round: int, arrays: Any) -> Any:
        """Make weights the newest version; return what clients hold of it.

        Not before they are sent: what other classes make of a mean may be private, the mean not.
        """
        # A strategy may change its record in place; arrays in it are only ever replaced.
        given = list(arrays.items())
        same = [name for name, _ in given] == [name for name, _ in self._given] and all(
            one is other for (_, one), (_, other) in zip(given, self._given, strict=True)
        )
        if self._held is None or not same:
            before = self._link.version
            try:
                if self._link.publish(weights_of(arrays)) != before or self._held is None:
                    self._held = array_record(self._link.held)
            except ValueError as error:
                # Of the same model: what clients sent may add up to what cannot be sent.
                if self._held is None or not _alike(arrays, self._held):
                    raise
                _log.error(
                    "fedkd_fast: round %d: the weights do not count, those before are sent: %s",
                    server_round,
                    error,
                )
            self._given = given
        return self._held

    def _row(self, server_round: int) -> Traffic:
        if not self.traffic or self.traffic[-1].round != server_round:
            self.traffic.append(Traffic(server_round, 0, 0, 0, 0, {}))
        return self.traffic[-1]

    def _dense(self) -> int:
        return sum(value.nbytes for value in self._link.held.values())

    def _addressed(self, server_round: int, messages: Iterable[Any]) -> list[Any]:
        """Replace the weights in each message by what its receiver needs to have them."""
        row, ready = self._row(server_round), []
        for message in messages:
            name, _ = only(message.content.array_records, "the strategy's message")
            letter = self._link.letter(message.metadata.dst_node_id)
            frames, control = written(letter)
            # Messages to several clients share their content.
            message.content = app.RecordDict({**message.content, name: frames, CONTROL: control})
            row.down, row.dense_down = row.down + letter.nbytes, row.dense_down + self._dense()
            ready.append(message)
        return ready

    def _counting(self, server_round: int, replies: Iterable[Any], *, trained: bool) -> list[Any]:
        """Decode replies, and leave out those that do not count."""
        row, counting = self._row(server_round), []
        for message in replies:
            node = message.metadata.src_node_id
            if message.has_error():
                if (message.error.reason or "").startswith(MissingBaseError.__name__):
                    self._link.forget(node)
                counting.append(message)
                continue
            try:
                self._decode(message, node, row, trained=trained)
            # The bytes are a stranger's: whatever is wrong with them is wrong with him alone.
            except Exception as error:
                row.refused[node] = str(error)
                _log.warning(
                    "fedkd_fast: round %d: reply of node %d is refused: %s",
                    server_round,
                    node,
                    error,
                )
                continue
            counting.append(message)
        return counting

    def _decode(self, message: Any, node: int, row: Traffic, *, trained: bool) -> None:
        content = message.content
        control = content.config_records.get(CONTROL)
        if control is None:
            raise ValueError(
                "it does not say which weights it was made from: make compress_mod the first of "
                "the client's mods"
            )
        if trained:
            name, record = only(content.array_records, "a reply")
            (frame,) = opened(record, [int(length) for length in control["lengths"]])
            weights = self._link.weights(frame)
            row.up, row.dense_up = row.up + len(frame), row.dense_up + self._dense()
            content[name] = array_record(weights)
        reply = int(control["reply"]) if trained else None
        self._link.confirm(node, int(control["version"]), reply=reply)
        del content[CONTROL]


def _alike(one: Any, other: Any) -> bool:
    return {name: tuple(array.shape) for name, array in one.items()} == {
        name: tuple(array.shape) for name, array in other.items()
    }
