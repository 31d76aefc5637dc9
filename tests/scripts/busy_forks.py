"""A process forks while its other threads are in the midst of taking, undoing and giving back sessions.

Some of them are in a registry. Run by test_fork.py, in a process of its own, whose forks are cheaper than pytest's.
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
from inference_session.exceptions import SessionBusyError, SessionError, SessionForkedError


warnings.simplefilter(
    "ignore", DeprecationWarning
)  # of forks in processes with threads, from 3.12 on


slots = StateSlots(create=list[int], length=len, nbytes=len)
shared = [Session() for _ in range(3)]
registry = SessionRegistry(max_sessions=4, idle_timeout=3600, max_kv_bytes=6)
finished = threading.Event()


def step(session: Session) -> None:
    """Add two tokens."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.kv_cache.extend(state.pending)
        state.advance(len(state.pending))


def abandon(session: Session) -> None:
    """Leave a borrow for others to undo."""
    slots.borrow(session).__enter__().append([3])


def work() -> None:
    """Step sessions, and leave borrows for others to undo."""
    while not finished.is_set():
        for session in shared:
            with suppress(SessionBusyError):
                step(session)
                abandon(session)
                with slots.borrow(session) as state:
                    state.rewind(0)


def serve() -> None:
    """Open, look up and step sessions of the registry."""
    while not finished.is_set():
        with suppress(SessionError):
            step(registry.open())
            for id in registry:  # noqa: A001
                step(registry[id])


def child() -> None:
    """Use new sessions, abandoned ones too, and none of the old ones."""
    faulthandler.dump_traceback_later(60, exit=True)
    for session in [*shared, *registry.values()]:
        try:
            slots.evict(session)
        except SessionForkedError:
            continue
        raise AssertionError
    for mine in [Session(), *(registry.open() for _ in range(10))]:
        if mine.closed:  # the registry has room for four
            continue
        step(mine)
        abandon(mine)
        step(mine)
        if mine.token_count != 4:
            raise AssertionError
        mine.close()
    registry.close()


def main() -> None:
    """Fork many times, and print how often it went well."""
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=do, daemon=True) for do in (work, work, serve, serve)]
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
