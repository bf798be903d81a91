"""Where a Flower client keeps what it holds: in its context, or in files beside it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from fedkd_fast.integrations.flower import Compression, compress_mod, state
from fedkd_fast.integrations.flower.records import CONTROL
from fedkd_fast.integrations.link import Receiver
from tests.in_flower.apps import Compressed, app_of, small, start, weights
from tests.in_flower.grid import LocalGrid


def rounds(
    strategy: Compressed,
    grid: LocalGrid,
    numbers: Iterable[int],
    arrays: ArrayRecord | None = None,
) -> ArrayRecord:
    arrays = arrays or start()
    for number in numbers:
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    return arrays


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no state be small enough for the context."""
    monkeypatch.setattr(state, "MOST_IN_CONTEXT", 0)


@pytest.mark.usefixtures("in_files")
def test_large_states_are_kept_in_files_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path / "new" / "place")))
    found = rounds(Compressed(), grid, range(1, 6))
    files = sorted((tmp_path / "new" / "place").iterdir())
    # Of each node the newest, and the one before it in case that the context is lost.
    assert [path.name.split("_")[:2] for path in files] == [["1", "1"]] * 2 + [["1", "2"]] * 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    for context in grid.contexts.values():
        assert list(context.state[CONTROL]) == ["file"]
        assert len(context.state[CONTROL]["file"]) < 100
    monkeypatch.setattr(state, "MOST_IN_CONTEXT", 1 << 30)
    other = LocalGrid(small)
    expected = rounds(Compressed(), other, range(1, 6))
    assert list(other.contexts[1].state[CONTROL]) == ["state"]
    for name, value in weights(expected).items():
        assert np.array_equal(value, weights(found)[name])


@pytest.mark.usefixtures("in_files")
def test_a_context_that_was_lost_leads_back_to_the_file_before(tmp_path: Path) -> None:
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path)))
    strategy = Compressed()
    arrays = rounds(strategy, grid, (1, 2))
    before = copy.deepcopy(grid.contexts[2].state)
    arrays = rounds(strategy, grid, (3,), arrays)
    grid.contexts[2].state = before  # the process was killed before it had handed it over
    grid.up.clear()
    rounds(strategy, grid, (4, 5), arrays)
    # It holds version 2 where the server takes it for 3: named once, and well again.
    errors = [m.error.reason for m in grid.up if m.has_error()]
    assert len(errors) == 1 and "version 2 is held here" in errors[0]


@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("damage", ["removed", "cut", "other run"])
def test_a_file_that_is_lost_is_a_client_that_starts_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path)))
    strategy = Compressed()
    arrays = rounds(strategy, grid, (1, 2))
    name = grid.contexts[2].state[CONTROL]["file"]
    if damage == "removed":
        (tmp_path / name).unlink()
    elif damage == "cut":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    else:
        grid.contexts[2].state[CONTROL]["file"] = "../9" + name
    grid.up.clear()
    rounds(strategy, grid, (3, 4), arrays)
    errors = [m.error.reason for m in grid.up if m.has_error()]
    assert len(errors) == 1 and "version 0 is held here" in errors[0]
    assert ("is lost" in caplog.text) == (damage != "other run")


@pytest.mark.usefixtures("in_files")
def test_where_no_file_can_be_written_the_context_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path / "file")))
    rounds(Compressed(), grid, (1, 2, 3))
    assert not any(message.has_error() for message in grid.up)
    assert list(grid.contexts[1].state[CONTROL]) == ["state"]
    assert str(tmp_path / "file") in caplog.text and "state_dir" in caplog.text


@pytest.mark.usefixtures("in_files")
def test_what_is_too_large_for_the_context_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MOST_WITHOUT_FILE", 0)
    (tmp_path / "file").write_text("")
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path / "file")))
    messages = Compressed().configure_train(1, start(), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    assert all(str(tmp_path / "file") in reply.error.reason for reply in replies)
    assert CONTROL not in grid.contexts[1].state


def aged(path: Path, days: int) -> None:
    path.write_text("")
    os.utime(path, (time.time() - 86400 * days,) * 2)


@pytest.mark.usefixtures("in_files")
def test_what_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = "0123456789abcdef.fkd"
    gone = {
        f"7_7_{left}": 31,
        f".7_7_{left}.55.part": 31,
        f"1_1_{left}": 0,
        f".1_1_{left}.5.part": 0,
    }
    kept = {f"8_8_{left}": 29, "notes.txt": 99, "update.fkd": 99, "7_7_short.fkd": 99}
    for name, days in {**gone, **kept}.items():
        aged(tmp_path / name, days)
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path)))
    arrays = rounds(Compressed(), grid, (1,))
    names = {path.name for path in tmp_path.iterdir()}
    assert kept.keys() < names and names.isdisjoint(gone)
    # A client's own file may be as old as it likes.
    own = tmp_path / grid.contexts[1].state[CONTROL]["file"]
    os.utime(own, (1.0, 1.0))
    states = state.States(tmp_path)
    receiver = Receiver(Compression())
    states.load(grid.contexts[1], receiver)
    assert receiver.version == 1 and own.exists()
    assert arrays is not None


def test_a_state_that_became_small_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MOST_IN_CONTEXT", 0)
    grid = LocalGrid(lambda node: app_of(node, compress_mod(state_dir=tmp_path)))
    strategy = Compressed()
    arrays = rounds(strategy, grid, (1,))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(state, "MOST_IN_CONTEXT", 1 << 20)
    arrays = rounds(strategy, grid, (2,), arrays)
    assert len(list(tmp_path.iterdir())) == 2  # in case that the context is lost
    rounds(strategy, grid, (3,), arrays)
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_options_is_a_client_that_starts_anew() -> None:
    grid = LocalGrid(small)
    strategy = Compressed()
    arrays = rounds(strategy, grid, (1, 2))
    grid.apps[2] = app_of(2, compress_mod(feedback=False))
    grid.up.clear()
    rounds(strategy, grid, (3, 4), arrays)
    assert len([m for m in grid.up if m.has_error()]) == 1


def test_folders_are_absolute() -> None:
    with pytest.raises(ValueError, match="state_dir must be an absolute path, got 'here'"):
        compress_mod(state_dir="here")
    assert state.States(Path("~/there")).folder == Path.home() / "there"


def test_files_lie_in_the_folder_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/some/where")
    assert state.States(None).folder == Path("/some/where/fedkd_fast")
    monkeypatch.delenv("FLWR_HOME")
    assert state.States(None).folder == Path.home() / ".flwr" / "fedkd_fast"


def test_an_evaluation_that_brings_nothing_new_writes_nothing(tmp_path: Path) -> None:
    grid = LocalGrid(lambda node: app_of(node, compress_mod()))
    strategy = Compressed()
    arrays = rounds(strategy, grid, (1,))
    for _ in range(2):
        before = [id(context.state.get(CONTROL)) for context in grid.contexts.values()]
        messages = strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)
        strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    after = [id(context.state.get(CONTROL)) for context in grid.contexts.values()]
    assert before == after
