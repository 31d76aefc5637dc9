"""The interpreter exits with sessions still open: quietly, and no KV cache is released twice."""

from pathlib import Path

import pytest
from tests.processes import run_script


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


def run(place: str, log: Path, *options: str, thread: bool) -> tuple[str, list[str]]:
    """Exit with a session in some place; return what was said, and what was released."""
    log.touch()
    done = run_script("exits", place, log, *(["thread"] if thread else []), options=options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr, log.read_text().split()


with_and_without_thread = pytest.mark.parametrize("thread", [False, True], ids=["", "thread"])
"""Whether a thread ran before, after which a free-threaded interpreter finalises more of its objects late."""


@with_and_without_thread
@pytest.mark.parametrize("place", FINALISED)
def test_a_session_that_is_finalised(place: str, tmp_path: Path, *, thread: bool) -> None:
    """A session open at the exit is released, once, and by default nothing is said about it."""
    assert run(place, tmp_path / "log", thread=thread) == ("", ["released"])


@with_and_without_thread
@pytest.mark.parametrize("place", LATE)
def test_a_session_that_dies_late(place: str, tmp_path: Path, *, thread: bool) -> None:
    """A session that dies when next to nothing is left does so quietly, and is released at most once."""
    said, released = run(place, tmp_path / "log", thread=thread)
    assert said == ""
    assert released in ([], ["released"])
    said, _ = run(place, tmp_path / "log", "-X", "dev", thread=thread)
    assert "Error" not in said  # a ResourceWarning at the most
    assert "Traceback" not in said


@with_and_without_thread
@pytest.mark.parametrize(
    ("place", "options"),
    [("in_main", ["-W", "always"]), *((place, ["-X", "dev"]) for place in FINALISED)],
)
def test_a_warning_for_who_asks(
    place: str, options: list[str], tmp_path: Path, *, thread: bool
) -> None:
    """Who asks for warnings gets one ResourceWarning for a session open at the exit, and nothing else."""
    said, released = run(place, tmp_path / "log", *options, thread=thread)
    assert released == ["released"]
    assert said.count("ResourceWarning: unclosed <Session ") == 1
    assert "Error" not in said
    assert "Traceback" not in said
