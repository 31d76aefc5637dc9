"""The garbage collector runs at every instant, and finalizers close and borrow the sessions at work.

Run by test_threads.py in a process of its own, as it may hang.
"""

import faulthandler
import gc
from collections.abc import Callable
from contextlib import suppress

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


class Finalizer:
    """Does something when it is collected as a part of a cycle."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do
        self.cycle = self

    def __del__(self) -> None:
        Finalizer.ran += 1
        self.do()

    ran = 0


released: list[list[int]] = []
created: list[list[int]] = []


def create() -> list[int]:
    """Make a KV cache."""
    cache: list[int] = []
    created.append(cache)
    return cache


slots = StateSlots(create=create, length=len, release=released.append)


def abandoned() -> Session:
    """Return a session whose borrow ended without its exit, so that the next to take it must undo that."""
    session = Session()
    state = slots.borrow(session).__enter__()
    state.append([1])
    state.kv_cache.append(1)
    state.advance(1)
    return session


def work(session: Session) -> None:
    """Take an abandoned session."""
    try:
        with slots.borrow(session) as state:
            state.append([1])
    except (SessionBusyError, SessionClosedError):
        pass


def steal(session: Session) -> None:
    """Take it in between."""
    with suppress(SessionBusyError, SessionClosedError):
        slots.evict(session)


def end_by_finalizers(
    do: Callable[[Session], None], end: Callable[[Session], None], first: int, second: int
) -> int:
    """Take a session, let a finalizer end it after some allocations, and another one some later, and tell how many."""
    session, other = abandoned(), abandoned()
    Finalizer.ran = 0

    def finish() -> None:
        end(session)
        Finalizer(other.close)
        gc.set_threshold(second, 1, 1)

    Finalizer(finish)
    gc.set_threshold(gc.get_count()[0] + first, 1, 1)
    gc.enable()
    do(session)
    gc.disable()
    ran = Finalizer.ran
    gc.collect()
    session.close()
    other.close()
    assert session.closed
    assert session.token_count == other.token_count == 0
    return ran


def main() -> None:
    """Have the garbage collector run at the first allocation, the second, and so on."""
    faulthandler.dump_traceback_later(30, exit=True)
    gc.disable()
    gc.collect()
    gc.freeze()
    ran = 0
    for do in (work, Session.close):
        for end in (Session.close, steal):
            for first in range(1, 25):
                for second in range(1, 7):
                    ran += end_by_finalizers(do, end, first, second)
    gone = [id(cache) for cache in released]
    assert sorted(gone) == sorted(id(cache) for cache in created)
    print(ran)  # noqa: T201


if __name__ == "__main__":
    main()
