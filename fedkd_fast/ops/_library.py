"""The native library, loaded. Nothing falls back: without it, an ImportError says what to do."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "libfedkd_fast_ops.so"


def _load() -> None:
    if not _LIBRARY.is_file():
        raise ImportError(
            f"{_LIBRARY.name} is missing from {_LIBRARY.parent}: build it with "
            "`pip install -e . --no-build-isolation` in the checkout, or reinstall fedkd-fast"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{_LIBRARY.name} does not fit this torch ({torch.__version__}; 2.10 or newer is "
            f"needed): {error}"
        ) from error


_load()
# Tests put another library of the same ops here.
native = torch.ops.fedkd_fast
