"""What pages take in from elsewhere, by a line of their own.

``<!-- from README.md: Install -->``
    a section of a file in the repository's root, by its heading; without one, the whole file.
``<!-- every module of fedkd_fast.methods -->``
    what autodoc says of each module of a package.

Links between docs/ and files of the root become links between pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
_FROM = re.compile(r"^<!-- from ([\w.-]+\.md)(?:: (.+?))? -->$", re.MULTILINE)
_EVERY = re.compile(r"^<!-- every module of ([\w.]+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?:\.\./|docs/)?([\w-]+\.md)(?=[)#])")
_MODULE = """## {title}

```{{eval-rst}}
.. automodule:: {name}
   {option}
```
"""


def section(text: str, heading: str) -> str:
    """Return what stands under a heading of the second level.

    Raises:
        ValueError: there is no such heading, or more than one of it.
    """
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    headings, bodies = parts[1::2], parts[2::2]
    if headings.count(heading) != 1:
        raise ValueError(f"heading must stand once among {headings}, got {heading!r}")
    return bodies[headings.index(heading)].strip()


def modules_of(package: str) -> Iterator[tuple[str, bool]]:
    """Go through the public modules below a package: name, and whether it is a package itself."""
    folder = ROOT.joinpath(*package.split("."))
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name != package and "._" not in name:
            yield name, is_package


def _every_module(match: re.Match[str]) -> str:
    return "\n".join(
        _MODULE.format(
            title=name.removeprefix(f"{match[1]}."),
            name=name,
            option=":no-members:" if is_package else ":members:",
        )
        for name, is_package in modules_of(match[1])
    )


def _on_read(app: Sphinx, page: str, source: list[str]) -> None:
    def taken(match: re.Match[str]) -> str:
        file, heading = ROOT / match[1], match[2]
        app.env.note_dependency(str(file))
        text = file.read_text(encoding="utf-8")
        return text if heading is None else section(text, heading)

    text = _EVERY.sub(_every_module, _FROM.sub(taken, source[0]))
    # Pages in folders link to their neighbours.
    if "/" not in page:
        text = _LINK.sub(lambda match: f"]({match[1].lower()}", text)
    source[0] = text


def setup(app: Sphinx) -> dict[str, Any]:
    """Expand pages as they are read."""
    app.connect("source-read", _on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
