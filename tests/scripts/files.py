"""Processes that share a file: `python -m tests.scripts.files (save|move|take|share) SEED COUNT`.

Run by test_file_safety.py in a process of its own. It forks workers that save, move or take a conversation, kills each
by SIGKILL at a random instant, and fails if the conversation is lost or torn then. Or it forks many that take one file.
"""

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import pytest

from inference_session import Session
from inference_session.engine import StateSlots


LENGTH = 30_000
LONGEST = 0.01  # seconds


def write(cache: bytearray, file: BinaryIO) -> None:
    """Write a KV cache, in pieces."""
    view = memoryview(cache)
    file.writelines(view[start : start + 10_000] for start in range(0, len(cache), 10_000))


def read(file: BinaryIO) -> bytearray:
    """Read a KV cache."""
    return bytearray(file.read())


SLOTS = StateSlots(create=bytearray, length=len, dump=write, load=read)


def version_of(session: Session) -> int:
    """Return how often a conversation was saved, and require it to be whole, with its KV cache."""
    with SLOTS.borrow(session) as state:
        version = state.token_history[0]
        assert state.token_history[:] == [version] * LENGTH, "torn"
        assert state.kv_cache == bytes([version % 256]) * LENGTH, "torn"
    return version


def rewrite(session: Session, version: int) -> None:
    """Make the next version of a conversation."""
    with SLOTS.borrow(session) as state:
        state.rewind(0)
        state.append([version] * LENGTH)
        state.kv_cache = bytearray([version % 256]) * LENGTH
        state.advance(LENGTH)


def save(path: Path, told: int) -> None:
    """Save ever newer versions, and tell of each that is safe."""
    with SLOTS.restore(path) as session:
        while True:
            version = version_of(session) + 1
            rewrite(session, version)
            SLOTS.save(session, path)
            os.write(told, version.to_bytes(4, "little"))


def move(path: Path, told: int) -> None:
    """Move ever newer versions to the file."""
    while True:
        session = SLOTS.restore(path)
        version = version_of(session) + 1
        rewrite(session, version)
        SLOTS.save(session, path, move=True)
        assert session.closed
        os.write(told, version.to_bytes(4, "little"))


def take(path: Path, told: int) -> None:
    """Take the file again and again, and tell when it's about to be removed at last, and when it's there again."""
    unlink = os.unlink

    def last_step(path: Any) -> None:
        os.write(told, (0).to_bytes(4, "little"))
        unlink(path)

    while True:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", last_step)
            session = SLOTS.restore(path, take=True)
        version = version_of(session)
        SLOTS.save(session, path)
        os.write(told, version.to_bytes(4, "little"))


WORKS = {"save": save, "move": move, "take": take}


def fork(work: Callable[[Path, int], None], path: Path, told: int) -> int:
    """Return the id of a process that works with the file."""
    child = os.fork()
    if child == 0:
        try:
            work(path, told)
            os._exit(0)
        except BaseException:  # noqa: BLE001 nothing else may go on in the child
            traceback.print_exc()
            os._exit(1)
    return child


def ended(child: int) -> int:
    """Return how a process has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_all(pipe: int) -> bytes:
    """Return what is written to a pipe, and close it."""
    with open(pipe, "rb") as file:
        return file.read()


def kill_at_random(work: str, path: Path, dice: random.Random) -> list[int]:
    """Kill a process that works with the file, and return what it told."""
    listens, tells = os.pipe()
    child = fork(WORKS[work], path, tells)
    os.close(tells)
    time.sleep(dice.random() * LONGEST)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL, "the worker failed"
    told = read_all(listens)
    return [int.from_bytes(told[start : start + 4], "little") for start in range(0, len(told), 4)]


def kill(work: str, path: Path, dice: random.Random, count: int) -> None:
    """Kill many processes, and look at the folder after each."""
    session, last = SLOTS.restore(path), 1
    for _ in range(count):
        told = kill_at_random(work, path, dice)
        others = [entry for entry in path.parent.iterdir() if entry != path]
        if work == "take" and told[-1:] != [0] and not path.exists():
            [claimed] = others
            claimed.rename(path)
            others = []
        if work == "take" and not path.exists():  # the process had it
            SLOTS.save(session, path)
        safe = max([last, *told])
        with SLOTS.restore(path) as restored:
            assert restored.id == session.id
            last = version_of(restored)
        assert last in {safe, safe + 1}, "lost"
        for entry in others:
            entry.unlink()


def take_once(path: Path, told: int) -> None:
    """Take the file if it's there, and tell."""
    with suppress(FileNotFoundError), SLOTS.restore(path, take=True) as session:
        os.write(told, bytes([version_of(session)]))


def share(path: Path, count: int) -> None:
    """Have 16 processes take one file, again and again."""
    session = SLOTS.restore(path)
    for _ in range(count):
        listens, tells = os.pipe()
        children = [fork(take_once, path, tells) for _ in range(16)]
        os.close(tells)
        assert read_all(listens) == b"\x01", "not taken once"
        assert [ended(child) for child in children] == [0] * 16
        assert not [*path.parent.iterdir()]
        SLOTS.save(session, path)


def main(work: str, seed: int, count: int) -> None:
    """Make a file, and have processes work with it."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "conversation")
        with Session() as session:
            rewrite(session, 1)
            SLOTS.save(session, path)
        if work == "share":
            share(path, count)
        else:
            kill(work, path, random.Random(seed), count)


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
