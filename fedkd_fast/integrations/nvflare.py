"""NVFLARE 2.9: models travel as frames, by two filters at each end.

In the job script::

    recipe = FedAvgRecipe(...)
    add_compression(recipe)

Down, the server's `CompressBroadcast` encodes each version of the weights once, for however many
clients, and the client's `RestoreBroadcast` hands its executor ordinary arrays or tensors; up,
`CompressReply` encodes what was trained less what was received, and `RestoreReply` hands the
aggregator what it would have got. Weights and differences to them (``TransferType.DIFF``) are both
understood. Both filters of an end share one link, which lives in the context of the run.

A client says with every request which version it holds, so one that was restarted gets the whole
model. A reply that cannot be decoded is refused by name and reason, and counts as one that learned
nothing; NVFLARE would end the job for an exception here. An error in a client's own filters does
reach NVFLARE, whose policy for failing clients decides, and is written to the server's log too.

The rounds have to be synchronous: a reply to another version than the newest is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedkd_fast.integrations.link import Compression, Letter, Receiver
from fedkd_fast.integrations.nvflare_ends import (
    CLIENT,
    DXO,
    SAID,
    SERVER,
    Compressing,
    DataKind,
    EventType,
    Filter,
    FLContext,
    MetaKey,
    ReturnCode,
    ServerLink,
    Shareable,
    content_of,
    link_of,
    packed,
    peer_of,
    restored,
)

REFUSALS = ("skip", "fail")
_NO_WEIGHT = 1e-12  # of a reply in a mean; NVFLARE takes 0 for 1
_ROUND_HEADER = "current_round"


class CompressBroadcast(Compressing):
    """The server's filter of what goes to clients (`task_data_filters`).

    Feedback belongs here where the server makes new weights from what clients hold, as FedAvg does
    of whole weights: ``w = mean(h + D)`` has lost what was left out. Of differences it makes
    ``w + mean(D)``, and ``w - h`` still holds it: with feedback it would be sent twice.

    Args:
        energy, feedback, codec, scope, warm: see `Compression`.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin the run's link."""
        if event_type == EventType.START_RUN:
            fl_ctx.set_prop(SERVER, ServerLink(self._compression()), private=True, sticky=True)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Replace the weights by what the client lacks of them.

        Raises:
            TypeError, ValueError: weights that cannot be sent; the job ends by name.
        """
        link = link_of(fl_ctx, SERVER, "CompressBroadcast")
        client, said = peer_of(fl_ctx)
        number = shareable.get_header(_ROUND_HEADER)
        with link.lock:
            try:
                link.publish(dxo.data, number)
            except (TypeError, ValueError) as error:
                # NVFLARE would only cancel the task, and go on with a mean of nothing.
                self.system_panic(f"the weights cannot be sent: {error}", fl_ctx)
                raise
            letter, numpy = link.letter(client, said), link.arrays
        self.log_info(fl_ctx, f"version {letter.version} for {client}: {letter.nbytes} bytes")
        content = {"run": letter.run, "version": letter.version, "numpy": numpy}
        return packed(dxo, {**content, "frames": list(letter.frames)})


class RestoreReply(Filter):
    """The server's filter of what comes from clients (`task_result_filters`).

    Args:
        refused: what a reply that cannot be decoded counts as: "skip", one that learned nothing,
            with next to no weight; "fail", an error of the client, for which NVFLARE's FedAvg ends
            the job unless enough other clients remain.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, refused: str = "skip") -> None:
        super().__init__()
        if refused not in REFUSALS:
            raise ValueError(f"refused must be one of {REFUSALS}, got {refused!r}")
        self.refused = refused

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Restore a reply; of one that reports an error, log what the client says of it."""
        if shareable.get_return_code() != ReturnCode.OK:
            client, said = peer_of(fl_ctx)
            if isinstance(said, dict) and "error" in said:
                self.log_error(fl_ctx, f"{client} failed: {str(said['error'])[:500]}")
        return super().process(shareable, fl_ctx)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Replace a frame by the weights or differences that it stands for.

        Raises:
            TypeError, ValueError: the reply cannot be decoded, and `refused` is "fail".
        """
        link = link_of(fl_ctx, SERVER, "CompressBroadcast")
        client, _ = peer_of(fl_ctx)
        if dxo.data_kind == DataKind.WEIGHT_DIFF and link.feedback:
            self.log_warning(
                fl_ctx, "clients send differences: CompressBroadcast needs feedback=False"
            )
        with link.lock:
            try:
                weights = link.weights(dxo)
            except (TypeError, ValueError) as error:
                self.log_error(fl_ctx, f"refused the reply of {client}: {error}")
                if self.refused == "fail":
                    raise
                weights = link.nothing_learned(dxo)
                dxo.meta = {**dxo.meta, MetaKey.NUM_STEPS_CURRENT_ROUND: _NO_WEIGHT}
        return restored(dxo, weights, link.arrays)


class _ClientFilter:
    """Tells the server why this client fails."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter, and leave the reason of an error where the next request brings it."""
        try:
            return super().process(shareable, fl_ctx)  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            fl_ctx.set_prop(SAID, {"error": str(error)}, private=False, sticky=True)
            raise


class RestoreBroadcast(_ClientFilter, Filter):
    """The client's filter of what comes from the server (`task_data_filters`)."""

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Replace frames by the weights, numpy arrays or tensors as the server had them.

        Raises:
            WireError: the bytes are damaged.
            MissingBaseError: they build on weights that are not held here.
            ValueError: no frames, or for other tensors.
        """
        receiver = link_of(fl_ctx, CLIENT, "CompressReply")
        missing = "CompressBroadcast in the server's task_data_filters"
        frames = tuple(content_of(dxo, "frames", list, missing))
        weights = receiver.receive(Letter(dxo.data["run"], dxo.data["version"], frames))
        said = {"run": receiver.run, "version": receiver.version}
        fl_ctx.set_prop(SAID, said, private=False, sticky=True)
        return restored(dxo, weights, dxo.data["numpy"])


class CompressReply(_ClientFilter, Compressing):
    """The client's filter of what goes to the server (`task_result_filters`).

    Args:
        energy, feedback, codec, scope, warm: see `Compression`.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin the run's link."""
        if event_type == EventType.START_RUN:
            fl_ctx.set_prop(CLIENT, Receiver(self._compression()), private=True, sticky=True)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Replace weights, or differences to those received, by a frame.

        Raises:
            TypeError: a value is no dense tensor or array; names it.
            MissingBaseError: nothing was received before.
            ValueError: NaN or Inf, or other names, shapes or dtypes than were received.
        """
        receiver = link_of(fl_ctx, CLIENT, "CompressReply")
        frame = receiver.reply(dxo.data, differences=dxo.data_kind == DataKind.WEIGHT_DIFF)
        self.log_info(fl_ctx, f"reply to version {receiver.version}: {len(frame)} bytes")
        return packed(dxo, {"frame": frame})


def add_compression(
    recipe: Any,
    *,
    up: Compression | None = None,
    down: Compression | None = None,
    refused: str = "skip",
    tasks: Sequence[str] = ("train",),
) -> None:
    """Add the four filters to a recipe; both ends need fedkd_fast installed.

    Args:
        recipe: of nvflare, such as ``FedAvgRecipe``.
        up: compression of replies.
        down: compression of broadcasts; by default with feedback where clients send whole weights,
            and without where they send differences (see `CompressBroadcast`).
        refused: see `RestoreReply`.
        tasks: whose data and results are weights.

    Raises:
        ValueError: `down` is needed, because the recipe does not say what clients send; or an
            argument out of its range.
    """
    transfer = getattr(recipe, "params_transfer_type", None)
    if down is None and transfer is None:
        raise ValueError(
            f"{type(recipe).__name__} has no params_transfer_type: pass down=Compression(feedback="
            "...), True where clients send whole weights, False where they send differences"
        )
    up, down = up or Compression(), down or Compression(feedback=transfer != "DIFF")
    recipe.add_server_output_filter(CompressBroadcast(**asdict(down)), tasks=list(tasks))
    recipe.add_client_input_filter(RestoreBroadcast(), tasks=list(tasks))
    recipe.add_client_output_filter(CompressReply(**asdict(up)), tasks=list(tasks))
    recipe.add_server_input_filter(RestoreReply(refused), tasks=list(tasks))
    # Else NVFLARE copies this package's sources into the job; a recipe has no door to this.
    job = recipe._job
    job.set_app_packages([*job.job.app_packages, "fedkd_fast"])
