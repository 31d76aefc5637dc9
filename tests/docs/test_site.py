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
PAGES = [
    page.relative_to(SITE).with_suffix("").as_posix()
    for page in sorted(SITE.glob("**/*.html"))
    if page.name not in GENERATED
]


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
    """Each error says when you get it and when you don't, and the list of errors has it."""
    means, do_not = errors.when(getattr(exceptions, name))
    assert means.endswith(".")
    assert do_not.endswith(".")
    listed = read("reference").partition('id="errors"')[2].partition("</dl>")[0]
    assert f"#inference_session.exceptions.{name}" in listed


def test_every_page_is_listed_once() -> None:
    """The list of pages beside each page names every page, and none twice."""
    listed = re.findall(r'toctree-l1"><a class="reference internal" href="([^"]+)"', read("index"))
    pages = {page.relative_to(SITE).as_posix() for page in SITE.glob("**/*.html")}
    assert sorted(listed) == sorted(pages - {"index.html", *GENERATED})


def test_picture_is_of_this_library() -> None:
    """The picture of the core concepts, wide and narrow, is in its page, and drawn from what a real session did."""
    for picture in read("concepts").split('role="img"')[1:]:
        assert picture.partition("</svg>")[0].count(">kv_length 5<") == 3
    assert read("concepts").count('role="img"') == 2


@pytest.mark.parametrize("page", PAGES)
def test_head(page: str) -> None:
    """A page says to search engines what it's about, and has an icon that is there."""
    assert re.search(r'<meta content="[^"]+LLM[^"]+" name="description"', read(page))
    (icon,) = re.findall(r'<link rel="shortcut icon" href="([^"]+)"', read(page))
    assert (SITE / page).parent.joinpath(icon).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_contents_are_worth_their_place(page: str) -> None:
    """A list of the page's sections names two of them at least, besides the page itself."""
    _, _, contents = read(page).partition('<div class="toc-tree">')
    assert contents.partition("</aside>")[0].count("<li>") not in {1, 2}


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_pages_are_links(page: str) -> None:
    """The README's paths of pages, such as docs/tutorial.md, are links on the site, by the pages' titles."""
    assert not re.search(r">docs/[\w/-]+\.md<", read(page))
    if page == "index":
        article = read(page).partition("<article")[2]
        assert 'href="engines/llama_cpp/index.html">llama.cpp</a>' in article


def test_names_are_linked() -> None:
    """In the reference, names in signatures and docstrings lead to what they name, also in Python's documentation."""
    page = read("reference")
    for target in ("engine.StateSlots.borrow", "engine.BorrowedState.kv_length", "Session"):
        assert f'<a class="reference internal" href="#inference_session.{target}"' in page
    for target in ("uuid.html#uuid.UUID", "functions.html#int", "exceptions.html#TypeError"):
        assert f'href="https://docs.python.org/3/library/{target}"' in page
