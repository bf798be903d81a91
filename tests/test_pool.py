"""Clients in memory and in files: few at a time, and always the same ones."""

from __future__ import annotations

import errno
import gc
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from federation import federation
from tiny_task import TinyTask, tiny_task
from trees_alike import alike

from fedkd_fast import pool as pool_module
from fedkd_fast.assembly import client_maker
from fedkd_fast.checkpoint import Store
from fedkd_fast.client import Client
from fedkd_fast.methods import METHODS, Learner, get_method
from fedkd_fast.pool import ClientPool
from fedkd_fast.trainer import configure
from fedkd_fast.trees import tensor_bytes

COUNT = 5
EXCHANGING = [name for name, method in METHODS.items() if method.exchanges]


class Made:
    """Makes clients, and counts them."""

    def __init__(self, method: str = "fedkd", *, layered: bool = False) -> None:
        task = TinyTask(layered=True) if layered else tiny_task(method)
        settings = {"clients": COUNT, "feedback": "both", "local_epochs": 0.5}
        config = configure(task, method, settings)
        self._make, _ = client_maker(config, task, get_method(method))
        self.counts: Counter[int] = Counter()

    def __call__(self, index: int, spare: Learner | None = None, *, fresh: bool = True) -> Client:
        self.counts[index] += 1
        return self._make(index, spare, fresh=fresh)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let temporary folders lie where a test can see them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def folders(temporary: Path) -> list[Path]:
    """Return ours; other packages have folders, too."""
    return list(temporary.glob("fedkd-fast-*"))


def take_part(client: Client, number: int = 1) -> bytes:
    """Let a client train and send."""
    client.train(number)
    return client.upload(0.7)


def bits(client: Client) -> Any:
    """Copy the state of a client as it is now."""

    def copied(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return tree.detach().clone()
        if isinstance(tree, dict):
            return {key: copied(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [copied(value) for value in tree]
        return tree

    return copied(client.state())


def test_memory_is_bounded(temporary: Path) -> None:
    roomy = ClientPool(Made(), COUNT, None, 1 << 30)
    for index in range(COUNT):
        roomy.take(index)
    assert len(roomy) == roomy.present == COUNT and not folders(temporary)
    (one,) = set(roomy._sizes.values())
    for limit, most in ((1, 1), (one - 1, 1), (one, 1), (2 * one, 2), (4 * one - 1, 3)):
        make = Made()
        pool = ClientPool(make, COUNT, None, limit)
        for step in range(30):
            index = step * 7 % COUNT
            client = pool.take(index) if step % 2 else pool.look(index)
            assert client.index == index and client is pool.look(index)
            assert pool.present <= most
        assert pool.present == most
        pool.close()
    assert not folders(temporary)


def test_those_that_were_not_used_for_longest_go_first() -> None:
    make = Made()
    pool = ClientPool(make, COUNT, None, 1 << 30)
    for index in (0, 1, 2, 0):
        pool.look(index)
    pool._limit = 2 * pool._sizes[0]
    pool.look(0)
    pool.look(3)  # 1 and 2 have to go
    pool.look(0)
    assert make.counts == {0: 1, 1: 1, 2: 1, 3: 1}
    pool.look(1)
    assert make.counts[1] == 2


def test_size_is_about_what_a_client_takes() -> None:
    pool = ClientPool(Made(), COUNT, None, 1 << 30)
    client = pool.look(0)
    models = [client.learner.mentor, client.learner.mentee]
    parameters = sum(one.numel() for model in models if model for one in model.parameters())
    assert pool._sizes[0] >= 4 * 4 * parameters


@pytest.mark.parametrize("method", METHODS)
def test_size_counts_all_that_a_client_holds(method: str) -> None:
    """Also what is only there once it took part: residuals, W_h and its moments, controls."""
    one = Made(method, layered=method == "fedkd")(0)
    new = one.nbytes()
    one.train(1)
    if get_method(method).exchanges:
        one.upload(0.7)
    state = one.state()
    # Beside what a checkpoint holds: gradients and the shared parameters at the round's start.
    learning = [model for model in (one.learner.mentor, one.learner.mentee) if model is not None]
    gradients = sum(p.grad.nbytes for m in learning for p in m.parameters() if p.grad is not None)
    base = sum(value.nbytes for value in one.learner.exchanged().values())
    wanted = tensor_bytes({**state, "base": None}) + gradients + base
    assert new <= one.nbytes()
    # All but the counters of Adam, and not much more.
    assert 0.99 * wanted <= one.nbytes() <= 1.2 * wanted


def test_what_clients_keep_later_counts_too(tmp_path: Path) -> None:
    """Room for the residuals of three of four clients: one has to go once they are there."""
    pool = ClientPool(Made(), COUNT, Store(tmp_path), 1 << 30)
    for index in range(3):
        take_part(pool.take(index))
    pool._limit = 3 * pool.look(0).nbytes() + Made()(3).nbytes()
    pool.look(3)
    assert pool.present == 4
    pool._limit -= 1
    pool.look(4)
    assert pool.present == 4


def test_a_client_that_is_dropped_is_gone_at_once() -> None:
    """No cycle of references keeps it until the collector comes by."""
    pool = ClientPool(Made(), COUNT, None, 1)
    gc.collect()
    gc.disable()
    try:
        held = []
        for index in range(3):
            client = pool.take(index)
            take_part(client)
            held.append(weakref.ref(client))
            del client
        pool.look(3)
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()
        pool.close()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "central"])
def test_clients_in_files_are_the_same(method: str, tmp_path: Path) -> None:
    """After rounds with the server, where only some take part, in every bit of their states."""
    server = None
    if method in EXCHANGING:
        server = federation(method, COUNT, feedback="both", local_epochs=0.5)[1]
    roomy = ClientPool(Made(method), COUNT, None, 1 << 30)
    tight = ClientPool(Made(method), COUNT, Store(tmp_path / "store"), 1)
    for number, asked in enumerate(([0, 1, 2], [2, 4], [0, 2, 1]), 1):
        frames = {}
        for index in asked:
            sent = []
            for pool in (roomy, tight):
                client = pool.take(index)
                if server and client.version < server.version:
                    client.absent(server.version - client.version)
                    client.apply(*server.catch_up(client.version))
                    client.version = server.version
                client.train(number)
                sent.append(client.upload(0.7) if server else b"")
            assert sent[0] == sent[1]
            frames[index] = sent[0]
        broadcast = server.step(frames, 0.7) if server else b""
        for index in asked if server else ():
            for pool in (roomy, tight):
                client = pool.take(index)
                client.apply(broadcast)
                client.version = number
    assert tight.present == 1
    for index in range(COUNT):
        assert alike(tight.look(index).state(), roomy.look(index).state()), index
        assert tight.look(index).digest() == roomy.look(index).digest()
    wanted = {0: 3, 1: 3, 2: 3, 4: 2} if server else {}
    assert tight.versions() == roomy.versions() == wanted


def test_versions_are_known_without_the_clients() -> None:
    make = Made()
    pool = ClientPool(make, COUNT, None, 1)
    for index in (1, 3):
        pool.take(index).version = 10 + index
    pool.look(0)
    made = Counter(make.counts)
    assert [pool.version(index) for index in range(COUNT)] == [0, 11, 0, 13, 0]
    assert pool.versions() == {1: 11, 3: 13}
    again = ClientPool(make, COUNT, None, 1)
    again.load_versions(sorted(pool.versions().items()))
    assert [again.version(index) for index in range(COUNT)] == [0, 11, 0, 13, 0]
    assert make.counts == made
    # One that is here knows better.
    pool.take(3).version = 14
    assert pool.version(3) == 14 and pool.versions() == {1: 11, 3: 14}


def test_a_client_stays_usable_until_the_next() -> None:
    pool = ClientPool(Made(), COUNT, None, 1)
    for number in range(1, 4):
        for index in range(3):
            client = pool.take(index)
            frame = take_part(client, number)
            assert pool.versions() == {} and pool.version(0) == 0
            client.lost(frame)
            assert pool.look(index) is client
    assert pool.present == 1


@pytest.mark.parametrize("where", ["never", "changed", "written", "evicted", "loaded"])
@pytest.mark.parametrize("method", ["fedkd", "scaffold", "powersgd", "sparseloco", "fedpaq"])
def test_what_happened_can_be_taken_back(where: str, method: str, tmp_path: Path) -> None:
    """Bit for bit, wherever the client was before."""
    limit = 1 if where in ("evicted", "loaded") else 1 << 30
    pool = ClientPool(Made(method), COUNT, Store(tmp_path / "store"), limit)
    if where != "never":
        take_part(pool.take(1))
    if where == "written":
        pool.write_changed()
    if limit == 1:
        pool.look(2)
    if where == "loaded":
        pool.look(1)
    untouched = ClientPool(Made(method), COUNT, None, 1 << 30)
    if where != "never":
        take_part(untouched.take(1))
    before = pool.before(1)
    wanted = bits(untouched.look(1))
    assert (before is None) == (where != "changed")
    client = pool.take(1)
    client.train(2)
    client.upload(0.7)
    client.version = 5
    assert not alike(bits(client), wanted)
    pool.undo(1, before)
    assert alike(bits(pool.look(1)), wanted) and pool.version(1) == 0
    # It goes on as one to whom nothing happened, and is written where it has to be.
    again, other = pool.take(1), untouched.take(1)
    assert take_part(again, 3) == take_part(other, 3)
    pool.write_changed()
    pool.undo(1, pool.before(1))
    assert alike(bits(pool.look(1)), bits(other))


def test_taking_back_needs_no_whole_client(tmp_path: Path) -> None:
    """What failed may have left it in any state, also without models."""
    pool = ClientPool(Made(), COUNT, None, 1 << 30)
    take_part(pool.take(0))
    wanted, before = bits(pool.look(0)), pool.before(0)
    client = pool.take(0)
    client.learner.mentor = None
    client.learner.load = None
    pool.undo(0, before)
    assert alike(bits(pool.look(0)), wanted)


def test_ties_survive_being_taken_back() -> None:
    """Residuals that are one object say which tensors are tied."""
    pool = ClientPool(Made(), COUNT, None, 1 << 30)
    client = pool.take(0)
    take_part(client)
    residuals = client.state()["up"]
    first, *others = residuals
    client._up.load({**residuals, "tied": residuals[first]})
    pool.undo(0, pool.before(0))
    found = pool.look(0).state()["up"]
    assert found["tied"] is found[first]
    assert all(found[name] is not found[first] for name in others)


def test_taking_back_does_not_share_memory(tmp_path: Path) -> None:
    pool = ClientPool(Made(), COUNT, None, 1 << 30)
    take_part(pool.take(0))
    before, wanted = pool.before(0), bits(pool.look(0))
    take_part(pool.take(0), 2)
    assert alike(before, wanted)


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    pool = ClientPool(Made(), COUNT, store, 1 << 30)
    pool.look(0)
    take_part(pool.take(1))
    pool.write_changed()
    assert "client-1" in store and "client-0" not in store
    with mock.patch.object(Store, "write", side_effect=AssertionError):
        pool.look(1)
        pool.write_changed()
    # Clients that were only looked at are not written to make room, either.
    tight = ClientPool(Made(), COUNT, Store(tmp_path / "tight"), 1)
    for index in range(COUNT):
        tight.look(index)
    assert not (tmp_path / "tight").exists()


def test_a_full_disk_loses_no_client(tmp_path: Path) -> None:
    pool = ClientPool(Made(), COUNT, Store(tmp_path), 1)
    take_part(pool.take(0))
    wanted = bits(pool.look(0))
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(Store, "write", side_effect=full):
        with pytest.raises(OSError, match="No space left"):
            pool.look(1)
        with pytest.raises(OSError, match="No space left"):
            pool.write_changed()
    assert alike(bits(pool.look(0)), wanted)
    pool.look(2)  # now there is room to make
    assert pool.present == 1 and alike(bits(pool.look(0)), wanted)


def test_temporary_files_are_few_and_removed(temporary: Path) -> None:
    pool = ClientPool(Made(), COUNT, None, 1)
    pool.look(0)
    assert not folders(temporary)  # not before they are needed
    for number in range(1, 4):
        for index in range(COUNT):
            take_part(pool.take(index), number)
    assert len(list(temporary.rglob("*.safetensors"))) <= COUNT
    assert len(folders(temporary)) == 1
    pool.close()
    pool.close()
    assert not folders(temporary)


def test_a_pool_goes_on_with_the_store_of_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    pool = ClientPool(Made(), COUNT, store, 1)
    for index in (1, 3):
        take_part(pool.take(index))
    pool.write_changed()
    store.commit({})
    wanted = [bits(pool.look(index)) for index in range(COUNT)]
    take_part(pool.take(1), 2)  # is lost with the process
    again = ClientPool(Made(), COUNT, Store(tmp_path), 1 << 30)
    assert alike([bits(again.look(index)) for index in range(COUNT)], wanted)
    # What was changed on the disk meanwhile is not believed.
    (path,) = tmp_path.glob("client-3.*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"client-3\.\d+\.safetensors is damaged"):
        ClientPool(Made(), COUNT, Store(tmp_path), 1).look(3)


def test_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all clients fit: training leaves holes. Not at every round, some take no time."""
    now, calls = [100.0], []
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pool_module, "give_back", lambda: calls.append(now[0]))
    pool = ClientPool(Made(), COUNT, None, 1 << 30)
    for step in (0.0, 0.9, 0.2, 0.9, 0.2, 5.0):
        now[0] += step
        pool.settle()
    assert calls == [pytest.approx(101.1), pytest.approx(102.2), pytest.approx(107.2)]
