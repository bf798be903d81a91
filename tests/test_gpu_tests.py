"""The tests that `python -m bench.gpu` runs: which, and what is kept of those that break."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_places import place, pretend

from bench.gpu import plan, stages
from bench.gpu.process import Finished
from bench.gpu.stages import FAILED, PASSED

CONFTEST = """
from bench.gpu import stages
stages.TEST_S = 2.0
"""
GOOD = "def test_good():\n    pass\n"
BAD = "def test_bad():\n    assert 1 == 2, 'off by 3'\n"
IDLE = "@pytest.mark.skip\ndef test_idle():\n    pass\n"
DIES = "def test_dies():\n    os._exit(7)\n"
HANGS = "def test_hangs():\n    time.sleep(600)\n"
# Its fault is noticed when the device is waited for.
FAULTS = "def test_faults():\n    timing.context_is_lost = lambda: True\n"
LAST = "def test_last():\n    assert not timing.context_is_lost()\n"
UNMARKED = "test_unmarked = pytest.mark.skipif(False, reason='')(lambda: None)\n"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place whose only tests are those of tests/test_stub.py, and that has rules."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    (tmp_path / stages.RULES).write_text("")
    monkeypatch.setenv("PYTHONPATH", str(stages.CHECKOUT))
    monkeypatch.setattr(stages, "test_files", lambda stem: ["test_stub.py"] * (stem == "rans"))
    monkeypatch.setattr(stages, "TEST_S", 2.0)
    return tmp_path


def run(folder: Path, *tests: str, seconds: float = 120) -> stages.Result:
    head = "import os, time\nimport pytest\nfrom pytest import mark\nfrom bench.gpu import timing\n"
    marked = [text if text is UNMARKED else f"@mark.cuda\n{text}" for text in tests]
    (folder / "tests" / "test_stub.py").write_text("\n".join([head, *marked]))
    found = stages.tests(place(folder, seconds), None)
    assert not (folder / "tests.jsonl").exists()
    return found


def named(*lines: str) -> list[str]:
    return [f"tests/test_stub.py::{line}" for line in lines]


def test_outcomes_are_counted(there: Path) -> None:
    assert run(there, GOOD, IDLE, LAST, UNMARKED) == {"outcome": PASSED, "passed": 2, "skipped": 1}


def test_a_test_that_breaks_costs_no_other(there: Path) -> None:
    found = run(there, GOOD, BAD, DIES, FAULTS, HANGS, LAST)
    assert (found["outcome"], found["passed"], found["failed"]) == (FAILED, 2, 4)
    assert "not reached" not in found
    assert found["error"] == "4 tests failed"
    bad, dies, faults, hangs = found["failures"]
    assert bad == named("test_bad: AssertionError: off by 3")[0]
    assert dies.startswith(named("test_dies: exit status 7")[0])
    assert [faults, hangs] == named(
        "test_faults: the CUDA context is lost behind it", "test_hangs: took longer than 2 s"
    )


def test_tests_that_were_not_reached_are_no_success(
    monkeypatch: pytest.MonkeyPatch, there: Path
) -> None:
    def answer(line: list[str]) -> Finished:
        (there / "tests.jsonl").write_text(
            '{"test": "a", "outcome": "passed", "error": null}\n'
            '{"test": "b", "outcome": "not reached", "error": null}\n'
            '{"test": "c", "outcome": "started", "error": null}\n{"test": "d'
        )
        return Finished(None, "")

    pretend(monkeypatch, answer)
    found = stages.tests(place(there), None)
    assert found["error"] == "ran out of time: 2 tests not reached"
    assert (found["outcome"], found["passed"], found["not reached"]) == (FAILED, 1, 2)


def test_a_file_that_cannot_be_imported_hides_no_other(there: Path) -> None:
    (there / stages.RULES).write_text("import no_such_module")
    found = run(there, GOOD, DIES, LAST)
    assert (found["passed"], found["failed"]) == (2, 2)
    assert "No module named 'no_such_module'" in "".join(found["failures"])


def test_pytest_that_cannot_begin_is_said(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pretend(monkeypatch, lambda line: Finished(4, "ERROR: unknown option\n"))
    found = stages.tests(place(there), None)
    assert found == {"outcome": FAILED, "error": "exit status 4: ERROR: unknown option"}
    assert len(commands) == 1


def test_an_op_alone_has_its_files_and_rules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = pretend(monkeypatch, lambda line: Finished(0, ""))
    assert stages.tests(place(tmp_path), "unpack_factors")["error"] == "no test ran"
    (line,) = commands
    assert line[line.index("-k") + 1] == "test_pack_factors or unpack_factors"
    assert "tests/test_pack_factors.py" in line and stages.RULES in line
    assert "tests/test_distill_loss.py" not in line


@pytest.mark.parametrize("built", [True, False])
def test_training_is_tested_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool
) -> None:
    commands = pretend(monkeypatch, lambda line: Finished(0, ""))
    (tmp_path / "fedkd_fast").mkdir()
    if built:
        (tmp_path / "fedkd_fast" / "_C.cpython-312-x86_64-linux-gnu.so").touch()
    stages.tests(place(tmp_path), None)
    assert (stages.TRAINING in commands[0]) == built
    # The most important first.
    files = [word for word in commands[0] if word.startswith("tests/")]
    assert files[0] == "tests/test_distill_loss.py"


def test_every_test_on_a_gpu_is_run() -> None:
    named = {name for row in plan.TABLE.values() for name in stages.test_files(row.stem)}
    named |= {Path(one).name for one in (stages.RULES, stages.TRAINING)}
    for path in (stages.CHECKOUT / "tests").glob("test_*.py"):
        runs_there = re.search(r"\bdevice: torch\.device|pytest\.mark\.cuda", path.read_text())
        assert not runs_there or path.name in named, path.name
        # The Python at hand there need not have it, and would lose the whole file.
        assert path.name not in named or "hypothesis" not in path.read_text(), path.name
