"""The filters of NVFLARE: what they hand on, what they refuse, and that the server lives."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import nvflare_stand_in as stand_in
import pytest
import torch
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.integrations.link import Compression, MissingBaseError

if stand_in.REAL:
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReturnCode
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.apis.utils.fl_context_utils import gen_new_peer_ctx
    from nvflare.app_common.decomposers import numpy_decomposers
else:
    from nvflare_stand_in import (  # type: ignore[assignment]
        DXO,
        DataKind,
        EventType,
        FLContextManager,
        ReturnCode,
        Shareable,
        from_shareable,
        gen_new_peer_ctx,
    )

if stand_in.REAL:
    flare_decomposers.register()
    numpy_decomposers.register()
adapter = stand_in.load()
KINDS = ["numpy", "torch"]


def model(seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(40, 30, generator=made),
        "bias": torch.randn(40, generator=made),
        "batches": torch.tensor(7),
    }


def moved(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1000 + seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=made)
        if value.is_floating_point()
        else value + 1
        for name, value in weights.items()
    }


def as_kind(weights: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    return {name: value.numpy() if kind == "numpy" else value for name, value in weights.items()}


def as_torch(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in weights.items()}


class End:
    """The filters of a site, in its run's context."""

    def __init__(self, name: str, data: Any, result: Any) -> None:
        self.data, self.result = data, result
        self.manager = FLContextManager(engine=None, identity_name=name, job_id="job")
        for one in (data, result):
            one.handle_event(EventType.START_RUN, self.context())

    def context(self, peer: End | None = None) -> Any:
        made = self.manager.new_context()
        if peer is not None:
            made.set_peer_context(gen_new_peer_ctx(peer.context()))
        return made


def server(down: Compression | None = None, refused: str = "skip") -> End:
    down = down or Compression()
    compress = adapter.CompressBroadcast(down.energy, down.feedback, down.codec)
    return End("server", compress, adapter.RestoreReply(refused))


def client(name: str = "site-1", up: Compression | None = None) -> End:
    up = up or Compression()
    reply = adapter.CompressReply(up.energy, up.feedback, up.codec)
    return End(name, adapter.RestoreBroadcast(), reply)


def broadcast(at: End, weights: Mapping[str, Any], number: int, to: End) -> Any:
    """Return the task as it leaves the server."""
    # Each client's task is a shareable of its own around the same data.
    task = DXO(DataKind.WEIGHTS, weights).to_shareable()  # type: ignore[arg-type]
    task.set_header("current_round", number)
    return at.data.process(task, at.context(to))


def received(at: End, task: Any) -> dict[str, Any]:
    found: dict[str, Any] = from_shareable(
        at.data.process(stand_in.travelled(task), at.context())
    ).data
    return found


def reply(at: End, weights: Mapping[str, Any], kind: str = DataKind.WEIGHTS) -> Any:
    """Return the result as it leaves the client."""
    meta = {"NUM_STEPS_CURRENT_ROUND": 5}
    return at.result.process(DXO(kind, dict(weights), meta).to_shareable(), at.context())


def taken(at: End, result: Any, of: End) -> Any:
    """Return the DXO that the aggregator gets."""
    return from_shareable(at.result.process(stand_in.travelled(result), at.context(of)))


def held(at: End) -> dict[str, Tensor]:
    found: dict[str, Tensor] = at.context().get_prop("fedkd_fast.server").broadcaster.held
    return found


def same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    first, second = as_torch(one), as_torch(two)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_rounds_of_fedavg(kind: str, sent: str) -> None:
    at = server(Compression(feedback=sent == DataKind.WEIGHTS))
    sites = [client("site-1"), client("site-2")]
    weights: dict[str, Any] = as_kind(model(), kind)
    for number in range(4):
        before = {
            name: value.copy() if kind == "numpy" else value.clone()
            for name, value in weights.items()
        }
        results, sizes = [], []
        for index, site in enumerate(sites):
            task = broadcast(at, weights, number, site)
            sizes.append(sum(map(len, from_shareable(task).data["frames"])))
            got = received(site, task)
            assert all(type(got[name]) is type(before[name]) for name in got)
            assert same(got, held(at))
            trained = moved(as_torch(got), 10 * number + index)
            step = (
                trained
                if sent == DataKind.WEIGHTS
                else {name: value - torch.as_tensor(got[name]) for name, value in trained.items()}
            )
            result = reply(site, as_kind(step, kind), sent)
            assert list(from_shareable(result).data) == ["frame"]
            dxo = taken(at, result, site)
            assert dxo.data_kind == sent and dxo.get_meta_prop("NUM_STEPS_CURRENT_ROUND") == 5
            assert dxo.get_meta_prop("PROCESSED_ALGORITHM") is None
            assert all(type(dxo.data[name]) is type(before[name]) for name in before)
            if number == 0:
                base = held(at) if sent == DataKind.WEIGHTS else dict.fromkeys(step, 0)
                wanted, found = (
                    step["matrix"] - base["matrix"],
                    torch.as_tensor(dxo.data["matrix"]) - base["matrix"],
                )
                assert float((wanted - found).norm()) <= 0.2**0.5 * float(wanted.norm()) * 1.001
            assert int(dxo.data["batches"]) == int(step["batches"])
            results.append(as_torch(dxo.data))
        assert same(weights, before)  # the server's own are untouched
        assert number == 0 or max(sizes) < 0.2 * 4 * 40 * 30
        mean = {name: (results[0][name] + results[1][name]) / 2 for name in weights}
        if sent == DataKind.WEIGHT_DIFF:
            mean = {name: torch.as_tensor(weights[name]) + value for name, value in mean.items()}
        weights = as_kind(mean, kind)


def gap(sent: str, feedback: bool) -> float:
    """How far clients stay behind a server that is moved by one step ten times."""
    at, site = (
        server(Compression(0.5, feedback)),
        client(up=Compression(codec="raw", feedback=False)),
    )
    weights = {name: model()[name] for name in ("matrix", "bias")}
    step = {name: moved(weights, 1)[name] - value for name, value in weights.items()}
    goal = weights
    for number in range(12):
        got = as_torch(received(site, broadcast(at, weights, number, site)))
        if number == 11:
            return float((got["matrix"] - goal["matrix"]).norm() / step["matrix"].norm())
        told = step if sent == DataKind.WEIGHT_DIFF else {k: got[k] + step[k] for k in got}
        mean = as_torch(taken(at, reply(site, told, sent), site).data)
        # FedAvg: `FLModelUtils.update_model`.
        weights = mean if sent == DataKind.WEIGHTS else {k: weights[k] + mean[k] for k in mean}
        goal = {k: goal[k] + step[k] for k in goal}
    raise AssertionError


def test_the_residual_of_the_way_down_belongs_where_the_server_forgets() -> None:
    assert gap(DataKind.WEIGHTS, True) < 0.4 * gap(DataKind.WEIGHTS, False)
    assert gap(DataKind.WEIGHT_DIFF, False) < 0.7 * gap(DataKind.WEIGHT_DIFF, True)


def test_a_round_is_encoded_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    at = server()
    sites = [client(f"site-{index}") for index in range(8)]
    for site in sites:
        received(site, broadcast(at, model(), 0, site))
    broadcaster = at.context().get_prop("fedkd_fast.server").broadcaster
    calls = []
    publish = broadcaster.publish
    monkeypatch.setattr(broadcaster, "publish", lambda w: (calls.append(1), publish(w))[1])
    weights = moved(model(), 1)
    with ThreadPoolExecutor(8) as pool:
        tasks = list(pool.map(lambda site: broadcast(at, weights, 1, site), sites))
    frames = [from_shareable(task).data["frames"] for task in tasks]
    assert calls == [1] and broadcaster.version == 2
    assert all(len(one) == 1 and one[0] is frames[0][0] for one in frames)
    weights["matrix"].add_(1)  # in place, in a later round
    broadcast(at, weights, 2, sites[0])
    assert broadcaster.version == 3


def test_a_client_that_was_restarted_gets_the_whole_model() -> None:
    at, site = server(), client()
    received(site, broadcast(at, model(), 0, site))
    fresh = client()
    task = broadcast(at, moved(model(), 1), 1, fresh)
    assert same(received(fresh, task), held(at))
    with pytest.raises(MissingBaseError, match="version 0 is held here"):
        # Had it not said so, the difference would have been refused.
        received(client(), broadcast(at, moved(model(), 1), 1, site))


def test_a_new_run_begins_anew() -> None:
    site = client()
    for seed in range(2):
        at = server()
        assert same(received(site, broadcast(at, model(seed), 0, site)), held(at))


def harm(result: Any, how: str) -> Any:
    result = stand_in.travelled(result)
    content = result["DXO"]["data"]
    frame = content["frame"]
    if how == "undecoded":
        result["DXO"]["meta"] = {}
        result["DXO"]["data"] = as_kind(model(), "numpy")
    else:
        content["frame"] = {
            "cut": frame[:-1],
            "flipped": frame[:20] + bytes([frame[20] ^ 1]) + frame[21:],
            "oversized": b"\0" * 10_000_000,
            "text": "frame",
            "none": None,
        }[how]
    return result


HARMS = {
    "cut": "bytes",
    "flipped": "site-1",
    "oversized": "at most",
    "text": "must hold 'frame' as bytes",
    "none": "must hold 'frame' as bytes",
    "undecoded": "CompressReply in the client's task_result_filters",
}


@pytest.mark.parametrize("sent", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize("how", HARMS)
def test_hostile_replies_count_as_nothing_learned(
    how: str, sent: str, caplog: pytest.LogCaptureFixture
) -> None:
    at, site = server(), client()
    got = as_torch(received(site, broadcast(at, as_kind(model(), "numpy"), 0, site)))
    step = moved(got, 1) if sent == DataKind.WEIGHTS else model(3)
    bad = harm(reply(site, step, sent), how)
    with caplog.at_level(logging.ERROR):
        dxo = taken(at, bad, site)
    assert "refused the reply of site-1" in caplog.text and HARMS[how] in caplog.text
    assert 0 < dxo.get_meta_prop("NUM_STEPS_CURRENT_ROUND") < 1e-9
    want = held(at) if sent == DataKind.WEIGHTS else {k: v - v for k, v in held(at).items()}
    assert same(dxo.data, want) and isinstance(dxo.data["matrix"], np.ndarray)
    strict = End("server", at.data, adapter.RestoreReply("fail"))
    with pytest.raises(ValueError if how not in ("text", "none") else TypeError):
        received(site, broadcast(strict, model(), 0, site))
        taken(strict, bad, site)


def test_a_reply_to_an_older_version_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    at, slow = server(), client()
    got = as_torch(received(slow, broadcast(at, model(), 0, slow)))
    late = reply(slow, moved(got, 1))
    broadcast(at, moved(model(), 2), 1, client("site-2"))
    taken(at, late, slow)
    assert "round 1" in caplog.text


@pytest.mark.parametrize(
    "said", [None, 5, "x", [], {}, {"run": 1}, *(1.5, math.nan, "1", None, -1, 10**30, True)]
)
def test_what_a_client_says_of_itself_harms_only_itself(said: object) -> None:
    at, site = server(), client()
    received(site, broadcast(at, model(), 0, site))
    run = at.context().get_prop("fedkd_fast.server").broadcaster.run
    plain = said is None or isinstance(said, list | dict)
    told = said if plain else {"run": run, "version": said}
    site.context().set_prop("fedkd_fast.said", told, private=False, sticky=True)
    frames = from_shareable(broadcast(at, moved(model(), 1), 1, site)).data["frames"]
    assert len(frames) == 1
    whole = wire.header(frames[0]).base is None
    assert whole or said is True  # True is 1, which it holds


def test_errors_of_a_client_are_named_on_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    at, site = server(), client()
    got = as_torch(received(site, broadcast(at, model(), 0, site)))
    for bad, words in (
        ({**got, "more": torch.zeros(2)}, "'more' not in it"),
        ({**got, "bias": torch.zeros(3)}, "'bias' is"),
        ({**got, "bias": torch.full((40,), math.nan)}, "'bias'.* NaN"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            reply(site, bad)
        failed = Shareable()
        failed.set_return_code(ReturnCode.TASK_DATA_FILTER_ERROR)
        at.result.process(failed, at.context(site))
        assert f"site-1 failed: {caught.value}" in caplog.text
    with pytest.raises(ValueError, match="'bias'.* only in it"):
        reply(site, {"matrix": got["matrix"]}, DataKind.WEIGHT_DIFF)
    with pytest.raises(
        ValueError, match=r"'bias' is \(1,\) float32, what was received has \(40,\)"
    ):
        reply(site, {**got, "bias": torch.zeros(1)}, DataKind.WEIGHT_DIFF)
    task = broadcast(at, moved(model(), 1), 1, site)
    assert same(received(site, task), held(at))  # the whole model: it may hold anything
    task["DXO"]["data"]["frames"] = [b"FK" * 40]
    with pytest.raises(wire.WireError):
        received(site, task)
    with pytest.raises(ValueError, match="is CompressBroadcast in the server's"):
        received(site, DXO(DataKind.WEIGHTS, model()).to_shareable())  # type: ignore[arg-type]


def test_weights_that_cannot_be_sent_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    at, site = server(), client()
    said: list[str] = []
    monkeypatch.setattr(at.data, "system_panic", lambda reason, fl_ctx: said.append(reason))
    with pytest.raises(ValueError, match="NaN"):
        broadcast(at, {**model(), "bias": torch.full((40,), math.nan)}, 0, site)
    assert len(said) == 1 and "the weights cannot be sent" in said[0] and "'bias'" in said[0]
    received(site, broadcast(at, model(), 0, site))
    with pytest.raises(ValueError, match="'bias'.* only in it"):
        broadcast(at, {"matrix": model()["matrix"]}, 1, site)


def test_a_filter_without_its_pair_says_so() -> None:
    at, site = server(), client()
    got = as_torch(received(site, broadcast(at, model(), 0, site)))
    result = reply(site, got)
    lonely = End("server", adapter.RestoreReply(), adapter.RestoreReply())
    with pytest.raises(ValueError, match="CompressBroadcast is missing .* of server"):
        taken(lonely, result, site)
    other = End("site-2", adapter.RestoreBroadcast(), adapter.RestoreBroadcast())
    with pytest.raises(ValueError, match="CompressReply is missing .* of site-2"):
        received(other, broadcast(at, model(), 0, other))
    with pytest.raises(MissingBaseError, match="receive comes before reply"):
        reply(client("site-3"), got)


def test_differences_with_feedback_down_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    at, site = server(Compression(feedback=True)), client()
    received(site, broadcast(at, model(), 0, site))
    taken(at, reply(site, model(2), DataKind.WEIGHT_DIFF), site)
    assert "CompressBroadcast needs feedback=False" in caplog.text
