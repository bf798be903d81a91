"""`name` in a docstring: a link where that very name has an entry, code elsewhere."""

from __future__ import annotations

from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment


class ExactName(PyXRefRole):
    """Sphinx's role, but that a leading dot is a part of the text and looks for nothing."""

    def process_link(
        self, env: BuildEnvironment, refnode: Element, explicit: bool, title: str, target: str
    ) -> tuple[str, str]:
        """Return what is shown, and what is looked for."""
        shown, sought = super().process_link(env, refnode, explicit, title, target)
        if refnode.attributes.pop("refspecific", False):
            return title, target
        return shown, sought


def setup(app: Sphinx) -> dict[str, Any]:
    """Take the place of Sphinx's role ``py:obj``."""
    app.add_role_to_domain("py", "obj", ExactName(), override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
