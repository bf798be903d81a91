"""The command line in new processes that have all modules already: to kill many of them is cheap.

They are forked from a process that has imported everything and done nothing.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import ForkServerProcess

import numpy as np

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "cryptography.hazmat.primitives.ciphers.aead",
        "fedkd_fast.__main__",
        "fedkd_fast.trainer",
        "sklearn.datasets",
        "transformers.models.vit.modeling_vit",
    ]
)


def start(*arguments: object) -> ForkServerProcess:
    """Start `fedkd-fast` with these arguments."""
    process = _CONTEXT.Process(target=_run, args=([*map(str, arguments)],))
    process.start()
    return process


def run(*arguments: object) -> None:
    """Run `fedkd-fast` with these arguments to its end, which must be a good one."""
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0, f"fedkd-fast {arguments} ended with {process.exitcode}"


def _run(arguments: list[str]) -> None:
    from fedkd_fast.__main__ import main

    np.random.seed()  # as in a process of its own
    sys.exit(main(arguments))
