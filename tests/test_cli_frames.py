"""The command line on files: compress, decompress, inspect."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Refusal, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedkd_fast
from fedkd_fast.__main__ import main
from fedkd_fast.compress import Compressor
from fedkd_fast.wire import DEFAULT_MAX_BYTES, Base

__all__ = ["refused"]
# Offset of the major version in a frame's header.
MAJOR_VERSION = 4
ENERGY = 0.99
DEFAULT_ENERGY = Compressor().target.energy


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(64, 3, generator=generator)
    low_rank = left @ torch.randn(3, 48, generator=generator)
    noise = torch.randn(64, 48, generator=generator)
    path = tmp_path / "after.safetensors"
    values = {
        "dense.weight": low_rank + 0.01 * noise,
        "dense.bias": torch.randn(48, generator=generator),
        "frozen": torch.zeros(5, 5),
        "steps": torch.tensor(3),
    }
    save_file(values, path)
    return path


@pytest.fixture
def base(tmp_path: Path, tensors: Path) -> Path:
    path = tmp_path / "before.safetensors"
    values = load_file(tensors)
    values["dense.weight"] = values["dense.weight"] * 0.5
    save_file(values, path)
    return path


@pytest.fixture
def frame(tmp_path: Path, tensors: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "update.fkd"
    assert main(["compress", str(tensors), str(path), "--energy", str(ENERGY)]) == 0
    capsys.readouterr()
    return path


def test_round_trip(tmp_path: Path, tensors: Path, frame: Path) -> None:
    out = tmp_path / "back.safetensors"
    assert main(["decompress", str(frame), str(out)]) == 0
    before, after = load_file(tensors), load_file(out)
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name].shape == value.shape
        assert after[name].dtype == value.dtype
        error = (after[name].double() - value.double()).square().sum()
        assert error <= (1 - ENERGY) * value.double().square().sum()
    assert frame.stat().st_size < tensors.stat().st_size


def test_raw_round_trip_is_exact(tmp_path: Path, tensors: Path) -> None:
    small, back = tmp_path / "raw.fkd", tmp_path / "back.safetensors"
    assert main(["compress", str(tensors), str(small), "--codec", "raw"]) == 0
    assert main(["decompress", str(small), str(back)]) == 0
    before, after = load_file(tensors), load_file(back)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_round_trip_against_a_base(tmp_path: Path, tensors: Path, base: Path) -> None:
    small, back = tmp_path / "diff.fkd", tmp_path / "back.safetensors"
    assert main(["compress", str(tensors), str(small), "--base", str(base)]) == 0
    assert main(["decompress", str(small), str(back), "--base", str(base)]) == 0
    before, old, after = load_file(tensors), load_file(base), load_file(back)
    name = "dense.weight"
    change = (before[name] - old[name]).double().square().sum()
    error = (before[name].double() - after[name].double()).square().sum()
    assert error <= (1 - DEFAULT_ENERGY) * change


def test_compress_says_what_it_did(
    tmp_path: Path, tensors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.fkd"
    assert main(["compress", str(tensors), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: ")
    assert "4 tensors" in said
    assert said.count("\n") == 1


def test_inspect_table(frame: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(frame)]) == 0
    text = capsys.readouterr().out
    size = f"{frame.stat().st_size:,}"
    assert re.search(r"^dense\.weight\s+64×48\s+coded factors\s+3\s", text, re.MULTILINE)
    assert re.search(rf"^total, 4 tensors\s+{size}\s+100\.0%", text, re.MULTILINE)


def test_inspect_json(frame: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(frame), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["frame_bytes"] == frame.stat().st_size
    assert facts["codec"] == "wf1" and facts["base_digest"] is facts["base_run"] is None
    modes = {tensor["name"]: tensor["mode"] for tensor in facts["tensors"]}
    assert modes["dense.weight"] == "CODED_FACTORS"
    assert modes["frozen"] == "ZERO"
    assert facts["dense_bytes"] == sum(tensor["dense_bytes"] for tensor in facts["tensors"])


def test_inspect_tells_how_rows_travel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = torch.zeros(2000, 48)
    table[::2] = torch.outer(torch.arange(1.0, 1001.0), torch.arange(1.0, 49.0))
    path = tmp_path / "rows.fkd"
    path.write_bytes(Compressor(0.9, "factors-fp32").compress({"emb": table}))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^emb\s+2000×48\s+1,000 rows, factors\s+1\s", text, re.MULTILINE)
    assert main(["inspect", str(path), "--json"]) == 0
    (tensor,) = json.loads(capsys.readouterr().out)["tensors"]
    assert (tensor["mode"], tensor["rank"]) == ("ROWS", 1000)
    assert (tensor["rows_mode"], tensor["rows_rank"]) == ("FACTORS", 1)


def test_inspect_names_base_and_tied_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.ones(3, 3)
    path = tmp_path / "tied.fkd"
    digest = bytes(range(16))
    path.write_bytes(
        Compressor().compress({"a": shared, "b": shared}, relative_to=Base(digest=digest))
    )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^b\s+3×3\s+alias\s+= a", text, re.MULTILINE)
    assert f"difference to base {digest.hex()}" in text


def test_tied_tensors_are_written_out(tmp_path: Path) -> None:
    shared = torch.ones(3, 3)
    path, out = tmp_path / "tied.fkd", tmp_path / "tied.safetensors"
    path.write_bytes(Compressor().compress({"a": shared, "b": shared}))
    assert main(["decompress", str(path), str(out)]) == 0
    assert set(load_file(out)) == {"a", "b"}


def test_overwrite(tensors: Path, frame: Path) -> None:
    before = frame.read_bytes()
    assert main(["compress", str(tensors), str(frame), "--overwrite", "--energy", "0.5"]) == 0
    assert frame.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--energy", "1.5"], r"energy must lie in \(0, 1\], got 1.5"),
        (["--energy", "nan"], r"energy must lie in \(0, 1\], got nan"),
        (["--error", "1"], r"error must lie in \[0, 1\), got 1.0"),
        (["--budget-bytes", "0"], "budget_bytes must be at least 1, got 0"),
        (["--bits-per-param", "-1"], "bits_per_param must be positive, got -1"),
        (["--budget-bytes", "70"], "at least about .* bytes, got a limit of 70"),
        (["--scope", "model"], "scope must be one of .*, got 'model'"),
        (["--codec", "zip"], "codec must be one of .*wf0.*, got 'zip'"),
        (["--base", "nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_compress_refuses_options(
    tmp_path: Path, tensors: Path, refused: Refusal, options: list[str], message: str
) -> None:
    assert re.search(message, refused("compress", tensors, tmp_path / "a.fkd", *options))


def test_compress_refuses_missing_input(tmp_path: Path, refused: Refusal) -> None:
    line = refused("compress", tmp_path / "nowhere", tmp_path / "a.fkd")
    assert "nowhere: No such file or directory" in line


def test_compress_refuses_what_is_no_safetensors(
    tmp_path: Path, frame: Path, refused: Refusal
) -> None:
    line = refused("compress", frame, tmp_path / "a.fkd")
    assert f"{frame} is not a safetensors file" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compress_refuses_nan(tmp_path: Path, refused: Refusal, value: float) -> None:
    source = tmp_path / "bad.safetensors"
    save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, value])}, source)
    assert "update['bad'] holds NaN or Inf" in refused("compress", source, tmp_path / "a.fkd")


def test_compress_refuses_a_base_of_other_tensors(
    tmp_path: Path, tensors: Path, refused: Refusal
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"dense.weight": torch.ones(64, 48)}, other)
    line = refused("compress", tensors, tmp_path / "a.fkd", "--base", other)
    assert "base does not match" in line


def test_existing_output_is_kept(
    tmp_path: Path, tensors: Path, frame: Path, refused: Refusal
) -> None:
    assert f"{frame} exists: give --overwrite" in refused("compress", tensors, frame)
    same = f"{tensors} is what is read: name another file to write"
    assert same in refused("compress", tensors, tensors, "--overwrite")
    # Only the base can read what was made against it.
    other = tensors.with_name("other.safetensors")
    shutil.copy(tensors, other)
    for given in (("compress", other), ("decompress", frame)):
        assert same in refused(*given, tensors, "--base", tensors, "--overwrite")
    assert tensors.read_bytes() == other.read_bytes()
    assert f"{tensors} exists: give --overwrite" in refused("decompress", frame, tensors)


def test_what_a_link_points_to_is_written(tmp_path: Path, frame: Path, tensors: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(Path("disk") / real.name)
    for _ in range(2):
        assert main(["decompress", str(frame), str(link), "--overwrite"]) == 0
        assert link.is_symlink() and load_file(real).keys() == load_file(tensors).keys()
        assert list(real.parent.iterdir()) == [real]


def test_targets_that_are_no_files(tmp_path: Path, tensors: Path, refused: Refusal) -> None:
    pipe, loop, astray = (tmp_path / name for name in ("pipe", "loop", "astray"))
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    astray.symlink_to(tmp_path / "nowhere" / "a.fkd")
    for target, words in (
        (pipe, f"{pipe} is no regular file"),
        (loop, f"{loop} is a link to itself"),
        (astray, f"{tmp_path / 'nowhere'} is not a folder"),
    ):
        assert words in refused("compress", tensors, target, "--overwrite")
    assert pipe.is_fifo() and loop.is_symlink() and astray.is_symlink()


def test_unwritable_output(tmp_path: Path, tensors: Path, frame: Path, refused: Refusal) -> None:
    inside = frame / "a.fkd"
    assert f"{frame} is not a folder" in refused("compress", tensors, inside)
    assert f"{tmp_path} is a folder" in refused("compress", tensors, tmp_path)
    assert "is not a folder" in refused("decompress", frame, tmp_path / "no" / "a.safetensors")


def test_disk_full_leaves_nothing(
    tmp_path: Path, tensors: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def fail(self: Path, data: Any) -> int:
        real(self, bytes(data)[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", fail)
    out = tmp_path / "a.fkd"
    assert f"{out}: No space left on device" in refused("compress", tensors, out)


def test_decompress_needs_its_base(
    tmp_path: Path, tensors: Path, base: Path, frame: Path, refused: Refusal
) -> None:
    small, out = tmp_path / "diff.fkd", tmp_path / "back.safetensors"
    small.write_bytes(Compressor().compress(load_file(tensors), load_file(base)))
    assert re.search(
        r"is a difference to base \w{32}: give --base", refused("decompress", small, out)
    )
    line = refused("decompress", small, out, "--base", tensors)
    assert "base does not match: the frame was made against" in line
    line = refused("decompress", frame, out, "--base", base)
    assert "the frame is not a difference: decode it without --base" in line


def _damaged(frame: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(frame.read_bytes())
    change(data)
    path = frame.with_name("damaged.fkd")
    path.write_bytes(data)
    return path


def _flip(data: bytearray) -> None:
    data[-1] ^= 1


def _newer(data: bytearray) -> None:
    data[MAJOR_VERSION] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.__delitem__(slice(100, None)), "damaged.fkd: frame is truncated"),
        (lambda data: data.clear(), "damaged.fkd: frame is truncated"),
        (_flip, "damaged.fkd: .*checksum"),
        (_newer, "damaged.fkd: frame version 2.0 is newer .*upgrade"),
        (lambda data: data.__setitem__(0, 0), "damaged.fkd: frame must start with FKD1"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "decompress"])
def test_damaged_frame(
    frame: Path,
    refused: Refusal,
    change: Callable[[bytearray], object],
    message: str,
    command: str,
) -> None:
    damaged = _damaged(frame, change)
    out = [frame.with_name("a.safetensors")] if command == "decompress" else []
    assert re.search(message, refused(command, damaged, *out))


def test_decompress_bounds_what_it_allocates(
    tmp_path: Path, frame: Path, refused: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    dense = sum(info.dense_bytes for info in fedkd_fast.inspect(frame.read_bytes()))
    line = refused("decompress", frame, out, "--max-bytes", dense - 1)
    assert f"{frame}: tensors must take at most --max-bytes = {dense - 1} bytes" in line
    assert "max_bytes must lie in" in refused("decompress", frame, out, "--max-bytes", "-1")
    assert main(["decompress", str(frame), str(out), "--max-bytes", str(dense)]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["decompress", "--help"])
    assert f"(default: {DEFAULT_MAX_BYTES})" in " ".join(capsys.readouterr().out.split())


def test_a_name_that_safetensors_keeps_for_itself(tmp_path: Path, refused: Refusal) -> None:
    small, out = tmp_path / "a.fkd", tmp_path / "a.safetensors"
    small.write_bytes(Compressor().compress({"__metadata__": torch.ones(2)}))
    assert f"{out} cannot hold a tensor named '__metadata__'" in refused("decompress", small, out)


def test_files_name_their_framework(tmp_path: Path, frame: Path) -> None:
    out = tmp_path / "back.safetensors"
    assert main(["decompress", str(frame), str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_names_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.fkd"
    tricky = "a\u202eb\u2028c\u200bé中"
    shared = torch.ones(2, 2)
    path.write_bytes(Compressor().compress({tricky: shared, "twin": shared}))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert not set(tricky[1:6:2]) & set(text)
    assert text.count(r"a\u202eb\u2028c\u200bé中") == 2


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = tmp_path / ":key:.fkd", "w:key:[bold]0"
    path.write_bytes(Compressor().compress({name: torch.ones(2, 2)}))
    assert main(["inspect", str(path)]) == 0
    assert name in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"][0]["name"] == name and facts["file"] == str(path)
    source, odd = tmp_path / "a.safetensors", tmp_path / "tab\tand\x0cfeed.fkd"
    save_file({"a": torch.ones(2)}, source)
    assert main(["compress", str(source), str(odd)]) == 0
    assert capsys.readouterr().out.startswith(f"{odd}: ")


def test_inspect_missing_file(tmp_path: Path, refused: Refusal) -> None:
    assert "nowhere: No such file" in refused("inspect", tmp_path / "nowhere")
    assert "Is a directory" in refused("inspect", tmp_path)


def test_inspect_names_the_round_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "round.fkd"
    update = {"w": torch.ones(3)}
    path.write_bytes(Compressor().compress(update, relative_to=Base(run=12, round=7)))
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "difference to run 12, round 7"
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["base_run"], facts["base_round"]) == (12, 7)


def test_budgets_and_errors(tensors: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.fkd"
    for options, most in ((["--budget-bytes", "700"], 700), (["--bits-per-param", "1"], 800)):
        assert main(["compress", str(tensors), str(path), "--overwrite", *options]) == 0
        assert path.stat().st_size <= most
    assert main(["compress", str(tensors), str(path), "--overwrite", "--error", "0.5"]) == 0
    other = tmp_path / "other.fkd"
    assert main(["compress", str(tensors), str(other), "--energy", "0.75"]) == 0
    assert path.read_bytes() == other.read_bytes()
