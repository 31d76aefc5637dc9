"""The hooks: while a check runs, borrows report their events.

Hooks are put on the classes of the private core, and taken off again, so that a borrow costs nothing extra when no
check runs. They pass over sessions unknown to the check, in any thread.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias

from inference_session import Session
from inference_session._borrow import BorrowedBatch
from inference_session.engine import BorrowedState, StateSlots


State: TypeAlias = BorrowedState[Any]
Slots: TypeAlias = StateSlots[Any]

METHODS: Final = ("append", "advance", "commit", "rewind", "reuse_prefix")
PROPERTIES: Final = ("kv_cache", "pending", "token_history", "kv_length")
FUNCTIONS: Final = ("create", "length", "truncate", "release")

_one_at_a_time = Lock()


class Listener(Protocol):
    """Is told of every event in the borrows of its sessions."""

    def knows(self, session: Session) -> bool:
        """Whether this is one of its sessions."""
        ...

    def knows_slots(self, slots: Slots) -> bool:
        """Whether one of its sessions was borrowed through these."""
        ...

    def borrowed(self, session: Session, slots: Slots) -> None:
        """Record a session just borrowed."""
        ...

    def assigned(self, slots: Slots, cache: object) -> None:
        """Record a KV cache put by a step in the place of the present one."""
        ...

    def in_borrow(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call on a borrowed state, known as `name`, and return its result."""
        ...

    def in_function(
        self, name: str, slots: Slots, function: Callable[..., Any], *args: object
    ) -> Any:
        """Call one of the engine's functions in `StateSlots`, and return its result."""
        ...


def slots_of(session: Session) -> Slots:
    """Return the `StateSlots` of the engine that began a session."""
    assert isinstance(session._slots, StateSlots)
    return session._slots


@contextmanager
def hooked(listener: Listener) -> Generator[None]:
    """Report every event in the borrows of a listener's sessions; one listener at a time."""
    with _one_at_a_time:
        originals: list[tuple[type, str, object]] = []
        try:
            for owner, name, hook in _hooks(listener):
                originals.append((owner, name, vars(owner)[name]))
                setattr(owner, name, hook)
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


def _hooks(listener: Listener) -> Iterator[tuple[type, str, object]]:
    for name in METHODS:
        yield BorrowedState, name, _method(listener, name)
    for name in PROPERTIES:
        yield BorrowedState, name, _property(listener, name)
    yield BorrowedState, "_take", _take(listener)
    yield BorrowedState, "_end", _end(listener, BorrowedState, lambda block: [block._session])
    yield (
        BorrowedBatch,
        "_end",
        _end(listener, BorrowedBatch, lambda block: [state._session for state in block._states]),
    )
    for name in FUNCTIONS:
        yield StateSlots, name, _function(listener, name)


def _method(listener: Listener, name: str) -> Callable[..., Any]:
    original: Callable[..., Any] = vars(BorrowedState)[name]

    @wraps(original)
    def method(state: State, *args: Any, **kwargs: Any) -> Any:
        if not listener.knows(state._session):
            return original(state, *args, **kwargs)
        return listener.in_borrow(name, partial(original, state, *args, **kwargs))

    return method


def _property(listener: Listener, name: str) -> property:
    original: property = vars(BorrowedState)[name]
    get, put = original.fget, original.fset
    assert get is not None

    def getter(state: State) -> Any:
        if not listener.knows(state._session):
            return get(state)
        return listener.in_borrow(name, partial(get, state))

    def setter(state: State, value: object) -> None:
        assert put is not None
        if not listener.knows(state._session):
            put(state, value)
            return

        def assign(put: Callable[[State, object], None] = put) -> None:
            listener.assigned(slots_of(state._session), value)
            put(state, value)

        listener.in_borrow(f"{name} =", assign)

    return property(getter, None if put is None else setter, doc=original.__doc__)


def _take(listener: Listener) -> Callable[..., None]:
    original: Callable[..., None] = vars(BorrowedState)["_take"]

    def take(state: State, lease: Any) -> None:
        if not listener.knows(state._session):
            original(state, lease)
            return

        def borrow() -> None:
            original(state, lease)
            listener.borrowed(state._session, slots_of(state._session))

        listener.in_borrow("borrow", borrow)

    return take


def _end(
    listener: Listener, owner: type, sessions: Callable[[Any], list[Session]]
) -> Callable[..., None]:
    original: Callable[..., None] = vars(owner)["_end"]

    def end(block: Any, *exc_info: Any) -> None:
        if not any(map(listener.knows, sessions(block))):
            original(block, *exc_info)
            return
        try:
            listener.in_borrow("last line", lambda: None)
        except BaseException as error:  # as if the block had raised it there
            original(block, type(error), error, error.__traceback__)
            raise
        listener.in_borrow("end of borrow", partial(original, block, *exc_info))

    return end


def _function(listener: Listener, name: str) -> property:
    slot = vars(StateSlots)[name]

    def getter(slots: Slots) -> Callable[..., Any] | None:
        function: Callable[..., Any] | None = slot.__get__(slots, StateSlots)
        if function is None or not listener.knows_slots(slots):
            return function
        return partial(listener.in_function, name, slots, function)

    return property(getter, slot.__set__, doc=slot.__doc__)
