"""The kit's view of a session, through the observer that a session may have.

A session that the kit has opened has a `Witness` as its observer, as one of a registry has the registry. As a borrow
begins, the core asks it for the engine's functions and for the lease, and gets some that report how they are used:

- Every member of a borrowed state first calls the lease, to see whether it's still alive.
- The core calls the engine's functions (`create`, `length`, `truncate` and so on) where a borrow got them.

So a report comes before every use of the session by a step. What the kit does there, such as raising an error, seems to
come from the member or the function itself. Sessions without a witness notice nothing.
"""

import inspect
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import local
from types import FrameType
from typing import Any, BinaryIO, Final, Literal, TypeAlias
from unittest.mock import patch
from weakref import WeakSet

from attrs import define, field, frozen

from inference_session import Session
from inference_session._session import NO_CACHE, CacheFunctions
from inference_session.engine import StateSlots


Slots: TypeAlias = StateSlots[Any]
Lease: TypeAlias = Callable[[], object]
When: TypeAlias = Literal["before", "after"]

MEMBERS: Final = frozenset(
    {
        *("append", "advance", "commit", "rewind", "reuse_prefix", "chunks", "branch"),
        *("session", "kv_cache", "pending", "token_history", "kv_length", "take_kv_cache"),
        *("__getitem__", "__setitem__", "__len__", "_chunks"),
    }
)
"""The members of a borrowed state, by the names of their functions."""


@frozen
class Event:
    """A use of a session by a step, or by the library on its behalf."""

    when: When
    name: str
    witness: "Witness | None"
    """The observer of the session; None if it isn't known which one."""
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
    """All events in the steps of an engine, and the actions triggered by them."""

    caches: "CacheBook" = field(init=False)
    advances: int = field(init=False)
    """How often the present step has advanced."""
    count: int = field(init=False)
    """How many events there were so far."""
    seen: Counter[str] = field(init=False)
    """The same by their names."""
    short: int = field(init=False)
    """By how many tokens `truncate` falls short of what it's asked for."""
    _functions: "dict[Slots, ReportingFunctions]" = field(init=False)
    _triggers: list[Trigger] = field(init=False)
    _acting: local = field(init=False, factory=local)
    """Has the witness of the session that each thread has used last."""

    def __attrs_post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with a new engine."""
        self.caches = CacheBook()
        self.count = 0
        self.seen = Counter()
        self.short = 0
        self._functions = {}
        self.begin_step()

    def begin_step(self, *triggers: Trigger) -> None:
        """Forget the last step, and its triggers."""
        self.advances = 0
        self._triggers = list(triggers)

    def add(self, session: Session) -> "Witness":
        """Watch a session from now on; it may have been begun by the engine already."""
        witness = Witness(self)
        session._observer = witness
        if session._slots is not None:
            session._slots = self.functions(session._slots)
            self.caches.committed(session)
        self.caches.sessions.add(session)
        return witness

    def functions(self, slots: CacheFunctions[Any]) -> "ReportingFunctions":
        """Return an engine's functions that report their calls: for the same engine, the same ones."""
        if isinstance(slots, ReportingFunctions):
            return slots
        assert isinstance(slots, StateSlots)
        return self._functions.setdefault(slots, ReportingFunctions(slots, self))

    def acts(self, witness: "Witness") -> None:
        """Record that the present thread uses a session."""
        self._acting.witness = witness

    def happens(self, when: When, name: str, *, inside: bool = False) -> None:
        """Record an event, and do what it triggers; `inside` the model, no session is known."""
        witness = None if inside else getattr(self._acting, "witness", None)
        event = Event(when, name, witness, self.advances)
        self.count += 1
        self.seen[str(event)] += 1
        for trigger in self._triggers:
            if trigger.fired is None and trigger.at(event):
                if trigger.skip:
                    trigger.skip -= 1
                else:
                    trigger.fired = event
                    trigger.act()


@define(eq=False)
class Witness:
    """The observer of one session."""

    watch: Watch

    def happens(self, when: When, name: str) -> None:
        """Report an event."""
        self.watch.acts(self)
        self.watch.happens(when, name)
        if name == "advance":
            self.watch.advances += 1

    # What the core calls

    def borrowing(
        self, slots: CacheFunctions[Any], lease: Lease
    ) -> tuple[CacheFunctions[Any], Lease]:
        """Return functions and a lease that report their calls."""
        self.happens("before", "borrow")
        return self.watch.functions(slots), ReportingLease(lease, self)

    def committing(self, session: Session) -> None:
        """Report the end of a step, or another commit."""
        self.watch.caches.committed(session)
        self.happens("before", "the commit")

    def rolled_back(self, session: Session, failure: BaseException | None) -> None:
        """Do nothing: what matters is how the session goes on."""

    def settled(self, session: Session) -> None:
        """Report the end of a borrow."""
        if not session.borrowed:
            self.happens("after", "the borrow")

    def close(self, session: Session) -> None:
        """Close a session."""
        session._closed = True


@frozen(eq=False)
class ReportingLease:
    """A lease that reports each use of the borrowed state."""

    _lease: Lease
    _witness: Witness

    def __call__(self) -> object:
        member = member_of(sys._getframe(1))
        if member is not None:
            self._witness.happens("before", member)
        return self._lease()


def member_of(frame: FrameType | None) -> str | None:
    """Return the member of a borrowed state in which its lease is called; None if it's called elsewhere."""
    if frame is not None and frame.f_code.co_name == "_current":  # what most members call first
        frame = frame.f_back
    if frame is None or frame.f_code.co_name not in MEMBERS:
        return None
    name = frame.f_code.co_name
    if name == "kv_cache" and frame.f_code.co_argcount > 1:
        return "kv_cache ="
    return "chunks" if name == "_chunks" else name


@define(eq=False)
class ReportingFunctions:
    """The functions of an engine's `StateSlots`, which report their calls."""

    slots: Slots
    _watch: Watch

    @property
    def create(self) -> Callable[[], Any]:
        """Make a KV cache."""
        return self._create

    @property
    def length(self) -> Callable[[Any], int]:
        """Measure a KV cache."""
        return self._length

    @property
    def truncate(self) -> Callable[[Any, int], Any] | None:
        """Cut a KV cache."""
        return None if self.slots.truncate is None else self._truncate

    @property
    def share(self) -> Callable[[Any, int], Any] | None:
        """Make another KV cache of the first tokens."""
        return None if self.slots.share is None else self._share

    @property
    def dump(self) -> Callable[[Any, BinaryIO], object] | None:
        """Write a KV cache."""
        return self.slots.dump

    @property
    def load(self) -> Callable[[BinaryIO], Any] | None:
        """Read a KV cache."""
        return self.slots.load

    @property
    def release(self) -> Callable[[Any], object] | None:
        """Free a KV cache."""
        return None if self.slots.release is None else self._release

    @property
    def nbytes(self) -> Callable[[Any], int] | None:
        """Weigh a KV cache."""
        return self.slots.nbytes

    def _create(self) -> Any:
        self._watch.happens("before", "create")
        cache = self.slots.create()
        self._made("create", cache)
        return cache

    def _length(self, cache: Any) -> int:
        self._watch.happens("before", "length")
        length = self.slots.length(cache)
        self._watch.happens("after", "length")
        return length

    def _truncate(self, cache: Any, length: int) -> Any:
        assert self.slots.truncate is not None
        self._watch.happens("before", "truncate")
        with self._caches.no_error("truncate"):
            cut = self.slots.truncate(cache, max(length - self._watch.short, 0))
        self._made("truncate", cut)
        if cut is cache:
            # A failure here would lose the new cache of a functional `truncate`: no fault of the engine.
            self._watch.happens("after", "truncate")
        return cut

    def _share(self, cache: Any, length: int) -> Any:
        assert self.slots.share is not None
        self._watch.happens("before", "share")
        shared = self.slots.share(cache, length)
        self._made("share", shared)
        return shared

    def _release(self, cache: Any) -> None:
        assert self.slots.release is not None
        self._watch.happens("before", "release")
        self._caches.released(cache)
        with self._caches.no_error("release"):
            self.slots.release(cache)

    def _made(self, function: str, cache: Any) -> None:
        self._caches.made(function, cache, releases=self.slots.release is not None)

    @property
    def _caches(self) -> "CacheBook":
        return self._watch.caches


# What the model consists of

Part: TypeAlias = tuple[Any, str]
"""A callable that the model consists of: what has it, a class or a module, and its name there."""


def part_name(part: Part) -> str:
    """Return how a part of the model is called in reports."""
    owner, name = part
    return f"{owner.__name__}.{name}"


@contextmanager
def reporting(parts: Sequence[Part], watch: Watch) -> Generator[None]:
    """Report, until the block ends, each call of parts of the model: before they do their work, and after."""
    with ExitStack() as stack:
        for part in parts:
            owner, name = part
            report = _reporting(inspect.getattr_static(owner, name), part_name(part), watch)
            stack.enter_context(patch.object(owner, name, report))
        yield


def _reporting(original: Any, event: str, watch: Watch) -> Any:
    if isinstance(original, staticmethod | classmethod):
        return type(original)(_reporting(original.__func__, event, watch))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType, reportUnknownVariableType]

    @wraps(original)
    def report(*args: Any, **kwargs: Any) -> Any:
        watch.happens("before", event, inside=True)
        result = original(*args, **kwargs)
        watch.happens("after", event, inside=True)
        return result

    return report


# Books


@define(eq=False)
class CacheBook:
    """The KV caches of an engine: each belongs to one session, and is released once."""

    mistakes: list[str] = field(init=False, factory=list[str])
    """Descriptions of misused KV caches."""
    suspicions: list[str] = field(init=False, factory=list[str])
    """The same where it may do no harm, as there is no `release`, and caches may be immutable."""
    sessions: WeakSet[Session] = field(init=False, factory=WeakSet[Session])
    _gone: dict[Hashable, object] = field(init=False, factory=dict[Hashable, object])
    """Those released; kept, as another object could get the same id."""

    def made(self, function: str, cache: object, *, releases: bool) -> None:
        """Record a KV cache made by one of the engine's functions."""
        if any(key(cache) == key(other) for session in self.sessions for other in held(session)):
            found = f"`{function}` returned a KV cache that another session has"
            (self.mistakes if releases else self.suspicions).append(found)
        self._gone.pop(key(cache), None)

    def released(self, cache: object) -> None:
        """Record a KV cache about to be released."""
        if key(cache) in self._gone:
            self.mistakes.append("`release` was called for a KV cache that was released before")
        self._gone[key(cache)] = cache

    def committed(self, session: Session) -> None:
        """Record the KV caches of a session: a step may have put its own there."""
        for cache in held(session):
            self._gone.pop(key(cache), None)

    @contextmanager
    def no_error(self, function: str) -> Generator[None]:
        """Record an error of one of the engine's functions: after a failed step, the library goes on without."""
        try:
            yield
        except Exception as error:
            self.mistakes.append(f"`{function}` raised {type(error).__name__}: {error}")
            raise


def key(cache: object) -> Hashable:
    """Return the identity of a KV cache; its value, if it's a handle, as handles can be used again."""
    return cache if isinstance(cache, (int, str, bytes)) else (id(cache),)


def held(session: Session) -> list[object]:
    """Return the KV caches held by a session."""
    caches = session._kv_cache, session._savepoint_cache
    return [cache for cache in caches if cache is not NO_CACHE]


def slots_of(session: Session) -> Slots | None:
    """Return the `StateSlots` of the engine that began a session, if one has."""
    slots = session._slots
    if isinstance(slots, ReportingFunctions):
        return slots.slots
    assert slots is None or isinstance(slots, StateSlots)
    return slots
