"""A terminal of its own for a program, with the keys that a user would press."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


if sys.platform != "win32":
    import pty
    import termios

CTRL_C = "\x03"
CTRL_D = "\x04"
SECONDS = 120  # for a machine that has other things to do; a program that hangs fails

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no such terminals there")


class Terminal:
    """Runs a program that has this terminal to itself."""

    def __init__(self, pid: int, master: int, slave: int) -> None:
        self.pid = pid
        self.output = ""
        self._master, self._slave = master, slave
        self._code: int | None = None

    def type(self, keys: str) -> None:
        """Press some keys."""
        os.write(self._master, keys.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key now and again until a pattern comes: readline can miss a signal until the next one."""

        def comes() -> bool:
            self.type(key)
            while self._read():
                pass
            return re.search(pattern, self.output) is not None

        self.wait_until(comes)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until a pattern comes, and take away the output up to there."""
        self.wait_until(lambda: re.search(pattern, self.output) is not None)
        found = re.search(pattern, self.output)
        assert found is not None
        self.output = self.output[found.end() :]
        return found

    def wait_for_prompt(self, prompt: str) -> None:
        """Read until a line can be edited: a Ctrl-D just before that is lost."""
        self.wait_for(prompt)
        self.wait_until(lambda: not self.shows_what_is_typed())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Read until a condition is met, which the program has to bring about."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.output
            assert self._code is None, self.output
            self._read()

    def wait(self) -> int:
        """Read until the program has ended, and return its exit code, negative if it's a signal's."""
        deadline = time.monotonic() + SECONDS
        while self._code is None:
            assert time.monotonic() < deadline, self.output
            self._read()
        return self._code

    def shows_what_is_typed(self) -> bool:
        """Tell whether a shell would find the terminal as it should be: it echoes, line by line."""
        flags: int = termios.tcgetattr(self._slave)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    def kill(self) -> None:
        """End what has not ended."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _read(self) -> bool:
        """Read what there is, or after a moment without output see whether the program has ended."""
        if select.select([self._master], [], [], 0.1)[0]:
            self.output += os.read(self._master, 2**16).decode(errors="replace")
            self.output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output)  # colours and the like
            return True
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            self._code = os.waitstatus_to_exitcode(status)
        return False


@contextmanager
def terminal(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Generator[Terminal]:
    """Run a command in a new terminal."""
    master, slave = pty.openpty()
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    become = f"{take} os.execvp(sys.argv[1], sys.argv[1:])"
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", become, *command],
        {**os.environ, "TERM": "xterm", **(environment or {})},
        file_actions=[(os.POSIX_SPAWN_DUP2, slave, number) for number in range(3)],
        setsid=True,
    )
    run = Terminal(pid, master, slave)
    try:
        yield run
    finally:
        run.kill()
        os.close(master)
        os.close(slave)


def nox_command(session: str, *arguments: str, directory: Path) -> list[str]:
    """Return the README's command for a session that finds all that it needs in this environment."""
    (directory / session).symlink_to(sys.prefix)
    noxfile = str(Path(__file__).parents[1] / "noxfile.py")
    options = ["-R", "--envdir", str(directory), "--noxfile", noxfile]
    return [sys.executable, "-m", "nox", *options, "-s", session, "--", *arguments]
