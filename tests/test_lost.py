"""Messages that do not arrive, or are never finished: nothing of an update may be lost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from updates import powerlaw, relative_error

from fedkd_fast import Compressor, ErrorFeedback, SubspaceCache, decompress


@pytest.mark.parametrize("schema", [True, False])
@pytest.mark.parametrize("against", ["nothing", "a base"])
def test_a_lost_message_comes_with_the_next(against: str, schema: bool) -> None:
    update = {"w": powerlaw(40, 30), "n": torch.tensor(7)}
    base = {name: 10 * torch.ones_like(value) for name, value in update.items()}
    weights = {"w": base["w"] + update["w"], "n": update["n"]}
    compressor = Compressor(0.9, feedback=ErrorFeedback(), schema=schema)
    if against == "a base":
        frame = compressor.compress(weights, base=base)
    else:
        frame = compressor.compress(update)
    assert isinstance(compressor.feedback, ErrorFeedback)
    compressor.feedback.lost(frame, None if schema else base)
    kept = compressor.state_dict()["feedback.w"]
    assert relative_error(update["w"], kept) < 1e-6, "all of the update is still to be sent"


def test_what_a_lost_message_did_not_hold_stays_as_it_is() -> None:
    compressor = Compressor(0.5, feedback=True)
    compressor.compress({"w": powerlaw(20, 20), "b": powerlaw(20, 20, seed=2)})
    before = compressor.state_dict()["feedback.b"]
    frame = compressor.compress({"w": powerlaw(20, 20, seed=1)})
    assert isinstance(compressor.feedback, ErrorFeedback)
    compressor.feedback.lost(frame)
    assert torch.equal(compressor.state_dict()["feedback.b"], before)


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ({"w": torch.full((20, 20), torch.nan)}, ValueError, r"message\['w'\] holds NaN or Inf"),
        ({"b": torch.ones(20), "w": torch.ones(20, 2)}, ValueError, r"message\['w'\] is \(20, 2\)"),
        (None, TypeError, "message must be a frame or a mapping, got NoneType"),
        ({"w": 3}, TypeError, r"message\['w'\] must be a torch.Tensor"),
        (b"no frame", ValueError, "frame"),
    ],
)
def test_what_cannot_have_been_lost_changes_nothing(
    message: Any, error: type[Exception], words: str
) -> None:
    compressor = Compressor(0.5, feedback=True)
    compressor.compress({"b": powerlaw(20, 1)[:, 0], "w": powerlaw(20, 20)})
    before = compressor.state_dict()
    assert isinstance(compressor.feedback, ErrorFeedback)
    with pytest.raises(error, match=words):
        compressor.feedback.lost(message)
    after = compressor.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_lost_message_is_kept_where_nothing_else_is() -> None:
    """As after a restart without the state."""
    update = {"w": powerlaw(20, 20), "h": powerlaw(20, 20, seed=1).half(), "n": torch.tensor(1)}
    frame = Compressor(0.9, feedback=True).compress(update)
    fresh = ErrorFeedback()
    fresh.lost(frame)
    decoded = decompress(frame)
    assert sorted(fresh.state_dict()) == ["h", "w"]
    assert all(torch.equal(kept, decoded[n].float()) for n, kept in fresh.state_dict().items())


@pytest.mark.parametrize("wrong", ["nan", "disk"])
def test_a_file_that_breaks_off_leaves_the_state_alone(wrong: str, tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if wrong == "disk" and self.tell() > 300:
                raise OSError(28, "No space left on device")
            return super().write(data)

    compressor = Compressor(0.5, feedback=True, cache=SubspaceCache())
    update = {name: powerlaw(30, 20, seed=seed) for seed, name in enumerate("abcd")}
    compressor.compress(update)
    before = compressor.state_dict()
    if wrong == "nan":
        update["d"] = torch.full((30, 20), torch.nan)
    with pytest.raises(ValueError if wrong == "nan" else OSError):
        compressor.compress_to(Full(), update)
    after = compressor.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with (
        (tmp_path / "x.fkd").open("ab") as file,
        pytest.raises(ValueError, match="appending.*'ab'"),
    ):
        compressor.compress_to(file, update)
