"""Fields of dataclasses and named tuples, described by the comments that stand beside them.

The sources say what a field means in a comment behind it or above it. Every class that autodoc
shows gets a list of its fields, with these comments.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any, NamedTuple

from sphinx.application import Sphinx


class Field(NamedTuple):
    """One field, as text."""

    name: str
    kind: str
    default: str | None  # None: it has to be given
    meaning: str  # empty: no comment


def fields_of(kind: type) -> list[Field]:
    """Return the public fields that a class declares itself, in their order."""
    source = textwrap.dedent(inspect.getsource(kind))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    found = []
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if node.target.id.startswith("_"):
            continue
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        said = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
        default = None if node.value is None else ast.unparse(node.value)
        found.append(
            Field(node.target.id, ast.unparse(node.annotation), _plain(default), " ".join(said))
        )
    return found


def _plain(default: str | None) -> str | None:
    """Say a default as a caller would write it."""
    if default is None or not default.startswith("field("):
        return default
    (call,) = ast.parse(default).body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    (keyword,) = call.value.keywords
    made = ast.unparse(keyword.value)
    return made if keyword.arg == "default" else f"{made}()"


def _has_fields(kind: object) -> bool:
    return isinstance(kind, type) and (
        dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def _on_docstring(
    app: Sphinx, what: str, name: str, kind: Any, options: Any, lines: list[str]
) -> None:
    if what != "class" or not _has_fields(kind):
        return
    lines += ["", ".. rubric:: Fields", ""]
    for field in fields_of(kind):
        default = "" if field.default is None else f" = ``{field.default}``"
        lines.append(f"* **{field.name}**: ``{field.kind}``{default}")
        if field.meaning:
            lines[-1] += f" – {field.meaning}".replace("*", r"\*")
    lines.append("")


def _on_signature(
    app: Sphinx, what: str, name: str, kind: Any, options: Any, signature: Any, returns: Any
) -> tuple[str, None] | None:
    # The list of fields says the same, and better.
    return ("", None) if what == "class" and _has_fields(kind) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Take part in the docstrings of classes, before napoleon does."""
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)
    app.connect("autodoc-process-signature", _on_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
