"""Processes of their own, for what would disturb pytest's, or be disturbed by it."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def run_python(*arguments: str | Path, measured: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments, and return how it ended and what it said.

    If it isn't measured, no coverage tool is there, in whose locks its interrupts, forks or finalizers would hang.
    """
    environment = os.environ.items()
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in environment if measured or "COVERAGE" not in name},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def run_script(
    name: str, *arguments: str | Path, options: tuple[str, ...] = (), measured: bool = True
) -> "subprocess.CompletedProcess[str]":
    """Run a script of `tests/scripts` in the same way."""
    return run_python(*options, "-m", f"tests.scripts.{name}", *arguments, measured=measured)
