"""The client's side: what comes is made weights of, what goes small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app.error import Error
from flwr.common.constant import ErrorCode

from fedkd_fast.integrations.flower.records import (
    CONTROL,
    app,
    array_record,
    only,
    read,
    sealed,
    weights_of,
)
from fedkd_fast.integrations.flower.state import States
from fedkd_fast.integrations.link import Compression, Receiver

_KINDS = ("train", "evaluate")


class CompressMod:
    """A Flower mod; `compress_mod` makes it."""

    def __init__(
        self,
        compression: Compression,
        initial: Callable[[Any], Mapping[str, object]] | None,
        states: States,
    ) -> None:
        self._compression, self._initial, self._states = compression, initial, states

    def __call__(self, msg: Any, ctxt: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        """Let the app train or evaluate with weights, and send what it trained as a frame."""
        kind = msg.metadata.message_type.split(".")[0]
        if kind not in _KINDS:
            return call_next(msg, ctxt)
        initial = None if self._initial is None else partial(self._initial, ctxt)
        receiver = Receiver(self._compression, initial)
        self._states.load(ctxt, receiver)
        before = receiver.run, receiver.version
        try:
            self._receive(msg, receiver)
        except (ValueError, TypeError) as error:
            return _refusal(error, msg)
        reply = call_next(msg, ctxt)
        if reply.has_error():
            # As if the message had not come: the server goes on from what it knows of this client.
            return reply
        trained = kind == "train"
        try:
            self._answer(reply, receiver, trained=trained)
            if trained or before != (receiver.run, receiver.version):
                self._states.save(ctxt, receiver)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            return _refusal(error, msg)
        return reply

    def _receive(self, msg: Any, receiver: Receiver) -> None:
        """Put weights in the place of what the server sent."""
        control = msg.content.config_records.get(CONTROL)
        if control is None:
            raise ValueError(
                "the server's strategy does not send frames: make CompressedStrategyMixin its "
                "first base, or leave compress_mod out"
            )
        name, record = only(msg.content.array_records, "the server's message")
        msg.content[name] = array_record(receiver.receive(read(record, control)))
        del msg.content[CONTROL]

    def _answer(self, reply: Any, receiver: Receiver, *, trained: bool) -> None:
        """Put a frame in the place of trained weights, and say which version they came from."""
        control: dict[str, Any] = {"version": receiver.version}
        if trained:
            name, record = only(reply.content.array_records, "the reply of a client that trained")
            frame = receiver.reply(weights_of(record))
            reply.content[name] = sealed((frame,))
            control["lengths"], control["reply"] = [len(frame)], receiver.replies
        reply.content[CONTROL] = app.ConfigRecord(control)


def _refusal(error: Exception, msg: Any) -> Any:
    """Tell the server, by the error's name, what is wrong."""
    reason = f"{type(error).__name__}: {error}"
    return app.Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=msg)


def compress_mod(
    compression: Compression | None = None,
    *,
    initial: Callable[[Any], Mapping[str, object]] | None = None,
    state_dir: str | Path | None = None,
    **options: Any,
) -> CompressMod:
    """Make the messages of a Flower client small: ``ClientApp(mods=[compress_mod(), …])``.

    It must come first, so that all other mods, of differential privacy for instance, see weights.
    What the client trained is sent as its difference to what it received; what that leaves out
    stays with the client and is added to the next one. The server needs
    `CompressedStrategyMixin`.

    Args:
        compression: how updates are coded.
        initial: makes the first weights of a Flower context, where the strategy has
            ``shared_start=True``: ``lambda context: make_model().state_dict()``. They must be the
            server's, from the same seed or file; they are compared.
        state_dir: where clients keep what they received and what they left out, some two times the
            model, where that is more than 4 MiB; an absolute path that all processes of a client
            can write to. Smaller ones are in ``context.state``, which Flower moves in one piece and
            gives a few seconds; so are those of up to 64 MiB where there is no such folder, while
            clients with larger ones refuse. By default ``fedkd_fast`` in Flower's own folder,
            ``FLWR_HOME``. There are up to two files a client; those of others are removed when
            they are 30 days old.
        options: fields of `Compression`, instead of one: ``energy=0.95, feedback=False``.

    Raises:
        ValueError: an option out of its range, or a folder that is not absolute.
        TypeError: an option that does not exist, or both an object and options.
    """
    if compression is not None and options:
        raise TypeError(f"compression excludes further options, got {', '.join(options)}")
    states = States(None if state_dir is None else Path(state_dir))
    return CompressMod(compression or Compression(**options), initial, states)
