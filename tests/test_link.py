"""Both ends of a link: what they hold is the same bits, whatever is lost, late or hostile."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from link_models import model, moved
from torch import Tensor

from fedkd_fast import wire
from fedkd_fast.decompression import decompress
from fedkd_fast.integrations.link import (
    Broadcaster,
    Compression,
    Letter,
    MissingBaseError,
    Receiver,
)
from fedkd_fast.tensors import digest_of, specs_of
from fedkd_fast.wire import Mode

CODECS = ["wf1", "dense", "wf0", "factors-fp32", "raw"]


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return sum(float((one[name].double() - two[name].double()).norm() ** 2) for name in one) ** 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_both_ends_hold_the_same_bits_for_many_rounds(codec: str) -> None:
    compression = Compression(codec=codec)
    server, client = Broadcaster(compression), Receiver(compression)
    weights = model()
    for number in range(1, 5):
        server.publish(weights)
        received = client.receive(server.letter("a"))
        assert digest_of(received) == digest_of(server.held) == client.digest
        server.confirm("a", client.version)
        trained = moved(received, number)
        weights = server.weights(client.reply(trained))
        assert weights.keys() == trained.keys()
        assert torch.equal(weights["batches"], trained["batches"])
    assert server.version == client.version == 4


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_tied_travels_once_and_stays_tied(codec: str) -> None:
    compression = Compression(codec=codec)
    server, client = Broadcaster(compression), Receiver(compression)
    weights = {"embed": torch.randn(40, 30), "head": torch.zeros(0)}
    weights["head"] = weights["embed"]
    for _ in range(3):
        server.publish(weights)
        letter = server.letter("a")
        received = client.receive(letter)
        server.confirm("a", client.version)
        assert received["head"] is received["embed"]
        reply = client.reply({"embed": (new := received["embed"] + 1), "head": new})
        for frame in (*letter.frames, reply):
            assert wire.decode(frame, schema=specs_of(received)).entries[1].mode is Mode.ALIAS
        weights = server.weights(reply)


@pytest.mark.parametrize("codec", CODECS)
def test_differences_travel_as_they_are(codec: str) -> None:
    compression = Compression(energy=0.95, codec=codec)
    server, client = Broadcaster(compression), Receiver(compression)
    server.publish(model())
    received = client.receive(server.letter("a"))
    trained = moved(received, 1)
    update = {name: trained[name] - value for name, value in received.items()}
    # In any order, and of wider dtypes than the weights have.
    given = {name: update[name] for name in reversed(list(update))}
    given["half"], given["batches"] = given["half"].double(), torch.tensor(0.9999)
    frame = client.reply(given, differences=True)
    found = server.differences(frame)
    assert list(found) == list(received) and torch.equal(found["batches"], torch.tensor(1))
    for name, value in update.items():
        assert found[name].dtype == value.dtype
        if value.is_floating_point():
            lost = (found[name] - value).double().norm() ** 2
            assert lost <= (0.05 if codec != "raw" else 0.0) * value.double().norm() ** 2
    for wrong, said in (
        ({"bias": update["bias"]}, "'embed', 'conv', 'half' only in it"),
        ({**update, "bias": torch.zeros(3)}, "'bias' is"),
        ({**update, "bias": torch.full((60,), torch.nan)}, "NaN"),
        ({**update, "batches": torch.tensor(torch.nan)}, "'batches' holds NaN, Inf"),
        ({**update, "batches": torch.tensor(1e20)}, "beyond torch.int64"),
    ):
        with pytest.raises(ValueError, match=said):
            client.reply(wrong, differences=True)


def test_the_way_down_feeds_back() -> None:
    """Servers make new weights from what clients hold; with feedback these go where they should."""
    gaps, start = {}, model()
    step = {name: moved(start, 1)[name] - value for name, value in start.items()}
    for feedback in (True, False):
        server, goal = Broadcaster(Compression(energy=0.5, feedback=feedback)), start
        server.publish(start)
        for _ in range(10):
            server.publish({name: value + step[name] for name, value in server.held.items()})
            goal = {name: value + step[name] for name, value in goal.items()}
        gaps[feedback] = distance(server.held, goal)
    assert gaps[True] < 0.35 * gaps[False]


def test_without_feedback_weights_that_remember_are_reached_as_well() -> None:
    start, target = model(0), moved(model(0), 1, 1.0)
    server = Broadcaster(Compression(energy=0.5, feedback=False))
    server.publish(start)
    for step in range(12):
        server.publish({**target, "batches": torch.tensor(step)})  # so that it is a new version
    assert distance(server.held, target) < 0.1 * distance(start, target)


def test_the_way_up_feeds_back() -> None:
    """Sums of what the server reads approach sums of what clients trained."""
    gaps = {}
    for feedback in (True, False):
        server, client = Broadcaster(), Receiver(Compression(energy=0.5, feedback=feedback))
        server.publish(model())
        base = client.receive(server.letter(0))
        got = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in base.items()}
        wanted = {name: value.clone() for name, value in got.items()}
        step = moved(base, 5)
        for _ in range(10):
            read = server.weights(client.reply(step))
            for name in got:
                got[name] += read[name].double() - base[name].double()
                wanted[name] += step[name].double() - base[name].double()
        gaps[feedback] = distance(got, wanted)
    assert gaps[True] < 0.35 * gaps[False]


def test_each_version_is_encoded_once_and_sent_once() -> None:
    server, client = Broadcaster(), Receiver()
    weights = model()
    assert server.publish(weights) == server.publish(weights) == 1
    assert len(server.letter("a").frames) == 1
    client.receive(server.letter("a"))
    server.confirm("a", 1)
    assert server.letter("a").frames == ()  # evaluation, then training: nothing new
    assert server.publish(moved(weights, 1)) == 2
    first, second = server.letter("a"), server.letter("a")
    assert first.frames[0] is second.frames[0]
    client.receive(first)
    server.confirm("a", 2)
    before = client.digest
    again = client.receive(server.letter("a"))
    assert server.letter("a").nbytes == 0 and digest_of(again) == before


def test_a_client_that_was_away_catches_up_in_the_fewest_bytes() -> None:
    server, client = Broadcaster(), Receiver()
    weights = model()
    server.publish(weights)
    client.receive(server.letter("a"))
    server.confirm("a", 1)
    for number in range(3):
        weights = moved(weights, number, 0.01)
        server.publish(weights)
    letter = server.letter("a")
    assert len(letter.frames) == 3
    whole = server.letter("new")
    assert len(whole.frames) == 1 and letter.nbytes < whole.nbytes
    fresh = Receiver()
    assert (
        digest_of(fresh.receive(whole))
        == digest_of(client.receive(letter))
        == digest_of(server.held)
    )
    for number in range(60):
        weights = moved(weights, number, 0.01)
        server.publish(weights)
    assert len(server.letter("a").frames) == 1  # the whole model is smaller
    assert digest_of(client.receive(server.letter("a"))) == digest_of(server.held)


def test_what_the_server_takes_for_lost_may_have_come() -> None:
    server, client = Broadcaster(), Receiver()
    weights = model()
    server.publish(weights)
    client.receive(server.letter("a"))
    server.confirm("a", 1)
    server.publish(moved(weights, 1))
    client.receive(server.letter("a"))  # and the client's answer got lost
    server.publish(moved(weights, 2))
    letter = server.letter("a")
    assert len(letter.frames) == 2
    assert digest_of(client.receive(letter)) == digest_of(server.held)


def test_a_client_without_its_base_says_so_and_gets_the_whole_model() -> None:
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    client.receive(server.letter("a"))
    server.confirm("a", 1)
    server.publish(moved(model(), 1))
    lost = Receiver()
    with pytest.raises(MissingBaseError, match="from version 1 .* to 2, but version 0 is held"):
        lost.receive(server.letter("a"))
    with pytest.raises(MissingBaseError, match="receive comes before reply"):
        lost.reply(model())
    server.forget("a")
    assert digest_of(lost.receive(server.letter("a"))) == digest_of(server.held)


def test_a_shared_start_is_not_sent_and_is_checked_by_what_follows() -> None:
    server = Broadcaster(shared_start=True)
    server.publish(model())
    assert server.letter("a").frames == ()
    with pytest.raises(MissingBaseError, match="initial= was not given"):
        Receiver().receive(server.letter("a"))
    client = Receiver(initial=model)
    assert digest_of(client.receive(server.letter("a"))) == digest_of(server.held)
    other = Receiver(initial=lambda: model(1))
    with pytest.raises(MissingBaseError, match="the same seed or file"):
        other.receive(server.letter("b"))
    server.forget("b")
    assert digest_of(other.receive(server.letter("b"))) == digest_of(server.held)


def test_state_goes_on_in_another_process() -> None:
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    base = client.receive(server.letter("a"))
    server.confirm("a", 1)
    client.reply(moved(base, 1))
    other = Receiver()
    other.load(client.state())
    assert other.reply(moved(base, 2)) == client.reply(moved(base, 2))
    server.publish(moved(base, 3))
    assert digest_of(other.receive(server.letter("a"))) == digest_of(server.held)


def test_a_state_older_than_a_reply_that_counts_has_no_residual() -> None:
    """What was left out has been sent with that reply: it would be sent once more."""
    server, client = Broadcaster(), Receiver()
    weights = model()
    states = []
    for number in range(1, 4):
        server.publish(weights)
        received = client.receive(server.letter("a"))
        weights = server.weights(client.reply(moved(received, number)))
        server.confirm("a", client.version, reply=client.replies)
        states.append(client.state())
    server.publish(weights)
    back = Receiver()
    back.load(states[1])  # the one of the third reply was lost on its way
    with pytest.raises(MissingBaseError):
        back.receive(server.letter("a"))
    server.forget("a")
    received = back.receive(server.letter("a"))
    fresh = Receiver()
    fresh.receive(server.letter("b"))
    trained = moved(received, 9)
    assert back.reply(trained) == fresh.reply(trained)
    # Whoever holds what the server knows of keeps it, also through a whole model.
    kept = Receiver()
    kept.load(states[2])
    kept.receive(server.letter("a"))
    assert kept.reply(trained) != fresh.reply(trained)


def test_two_replies_from_one_version_are_two() -> None:
    """As where the mean of a round does not count."""
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    received = client.receive(server.letter("a"))
    states = []
    for number in range(2):
        server.weights(client.reply(moved(received, number)))
        server.confirm("a", client.version, reply=client.replies)
        states.append(client.state())
    back, fresh = Receiver(), Receiver()
    back.load(states[0])  # the one of the second reply was lost on its way
    trained = moved(back.receive(server.letter("a")), 9)
    fresh.receive(server.letter("b"))
    assert back.reply(trained) == fresh.reply(trained)
    back.load(states[1])
    back.receive(server.letter("a"))
    assert back.reply(trained) != fresh.reply(trained)


def test_damaged_state_is_refused() -> None:
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    base = client.receive(server.letter("a"))
    state = client.state()
    with pytest.raises(wire.WireError):
        client.load(state[:-3])
    with pytest.raises(ValueError, match="it names no run"):
        client.load(server.letter("a").frames[0])
    with pytest.raises(ValueError, match="feedback"):
        feeding = Receiver(Compression(warm=False))
        feeding.receive(server.letter("a"))
        feeding.reply(moved(base, 1))
        Receiver(Compression(feedback=False)).load(feeding.state())
    assert client.version == 1


def test_another_run_begins_anew() -> None:
    client = Receiver()
    for seed in range(2):
        server = Broadcaster()
        server.publish(model(seed))
        received = client.receive(server.letter("a"))
        assert digest_of(received) == digest_of(server.held)
        client.reply(moved(received, seed))


def test_a_refused_letter_of_another_run_changes_nothing() -> None:
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    received = client.receive(server.letter("a"))
    client.reply(moved(received, 1))
    before = client.state()
    for letter in (
        Letter(server.run + 1, 1, (b"damaged",)),
        Letter(server.run + 1, 3, (), digest=b"x" * 16),
        Letter(server.run + 1, 2, ()),
    ):
        with pytest.raises(ValueError):
            client.receive(letter)
        assert client.state() == before


def test_a_whole_model_of_other_tensors_is_refused_within_a_run() -> None:
    """It could be of any size."""
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    client.receive(server.letter("a"))
    other = Broadcaster()
    other.publish({"embed": torch.zeros(1 << 14, 1 << 10)})
    with pytest.raises(ValueError, match="does not match"):
        client.receive(Letter(server.run, 5, other.letter("a").frames))
    assert client.version == 1


def test_what_is_received_may_be_changed_in_place() -> None:
    server, client = Broadcaster(), Receiver()
    weights = model()
    server.publish(weights)
    weights["embed"].zero_()
    received = client.receive(server.letter("a"))
    assert float(received["embed"].abs().sum()) > 0
    received["embed"].zero_()
    assert client.digest == digest_of(server.held)


def test_what_does_not_fit_is_named() -> None:
    server, client = Broadcaster(), Receiver()
    with pytest.raises(ValueError, match="publish must come before letter"):
        server.letter("a")
    server.publish(model())
    base = client.receive(server.letter("a"))
    with pytest.raises(ValueError, match="'bias' only in it"):
        client.reply({name: value for name, value in base.items() if name != "bias"})
    with pytest.raises(ValueError, match="'more' not in it"):
        server.publish({**base, "more": torch.zeros(2)})
    with pytest.raises(ValueError, match="'bias' is \\(3,\\)"):
        server.publish({**base, "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'embed'.* NaN"):
        client.reply({**base, "embed": torch.full((60, 24), torch.nan)})
    with pytest.raises(ValueError, match=r"version must lie in \[1, 1\], got 2"):
        server.confirm("a", 2)
    with pytest.raises(ValueError, match="energy"):
        Compression(energy=1.5)


def test_hostile_replies_are_refused() -> None:
    server, client = Broadcaster(), Receiver()
    server.publish(model())
    base = client.receive(server.letter("a"))
    frame = client.reply(moved(base, 1))
    with pytest.raises(wire.WireError):
        server.weights(frame[:-1])
    with pytest.raises(wire.WireError):
        server.weights(bytes([frame[0] ^ 1]) + frame[1:])
    with pytest.raises(wire.WireError, match="at most"):
        server.weights(b"\0" * 10_000_000)
    server.publish(moved(base, 2))
    with pytest.raises(ValueError, match="round 1"):
        server.weights(frame)  # a reply to the version before
    with pytest.raises(wire.WireError):
        client.receive(Letter(server.run, 2, (server.letter("x").frames[0][:40],)))
    assert client.version == 1 and client.digest == digest_of(base)


def test_models_may_be_larger_than_what_strangers_may_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 1 << 12
    monkeypatch.setattr(wire, "DEFAULT_MAX_BYTES", most)
    assert decompress.__kwdefaults__ is not None
    monkeypatch.setitem(decompress.__kwdefaults__, "max_bytes", most)
    first = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    server, client, later = Broadcaster(), Receiver(), Receiver()
    server.publish(first)
    received = client.receive(server.letter("a"))
    server.confirm("a", 1)
    later.load(client.state())
    server.weights(later.reply({"w": received["w"] + 1}))
    server.publish({"w": first["w"] * 2})
    assert torch.equal(later.receive(server.letter("a"))["w"], server.held["w"])
