"""A child inherits sessions and exits as usual: `forks.py FILE`, to which each `release` writes its process.

Run by test_fork.py, in a process of its own, so that the child is its copy and not one of pytest.
"""

import os
import sys
from pathlib import Path

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


log = Path(sys.argv[1])


def release(cache: list[int]) -> None:
    """Write who does it."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")


slots = StateSlots(create=list[int], length=len, release=release)
sessions = [Session() for _ in range(3)]


def step(state: BorrowedState[list[int]]) -> None:
    """Take a step."""
    state.append([1])
    state.kv_cache.append(1)
    state.advance(1)


for session in sessions:
    with slots.borrow(session) as state:
        step(state)

with slots.borrow(sessions[0]) as state:
    step(state)
    child = os.fork()
    if child == 0:
        sessions[1].close()
        sys.exit()
if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
    raise SystemExit("the child failed")
for session in sessions:
    session.close()
print(os.getpid())  # noqa: T201
