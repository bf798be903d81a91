"""The store of states: whatever happens, the last commit is there, whole, and believed only so."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from snapshots import Snapshots
from trees_alike import alike

import fedkd_fast.checkpoint as checkpoint
from fedkd_fast.checkpoint import MANIFEST, Store
from fedkd_fast.trees import write_tree

States = dict[str, Any]


def state(number: int) -> dict[str, Any]:
    """Make a state that no other number has."""
    return {"n": number, 3: torch.full((4, 5), number / 7), "b": bytes([number] * 9)}


def contents(store: Store, keys: str = "abcd") -> States:
    return {key: store.read(key) for key in keys if key in store}


def on_disk(folder: Path) -> Store:
    """Open a copy, as the next process would: it removes what this one has not committed."""
    copies = folder.parent / f"{folder.name}-copies"
    copy = copies / str(len(names(copies)) if copies.exists() else 0)
    shutil.copytree(folder, copy) if folder.exists() else copy.mkdir(parents=True)
    return Store(copy)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What each commit consists of: keys with the numbers of their states, the last ones counting.
COMMITS = (("a1", "b2", "d3"), ("a4", "a5", "c6"), (), ("b7",))


def commits(store: Store) -> Iterator[States]:
    """Commit one after the other, and yield what was committed."""
    states: States = {}
    for number, writes in enumerate(COMMITS):
        for key, value in writes:
            states[key] = state(int(value))
            store.write(key, states[key])
            assert alike(store.read(key), states[key])
        store.commit({"number": number}, {"clock": 2.5 * number})
        yield dict(sorted(states.items()))


def test_what_was_committed_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "folder")
    assert store.facts == {} and "a" not in store and not store.folder.exists()
    for number, wanted in enumerate(commits(store)):
        again = on_disk(store.folder)
        for one in (store, again):
            assert alike(contents(one), wanted)
            assert one.facts == {"number": number, "clock": 2.5 * number}
        assert len(names(store.folder)) == 1 + len(wanted)  # and nothing else lies there
    with pytest.raises(KeyError):
        store.read("e")


def test_a_kill_at_any_moment_leaves_the_last_commit(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    (tmp_path / "copies").mkdir()
    store, done = Store(tmp_path / "live"), [-1]
    shots = Snapshots(store.folder, tmp_path / "copies", lambda: done[0])
    replace = os.replace

    def count(source: Any, target: Any) -> None:
        replace(source, target)
        done[0] += 1  # from here on it is the next one that counts

    known: list[States] = []
    half = shots.half(write_tree, lambda path, tree: path)
    with (
        mock.patch.object(os, "replace", count),
        mock.patch.object(checkpoint, "write_tree", half),
        shots.taking(),
    ):
        known = list(commits(store))
    assert {note for _, _, note in shots.taken} == {-1, 0, 1, 2, 3} and len(shots.taken) > 60
    for folder, moment, number in shots.taken:
        found = Store(folder)
        wanted = known[number] if number >= 0 else {}
        assert alike(contents(found), wanted), moment
        assert found.facts.get("number", -1) == number, moment
        # What was not committed is gone, and the run goes on from there.
        expected = {MANIFEST} if number >= 0 else set()
        assert len(names(folder)) == len(wanted) + len(expected), moment
        assert all(name in names(folder) for name in expected)
        before = names(folder)
        found.write("a", state(99))
        assert before < names(folder), moment  # no committed file was written over
        found.commit({"number": 99})
        assert alike(contents(Store(folder)), {**wanted, "a": state(99)}), moment


@pytest.mark.parametrize("call", ["replace", "unlink", "fsync", "write_tree"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_error_at_any_moment_leaves_the_last_commit(
    call: str, error: BaseException, tmp_path: Path
) -> None:
    """Also for the process that had it, where it goes on."""
    known: list[States] = [{}, *commits(Store(tmp_path / "known"))]
    home = checkpoint if call == "write_tree" else os
    real, place = getattr(home, call), 0
    while True:
        place += 1
        folder, calls = tmp_path / str(place), [0]

        def fail(*arguments: Any, real: Any = real, calls: Any = calls, place: int = place) -> Any:
            calls[0] += 1
            if calls[0] == place:
                raise error
            return real(*arguments)

        store, done = Store(folder), known[:1]
        with mock.patch.object(home, call, fail):
            try:
                for wanted in commits(store):
                    done.append(wanted)
            except type(error):
                pass
        if calls[0] < place:
            break  # that many calls there are not
        # The commit that was under way may have been through when the error came.
        found = on_disk(folder)
        number, again = found.facts.get("number", -1), contents(found)
        assert number - (len(done) - 2) in (0, 1)
        assert alike(again, known[number + 1])
        for value in (50, 51):
            store.write("d", state(value))
            assert alike(contents(on_disk(folder)), again)  # writing does not touch it
        store.commit({"number": 52})
        assert alike(on_disk(folder).read("d"), state(51))
    assert place > 4


def test_an_error_does_not_cost_what_it_found(tmp_path: Path) -> None:
    """The manifest was replaced, and only then its folder could not be synced."""
    store = Store(tmp_path / "live")
    store.write("a", state(1))
    store.commit({"n": 1})
    store.write("a", state(2))
    with (
        mock.patch("fedkd_fast._files.sync", side_effect=[None, OSError(errno.EIO, "broken")]),
        pytest.raises(OSError, match="broken"),
    ):
        store.commit({"n": 2})
    for number in (3, 4):
        store.write("a", state(number))  # either of both may be what the disk holds
        assert alike(contents(on_disk(store.folder)), {"a": state(2)})
    store.commit({"n": 5})
    assert alike(contents(on_disk(store.folder)), {"a": state(4)})
    assert len(names(store.folder)) == 2


def test_numbers_of_files_only_rise(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), set()
    for number in range(6):
        for key in ("a", "b", "a"):
            store.write(key, state(number))
            new = {name for name in names(tmp_path) if name not in seen and name != MANIFEST}
            assert len(new) == 1
            seen |= new
        store.commit({})
        if number % 2:
            store = Store(tmp_path)
    numbers = [int(name.split(".")[1]) for name in seen]
    assert len(set(numbers)) == len(numbers) == 18


def test_states_that_are_written_often_take_the_place_of_one(tmp_path: Path) -> None:
    """Clients that come and go, without a commit."""
    store = Store(tmp_path)
    for number in range(20):
        store.write("a", state(number))
        assert len(names(tmp_path)) == 1
    store.commit({})
    for number in range(20, 40):
        store.write("a", state(number))
        assert len(names(tmp_path)) == 3  # with the manifest and what was committed


def test_only_own_strays_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", state(1))
    store.commit({})
    strays = ("a.7.safetensors", "client-3.9.safetensors", f".{MANIFEST}.77.part")
    others = ("notes.txt", "a.safetensors", "A.1.safetensors", ".a.1.safetensors", "a.1.pt")
    for name in (*strays, *others):
        (tmp_path / name).write_text("x")
    Store(tmp_path)
    assert names(tmp_path) == {MANIFEST, "a.1.safetensors", *others}


def test_a_file_that_was_changed_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("a", "b"):
        store.write(key, state(1))
    store.commit({})
    content = (tmp_path / "a.1.safetensors").read_bytes()
    for place in (8, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 4
        (tmp_path / "a.1.safetensors").write_bytes(changed)
        again = Store(tmp_path)
        with pytest.raises(ValueError, match=r"a\.1\.safetensors is damaged: it is not what"):
            again.read("a")
        assert alike(again.read("b"), state(1))
    # Another whole state in its place is no better.
    (tmp_path / "a.1.safetensors").write_bytes((tmp_path / "b.2.safetensors").read_bytes())
    assert alike(Store(tmp_path).read("b"), state(1))
    write_tree(tmp_path / "a.1.safetensors", state(2))
    with pytest.raises(ValueError, match=r"a\.1\.safetensors is damaged"):
        Store(tmp_path).read("a")
    # A state that was not asked for and not written again stays what it was.
    (tmp_path / "a.1.safetensors").write_bytes(content)
    again = Store(tmp_path)
    again.commit({"later": 1})
    write_tree(tmp_path / "a.1.safetensors", state(2))
    with pytest.raises(ValueError, match=r"a\.1\.safetensors is damaged"):
        again.read("a")


@pytest.mark.parametrize(
    ("key", "name"),
    [("a", "../a.1.safetensors"), ("a", "/etc/passwd"), ("..", "...1.safetensors"),
     ("sub/a", "sub/a.1.safetensors"), ("a", "b.1.safetensors"), ("a", "a.1.pt"),
     ("a", "a.1.safetensors\n"), ("a", "a.-1.safetensors"), ("a", "a.2.safetensors"), ("a", 7),
     ("a", None), ("A", "A.1.safetensors")],
)  # fmt: skip
def test_manifests_name_files_of_the_folder_only(key: str, name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    store = Store(folder)
    for one in ("a", "b"):
        store.write(one, state(1))
    store.commit({})
    (folder / "sub").mkdir()
    for place in (tmp_path / "a.1.safetensors", folder / "sub" / "a.1.safetensors"):
        write_tree(place, state(1))
    write_tree(folder / "A.1.safetensors", state(1))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][key] = [name, manifest["files"]["a"][1]]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        Store(folder)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": 1}, "has format 1, this version reads 5"), ({"format": None}, "has format None"),
     ({"files": []}, "is damaged"), ({"files": {"a": []}}, "is damaged"), ({"facts": 3}, "damaged"),
     ({"files": {"a": 3}}, "is damaged"), ({"facts": {"n": 1}}, "damaged: it is not what was"),
     ({"sha256": "0"}, "is damaged: it is not what was written")],
)  # fmt: skip
def test_damaged_manifests_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", state(1))
    store.commit({})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=f"{MANIFEST} .*{words}|{MANIFEST} {words}"):
        Store(tmp_path)
    assert names(tmp_path) == {MANIFEST, "a.1.safetensors"}
    for text in ("", "{", "[]", "\xff"):
        (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=MANIFEST):
            Store(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", state(1))
    store.commit({})
    (tmp_path / "a.1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"damaged: a\.1\.safetensors is missing"):
        Store(tmp_path)


def test_the_hash_is_that_of_states_and_facts(tmp_path: Path) -> None:
    """Whatever the names of the files, the clock, and what came before."""

    def digest(folder: str, facts: Any, states: States, *, detour: bool = False) -> str:
        store = Store(tmp_path / folder)
        if detour:
            for number in range(3):
                store.write("b", state(number))
            store.commit({"other": 1}, {"seconds": 1.0})
            store = Store(tmp_path / folder)
        for key, value in states.items():
            store.write(key, value)
        return store.commit(facts, {"seconds": float(detour)})

    facts, states = {"x": [1, 2.5], "y": None}, {"a": state(1), "b": state(2)}
    wanted = digest("one", facts, states)
    assert wanted == digest("two", {"y": None, "x": (1, 2.5)}, states, detour=True)
    assert wanted == digest("three", facts, dict(reversed(states.items())))
    others = [
        digest("four", {**facts, "y": 0}, states),
        digest("five", facts, {"a": state(1), "b": state(3)}),
        digest("six", facts, {"a": state(2), "b": state(1)}),
        digest("seven", facts, {"a": state(1), "c": state(2)}),
        digest("eight", facts, {"a": state(1)}),
    ]
    assert len({wanted, *others}) == 6


@pytest.mark.parametrize("what", ["state", "manifest"])
def test_a_full_disk_leaves_the_last_commit(what: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for it; only the message differs."""
    store = Store(tmp_path)
    store.write("a", state(1))
    store.commit({"n": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        if what == "state":
            with pytest.raises(OSError, match="File too large") as caught:
                store.write("a", {"x": torch.zeros(10_000)})
            assert str(caught.value.filename).endswith("a.2.safetensors")
            assert alike(store.read("a"), state(1))
        else:
            store.write("a", state(2))
            with pytest.raises(OSError, match="File too large"):
                store.commit({"n": "2" * 20_000})
            assert alike(store.read("a"), state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert alike(contents(Store(tmp_path)), {"a": state(1)})
    assert names(tmp_path) == {MANIFEST, "a.1.safetensors"}
    # When there is space again, the process itself may go on.
    store = Store(tmp_path)
    store.write("a", state(3))
    store.commit({"n": 3})
    assert alike(contents(Store(tmp_path)), {"a": state(3)})
