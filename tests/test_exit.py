"""The interpreter exits with sessions still open: quietly, and no KV cache is released twice."""

import subprocess
import sys
from pathlib import Path

import pytest


EXITS = Path(__file__).parent / "scripts" / "exits.py"

FINALISED = [
    "in_main",
    "in_a_module",
    "in_a_cycle",
    "in_a_generator",
    "in_an_abandoned_borrow",
]
"""Where the interpreter finalises a session while it can still do everything."""

LATE = ["in_builtins", "in_builtins_unclosed", "in_a_daemon_thread"]
"""Where it does so when modules are gone, or not at all."""


def run(place: str, log: Path, *options: str) -> tuple[str, list[str]]:
    """Exit with a session in some place; return what was said, and what was released."""
    log.touch()
    done = subprocess.run(
        [sys.executable, *options, EXITS, place, log],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr, log.read_text().split()


@pytest.mark.parametrize("place", FINALISED)
def test_a_session_that_is_finalised(place: str, tmp_path: Path) -> None:
    """A session open at the exit is released, once, and by default nothing is said about it."""
    assert run(place, tmp_path / "log") == ("", ["released"])


@pytest.mark.parametrize("place", LATE)
def test_a_session_that_dies_late(place: str, tmp_path: Path) -> None:
    """A session that dies when next to nothing is left does so quietly, and is released at most once."""
    said, released = run(place, tmp_path / "log")
    assert said == ""
    assert released in ([], ["released"])


@pytest.mark.parametrize(
    ("place", "options"),
    [("in_main", ["-W", "always"]), *((place, ["-X", "dev"]) for place in FINALISED)],
)
def test_a_warning_for_who_asks(place: str, options: list[str], tmp_path: Path) -> None:
    """Who asks for warnings gets one ResourceWarning for a session open at the exit, and nothing else."""
    said, released = run(place, tmp_path / "log", *options)
    assert released == ["released"]
    assert said.count("ResourceWarning: unclosed <Session ") == 1
    assert "Error" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("place", LATE)
def test_no_noise_for_who_asks(place: str, tmp_path: Path) -> None:
    """Nor does a session that dies late cause anything but that warning."""
    said, released = run(place, tmp_path / "log", "-X", "dev")
    assert len(released) <= 1
    assert "Error" not in said
    assert "Traceback" not in said
