"""Sphinx: furo, Markdown pages, API from docstrings. Everything is local, so the build works offline."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from convlora._version import __version__

project = "convlora"
author = "The convlora authors"
copyright = "The convlora authors. Apache License 2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_autodoc_typehints"]
exclude_patterns = ["_build", "methods_table.md"]  # the table is a part of methods.md
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
always_use_bars_union = True
# Annotations that a type checker alone resolves are printed as written.
suppress_warnings = ["sphinx_autodoc_typehints.forward_reference", "sphinx_autodoc_typehints.guarded_import"]

# sphinx-autodoc-typehints' own use of an interface that goes away in Sphinx 10; constraints.txt pins both.
warnings.filterwarnings("ignore", message=".*_RstSnippetParser.*")

html_theme = "furo"
html_title = f"convlora {version}"


def double_backticks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here write code as in Markdown, `x: y`; reStructuredText wants two backticks on each side."""
    lines[:] = [re.sub(r"(?<![`:])`([^`]+)`(?![`_])", r"``\1``", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", double_backticks, priority=100)  # before napoleon reads colons
