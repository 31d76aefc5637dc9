"""What is published is consistent, and so is what checks it."""

import re
from importlib.metadata import metadata, version
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]

NOT_IN_CI = {"handover", "ray", "server", "tests"}
"""Sessions that CI doesn't name: those that show an example to somebody, and the README's test command."""


def read(path: str) -> str:
    """Return the text of a file of the project."""
    return (ROOT / path).read_text("utf-8")


def test_changelog_knows_the_version() -> None:
    """The newest version in the changelog is the one that is installed."""
    versions = re.findall(r"^## \[(\d.*?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == version("inference-session")


def test_metadata_is_complete() -> None:
    """Whoever finds the package learns what it is and where it runs; addresses that don't exist aren't made up."""
    about = metadata("inference-session")
    assert about["Summary"]
    assert about["License-Expression"] == "MIT"
    assert about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == ">=3.11"
    assert about["Description-Content-Type"] == "text/markdown"
    assert about["Keywords"]
    assert "Home-page" not in about
    assert "Project-URL" not in about
    classifiers = about.get_all("Classifier") or []
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert pythons == PYTHONS
    assert {line.split(" :: ")[0] for line in classifiers} >= {
        "Development Status",
        "Intended Audience",
        "Operating System",
        "Topic",
        "Typing",
    }


def test_it_is_no_program() -> None:
    """`python -m inference_session` is for nothing, so it isn't there, nor does the package install a command."""
    assert find_spec("inference_session.__main__") is None
    assert find_spec("inference_session.testing.__main__") is None


def test_ci_runs_every_session() -> None:
    """No session of noxfile.py is forgotten by CI, nor by what GitHub runs."""
    sessions = re.findall(
        r"^@nox\.session.*?^def (\w+)\(", read("noxfile.py"), re.MULTILINE | re.DOTALL
    )
    assert len(sessions) > 5
    here = re.findall(r"nox .*-s (.*)'$", read(".ci/run"), re.MULTILINE)
    on_github = re.findall(r"sessions: (.*) }$", read(".github/workflows/ci.yml"), re.MULTILINE)
    for commands in here, on_github:
        assert set(sessions) - NOT_IN_CI <= set(re.findall(r"\w+", "\n".join(commands)))


def test_workflow_is_ci_and_pinned() -> None:
    """GitHub runs what everybody runs, on every Python; actions are pinned to commits, as tags can be moved."""
    workflow = read(".github/workflows/ci.yml")
    assert set(re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE)) == {
        "python -m pip install nox",
        "python -m nox -s ${{ matrix.sessions }}",
        "python -m nox -s tests",
    }
    [pythons] = re.findall(r"python: \[(.*)\]$", workflow, re.MULTILINE)
    assert re.findall(r"[\w.]+", pythons) == [*PYTHONS, "3.13t", "3.14t"]
    actions = re.findall(r"uses: +(.*)$", workflow, re.MULTILINE)
    assert len(actions) == 4
    for action in actions:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@pytest.mark.parametrize(
    "file", [".ci/pythons", ".ci/run", ".editorconfig", "CONTRIBUTING.md", "LICENSE", "noxfile.py"]
)
def test_files_are_there(file: str) -> None:
    """Also who has only the source distribution can read, run and check all of the project."""
    assert (ROOT / file).is_file()
