"""Packages that come with extras: the core does without them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str, what: str, package: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: to import.
        what: needs it, for the message.
        package: that has it, as pip names it.
        extra: that brings it.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'{what} needs {package}: pip install "fedkd-fast[{extra}]"') from error
