"""Runs a script as if nothing but the package's own dependencies were installed.

python tests/without_extras.py SCRIPT
"""

from __future__ import annotations

import importlib.machinery
import runpy
import sys
from typing import Any

HIDDEN = {
    *("transformers", "sklearn", "scipy", "peft", "yaml", "seqeval", "datasets", "matplotlib"),
    *("tensorboard", "cryptography", "dp_accounting", "flwr", "nvflare", "openfl", "appfl"),
}
_finder = importlib.machinery.PathFinder
_find_spec = _finder.find_spec


def _find_what_is_not_hidden(name: str, path: Any = None, target: Any = None) -> Any:
    return None if name.split(".")[0] in HIDDEN else _find_spec(name, path, target)


if __name__ == "__main__":
    _finder.find_spec = staticmethod(_find_what_is_not_hidden)  # type: ignore[assignment]
    runpy.run_path(sys.argv[1], run_name="__main__")
    found = HIDDEN & {name.split(".")[0] for name in sys.modules}
    assert not found, f"{found} were imported all the same"
