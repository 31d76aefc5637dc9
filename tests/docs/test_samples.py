"""Every code sample is run: in the README, on the site's pages and in docstrings."""

import re
from pathlib import Path

import pytest
from docs import samples
from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if "_build" not in page.parts
)
SOURCES = sorted(ROOT.glob("src/**/*.py"))
UNRUN = re.compile(
    r"^ *[`~:]{3,} *\{(code|code-block|sourcecode|doctest|parsed-literal)\}", re.MULTILINE
)
"""Other ways to write code, which nothing runs."""

LANGUAGES = {"python", "console", "json", "python-console", "rust", "sh", "text", "toml"}
"""What a sample may be in. `python` is run, and nothing else is Python by another name."""

FIRST_READ = ["README.md", "docs/tutorial.md", "docs/concepts.md"]
"""Pages that are read on phones, before anybody has installed anything. The README heads the site, too."""


def as_id(path: Path) -> str:
    """Return what to call a file in the names of tests."""
    return path.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[str]:
    """Return the languages of a page's code blocks, leaving out directives of the site."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    languages = [token.info.strip() for token in tokens if token.type == "fence"]
    assert not any(token.type == "code_block" for token in tokens), "indented code has no language"
    return [language for language in languages if not language.startswith("{")]


def test_pages_are_found() -> None:
    """There are pages with samples to look at."""
    assert sum(fences(page).count("python") for page in PAGES) > 15


@pytest.mark.parametrize("page", PAGES, ids=as_id)
def test_languages(page: Path) -> None:
    """No sample hides from being run by a name such as `py` or `{code-block} python`, or by none at all."""
    assert set(fences(page)) <= LANGUAGES
    assert not UNRUN.search(page.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=as_id)
def test_every_sample_is_run(page: Path) -> None:
    """What runs the samples sees each `python` block of a page, the invisible ones included."""
    seen = list(samples.markdown.parse(page).examples())
    invisible = page.read_text("utf-8").count("invisible-code-block: python")
    assert len(seen) == fences(page).count("python") + invisible


@pytest.mark.parametrize("page", FIRST_READ)
def test_comments_fit_a_phone(page: str) -> None:
    """On the pages read first, comments stand above the code, and are short."""
    lines = [
        line
        for token in MarkdownIt().parse((ROOT / page).read_text("utf-8"))
        if token.type == "fence" and token.info == "python" and ">>> " not in token.content
        for line in token.content.splitlines()
    ]
    assert lines
    assert not [line for line in lines if "  # " in line.lstrip()]
    assert not [line for line in lines if line.lstrip().startswith("#") and len(line) > 60]


@pytest.mark.parametrize("source", SOURCES, ids=as_id)
def test_docstrings(source: Path) -> None:
    """Samples in docstrings are doctests, which are run; a literal block would not be."""
    text = source.read_text("utf-8")
    assert not re.search(r"```|::$|\.\. code", text, re.MULTILINE)
    assert len(list(samples.docstrings.parse(source).examples())) >= (">>> " in text)
