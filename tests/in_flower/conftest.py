"""Tests that need Flower; `test_flower_mod.py` runs them in an environment that has it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["*"]
