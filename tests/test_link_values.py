"""Numbers that travel over a link: counters, masks, and what averages cannot hold."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from link_models import model, moved
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.integrations import link
from fedkd_fast.integrations.link import Broadcaster, Compression, Receiver


@pytest.mark.parametrize(
    "held",
    [
        torch.full((5, 5), torch.finfo(torch.float32).min).triu(1),
        torch.full((6,), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16),
        torch.tensor([2**62 + 1, -(2**63), 7]),
        torch.full((4,), 6e4, dtype=torch.float16),
    ],
    ids=["mask", "narrow mask", "hashes", "half"],
)
def test_numbers_that_were_held_before_are_welcome(held: Tensor) -> None:
    raw = Compression(codec="raw")
    for start in ({**model(), "held": held}, {**model(), "held": torch.zeros_like(held)}):
        server, client = Broadcaster(raw), Receiver(raw)
        server.publish(start)
        trained = {**client.receive(server.letter("a")), "held": held}
        if start["held"] is held or held.dtype == torch.float16:
            assert torch.equal(server.weights(client.reply(trained))["held"], held)
        else:
            with pytest.raises(ValueError, match="'held' holds numbers that averages cannot"):
                server.weights(client.reply(trained))


def test_averages_of_counters_become_counters_again() -> None:
    server = Broadcaster()
    server.publish(model())
    weights: dict[str, object] = dict(model())
    weights["batches"] = np.float64(11.6)
    server.publish(weights)
    assert server.held["batches"].dtype == torch.int64 and int(server.held["batches"]) == 12


def test_counters_may_begin_as_averages() -> None:
    """As where weights that a framework has averaged begin another run."""
    server, client = Broadcaster(), Receiver()
    server.publish({**model(), "batches": np.float64(11.0)})
    received = client.receive(server.letter("a"))
    trained: dict[str, object] = {**moved(received, 1), "batches": torch.tensor(15)}
    found = server.weights(client.reply(trained))
    assert found["batches"].dtype == torch.float64 and float(found["batches"]) == 15.0
    # What that dtype cannot hold is no counter of it.
    with pytest.raises(ValueError, match="'batches' is \\(\\) int64"):
        client.reply({**trained, "batches": torch.tensor(2**53 + 1)})


@pytest.mark.parametrize("codec", ["wf1", "wf0"])
def test_weights_that_cannot_be_sent_leave_no_trace(codec: str) -> None:
    server, client = Broadcaster(Compression(codec=codec)), Receiver()
    start = {"half": torch.full((300, 200), 6e4, dtype=torch.float16)}
    server.publish(start)
    client.receive(server.letter("a"))
    server.publish({"half": start["half"] - 100 * torch.randn(300, 200).half()})
    kept = {name: one.clone() for name, one in server._compressor.state_dict().items()}
    bad = {"half": torch.full((300, 200), torch.nan, dtype=torch.float16)}
    with pytest.raises(ValueError, match="NaN"):
        server.publish(bad)
    for error in (wire.WireError("beyond float16"), MemoryError("beyond memory")):
        with (
            mock.patch.object(link, "decompress", side_effect=error),
            pytest.raises(type(error), match="beyond"),
        ):
            server.publish({"half": start["half"] + 1000})
    after = server._compressor.state_dict()
    assert server.version == 2 and kept.keys() == after.keys()
    assert all(torch.equal(kept[name], after[name]) for name in kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [("embed", 3.4e38), ("half", 3.3e38), ("batches", 2**63 - 1), ("batches", -(2**53) - 1)],
)
def test_numbers_that_would_spoil_averages_are_refused(name: str, value: float) -> None:
    server, client = Broadcaster(Compression(codec="raw")), Receiver(Compression(codec="raw"))
    server.publish({**model(), name: torch.zeros_like(model()[name])})
    trained = client.receive(server.letter("a"))
    trained[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"'{name}' holds numbers that averages cannot hold"):
        server.weights(client.reply(trained))
