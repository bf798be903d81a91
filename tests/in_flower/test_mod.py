"""compress_mod and CompressedStrategyMixin with Flower's own apps, strategies and messages."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, Krum

from fedkd_fast.integrations.flower import (
    CompressedStrategyMixin,
    Compression,
    array_record,
    check_version,
    compress_mod,
)
from fedkd_fast.integrations.flower.records import CONTROL
from tests.in_flower.apps import (
    TARGET,
    Compressed,
    Net,
    app_of,
    plain,
    small,
    start,
    weights,
)
from tests.in_flower.grid import LocalGrid, through_proto


def test_lossless_messages_change_nothing() -> None:
    raw = Compression(codec="raw")
    ours = Compressed(compression=raw).start(
        LocalGrid(lambda node: app_of(node, compress_mod(raw))), start(), num_rounds=3
    )
    theirs = FedAvg().start(LocalGrid(plain), start(), num_rounds=3)
    wanted = weights(theirs.arrays)
    for name, value in weights(ours.arrays).items():
        if name != "norm.num_batches_tracked":
            # Differences are rounded once more.
            assert np.allclose(value, wanted[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("base", [FedAvg, FedAdam, FedAvgM, FedProx, FedMedian, Krum])
def test_all_strategies_learn_through_frames(base: type[FedAvg]) -> None:
    made = type("Small", (CompressedStrategyMixin, base), {})
    options = {"eta": 0.05} if base is FedAdam else {}
    options |= {"proximal_mu": 0.1} if base is FedProx else {}
    ours, theirs = made(**options), base(**options)
    nodes = 4 if base is Krum else 3
    found = ours.start(LocalGrid(small, nodes), start(), num_rounds=12)
    wanted = theirs.start(LocalGrid(plain, nodes), start(), num_rounds=12)
    gaps = [one.evaluate_metrics_clientapp[12]["gap"] for one in (found, wanted)]
    first = wanted.evaluate_metrics_clientapp[1]["gap"]
    assert gaps[1] < first
    assert gaps[0] < gaps[1] + 0.1 * first
    up = sum(row.up for row in ours.traffic) / sum(row.dense_up for row in ours.traffic)
    assert up < 0.25


def test_a_broadcast_is_encoded_once_and_what_is_held_is_not_sent_again() -> None:
    strategy, grid = Compressed(), LocalGrid(small, nodes=3)
    strategy.start(grid, start(), num_rounds=3)
    frames = [message.content["arrays"]["frames"].data for message in grid.down]
    assert len(frames) == 3 * 3 * 2
    whole = frames[:3]
    assert len(whole[0]) > TARGET.nbytes and len(set(whole)) == 1
    for number in range(3):
        evaluation = frames[6 * number + 3 : 6 * number + 6]
        assert len(set(evaluation)) == 1 and 0 < len(evaluation[0]) < TARGET.nbytes / 4
        if number:
            assert set(frames[6 * number : 6 * number + 3]) == {b""}
    assert sum(map(len, frames)) == sum(row.down for row in strategy.traffic)
    assert grid.frames_up == sum(row.up for row in strategy.traffic)


def test_a_shared_start_is_not_sent() -> None:
    def app(node: int) -> ClientApp:
        return app_of(node, compress_mod(initial=lambda context: Net().state_dict()))

    strategy = Compressed(shared_start=True)
    grid = LocalGrid(app)
    strategy.start(grid, start(), num_rounds=2)
    assert all(message.content["arrays"]["frames"].data == b"" for message in grid.down[:2])
    assert max(row.down for row in strategy.traffic) < TARGET.nbytes
    assert not any(row.refused for row in strategy.traffic)


def test_counters_stay_whole_numbers() -> None:
    strategy = Compressed()
    strategy.start(LocalGrid(small), start(), num_rounds=2)
    tracked = strategy._link.held["norm.num_batches_tracked"]
    # Weighted by 10 and 20 samples: 1 and 2 more are 1.67 more a round, which is 2.
    assert tracked.dtype == torch.int64 and int(tracked) == 4


def test_models_in_bfloat16() -> None:
    def app(node: int) -> ClientApp:
        return app_of(node, compress_mod(), dtype=torch.bfloat16)

    initial = array_record(Net().bfloat16().state_dict())
    assert initial["weight"].dtype == "float32"
    strategy = Compressed()
    found = strategy.start(LocalGrid(app), initial, num_rounds=4)
    gaps = [row["gap"] for row in found.evaluate_metrics_clientapp.values()]
    assert gaps[-1] < gaps[0] and not any(row.refused for row in strategy.traffic)


def test_privacy_within_works_and_without_is_an_error_that_says_why() -> None:
    privacy = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=100.0, delta=1e-5)
    strategy = Compressed()
    found = strategy.start(
        LocalGrid(lambda node: app_of(node, compress_mod(), privacy)), start(), num_rounds=1
    )
    moved = weights(found.arrays)["weight"] - weights(start())["weight"]
    assert 0 < np.linalg.norm(moved) < 2.5
    grid = LocalGrid(lambda node: app_of(node, privacy, compress_mod()))
    Compressed().start(grid, start(), num_rounds=1)
    trained = [m for m in grid.up if m.metadata.message_type.startswith("train")]
    reasons = [message.error.reason for message in trained]
    assert len(reasons) == 2 and all(
        "compress_mod must be the first" in reason for reason in reasons
    )


def test_one_half_alone_is_an_error_that_says_what_is_missing() -> None:
    grid = LocalGrid(small)
    FedAvg().start(grid, start(), num_rounds=1)
    assert all("make CompressedStrategyMixin its first base" in m.error.reason for m in grid.up)
    grid = LocalGrid(plain)
    Compressed().start(grid, start(), num_rounds=1)
    assert all(
        "CompressedStrategyMixin the first base of the server's strategy" in m.error.reason
        for m in grid.up
        if m.has_error()
    )


class Careless(CompressedStrategyMixin, FedAvg):
    """Decodes nothing."""

    def aggregate_train(self, server_round, replies):
        return FedAvg.aggregate_train(self, server_round, replies)


def test_a_reply_that_was_not_decoded_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match="frames of fedkd_fast; compress_mod must be"):
        Careless().start(LocalGrid(small), start(), num_rounds=1)


def with_frame(message: Message, data: bytes, stype: str | None = None) -> Message:
    old = message.content["arrays"]["frames"]
    array = Array("uint8", (len(data),), stype or old.stype, data)
    message.content["arrays"] = ArrayRecord({"frames": array})
    message.content[CONTROL]["lengths"] = [len(data)]
    return message


def flipped(message: Message) -> Message:
    data = bytearray(message.content["arrays"]["frames"].data)
    data[len(data) // 2] ^= 1
    return with_frame(message, bytes(data))


def without(message: Message, name: str) -> Message:
    del message.content[name]
    return message


def versioned(message: Message, version: int) -> Message:
    message.content[CONTROL]["version"] = version
    return message


HOSTILE = {
    "flipped": (flipped, "check"),
    "truncated": (lambda m: with_frame(m, m.content["arrays"]["frames"].data[:-9]), "bytes"),
    "huge": (lambda m: with_frame(m, bytes(30_000_000)), "at most"),
    "empty": (lambda m: with_frame(m, b""), ""),
    "plain arrays": (lambda m: with_frame(m, b"\0" * 8, "numpy.ndarray"), "plain arrays"),
    "no arrays": (lambda m: without(m, "arrays"), "one ArrayRecord, got 0"),
    "no control": (lambda m: without(m, CONTROL), "make compress_mod the first"),
    "future": (lambda m: versioned(m, 99), "must lie in"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_server_outlives_what_a_client_sends(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, word = HOSTILE[kind]

    def tamper(node: int, message: Message) -> Message:
        train = message.metadata.message_type.startswith("train")
        return change(message) if node == 2 and train else message

    strategy = Compressed()
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.WARNING, "flwr"):
        found = strategy.start(LocalGrid(small, 3, tamper), start(), num_rounds=3)
    assert [set(row.refused) for row in strategy.traffic] == [{2}] * 3
    assert all(word in row.refused[2] for row in strategy.traffic)
    assert "reply of node 2 is refused" in caplog.text
    gaps = [row["gap"] for row in found.evaluate_metrics_clientapp.values()]
    assert gaps[-1] < gaps[0]


class Spoiled(FedAvg):
    """Puts something else in the place of one of the weights of the second round."""

    def __init__(self, bad: dict[str, Array]) -> None:
        super().__init__()
        self.bad = bad

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 2:
            arrays = ArrayRecord({**arrays, **self.bad})
        return arrays, metrics


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", np.full((32, 48), np.inf, np.float32), "round 2: the mean is not finite"),
        (
            "norm.num_batches_tracked",
            np.array(2.0**64),
            "the weights do not count, those before are sent: 'norm.num_batches_t",
        ),
    ],
)
def test_a_mean_that_cannot_be_sent_does_not_count(
    name: str, value: np.ndarray, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = type("Small", (CompressedStrategyMixin, Spoiled), {})({name: Array(value)})
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.ERROR, "flwr"):
        found = strategy.start(LocalGrid(small), start(), num_rounds=3)
    assert message in caplog.text
    gaps = [row["gap"] for row in found.evaluate_metrics_clientapp.values()]
    assert gaps[0] == gaps[1] > gaps[2]


class Private(Compressed):
    """Adds noise to what the strategy below makes, as central differential privacy does."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.means.append(weights(arrays)["weight"])
        noisy = Array(self.means[-1] + 100 * server_round)
        return ArrayRecord({**arrays, "weight": noisy}), metrics


def test_a_mean_that_another_class_changes_is_not_sent() -> None:
    raw = Compression(codec="raw")
    strategy = Private(compression=raw)
    strategy.means = []
    seen: list[np.ndarray] = []

    def watched(node: int) -> ClientApp:
        return app_of(node, compress_mod(raw), watch)

    def watch(message, context, call_next):
        seen.append(weights(message.content["arrays"])["weight"])
        return call_next(message, context)

    grid = LocalGrid(watched)
    strategy.start(grid, start(), num_rounds=3)
    assert len(strategy.means) == 3 and len(seen) == 12
    for mean in strategy.means:
        assert min(np.abs(one - mean).max() for one in seen) > 0.5
    frames = [message.content["arrays"]["frames"].data for message in grid.down]
    # The first weights, and one version a round.
    assert len({frame for frame in frames if len(frame)}) == 4


def test_a_run_goes_on_from_averaged_counters() -> None:
    """FedAvg makes floating numbers of counters, and what it made begins the next run."""
    first = Compressed().start(LocalGrid(small), start(), num_rounds=2)
    strategy = Compressed()
    found = strategy.start(LocalGrid(small), first.arrays, num_rounds=3)
    assert all(row.refused == {} for row in strategy.traffic)
    gaps = [row["gap"] for one in (first, found) for row in one.evaluate_metrics_clientapp.values()]
    assert gaps[-1] < gaps[1] < gaps[0]


def test_a_strategy_may_be_started_again() -> None:
    """With the same clients, or new ones, or another model: as a new strategy would go on."""
    strategy = Compressed()
    strategy.start(LocalGrid(small), start(), num_rounds=2)
    before = strategy.traffic
    grid = LocalGrid(small)
    found = strategy.start(grid, start(), num_rounds=2)
    wanted = Compressed().start(LocalGrid(small), start(), num_rounds=2)
    assert [row.round for row in strategy.traffic] == [1, 2]
    assert strategy.traffic == before
    for name, value in weights(found.arrays).items():
        assert np.array_equal(value, weights(wanted.arrays)[name]), name


class InPlace(FedAvg):
    """Keeps one record, whose arrays it replaces."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 1:
            self.record = arrays
        else:
            self.record.update(arrays)
        return self.record, metrics


def test_a_record_that_is_changed_in_place_is_sent() -> None:
    strategy = type("Small", (CompressedStrategyMixin, InPlace), {})()
    found = strategy.start(LocalGrid(small), start(), num_rounds=4)
    wanted = Compressed().start(LocalGrid(small), start(), num_rounds=4)
    gaps = [
        [row["gap"] for row in one.evaluate_metrics_clientapp.values()] for one in (found, wanted)
    ]
    assert gaps[0] == gaps[1]


def test_a_client_that_lost_its_state_is_named_and_gets_the_whole_model() -> None:
    strategy, grid = Compressed(), LocalGrid(small)
    arrays = start()
    for number in range(1, 5):
        if number == 3:
            grid.contexts[2] = grid.context(2)  # came back on a new disk
        grid.up.clear()
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        sent = {m.metadata.dst_node_id: len(m.content["arrays"]["frames"].data) for m in messages}
        arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
        errors = {m.metadata.src_node_id: m.error.reason for m in grid.up if m.has_error()}
        assert set(errors) == ({2} if number == 3 else set())
        if errors:
            assert errors[2].startswith("MissingBaseError: the server's message leads from version")
        assert (sent[2] > TARGET.nbytes) == (number in (1, 4))
        assert sent[1] < TARGET.nbytes or number == 1


def test_a_client_that_was_not_sampled_catches_up() -> None:
    strategy, grid = Compressed(), LocalGrid(small, nodes=4)
    arrays = start()
    for number in range(1, 7):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        if number not in (1, 6):
            messages = [m for m in messages if m.metadata.dst_node_id != 3]
        replies = grid.send_and_receive(messages)
        arrays, _ = strategy.aggregate_train(number, replies)
        assert not any(message.has_error() for message in replies)
    last = [m for m in grid.down if m.metadata.dst_node_id == 3][-1]
    assert 1 < len(last.content[CONTROL]["lengths"]) <= 5


def test_another_model_is_refused_on_either_side() -> None:
    strategy, grid = Compressed(), LocalGrid(small)
    arrays = start()
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    more = ArrayRecord({**arrays, "more": Array(np.zeros(3, np.float32))})
    with pytest.raises(ValueError, match="'more' not in it"):
        strategy.configure_train(2, more, ConfigRecord(), grid)

    def smaller(node: int) -> ClientApp:
        app = ClientApp(mods=[compress_mod()])

        @app.train()
        def train(message: Message, context: object) -> Message:
            state = message.content["arrays"].to_torch_state_dict()
            state["weight"] = state["weight"][:4]
            metrics = MetricRecord({"num-examples": 1})
            return Message(
                RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message
            )

        return app

    grid = LocalGrid(smaller)
    Compressed().start(grid, start(), num_rounds=1)
    trained = [m for m in grid.up if m.metadata.message_type.startswith("train")]
    assert len(trained) == 2
    assert all("'weight' is (4, 48)" in message.error.reason for message in trained)


def test_frames_survive_the_transport() -> None:
    strategy, grid = Compressed(), LocalGrid(small)
    (message, _) = strategy.configure_train(1, start(), ConfigRecord({"lr": 0.1}), grid)
    arrived = through_proto(copy.copy(message))
    assert arrived.content == message.content
    assert arrived.content["config"]["lr"] == 0.1


def test_versions_of_flower() -> None:
    check_version("1.39.0")
    check_version("1.41.2")
    for found in ("1.38.1", "2.0.0", "0.19"):
        with pytest.raises(ImportError, match="needs flwr>=1.39,<2, got"):
            check_version(found)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="energy"):
        compress_mod(energy=0.0)
    with pytest.raises(TypeError, match="excludes further options, got energy"):
        compress_mod(Compression(), energy=0.9)
    with pytest.raises(TypeError, match="speed"):
        compress_mod(speed=3)
