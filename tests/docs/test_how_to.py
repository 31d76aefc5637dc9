"""The samples of a how-to page run as printed, by someone who has followed the page and nothing else."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import inference_session


HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = sorted(HOW_TO.glob("*.md"))
PACKAGES = Path(inference_session.__file__).parents[1]


def as_script(page: Path) -> str:
    """Return the `python` blocks of a page, one after the other."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    return "\n".join(token.content for token in tokens if token.info.strip() == "python")


def files_to_save(page: Path) -> list[Path]:
    """Return the modules that the page links to."""
    links: list[str] = re.findall(r"\]\((\S+\.py)\)", page.read_text("utf-8"))
    return [page.parent / link for link in links]


def packages_to_install(page: Path) -> set[str]:
    """Return the packages that the page says to install."""
    (command,) = re.findall(r"`pip install ([\w\s-]+)`", page.read_text("utf-8"))
    return set(command.split())


def imports(source: str) -> Iterator[str]:
    """Yield the top-level names of the modules that a script imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def run(page: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's samples in a directory that has the files that the page links to, and nothing else."""
    for module in files_to_save(page):
        shutil.copy(module, directory)
    directory.joinpath("samples.py").write_text(as_script(page), "utf-8")
    return subprocess.run(
        [sys.executable, "-W", "error", "samples.py"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_pages_are_found() -> None:
    """There are pages to look at."""
    assert len(PAGES) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_hidden(page: Path) -> None:
    """A page shows all the code that its samples need."""
    assert "invisible" not in page.read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_imports_are_explained(page: Path) -> None:
    """A page names the packages and the files that its samples import, and those that these import in turn."""
    files = files_to_save(page)
    sources = [as_script(page), *(file.read_text("utf-8") for file in files)]
    names = {name for source in sources for name in imports(source)}
    distributions = packages_distributions()
    for name in names - sys.stdlib_module_names - {file.stem for file in files}:
        assert packages_to_install(page) & {name.replace("_", "-"), *distributions.get(name, ())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_samples_run_as_printed(page: Path, tmp_path: Path) -> None:
    """The samples of a page are a script that runs, without a warning, and leaves no session open."""
    result = run(page, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr, result.stderr


def test_logs_have_the_id(tmp_path: Path) -> None:
    """Each way to log that the page shows puts the session's id in, also if two sessions are stepped at once."""
    result = run(HOW_TO / "logging.md", tmp_path)
    session_id, steps = result.stdout.split()[1], re.findall(r"session=(\S+) a step", result.stderr)
    assert f"session={session_id} answering" in result.stderr
    assert sorted(Counter(steps).values()) == [3, 3]
    assert session_id in steps
    (line,) = re.findall(r"^\{.*\}$", result.stdout, re.MULTILINE)
    assert json.loads(line) == {
        "event": "answered",
        "level": "info",
        "session_id": session_id,
        "tokens": 1,
    }
    assert result.stdout.count(f'"gen_ai.conversation.id": "{session_id}"') == 2
    assert f"session {session_id} is closed; go on in a new one" in result.stdout
