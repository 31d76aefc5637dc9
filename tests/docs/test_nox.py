"""The commands that nox runs: interrupted while they install, and handed over to their programs; what they refuse."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from tests.terminal import CTRL_C, needs_terminal, terminal


pytestmark = needs_terminal

PROJECT = Path(__file__).parents[2]
NOXFILE = f"""
import contextlib
import pathlib
import runpy

import nox

with contextlib.chdir({str(PROJECT)!r}):
    project = runpy.run_path("noxfile.py")


@nox.session
def install(session):
    with project["installing"](session):
        session.run("python", *session.posargs)


@nox.session
def one(session):
    project["hand_over"](session, "program.py")


@nox.session
def two(session):
    project["hand_over"](session, "program.py")


@nox.session
def folder(session):
    project["check_folder"](session, pathlib.Path(*session.posargs))
"""
PROGRAM = """
import os
import sys

print("program", os.getpid(), sys.argv[1:], os.environ["NOX_CURRENT_SESSION"], sys.prefix)
if "wait" in sys.argv:
    input("waiting")
sys.exit("fail" in sys.argv)
"""


@pytest.fixture
def nox(tmp_path: Path) -> list[str]:
    """Give a command that runs sessions of a noxfile which uses what the project's has."""
    (tmp_path / "noxfile.py").write_text(NOXFILE, "utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    (tmp_path / ".nox").mkdir()
    for name in ("one", "two", "folder"):
        (tmp_path / ".nox" / name).symlink_to(sys.prefix)
    return [sys.executable, "-m", "nox", "--noxfile", str(tmp_path / "noxfile.py"), "-s"]


def test_an_interrupted_environment_is_made_anew(nox: list[str], tmp_path: Path) -> None:
    """A Ctrl-C while an environment is made or installed to doesn't break the next run."""
    environment = tmp_path / ".nox" / "install"
    with terminal([*nox, "install", "--", "-m", "pip", "--version"]) as run:
        run.wait_for("Creating virtual environment")
        run.wait_until((environment / "bin" / "python").exists)
        run.type(CTRL_C)
        assert run.wait() == 130
    assert not list(environment.glob("bin/pip"))

    # Nox shows the command, so that must not look like its prompt.
    with terminal([*nox, "install", "--", "-c", "input('install' 'ing')"]) as run:
        run.wait_for("making the environment anew")
        run.wait_for("installing$")
        run.type(CTRL_C)
        assert run.wait() == 130
    half_installed = next(environment.glob("lib/*/site-packages")) / "package"
    half_installed.mkdir()

    with terminal([*nox, "install", "--", "-m", "pip", "--version"]) as run:
        run.wait_for("making the environment anew")
        run.wait_for("pip [0-9.]+ from")
        assert run.wait() == 0
    assert not half_installed.exists()

    half_installed.mkdir()
    with terminal([*nox, "install", "--", "-m", "pip", "--version"]) as run:
        run.wait_for("pip [0-9.]+ from")
        assert run.wait() == 0
    assert half_installed.exists()  # Nothing was wrong: it is the same one.


def test_a_session_becomes_its_program(nox: list[str], tmp_path: Path) -> None:
    """The program has the process, the arguments, the environment and the exit code of the command."""
    environment = str(tmp_path / ".nox" / "one")
    with terminal([*nox, "one", "--", "a b", "fail"]) as run:
        found = run.wait_for(r"program (\d+) \['a b', 'fail'\] one (\S+)")
        assert found[1] == str(run.pid)
        assert os.path.realpath(found[2]) == os.path.realpath(environment)
        assert run.wait() == 1
    with terminal([*nox, "one", "--", "wait"]) as run:
        run.wait_for("waiting")
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait() == -signal.SIGTERM


def test_sessions_after_a_program_run(nox: list[str]) -> None:
    """Among other sessions a program is one of nox's commands: it doesn't end the list, nor hide a failure."""
    with terminal([*nox, "one", "two"]) as run:
        for name in ("one", "two"):
            found = run.wait_for(rf"program (\d+) \[\] {name} ")
            assert found[1] != str(run.pid)
        run.wait_for("Ran 2 sessions")
        assert run.wait() == 0
    with terminal([*nox, "one", "two", "--", "fail"]) as run:
        run.wait_for("program.* two ")
        assert run.wait() == 1


def test_installing_only(nox: list[str]) -> None:
    """Where nox is told to install only, the program isn't run."""
    with terminal([*nox, "one", "--install-only"]) as run:
        assert run.wait() == 0
    assert "program " not in run.output


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("index.md", "lacks a page, index.md"),
        ("module.py", "lacks a module"),
        ("test_module.py", r"lacks a test, test_\*\.py"),
        ("group", "lacks a dependency group of its name in pyproject.toml"),
    ],
)
def test_a_folder_lacks_something(
    lacking: str, message: str, nox: list[str], tmp_path: Path
) -> None:
    """A folder of an engine or an example that isn't complete is an error that says what it lacks."""
    folder = tmp_path / ("nothing" if lacking == "group" else "numpy")
    folder.mkdir()
    for name in {"index.md", "module.py", "test_module.py"} - {lacking}:
        (folder / name).touch()
    with terminal([*nox, "folder", "--", str(folder)]) as run:
        run.wait_for(re.escape(str(folder)) + " " + message + r"\.\r\n")
        assert run.wait() == 1
