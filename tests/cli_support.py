"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedkd_fast.__main__ import main

Refusal = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must fail; return its one line and check that no file appeared."""

    def run(*argv: object) -> str:
        before = _listing(tmp_path)
        assert main([str(argument) for argument in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fedkd-fast: error: ")
        assert captured.err.count("\n") == 1
        assert _listing(tmp_path) == before
        return captured.err

    return run


def _listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
