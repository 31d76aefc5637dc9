"""The interpreter exits with an open session: `exits.py PLACE FILE [thread]`, where PLACE is where the session is.

With `thread`, the session is begun in a thread that has ended then.
Each `release` appends a line to FILE, by C functions alone, which work as long as the interpreter does. Run by
test_exit.py.
"""

import builtins
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


FILE = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
LINE = b"released\n"
LAST: ModuleType = builtins


def length(cache: bytearray) -> int:
    """Leave the line out."""
    return len(cache) - len(LINE)


def truncate(cache: bytearray, count: int) -> bytearray:
    """Keep it as it is: it never covers more than that."""
    return cache


slots = StateSlots(
    create=partial(bytearray, LINE),
    length=length,
    truncate=truncate,
    release=partial(os.write, FILE),
)


def step(state: BorrowedState[bytearray]) -> None:
    """Append a token. The KV cache stays as it is: a line."""
    state.append([1])
    assert state.kv_cache == LINE


def in_a_cycle(session: Session) -> None:
    """Leave it to the garbage collector."""
    cycle: list[object] = [session]
    cycle.append(cycle)


def in_a_module(session: Session) -> None:
    """Keep it in a module that is imported."""
    module = ModuleType("keeps_a_session")
    sys.modules["keeps_a_session"] = module
    vars(module)["session"] = session


def in_a_daemon_thread(session: Session) -> None:
    """Have it borrowed, for ever."""
    started = threading.Event()

    def work() -> None:
        with slots.borrow(session) as state:
            step(state)
            started.set()
            threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    started.wait()


def in_builtins(session: Session) -> None:
    """Keep it where it dies last, together with what uses it then."""

    class Last:
        def __init__(self) -> None:
            self.session = session

        def __del__(self) -> None:
            self.session.close()

    vars(LAST)["last"] = Last()


def in_builtins_unclosed(session: Session) -> None:
    """Keep it where it dies last."""
    vars(LAST)["last"] = session


def in_an_abandoned_borrow(session: Session) -> None:
    """Have it borrowed by what dies at the exit."""
    global abandoned  # noqa: PLW0603
    abandoned = slots.borrow(session)
    step(abandoned.__enter__())


def in_a_generator(session: Session) -> None:
    """Have it borrowed by a generator that is under way."""
    global stream  # noqa: PLW0603

    def tokens() -> Iterator[None]:
        with slots.borrow(session) as state:
            step(state)
            yield

    stream = iter(tokens())
    next(stream)


def in_main(session: Session) -> None:
    """Keep it in a global variable."""
    global kept  # noqa: PLW0603
    kept = session


def begin() -> Session:
    """Return a session that holds a KV cache."""
    session = Session()
    with slots.borrow(session) as state:
        step(state)
    return session


kept: object = None
abandoned: AbstractContextManager[BorrowedState[bytearray], None] | None = None
stream: Iterator[None] = iter(())

begun: list[Session] = []

if "thread" in sys.argv[3:]:
    first = threading.Thread(target=lambda: begun.append(begin()))
    first.start()
    first.join()
else:
    begun.append(begin())
globals()[sys.argv[1]](begun.pop())
