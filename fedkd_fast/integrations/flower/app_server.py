"""The server of FedKD as a Flower app: the loop of `fedkd-fast train`, with clients at nodes."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd_fast.connect import connect
from fedkd_fast.integrations.flower.carrier import GridCarrier, log
from fedkd_fast.integrations.flower.seals import sealed_carrier
from fedkd_fast.integrations.flower.settings import settings
from fedkd_fast.records import ClientRecord, RoundRecord
from fedkd_fast.trainer import train

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Train as the run's configuration says.

    Raises:
        ValueError: the configuration, a key or a client does not fit.
        OSError: a file of keys cannot be read.
        QuorumError: too few replies of a round count.
        NoAnswerError: clients did not come.
    """
    found = settings(context.run_config)
    config = found.config
    carrier = GridCarrier(grid, config.client_timeout, found.wait_s, found.rejoin_s)
    sealed = sealed_carrier(carrier, config, context.run_config, context.run_id)
    run = train(
        found.task,
        config.method,
        connect=connect(config, found.task, sealed, found.wait_s),
        progress=_show,
        **found.fields,
    )
    summary, score = run.summary, run.summary["score"]
    log.info(
        "%s %s: %s, %.0f bytes up and %.0f down a client in %d rounds",
        config.task,
        config.method,
        "no scores" if score is None else f"{summary['metric']} {score:.4f}",
        summary["bytes_up"],
        summary["bytes_down"],
        summary["rounds"],
    )
    log.info(
        "Flower's messages: %d bytes to nodes, %d from nodes",
        carrier.bytes_sent,
        carrier.bytes_received,
    )
    if run.folder is not None:
        log.info("run folder: %s", run.folder)


def _show(record: RoundRecord | ClientRecord) -> None:
    if isinstance(record, ClientRecord):
        return
    roles = ("mentor", "mentee")
    scores = {role: getattr(record, f"score_{role}") for role in roles}
    shown = [f"{role} {score:.4f}" for role, score in scores.items() if score is not None]
    log.info(
        "round %d/%d: %s, %.0f bytes up and %.0f down a client",
        record.round,
        record.rounds,
        f"{record.split} {', '.join(shown)}" if shown else "no scores",
        record.bytes_up,
        record.bytes_down,
    )
