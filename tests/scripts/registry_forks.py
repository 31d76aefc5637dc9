"""A process forks while its other threads are in the midst of using a registry.

Run by test_registry_safety.py, in a process of its own, whose forks are cheaper than pytest's.
"""

import faulthandler
import os
import sys
import threading
import traceback
import warnings
from contextlib import suppress

from inference_session import Session, SessionRegistry
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionError, SessionForkedError


warnings.simplefilter(
    "ignore", DeprecationWarning
)  # of forks in processes with threads, from 3.12 on


def new_cache() -> list[int]:
    """Make a KV cache."""
    return []


slots = StateSlots(create=new_cache, length=len, nbytes=len)
registry = SessionRegistry(max_sessions=4, idle_timeout=3600, max_kv_bytes=6)
finished = threading.Event()


def step(session: Session) -> None:
    """Add two tokens."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.kv_cache.extend(state.pending)
        state.advance(len(state.pending))


def work() -> None:
    """Open, look up and step sessions."""
    while not finished.is_set():
        with suppress(SessionError):
            step(registry.open())
            for id in registry:  # noqa: A001
                step(registry[id])


def child() -> None:
    """Use new sessions, and none of the old ones."""
    faulthandler.dump_traceback_later(60, exit=True)
    for id in registry:  # noqa: A001
        try:
            step(registry[id])
        except SessionForkedError:
            continue
        raise AssertionError
    for _ in range(10):
        mine = registry.open()
        step(mine)
        if registry[mine.id] is not mine or len(registry) > 4:
            raise AssertionError
    registry.close()


def main() -> None:
    """Fork many times, and print how often it went well."""
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    good = 0
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child()
                status = 0
            except BaseException:  # noqa: BLE001 nothing else may be done in the child
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        good += os.waitpid(pid, 0)[1] == 0
    finished.set()
    for thread in threads:
        thread.join()
    print(good)  # noqa: T201


main()
