"""The watch on borrows while a check runs, and the actions triggered by their events."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from attrs import define, field, frozen

from inference_session import Session
from inference_session.testing._caches import CacheBook
from inference_session.testing._hooks import Slots


When: TypeAlias = Literal["before", "after"]


@frozen
class Event:
    """A call by a step on its borrowed state, or by the library on its KV cache."""

    when: When
    name: str
    advances: int
    """How often the step had advanced by then."""

    def __str__(self) -> str:
        return f"{self.when} {self.name}"


@define(eq=False)
class Trigger(ABC):
    """An action at an event of a step, done once."""

    at: Callable[[Event], bool]
    skip: int
    """How many such events to let pass first."""
    fired: Event | None = field(init=False, default=None)
    """The event at which it was done."""

    @abstractmethod
    def act(self) -> None:
        """Do it."""


@define(eq=False)
class Watch:
    """The listener of a check."""

    book: CacheBook = field(init=False, factory=CacheBook)
    advances: int = field(init=False, default=0)
    """How often the present step has advanced."""
    seen: set[str] = field(init=False, factory=set[str])
    """All events so far."""
    _triggers: list[Trigger] = field(init=False, factory=list[Trigger])
    _sessions: WeakSet[Session] = field(init=False, factory=WeakSet[Session])
    _slots: set[Slots] = field(init=False, factory=set[Slots])

    def reset(self) -> None:
        """Begin with a new engine."""
        self.book = CacheBook()
        self.seen.clear()
        self._sessions.clear()
        self._slots.clear()
        self.begin_step()

    def add(self, session: Session) -> None:
        """Watch a session."""
        self._sessions.add(session)

    def begin_step(self, *triggers: Trigger) -> None:
        """Forget the last step, and its triggers."""
        self.advances = 0
        self._triggers = list(triggers)

    def knows(self, session: Session) -> bool:
        """Whether this session is watched."""
        return session in self._sessions

    def knows_slots(self, slots: Slots) -> bool:
        """Whether a watched session was borrowed through these."""
        return slots in self._slots

    def borrowed(self, session: Session, slots: Slots) -> None:
        """Record a session just borrowed."""
        self._slots.add(slots)

    def assigned(self, slots: Slots, cache: object) -> None:
        """Record a KV cache put by a step in the place of the present one."""
        if slots.release is not None:
            self.book.adopt(cache)

    def in_borrow(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call on a borrowed state, and trigger the actions before and after it."""
        self._happens("before", name)
        result = call()
        if name == "advance":
            self.advances += 1
        self._happens("after", name)
        return result

    def in_function(self, name: str, slots: Slots, function: Callable[..., Any], *args: Any) -> Any:
        """Call one of the engine's functions, and keep the books of KV caches."""
        self._happens("before", name)
        books = slots.release is not None
        if books and name == "release":
            self.book.released(args[0])
        result = function(*args)
        if books:
            self.book.write(name, args, result)
        if name == "length" or (name == "truncate" and result is args[0]):
            # A failure here would lose the new cache of `create` or a functional `truncate`: no fault of the engine.
            self._happens("after", name)
        return result

    def _happens(self, when: When, name: str) -> None:
        event = Event(when, name, self.advances)
        self.seen.add(str(event))
        for trigger in self._triggers:
            if trigger.fired is None and trigger.at(event):
                if trigger.skip:
                    trigger.skip -= 1
                else:
                    trigger.fired = event
                    trigger.act()
