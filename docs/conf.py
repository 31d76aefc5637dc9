"""Configuration of the documentation."""

import pkgutil
import re
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import cast

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import inference_session


HERE = Path(__file__).parent
PAGE = re.compile(r"docs/(.+)\.md")
sys.path.insert(0, str(HERE.parent))

from docs import errors, links, picture  # noqa: E402


project = "inference-session"
about = metadata(project)
author = "The inference-session authors"
copyright = f"2026, {author}"  # noqa: A001
release = version = about["Version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]

# Docstrings write `code` as Markdown does: see `links`.
default_role = "name"

# The order of the source is the order of importance.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

# A build must not need the network, so what is linked of the standard library is listed in a file.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "python.inv")}
nitpick_ignore_regex = [
    (r"py:class", r"_pytest\..*|.*\.(E|KV|T)"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_html_meta = {"description": about["Summary"]}

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {"top_of_page_buttons": list[str]()}
pygments_dark_style = "github-dark"  # the theme's own underlines what is imported


def setup(app: Sphinx) -> None:
    """Write the generated parts, and correct the output of Sphinx and its extensions."""
    links.setup(app)
    app.connect("builder-inited", _find_order)
    app.connect("autodoc-process-docstring", _convert_sections)
    app.connect("autodoc-process-bases", _show_public_bases)
    app.connect("doctree-resolved", _link_pages)
    app.connect("html-page-context", _hide_short_contents, priority=900)
    picture.draw(HERE / "_build" / "concepts.svg")
    errors.write(HERE / "_build" / "errors.md")


def _find_order(*_: object) -> None:
    """Let members be in the order of the source, though their modules only hand them on."""
    modules = pkgutil.iter_modules(inference_session.__path__, "inference_session.")
    private = [_analyzed(module.name) for module in modules if not module.ispkg]
    for public in map(_analyzed, links.MODULES):
        for source in private:
            public.tagorder |= source.tagorder


def _analyzed(module: str) -> ModuleAnalyzer:
    analyzer = ModuleAnalyzer.for_module(module)  # the same object each time
    analyzer.analyze()
    return analyzer


def _convert_sections(*event: object) -> None:
    """Turn the docstrings' "Raises:" and the like into fields.

    The napoleon extension would do so, too, but takes what precedes a colon in an attribute's docstring for its type.
    """
    lines = cast("list[str]", event[-1])
    lines[:] = GoogleDocstring(lines).lines()


def _show_public_bases(*event: object) -> None:
    bases = cast("list[type]", event[-1])
    bases[:] = [base.__base__ or base if base.__name__[0] == "_" else base for base in bases]


def _link_pages(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Turn the path of a page, which is all that the README can tell, into a link with the page's title."""
    for path in list(doctree.findall(nodes.literal)):
        if not (found := PAGE.fullmatch(path.astext())):
            continue
        if found[1] not in app.env.titles:
            raise SphinxError(f"{page} tells of {path.astext()}, which isn't a page")
        link = nodes.reference(
            "", "", internal=True, refuri=app.builder.get_relative_uri(page, found[1])
        )
        link += nodes.Text(app.env.titles[found[1]].astext())
        path.replace_self(link)


def _hide_short_contents(*event: object) -> None:
    """Show no table of contents where it would have one entry."""
    context = cast("dict[str, object]", event[3])
    if str(context.get("toc", "")).count("<li>") <= 2:  # one of them is the page's own title
        context["furo_hide_toc"] = True
