"""Configuration of the documentation."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import cast

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from docs import errors, picture  # noqa: E402


project = "inference-session"
author = "The inference-session authors"
copyright = f"2026, {author}"  # noqa: A001
release = version = version_of(project)

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

# Docstrings write `code` as Markdown does.
default_role = "code"

# The order of the source is the order of importance.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

# A build must not need the network, so there is nothing to link the standard library to.
nitpick_ignore_regex = [
    (r"py:.*", r"(builtins|collections|contextlib|types|typing|unittest|uuid)\..*"),
    (r"py:class", r"_pytest\..*"),
    (r"py:class", r"int|str|object|bool|None|UUID|Exception|(.*\.)?(KV|T)"),
    (r"py:(class|exc)", r"(Memory|Runtime|Type|Value)Error"),
    (r"py:obj", r".*\.(KV|T)"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"


def setup(app: Sphinx) -> None:
    """Write what is written by programs, and turn the docstrings' "Raises:" and the like into fields.

    The napoleon extension would do so, too, but takes what precedes a colon in an attribute's docstring for its type.
    """
    app.connect("autodoc-process-docstring", _convert_sections)
    app.connect("autodoc-process-bases", _show_public_bases)
    picture.draw(HERE / "_build" / "concepts.svg")
    errors.write(HERE / "_build" / "errors.md")


def _convert_sections(*event: object) -> None:
    lines = cast("list[str]", event[-1])
    lines[:] = GoogleDocstring(lines).lines()


def _show_public_bases(*event: object) -> None:
    bases = cast("list[type]", event[-1])
    bases[:] = [base.__base__ or base if base.__name__[0] == "_" else base for base in bases]
