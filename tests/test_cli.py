"""The command line: help, errors, info, report."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import Refusal, refused
from fake_runs import make_run

from fedkd_fast.__main__ import build_parser, main
from fedkd_fast._driver import describe_driver
from fedkd_fast.codec.message import CODECS
from fedkd_fast.compress import DEFAULT_ENERGY, Compressor

__all__ = ["refused"]
COMMANDS = (
    *("train", "sweep", "evaluate", "predict", "report"),
    *("compress", "decompress", "inspect", "keygen", "info"),
)


# ---- help ----------------------------------------------------------------------------------------


def _help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([*argv, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", text, re.MULTILINE)
    assert "examples:" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, command)
    assert "examples:" in text
    assert f"fedkd-fast {command}" in text
    assert "None" not in text
    assert "==SUPPRESS==" not in text
    examples = text.split("examples:")[1].strip().splitlines()
    for line in examples:
        build_parser().parse_args(line.replace("fedkd-fast", "", 1).split())


def test_help_names_codecs_and_defaults_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(_help(capsys, "compress").split())
    for codec in CODECS:
        assert codec in text
    defaults = inspect.signature(Compressor).parameters
    args = build_parser().parse_args(["compress", "a", "b"])
    assert args.energy is None and f"({DEFAULT_ENERGY} where nothing is asked for)" in text
    assert args.codec == defaults["codec"].default
    assert args.scope == defaults["scope"].default
    assert f"(default: {args.codec})" in text


def test_program_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedkd_fast", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: fedkd-fast")
    assert done.stderr == ""


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, fedkd_fast.__main__ as m; m.build_parser(); "
        "print(sorted({'torch', 'numpy', 'rich', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fedkd_fast import __version__

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fedkd-fast {__version__}\n"


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a command: .*compress"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["compress", "a"], "the following arguments are required: OUT.fkd"),
        (["compress", "a", "b", "--energy", "much"], "invalid float value: 'much'"),
        (["inspect", "a", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["report"], "the following arguments are required: DIR"),
    ],
)
def test_usage_errors_take_one_line(refused: Refusal, argv: list[str], message: str) -> None:
    line = refused(*argv)
    assert re.search(message, line)
    assert "--help)" in line


def test_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedkd_fast.report.write_report", interrupt)
    assert main(["report", "anything"]) == 130
    assert capsys.readouterr().err == "fedkd-fast: interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError(), "out of memory"), (MemoryError("for 9 GB"), "out of memory: for 9 GB")],
)
def test_memory_that_runs_out_takes_one_line(
    error: MemoryError, line: str, monkeypatch: pytest.MonkeyPatch, refused: Refusal
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedkd_fast.report.write_report", fail)
    assert refused("report", "anything") == f"fedkd-fast: error: {line}\n"


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("fedkd_fast.report.write_report", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["report", "anything"])


# ---- info ----------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert lines["compiled"] == "CPU only" or lines["compiled"].startswith("with CUDA 1")
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["native ops"] == "loaded"
    assert {"fedkd_fast", "compiler", "device", "driver", "CPU capability"} <= set(lines)


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        (None, "13.0.48", "none found"),
        ("580.65.06", "13.0.48", "580.65.06"),
        ("570.12", "13.0.48", "570.12, too old: .* CUDA 13.0.48, for 580 or newer"),
        ("570.12", "12.8.61", "570.12"),
        ("570.12", "", "570.12"),
    ],
)
def test_info_says_when_the_driver_is_too_old(driver: str | None, cuda: str, words: str) -> None:
    assert re.fullmatch(words, describe_driver(driver, cuda))


# ---- report --------------------------------------------------------------------------------------


def test_report_prints_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the report's plots need the extra [report]")
    folders = [make_run(tmp_path / method, method, rounds=2) for method in ("fedkd", "local")]
    page = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "-o", str(page)]) == 0
    assert page.is_file()
    text = capsys.readouterr().out
    saving = json.loads((folders[0] / "summary.json").read_text())["saving"]
    assert re.search(rf"^digits\s+fedkd\s.*{100 * saving:.1f}%", text, re.MULTILINE)
    assert re.search(r"^digits\s+local\s", text, re.MULTILINE)
    assert f"report: {page}" in text


def test_report_of_an_unfinished_run(tmp_path: Path, refused: Refusal) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    (folder / "summary.json").unlink()
    assert "run has no summary.json" in refused("report", folder)


def test_report_names_the_malformed_line(tmp_path: Path, refused: Refusal) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write("{")
    assert re.search(r"metrics\.jsonl:6: not JSON", refused("report", folder))


def test_report_into_a_missing_folder(tmp_path: Path, refused: Refusal) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    assert "is not a folder" in refused("report", folder, "-o", tmp_path / "no" / "page.html")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a read-only file system")
def test_report_into_a_folder_that_takes_no_files(tmp_path: Path, refused: Refusal) -> None:
    pytest.importorskip("matplotlib", reason="the report's plots need the extra [report]")
    folder = make_run(tmp_path / "run", "local", rounds=1)
    assert "/proc/page.html: " in refused("report", folder, "-o", "/proc/page.html")
