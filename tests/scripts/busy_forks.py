"""A process forks while its other threads are in the midst of taking, undoing and giving back sessions.

Run by test_fork.py, in a process of its own, whose forks are cheaper than pytest's.
"""

import faulthandler
import os
import sys
import threading
import traceback
import warnings

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionBusyError, SessionForkedError


warnings.simplefilter(
    "ignore", DeprecationWarning
)  # of forks in processes with threads, from 3.12 on


def new_cache() -> list[int]:
    """Make a KV cache."""
    return []


slots = StateSlots(create=new_cache, length=len)
shared = [Session() for _ in range(3)]
finished = threading.Event()


def step(session: Session) -> None:
    """Add a token."""
    with slots.borrow(session) as state:
        state.append([1])
        state.kv_cache.extend(state.pending)
        state.advance(len(state.pending))


def work() -> None:
    """Step sessions, and leave borrows for others to undo."""
    while not finished.is_set():
        for session in shared:
            try:
                step(session)
                abandoned = slots.borrow(session).__enter__()
                abandoned.append([2])
                del abandoned
                with slots.borrow(session) as state:
                    state.rewind(0)
            except SessionBusyError:
                pass


def child() -> None:
    """Use new sessions, abandoned ones too, and none of the old ones."""
    faulthandler.dump_traceback_later(60, exit=True)
    for _ in range(3):
        mine = Session()
        step(mine)
        abandoned = slots.borrow(mine).__enter__()
        abandoned.append([2])
        del abandoned
        step(mine)
        if mine.token_count != 2:
            raise AssertionError
        mine.close()
    for session in shared:
        try:
            slots.evict(session)
        except SessionForkedError:
            continue
        raise AssertionError


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
