"""What an engine does with a session, without a model, in loops that are short enough to measure."""

from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial
from threading import Lock

from tests.benchmarks.measuring import Measure, timed

from inference_session import Session
from inference_session.engine import Slot, StateSlots


TOKEN = [50_000]


def cut(kv_cache: list[int], length: int) -> list[int]:
    """Truncate in place."""
    del kv_cache[length:]
    return kv_cache


slots = StateSlots(create=list[int], length=len, truncate=cut, nbytes=len)


@cache
def session_of(size: int) -> Session:
    """Return the session with so many tokens, all of them in the KV cache."""
    session = Session()
    with slots.borrow(session) as state:
        state.append(array("i", TOKEN) * size)
        state.kv_cache.extend(TOKEN * size)
        state.advance(size)
    return session


def step(session: Session, count: int) -> None:
    """Do a decode step's bookkeeping."""
    for _ in range(count):
        with slots.borrow(session) as state:
            kv_cache = state.kv_cache
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)


def long_step(session: Session, count: int) -> None:
    """Do the same within one borrow."""
    with slots.borrow(session) as state:
        kv_cache = state.kv_cache
        for _ in range(count):
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)
            state.commit()


def step_all(sessions: Sequence[Session]) -> None:
    """Do a decode step's bookkeeping for a batch."""
    with slots.borrow_all(sessions) as states:
        for state in states:
            kv_cache = state.kv_cache
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)


class Locked:
    """What one would write to step a session by one thread at a time."""

    __slots__ = ("kv_cache", "lock", "token_history")

    def __init__(self) -> None:
        self.lock = Lock()
        self.kv_cache: list[int] = []
        self.token_history: list[int] = []


@cache
def by_hand() -> Locked:
    """Return a session written by hand."""
    return Locked()


def step_by_hand(count: int) -> None:
    """Do what one would write for a decode step."""
    session = by_hand()
    for _ in range(count):
        with session.lock:
            session.token_history.append(0)
            session.kv_cache.append(0)


def borrow(session: Session, count: int) -> None:
    """Borrow, and no more."""
    for _ in range(count):
        with slots.borrow(session):
            pass


def append(session: Session, count: int) -> None:
    """Append a token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.append(TOKEN)


def advance(session: Session, count: int) -> None:
    """Advance by a token."""
    with slots.borrow(session) as state:
        state.append(TOKEN * count)
        kv_cache = state.kv_cache
        for _ in range(count):
            kv_cache.append(0)
            state.advance(1)


def commit(session: Session, count: int) -> None:
    """Commit what didn't change."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.commit()


def commit_token(session: Session, count: int) -> None:
    """Commit one more token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.append(TOKEN)
            state.commit()


def rewind(session: Session, count: int) -> None:
    """Rewind by a token that is committed and in the KV cache, and put another in its place."""
    with slots.borrow(session) as state:
        kv_cache, length = state.kv_cache, state.kv_length - 1
        for _ in range(count):
            state.rewind(length, pending=0)
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)
            state.commit()


def look(session: Session, count: int) -> None:
    """Look at the history, its length and its last token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            history = state.token_history
            len(history)
            history[-1]


SLOT = Slot(int)


def read_slot(session: Session, count: int) -> None:
    """Read a further slot."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state[SLOT]


def set_slot(session: Session, count: int) -> None:
    """Set a further slot."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state[SLOT] = 1


def read_item(count: int) -> None:
    """Read an item of a dict."""
    values = {SLOT: 1}
    for _ in range(count):
        values[SLOT]


def set_item(count: int) -> None:
    """Set an item of a dict."""
    values = {SLOT: 1}
    for _ in range(count):
        values[SLOT] = 1


def timed_at(size: int, work: Callable[[Session, int], None]) -> Measure:
    """Measure seconds with a history of a size, which is restored after each round."""

    def measure() -> float:
        session = session_of(size)
        seconds = timed(partial(work, session))()
        with slots.borrow(session) as state:
            state.rewind(size, pending=0)
        return seconds

    return measure
