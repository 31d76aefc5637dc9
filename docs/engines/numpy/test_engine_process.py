"""An engine in a process of its own: it does what it is told, and never outlives who started it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from engine_process import EngineProcess
from llama_model import random_model
from numpy_llama import LlamaEngine


make_engine = partial(LlamaEngine, random_model(1), chunk=7)

SCRIPT = """
import os
import signal

from engine_process import EngineProcess
from test_engine_process import make_engine

if __name__ == "__main__":
    other = EngineProcess(make_engine)
    {end}
"""
INTERRUPTED = """
    try:
        os.killpg(0, signal.SIGINT)
    except KeyboardInterrupt:
        print(other.call(getattr, "chunk"))
    other.kill()
"""
KILLED = """
    print(other.call(getattr, "chunk"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder: Path, end: str) -> tuple[int, str, str]:
    """Run a program that starts a process; return its exit code and what both have printed, when both have ended."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(end=end.strip()), "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        encoding="utf-8",
        start_new_session=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_call() -> None:
    """A function gets the engine there, and its result or its error comes back."""
    with EngineProcess(make_engine) as other:
        assert other.call(LlamaEngine._check, [1, 2, 3]).tolist() == [1, 2, 3]
        with pytest.raises(ValueError, match="600 tokens do not fit in a context of 512"):
            other.call(LlamaEngine._check_room, length=600)
        assert other.call(LlamaEngine._check, [4]).tolist() == [4]


def test_kill() -> None:
    """A process that was killed is gone, and says so."""
    with EngineProcess(make_engine) as other:
        other.kill()
        with pytest.raises(BrokenPipeError):
            other.call(LlamaEngine._check, [1])


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Even if that is killed."""
    assert run(tmp_path, KILLED) == (-9, "7\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_interrupts_are_not_for_it(tmp_path: Path) -> None:
    """After a Ctrl-C, from its first instant on, it works, and says nothing: who started it decides."""
    assert run(tmp_path, INTERRUPTED) == (0, "7\n", "")
