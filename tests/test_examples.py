"""The examples run without extras, and print what their README says that they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
WITHOUT_EXTRAS = Path(__file__).parent / "without_extras.py"
NUMBER = re.compile(r"[\d,]*\d(?:\.\d+)?")
# What an encoder chooses may differ between types of machines, and so what is trained on it.
POINTS, SHARE_OF_BYTES = 2.0, 0.05


def said(name: str) -> list[str]:
    """What the README says that an example prints."""
    text = (FOLDER / "README.md").read_text()
    (block,) = re.findall(rf"`python examples/{name}`\n\n```\n(.*?)\n```", text, re.DOTALL)
    return block.split("\n")


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(line)]


@pytest.mark.parametrize("name", ["plain_torch.py", "numpy_server.py"])
def test_an_example_prints_what_its_readme_says(name: str) -> None:
    done = subprocess.run(
        [sys.executable, WITHOUT_EXTRAS, FOLDER / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines, wanted = done.stdout.splitlines(), said(name)
    assert [NUMBER.sub("#", line) for line in lines] == [NUMBER.sub("#", line) for line in wanted]
    assert lines[0] == wanted[0], "the size of the model"
    for line, other in zip(lines[1:], wanted[1:], strict=True):
        if "accuracy" not in line:
            assert line == other
            continue
        (round_, accuracy, *sizes), (number, percent, *expected) = numbers(line), numbers(other)
        assert round_ == number and abs(accuracy - percent) <= POINTS
        assert sizes == pytest.approx(expected, rel=SHARE_OF_BYTES)


def test_the_first_example_learns_at_a_tenth_of_the_bytes() -> None:
    first, *rounds = (numbers(line) for line in said("plain_torch.py"))
    assert rounds[-1][1] > rounds[0][1] + 3
    assert all(max(up, down) < first[0] / 10 for _, _, up, down in rounds)
