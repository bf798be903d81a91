"""Pages made from what they are about: the help of the command line, the files of results."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from fedkd_fast.__main__ import build_parser

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
_HELP_COLUMNS = 88
# Files in which nothing says by which command they were made.
COMMANDS = {
    "aggregate.json": "python bench/bench_aggregate.py --out FILE",
    "codec_cpu.json": "python -m pytest bench/bench_pack_factors.py bench/bench_rans.py "
    "bench/bench_wire.py --benchmark-json=FILE",
    "codec_avx2.json": "python -m pytest bench/bench_pack_factors.py bench/bench_rans.py "
    "bench/bench_wire.py --benchmark-json=FILE",
    "cpu.json": "make bench",
    "cpu_2_threads.json": "python -m pytest bench/bench_distill_loss.py bench/bench_layer_mse.py "
    "--threads 2 --benchmark-json=FILE",
    "distill_memory.json": "python bench/distill_memory.py --out FILE",
    "distill_step.json": "python bench/distill_step.py --rounds 7 --out FILE",
    "kernel_resources.json": "python bench/kernel_resources.py",
    "nvflare_quantizer.json": "python bench/nvflare_quantizer.py --out FILE",
    "openfl.json": "python bench/openfl_pipelines.py --out FILE",
    "process_group.json": "python bench/process_group.py --seeds 0 1 2 --out FILE",
    "sealing.json": "cd bench && python -m pytest bench_sealing.py --threads 1 "
    "--benchmark-json=FILE",
}


def helps() -> dict[str, str]:
    """Return the help of every command by its name; that of the program has the empty one."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_HELP_COLUMNS)  # argparse asks nothing else for the width
    try:
        parser = build_parser()
        (commands,) = (
            action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        )
        found = {"": parser.format_help()}
        for name, command in commands.choices.items():
            found[name] = command.format_help()
        return found
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def results() -> list[tuple[str, str, str]]:
    """Return name, command and commit of each file of results.

    Raises:
        ValueError: a file says nothing of its command, nor does `COMMANDS`; or both do.
    """
    rows = []
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        facts = content if isinstance(content, dict) else {}
        if ("command" in facts) == (file.name in COMMANDS):
            raise ValueError(f"{file.name} must name its command, or COMMANDS must, and not both")
        command = facts.get("command") or COMMANDS[file.name]
        places = (facts, *(facts.get(key, {}) for key in ("facts", "provenance", "fedkd_fast")))
        commit = next((place["commit"] for place in places if "commit" in place), "–")
        rows.append((file.name, command, commit))
    return rows


class CommandLine(Directive):
    """The help of each command, under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        """Make the sections."""
        made: list[nodes.Node] = []
        for name, text in helps().items():
            title = f"fedkd-fast {name}".strip()
            part = nodes.section(ids=[nodes.make_id(title)], names=[title])
            part += nodes.title(text=title)
            part += nodes.literal_block(text, text, language="text")
            made.append(part)
        return made


class Results(Directive):
    """A table of the files of results, and of the commands that made them."""

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        group = nodes.tgroup(cols=3)
        for width in (20, 65, 15):
            group += nodes.colspec(colwidth=width)
        group += nodes.thead("", _row(*(nodes.Text(one) for one in ("file", "command", "commit"))))
        body = nodes.tbody()
        for name, command, commit in results():
            body += _row(nodes.literal(text=name), nodes.literal(text=command), nodes.Text(commit))
        group += body
        return [nodes.table("", group, classes=["results"])]


def _row(*cells: nodes.Node) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("command-line", CommandLine)
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
