"""The command line: `fedkd-fast`, also `python -m fedkd_fast`.

Exit codes: 0; 2 with one line on stderr for anything that the user can mend; 3 where a round had
too few replies; 130 on Ctrl-C or SIGTERM. After 3 and 130 `train --resume` goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fedkd_fast import __version__
from fedkd_fast._errors import QuorumError, Stopped
from fedkd_fast.cli import frames, keys, runs, sweep, train
from fedkd_fast.cli.common import HelpFormatter, Parser, UsageError, add_command, say

PROG = "fedkd-fast"
_MENDABLE = 2
_NO_QUORUM = 3
_INTERRUPTED = 130
# What a shell reports of a program whose reader went away.
_BROKEN_PIPE = 141
# Extras that bring a module; the core does without them.
_EXTRAS = {
    "transformers": "train",
    "sklearn": "train",
    "yaml": "train",
    "matplotlib": "report",
    "tensorboard": "tensorboard",
    "cryptography": "crypto",
    "dp_accounting": "privacy",
}

_EXAMPLES = f"""examples:
  {PROG} train --task digits --method fedkd
  {PROG} report runs/digits-fedkd-s0 runs/digits-local-s0 -o page.html
  {PROG} compress update.safetensors update.fkd --energy 0.95
  {PROG} inspect update.fkd

`{PROG} COMMAND --help` explains a command."""


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=PROG,
        description="Federated learning with mutual distillation and tiny updates.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    train.add_commands(commands)
    sweep.add_commands(commands)
    runs.add_commands(commands)
    frames.add_commands(commands)
    keys.add_commands(commands)
    add_command(commands, "info", _info, "show the version, the build and this machine", "")
    parser.set_defaults(run=None, commands=tuple(commands.choices), verbose=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    verbose = 0
    try:
        args = build_parser().parse_args(argv)
        if args.run is None:
            known = ", ".join(args.commands)
            raise UsageError(f"name a command: {known} (see {PROG} --help)")
        verbose = args.verbose or 0
        _configure_logging(verbose)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"{PROG}: {stop if str(stop) else 'interrupted'}", file=sys.stderr)
        return _INTERRUPTED
    except QuorumError as error:
        print(f"{PROG}: error: {_one_line(error)}", file=sys.stderr)
        return _NO_QUORUM
    except BrokenPipeError:
        # The reader of stdout went away (`| head`); what is left in the buffer has no taker.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if verbose > 1:
            logging.getLogger("fedkd_fast").debug("where it came from", exc_info=True)
        print(f"{PROG}: error: {_one_line(error)}", file=sys.stderr)
        return _MENDABLE


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        return f'{error.name} is not installed: pip install "fedkd-fast[{extra}]"'
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return " ".join(str(error).split()) or type(error).__name__


def _configure_logging(verbose: int) -> None:
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedkd_fast").setLevel(levels[min(verbose, 2)])


def _info(args: argparse.Namespace) -> int:
    import torch

    import fedkd_fast._C as build
    from fedkd_fast._driver import describe_driver, driver_version

    cuda = f"with CUDA {build.cuda_version} ({build.cuda_archs})"
    facts = {
        "fedkd_fast": __version__,
        "compiled": cuda if build.has_cuda else "CPU only",
        "compiler": build.compiler,
        "native ops": _native_ops(),
        "torch": torch.__version__,
        "device": _device(),
        "driver": describe_driver(driver_version(), build.cuda_version),
        "threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "Python": sys.version.split()[0],
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        say(f"{name:<{width}}  {value}")
    return 0


def _native_ops() -> str:
    try:
        import fedkd_fast.ops  # noqa: F401
    except ImportError as error:
        return _one_line(error)
    return "loaded"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    if torch.version.cuda is not None:
        return f"no CUDA device found by this torch (CUDA {torch.version.cuda})"
    return "CPU, this torch has no CUDA"


if __name__ == "__main__":
    sys.exit(main())
