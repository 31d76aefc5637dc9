"""The built site has all that it should."""

import importlib
import inspect
import os
import re
from pathlib import Path

import pytest
from docs import errors
from sphinx.util.inventory import InventoryFile

from inference_session import exceptions


MODULES = [
    "inference_session",
    "inference_session.engine",
    "inference_session.exceptions",
    "inference_session.testing",
]
SITE = Path(os.environ["BUILT_SITE"])
GENERATED = {"genindex.html", "py-modindex.html", "search.html"}


def read(page: str) -> str:
    """Return a page of the site."""
    return (SITE / f"{page}.html").read_text("utf-8")


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """Return the full names of all that has an entry in the reference."""
    inventory = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    return {name for kind in inventory.data.values() for name in kind}


@pytest.mark.parametrize("module", MODULES)
def test_reference_is_complete(module: str, documented: set[str]) -> None:
    """Every public name and each of its public members has an entry, or is one of its class's arguments."""
    for name in importlib.import_module(module).__all__:
        public: type[object] = getattr(importlib.import_module(module), name)
        assert f"{module}.{name}" in documented
        for member in getattr(public, "__dict__", {}):  # a constant has none
            is_argument = f"\n    {member}: " in (inspect.getdoc(public) or "")
            assert (
                member.startswith("_") or is_argument or f"{module}.{name}.{member}" in documented
            )


@pytest.mark.parametrize("name", exceptions.__all__)
def test_errors_say_when(name: str) -> None:
    """Each error says when you get it and when you don't, and the table of errors shows both."""
    means, do_not = errors.when(getattr(exceptions, name))
    assert means.endswith(".")
    assert do_not.endswith(".")
    table = read("reference").partition("</table>")[0]
    assert f"#inference_session.exceptions.{name}" in table


def test_every_page_is_listed_once() -> None:
    """The list of pages beside each page names every page, and none twice."""
    listed = re.findall(r'toctree-l1"><a class="reference internal" href="([^"]+)"', read("index"))
    pages = {page.relative_to(SITE).as_posix() for page in SITE.glob("**/*.html")}
    assert sorted(listed) == sorted(pages - {"index.html", *GENERATED})


def test_picture_is_of_this_library() -> None:
    """The picture of the core concepts is in its page, drawn from what a real session did."""
    page = read("concepts")
    assert "</svg>" in page
    assert page.count(">kv_length 5<") == 3
