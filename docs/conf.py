"""How Sphinx builds the site: `make docs`. Neither building nor reading it needs the network."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER / "_ext"))

project = "fedkd_fast"
author = "The fedkd_fast authors"
copyright = "The fedkd_fast authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "absent_frameworks",
    "commented_fields",
    "exact_names",
    "expanded_pages",
    "generated",
    "mathml",
]
exclude_patterns = ["_ext"]
templates_path: list[str] = []

# Fences without a language are shells, layouts and equations in plain text.
highlight_language = "text"
# `name` in a docstring is a link where the name has an entry here, and code elsewhere.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "fedkd_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
