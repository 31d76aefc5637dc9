"""A process forks, and a hook that's older than the library is what first runs in the child: `earlier_hook.py CASE`.

Run by test_fork.py. Each `release` says in which process it runs; so does whatever goes wrong in the child.
"""

import faulthandler
import gc
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


to_do: list[Callable[[], None]] = []


def hook() -> None:
    """Do what is to be done, tell of every error, and end if that hangs."""
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        for do in to_do:
            do()
    except BaseException:  # noqa: BLE001 an error in a hook is only printed otherwise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


os.register_at_fork(
    after_in_child=hook
)  # before the import of the library, which has a hook as well

from tests.members import MEMBERS  # noqa: E402

from inference_session import Session, SessionRegistry, _fork  # noqa: E402
from inference_session._lock import lock  # noqa: E402
from inference_session.engine import StateSlots  # noqa: E402
from inference_session.exceptions import SessionForkedError  # noqa: E402


warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from 3.12 on

PARENT = os.getpid()


def release(cache: list[int]) -> None:
    """Say where it is."""
    os.write(1, b"in the parent\n" if os.getpid() == PARENT else b"in the CHILD\n")


slots = StateSlots(create=list[int], length=len, release=release, nbytes=len)
registry = SessionRegistry(max_sessions=10, max_kv_bytes=1000)
sessions = [Session(), registry.open()]
"""One of its own, and one in a registry."""


def step(session: Session) -> None:
    """Add a token."""
    with slots.borrow(session) as state:
        state.append([1])
        state.kv_cache.extend(state.pending)
        state.advance(len(state.pending))


def refused(do: Callable[..., object], *arguments: object) -> None:
    """Require that something is refused, as the session is the parent's."""
    try:
        do(*arguments)
    except SessionForkedError:
        return
    raise AssertionError("not refused")


def fork() -> None:
    """Fork, and require that the child ends well."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("the child failed")


def close_all() -> None:
    """Close the inherited sessions."""
    for session in sessions:
        session.close()
        session.close()
        if not session.closed:
            raise AssertionError


def borrow_all() -> None:
    """Borrow the inherited sessions in every way, and those closed as well."""
    for session in sessions:
        refused(slots.borrow(session).__enter__)
        refused(slots.borrow_all([session]).__enter__)
        refused(slots.evict, session)
        if session.borrowed:
            raise AssertionError


def drop_all() -> None:
    """Let go of the inherited sessions."""
    global registry  # noqa: PLW0603
    registry = SessionRegistry()
    sessions.clear()
    gc.collect()


def closed() -> None:
    """Close in the hook."""
    to_do.extend((close_all, borrow_all))
    fork()


def closed_by_the_registry() -> None:
    """Close by the registry in the hook."""
    to_do.append(lambda: registry.close(sessions[1].id))
    to_do.append(registry.close)
    fork()


def dropped() -> None:
    """Drop in the hook."""
    to_do.append(drop_all)
    fork()


def borrowed() -> None:
    """Borrow in the hook."""
    to_do.append(borrow_all)
    fork()


def in_mid_borrow() -> None:
    """Use, in the hook, the states of a borrow that is under way; and end it there."""
    with slots.borrow_all(sessions) as states, slots.borrow(Session()) as alone:

        def use() -> None:
            for state in (*states, alone):
                for member in MEMBERS.values():
                    refused(member, state)

        for state in (*states, alone):
            state.append([1])
            state.kv_cache.extend(state.pending)
            state.advance(1)
        to_do.extend((use, borrow_all, close_all, use))
        fork()
        for state in (*states, alone):
            if list(state.token_history)[-1] != 1 or state.kv_cache == []:
                raise AssertionError
        to_do.clear()


def ended() -> None:
    """End, in the hook, borrows that are under way, well and by an exception."""
    borrows = [slots.borrow(sessions[0]), slots.borrow_all([sessions[1]])]

    def end_well() -> None:
        for borrow in borrows:
            refused(borrow.__exit__, None, None, None)

    def end_badly() -> None:
        for borrow in borrows:
            borrow.__exit__(MemoryError, MemoryError(), None)

    for end in (end_well, end_badly):
        borrows[:] = [slots.borrow(sessions[0]), slots.borrow_all([sessions[1]])]
        for borrow in borrows:
            borrow.__enter__()
        to_do[:] = [end, borrow_all]
        fork()
        for borrow in borrows:
            borrow.__exit__(None, None, None)


def while_locked() -> None:
    """Close and borrow in the hook, while another thread, which the child doesn't have, held the library's lock."""
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            locked.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    to_do.extend((borrow_all, close_all, borrow_all))
    fork()
    done.set()
    thread.join()


def fork_often() -> None:
    """Fork many times."""
    for _ in range(15):
        fork()


def step_often(finished: threading.Event) -> None:
    """Use sessions of the parent."""
    without_release = StateSlots(create=list[int], length=len, nbytes=len)
    while not finished.is_set():
        with Session() as mine, registry.open() as registered:
            for session in (mine, registered):
                with without_release.borrow(session) as state:
                    state.append([1])
                    state.kv_cache.append(1)
                    state.advance(1)


def while_others_fork() -> None:
    """Close and borrow in the hook, while other threads fork as well, and others use sessions of the parent."""
    to_do.extend((borrow_all, close_all, borrow_all))
    finished = threading.Event()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as threads:
        user = threads.submit(step_often, finished)
        forkers = [threads.submit(fork_often) for _ in range(3)]
        wait(forkers)
        finished.set()
    for done in (user, *forkers):
        done.result()
    if _fork.pid != os.getpid():
        raise AssertionError(f"{_fork.pid=} {_fork._forks=}")


for session in sessions:
    step(session)
globals()[sys.argv[1]]()
to_do.clear()
for session in sessions:
    step(session)
    session.close()
