"""What the subcommands share: the parser's manners, tables, and the way files are written."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedkd_fast._files import replacing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

Command = Callable[[argparse.Namespace], int]
# A table into a file or pipe must not be cut at the 80 columns that rich assumes there.
_PIPE_WIDTH = 160
# Control and format characters, line and paragraph separators: a name that holds them could rewrite
# or reorder what a terminal shows.
_INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp"})
# The key of a safetensors header that is no tensor.
_RESERVED = "__metadata__"


NO_REPORT = 'needs pip install "fedkd-fast[report]"'


class UsageError(ValueError):
    """A command line that names no possible command."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any, examples in their own lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for the indent of subcommands, which argparse forgets."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that every error takes one way out."""

    before_help: Callable[[], None] | None = None
    """Completes help texts; called once, and only if help is asked for."""

    def format_help(self) -> str:
        """Return the help."""
        if self.before_help is not None:
            prepare, self.before_help = self.before_help, None
            prepare()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Command,
    summary: str,
    examples: str,
    description: str | None = None,
) -> Parser:
    """Add a subcommand with the options that all of them have."""
    lines = "\n".join(f"  fedkd-fast {name} {line}".rstrip() for line in examples.splitlines())
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description or f"{summary[0].upper()}{summary[1:]}.", 79),
        epilog=f"examples:\n{lines}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=None,
        help="log to stderr what is being done; -vv also shows where an error came from",
    )
    parser.set_defaults(run=run)
    return parser


def stdout() -> Console:
    """The console of tables."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,  # names may be like :key:
    )


def say(text: str) -> None:
    """Print a result as it is, never wrapped or marked up."""
    sys.stdout.write(f"{text}\n")


def visible(text: str) -> str:
    """Write characters that a terminal would obey instead of show as escapes."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _INVISIBLE else char
        for char in text
    )


def table(*columns: str, left: int = 1) -> Table:
    """An empty table; the first ``left`` columns hold text, the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        text = number < left
        made.add_column(
            column,
            justify="left" if text else "right",
            no_wrap=True,
            overflow="ellipsis" if text else "fold",
        )
    return made


def page_of(
    folders: Sequence[Path], out: Path | None = None, names: Sequence[str] | None = None
) -> Path | None:
    """Write the report of runs where the extra that draws it is installed, and return its path."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from fedkd_fast.report import write_report

    return write_report(folders, out, names)


def check_target(path: Path, overwrite: bool, *sources: Path | None) -> Path:
    """Refuse a file that cannot or must not be written, before any work is done.

    Returns:
        The file to write: of a link, which somebody gave by name, what it points to.

    Raises:
        ValueError: its folder does not exist, it is no regular file, or it exists and must be kept,
            as sources must be.
    """
    for source in sources:
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"{path} is what is read: name another file to write")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():
        # As /dev/null: a file would take its place.
        raise ValueError(f"{path} is no regular file: name another")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: give --overwrite to replace it")
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise ValueError(f"{path} is a link to itself: name a file")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder")
    return target


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as part:
        part.write_bytes(data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is not a safetensors file.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # The library gives them in any order, and frames of the same file should be the same.
        return dict(sorted(load(path.read_bytes()).items()))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        ValueError: a name that the format keeps for itself.
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    if _RESERVED in tensors:
        raise ValueError(f"{path} cannot hold a tensor named {_RESERVED!r}: safetensors keeps it")
    # Tied tensors share their memory, which the format cannot say: each name gets its own copy.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    # What transformers wants to see before it reads a file.
    write_bytes(path, save(copies, metadata={"format": "pt"}))
