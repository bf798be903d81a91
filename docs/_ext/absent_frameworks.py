"""Adapters are described where the frameworks that they are for are not installed.

They are imported here once, over stand-ins of a version that they accept; autodoc then finds them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from expanded_pages import modules_of
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock

VERSIONS = {"appfl": "1.12", "flwr": "1.41", "nvflare": "2.9", "openfl": "1.9"}


def setup(app: Sphinx) -> dict[str, Any]:
    """Import the adapters."""
    with mock(list(VERSIONS)):
        for framework, version in VERSIONS.items():
            import_module(framework).__version__ = version
        for name, _ in modules_of("fedkd_fast.integrations"):
            import_module(name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
