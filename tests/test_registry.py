"""The registry: sessions by their ids, who has to go when there are too many, and what their KV caches may hold."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, cast
from uuid import UUID

import pytest
from tests.books import check_books, in_order, sizes

from inference_session import Session, SessionRegistry, _lease, _registry
from inference_session._lease import Lease, nobody, replace, take
from inference_session._session import Maintenance
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)


SOME_ID = UUID("12345678-1234-5678-1234-567812345678")


class Cache:
    """A KV cache: its tokens, at a hundred bytes each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.released = 0


class Engine:
    """An engine that keeps book of its KV caches."""

    def __init__(self) -> None:
        self.caches: list[Cache] = []
        self.release_error: BaseException | None = None
        self.nbytes_error: BaseException | None = None
        self.slots = StateSlots(
            create=self.create,
            length=lambda cache: len(cache.tokens),
            truncate=self.truncate,
            release=self.release,
            nbytes=self.nbytes,
        )

    def create(self) -> Cache:
        """Make a cache."""
        self.caches.append(Cache())
        return self.caches[-1]

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Do it in place."""
        del cache.tokens[length:]
        return cache

    def release(self, cache: Cache) -> None:
        """Take a cache back, even if it's told to fail."""
        cache.released += 1
        if self.release_error is not None:
            raise self.release_error

    def nbytes(self, cache: Cache) -> int:
        """Tell its size."""
        if self.nbytes_error is not None:
            raise self.nbytes_error
        return 100 * len(cache.tokens)

    def step(self, session: Session, count: int = 1) -> None:
        """Add some tokens, and feed all that are pending."""
        with self.slots.borrow(session) as state:
            state.append([7] * count)
            fed = state.pending
            state.kv_cache.tokens.extend(fed)
            state.advance(len(fed))

    def cached(self, session: Session) -> int:
        """Return how many tokens a session's KV cache covers, without using the session."""
        return session._kv_length

    def check(self) -> None:
        """Require that every cache was released once."""
        assert [cache.released for cache in self.caches] == [1] * len(self.caches)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Give an engine, and require in the end that it got every cache back, once."""
    engine = Engine()
    yield engine
    gc.collect()
    engine.check()


class Clock:
    """What `time.monotonic` tells here."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give a clock that stands still until it's told otherwise."""
    clock = Clock()
    monkeypatch.setattr(_registry, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """Give the errors that nobody was there to catch."""
    errors: list[BaseException | None] = []

    def hook(report: "sys.UnraisableHookArgs") -> None:
        errors.append(report.exc_value)

    monkeypatch.setattr(sys, "unraisablehook", hook)
    return errors


# Opening and looking up


def test_open() -> None:
    """A session that was opened is found by its id, and is the same one."""
    with SessionRegistry() as registry:
        one, other = registry.open(), registry.open()
        assert one.id != other.id
        assert registry[one.id] is one
        assert registry.get(other.id) is other
        assert one.id in registry
        assert len(registry) == 2
        assert set(registry) == {one.id, other.id}


def test_open_with_an_id() -> None:
    """A replay, or a server whose client chose the id, gets exactly that one."""
    with SessionRegistry() as registry:
        session = registry.open(SOME_ID)
        assert session.id is SOME_ID
        assert registry[UUID(str(SOME_ID))] is session


def test_unknown_id() -> None:
    """An id that isn't there is a `KeyError`, as in a dict, and names the id."""
    with SessionRegistry() as registry:
        with pytest.raises(SessionNotFoundError) as caught:
            registry[SOME_ID]
        assert caught.value.session_id is SOME_ID
        assert isinstance(caught.value, KeyError)
        with pytest.raises(SessionNotFoundError):
            registry.close(SOME_ID)
        assert registry.get(SOME_ID) is None
        assert SOME_ID not in registry


def test_existing_id() -> None:
    """A second session under an id never takes the place of the first."""
    with SessionRegistry() as registry:
        session = registry.open(SOME_ID)
        with pytest.raises(SessionExistsError) as caught:
            registry.open(SOME_ID)
        assert caught.value.session_id == SOME_ID
        assert registry[SOME_ID] is session
        assert not session.closed


def test_existing_id_in_a_full_registry() -> None:
    """Nobody has to go for a session that isn't opened."""
    with SessionRegistry(max_sessions=2) as registry:
        registry.open()
        registry.open(SOME_ID)
        with pytest.raises(SessionExistsError):
            registry.open(SOME_ID)
        assert len(registry) == 2


@pytest.mark.parametrize("wrong", [str(SOME_ID), SOME_ID.int, SOME_ID.bytes, b"", 1.0, Session()])
def test_ids_are_uuids(wrong: Any) -> None:
    """What isn't a `UUID` is told so everywhere: a string from a request would otherwise just never be found."""
    registry = SessionRegistry()
    calls: list[Callable[[Any], object]] = [
        registry.open,
        registry.__getitem__,
        registry.get,
        registry.__contains__,
        registry.close,
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"must be a uuid\.UUID, got '{type(wrong).__name__}'"):
            call(wrong)
    assert len(registry) == 0


def test_iteration_is_over_a_snapshot() -> None:
    """A loop over the ids may open and close sessions."""
    with SessionRegistry() as registry:
        ids = {registry.open().id for _ in range(5)}
        seen: set[UUID] = set()
        for id in registry:  # noqa: A001
            registry.close(id)
            registry.open()
            seen.add(id)
        assert seen == ids


def test_true_when_empty() -> None:
    """A server that writes `registry or SessionRegistry()` keeps the limits of the empty one that it was given."""
    empty = SessionRegistry(max_sessions=2)
    assert empty
    assert (empty or SessionRegistry()) is empty
    empty.close()
    assert empty


def test_values(engine: Engine) -> None:
    """The open sessions can be listed: a list of their own, which changes with nothing."""
    with SessionRegistry() as registry:
        assert registry.values() == []
        sessions = [registry.open() for _ in range(3)]
        listed = registry.values()
        assert listed == sessions
        listed.clear()
        sessions[0].close()
        assert registry.values() == sessions[1:]
        with engine.slots.borrow(sessions[1]):
            assert registry.values() == sessions[1:]


def test_values_are_no_use(clock: Clock) -> None:
    """A page that shows all sessions keeps none of them alive: neither in the order of use nor by the clock."""
    with SessionRegistry(max_sessions=3, idle_timeout=10) as registry:
        first, second, third = (registry.open() for _ in range(3))
        clock.now += 6
        registry[first.id]
        for list_them in (registry.values, lambda: list(registry), lambda: repr(registry)):
            list_them()
            assert in_order(registry) == [second, third, first]
        assert [session.token_count for session in registry.values()] == [0, 0, 0]
        clock.now += 5
        registry.values()
        assert registry.close_idle() == 2
        assert registry.values() == [first]


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"max_sessions": 0}, ValueError),
        ({"max_sessions": -1}, ValueError),
        ({"max_sessions": 1.5}, TypeError),
        ({"max_sessions": "5"}, TypeError),
        ({"max_kv_bytes": -1}, ValueError),
        ({"max_kv_bytes": 1e9}, TypeError),
        ({"max_sessions": True}, TypeError),
        ({"max_kv_bytes": True}, TypeError),
        ({"idle_timeout": True}, TypeError),
        ({"idle_timeout": 0}, ValueError),
        ({"idle_timeout": -1.0}, ValueError),
        ({"idle_timeout": float("nan")}, ValueError),
        ({"idle_timeout": "60"}, TypeError),
    ],
    ids=repr,
)
def test_wrong_limits(limits: dict[str, Any], error: type[Exception]) -> None:
    """A limit that makes no sense is refused at once, by its name."""
    with pytest.raises(error, match=next(iter(limits))):
        SessionRegistry(**limits)


# Closing


def test_close_one(engine: Engine) -> None:
    """A session closed by its id is closed, released and gone."""
    with SessionRegistry() as registry:
        session, other = registry.open(), registry.open()
        engine.step(session)
        registry.close(session.id)
        assert session.closed
        assert session.id not in registry
        assert set(registry) == {other.id}
        engine.check()


def test_close_none(engine: Engine) -> None:
    """An id that is missing by mistake doesn't close every conversation there is."""
    with SessionRegistry() as registry:
        session = registry.open()
        engine.step(session)
        nothing = cast("UUID", None)
        with pytest.raises(TypeError, match=r"must be a uuid\.UUID, got 'NoneType'"):
            registry.close(nothing)
        with pytest.raises(TypeError, match=r"must be a uuid\.UUID, got 'NoneType'"):
            registry.close(id=nothing)
        assert registry.values() == [session]
        assert not session.closed
        engine.step(session)
        registry.open()


@pytest.mark.parametrize("borrowed", [False, True])
def test_closed_by_anyone(engine: Engine, *, borrowed: bool) -> None:
    """A session that somebody else closes leaves the registry at once, even in mid-borrow."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        session = registry.open(SOME_ID)
        engine.step(session)
        if borrowed:
            with engine.slots.borrow(session):
                session.close()
                assert SOME_ID not in registry
                other = registry.open(SOME_ID)
        else:
            session.close()
            assert SOME_ID not in registry
            other = registry.open(SOME_ID)
        session.close()
        assert registry[SOME_ID] is other
        assert registry._kv_total == 0
        engine.check()


def test_removal_is_by_identity(engine: Engine) -> None:
    """The late end of an old session doesn't touch the new one with its id: not its place, nor its KV cache."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        old = registry.open(SOME_ID)
        with engine.slots.borrow(old) as state:
            state.append([1])
            state.kv_cache.tokens.append(1)
            state.advance(1)
            registry.close(SOME_ID)
            new = registry.open(SOME_ID)
            engine.step(new, 3)
            state.commit()
        old.close()
        assert registry[SOME_ID] is new
        assert not new.closed
        assert registry._kv_total == 300


def test_closed_sessions_are_let_go(engine: Engine) -> None:
    """Nothing in the registry keeps a closed session alive, nor does it take the garbage collector to free it."""
    gc.disable()
    try:
        registry = SessionRegistry(max_sessions=3, idle_timeout=60, max_kv_bytes=1000)
        ways: list[Callable[[Session], object]] = [
            Session.close,
            lambda session: registry.close(session.id),
            lambda session: [registry.open() for _ in range(3)],
            lambda session: registry.close(),
        ]
        for close in ways:
            session = registry.open()
            engine.step(session)
            reference = weakref.ref(session)
            close(session)
            assert session.closed
            del session
            assert reference() is None
    finally:
        gc.enable()


def test_a_registry_that_is_dropped(engine: Engine) -> None:
    """A registry that is dropped lets its sessions go at once; one that somebody still has works on."""
    gc.disable()
    try:
        registry = SessionRegistry(idle_timeout=60, max_kv_bytes=100)
        session, other = registry.open(), registry.open()
        engine.step(other)
        reference = weakref.ref(other)
        del other
        with pytest.warns(ResourceWarning, match="unclosed"):
            del registry
        assert reference() is None
        engine.step(session, 5)
        with pytest.raises(MemoryError), engine.slots.borrow(session):
            raise MemoryError
        assert engine.cached(session) == 5
        session.close()
        assert session.closed
    finally:
        gc.enable()


def test_close_all(engine: Engine) -> None:
    """At the end of its block a registry closes all sessions, those that are borrowed too; then it opens no more."""
    registry = SessionRegistry()
    with registry as entered:
        assert entered is registry
        idle, borrowed = registry.open(), registry.open(SOME_ID)
        engine.step(idle)
        borrow = engine.slots.borrow(borrowed)
        borrow.__enter__()
    assert idle.closed
    assert borrowed.closed
    assert len(registry) == 0
    borrow.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="registry is closed"):
        registry.open()
    with pytest.raises(SessionNotFoundError):
        registry[SOME_ID]
    registry.close()


def test_close_all_when_release_fails(engine: Engine) -> None:
    """However many fail to release, all are closed; the first error is raised, and tells of the others."""
    registry = SessionRegistry()
    sessions = [registry.open() for _ in range(3)]
    for session in sessions:
        engine.step(session)
    engine.release_error = ConnectionError("gone")
    with pytest.raises(ConnectionError) as caught:
        registry.close()
    assert caught.value is engine.release_error
    assert len(caught.value.__notes__) == 2
    assert all(session.closed for session in sessions)
    assert len(registry) == 0


# Too many


def test_the_least_recently_used_goes() -> None:
    """Over `max_sessions` the one is closed that was longest not looked up."""
    with SessionRegistry(max_sessions=3) as registry:
        first, second, third = (registry.open() for _ in range(3))
        assert registry[first.id] is first
        assert registry.get(third.id) is third
        assert second.id in registry  # no use
        registry.open()
        assert [session.closed for session in (first, second, third)] == [False, True, False]
        registry.open()
        assert [session.closed for session in (first, third)] == [True, False]
        assert len(registry) == 3


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_a_borrow_is_a_use(engine: Engine, *, batch: bool, fails: bool) -> None:
    """Borrowing keeps a session in the registry, even if it wasn't looked up, and even if the step failed."""
    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        try:
            with engine.slots.borrow_all([first]) if batch else engine.slots.borrow(first):
                if fails:
                    raise MemoryError  # noqa: TRY301
        except MemoryError:
            pass
        registry.open()
        assert [first.closed, second.closed] == [False, True]


def test_a_refused_borrow_is_no_use(engine: Engine) -> None:
    """A borrow that fails changes nothing."""
    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        with engine.slots.borrow(second):
            for batch in ([second], [first, second]):
                with pytest.raises(SessionBusyError), engine.slots.borrow_all(batch):
                    pass
        registry.open()
        assert [first.closed, second.closed] == [True, False]


def test_borrowed_ones_stay(engine: Engine) -> None:
    """A session that is borrowed is passed over, however long ago that began."""
    with SessionRegistry(max_sessions=3) as registry:
        first, second, third = (registry.open() for _ in range(3))
        with engine.slots.borrow_all([first, third]):
            registry.open()
            assert [session.closed for session in (first, second, third)] == [False, True, False]
            registry.open()
            assert [first.closed, third.closed] == [False, False]


def test_full(engine: Engine) -> None:
    """Where all are borrowed nobody has to go, and nothing changes."""
    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        with engine.slots.borrow_all([first, second]):
            with pytest.raises(RegistryFullError) as caught:
                registry.open()
            assert caught.value.max_sessions == 2
            with pytest.raises(RegistryFullError):
                registry.open(SOME_ID)
            assert set(registry) == {first.id, second.id}
            assert SOME_ID not in registry
        registry.open()
        assert [first.closed, second.closed] == [True, False]


def test_an_abandoned_borrow_is_none(engine: Engine) -> None:
    """A session whose borrow died unfinished may be closed to make room."""
    with SessionRegistry(max_sessions=1) as registry:
        session = registry.open()
        state = engine.slots.borrow(session).__enter__()
        state.append([1])
        state.kv_cache.tokens.append(1)
        del state
        registry.open()
        assert session.closed
        engine.check()


def test_release_fails_for_who_must_go(
    engine: Engine, unraisable: list[BaseException | None]
) -> None:
    """Who opens a session doesn't get the error of another one, but the hook for such errors does."""
    with SessionRegistry(max_sessions=1) as registry:
        session = registry.open()
        engine.step(session)
        engine.release_error = ConnectionError("gone")
        assert registry.open().id in registry
        assert session.closed
        assert unraisable == [engine.release_error]


def test_release_is_interrupted(engine: Engine) -> None:
    """An interrupt in `release` goes on to the caller; the next attempt opens a session."""
    with SessionRegistry(max_sessions=1) as registry:
        session = registry.open()
        engine.step(session)
        engine.release_error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            registry.open()
        assert session.closed
        assert len(registry) == 0
        registry.open()


@pytest.mark.parametrize("borrowed", [False, True])
def test_changed_hands_at_the_last_moment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, *, borrowed: bool
) -> None:
    """A session that other threads get hold of, or let go of, when it is about to be closed is looked at again."""
    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        maintenance = Maintenance()

        def too_late(session: Session, lease: Lease) -> None:
            session._lease = (
                weakref.ref(maintenance) if session._lease is nobody else session._lease
            )

        monkeypatch.setattr(_registry, "take", too_late)
        with engine.slots.borrow(first) if borrowed else nullcontext():
            registry.open()
        assert [first.closed, second.closed] == [not borrowed, borrowed]
        assert maintenance is not None


def test_taken_over_at_the_last_moment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose unfinished borrow another thread takes over just now is borrowed, so another one has to go."""
    with SessionRegistry(max_sessions=2) as registry, ExitStack() as other_thread:
        first, second = registry.open(), registry.open()
        engine.slots.borrow(first).__enter__()  # and never ended

        def too_late(session: Session, last: Lease, lease: Lease) -> bool:
            monkeypatch.setattr(_lease, "replace", replace)
            other_thread.enter_context(engine.slots.borrow(first))
            return replace(session, last, lease)

        monkeypatch.setattr(_lease, "replace", too_late)
        registry.open()
        assert [first.closed, second.closed] == [False, True]


def test_replaced_at_the_last_moment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry isn't full because of a session that was borrowed, but has gone meanwhile."""
    with SessionRegistry(max_sessions=1) as registry:
        first = registry.open()
        all_borrowed = SessionRegistry._all_borrowed

        def change(registry: SessionRegistry) -> bool:
            monkeypatch.setattr(SessionRegistry, "_all_borrowed", all_borrowed)
            first.close()
            registry.open(SOME_ID)
            return all_borrowed(registry)

        monkeypatch.setattr(SessionRegistry, "_all_borrowed", change)
        with engine.slots.borrow(first):
            assert registry.open().id in registry
        assert SOME_ID not in registry


class Relay:
    """Borrows two sessions in turn, never both: always the one that the registry is about to look at."""

    def __init__(self, engine: Engine, *sessions: Session, turns: int) -> None:
        self.engine, self.sessions, self.turns = engine, sessions, turns
        self.borrow = engine.slots.borrow(sessions[0])
        self.borrow.__enter__()
        self.has: Session = sessions[0]

    def look(self, session: Session) -> None:
        """Have a session borrowed now, and only now."""
        if self.turns > 0 and session in self.sessions and session is not self.has:
            self.turns -= 1
            self.borrow.__exit__(None, None, None)
            self.has = session
            self.borrow = self.engine.slots.borrow(session)
            self.borrow.__enter__()


@pytest.mark.parametrize("turns", range(1, 12))
def test_full_at_no_instant(engine: Engine, monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """A registry whose sessions are borrowed one after the other isn't full, wherever `open` looks meanwhile."""
    borrowed = cast("property", vars(Session)["borrowed"])

    def look_and_take(session: Session, lease: Lease) -> Lease | None:
        relay.look(session)
        return take(session, lease)

    def look_whether_borrowed(session: Session) -> bool:
        relay.look(session)
        found: bool = borrowed.__get__(session)
        return found

    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        relay = Relay(engine, first, second, turns=turns)
        with monkeypatch.context() as patch:
            patch.setattr(_registry, "take", look_and_take)
            patch.setattr(Session, "borrowed", property(look_whether_borrowed))
            new = registry.open()
        assert relay.turns == 0
        assert registry.values() == [relay.has, new]
        assert [first.closed, second.closed] == [relay.has is second, relay.has is first]
        relay.borrow.__exit__(None, None, None)
        check_books(registry, 2)


def test_full_at_one_instant(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry is full if all were borrowed at one instant, though one of them was given back and taken before."""
    with SessionRegistry(max_sessions=2) as registry, ExitStack() as borrows:
        first, second = registry.open(), registry.open()
        borrows.enter_context(engine.slots.borrow(first))
        looks: list[Session] = []

        def look_and_take(session: Session, lease: Lease) -> Lease | None:
            looks.append(session)
            if len(looks) == 2:
                borrows.enter_context(engine.slots.borrow(second))
            return take(session, lease)

        monkeypatch.setattr(_registry, "take", look_and_take)
        with pytest.raises(RegistryFullError):
            registry.open()
        assert looks == [first, second]
        check_books(registry, 2)


@contextmanager
def at_the_last_moment(work: Callable[[], object]) -> Generator[None]:
    """Do something once, when the registry is about to take a session so as to close it."""

    def too_late(session: Session, lease: Lease) -> Lease | None:
        patch.undo()
        work()
        return take(session, lease)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registry, "take", too_late)
        yield


def test_looked_up_when_it_has_to_go(engine: Engine) -> None:
    """A session that is looked up while it is about to be closed isn't the least recently used: another one goes."""
    with SessionRegistry(max_sessions=2) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first)
        engine.step(second)
        with at_the_last_moment(lambda: registry[first.id]):
            registry.open()
        assert [first.closed, second.closed] == [False, True]
        engine.step(first)
    engine.check()


def test_looked_up_when_it_was_idle(engine: Engine, clock: Clock) -> None:
    """A session that is looked up while it is about to be closed isn't idle any more."""
    with SessionRegistry(idle_timeout=10) as registry:
        session = registry.open()
        engine.step(session)
        clock.now += 11
        with at_the_last_moment(lambda: registry[session.id]):
            assert registry.close_idle() == 0
        assert not session.closed
        engine.step(session)
    engine.check()


def test_idle_ones_are_counted_once(engine: Engine, clock: Clock) -> None:
    """Of two threads that close idle sessions at once, one counts each."""
    with SessionRegistry(idle_timeout=10) as registry:
        for _ in range(2):
            engine.step(registry.open())
        clock.now += 11
        counts: list[int] = []
        with at_the_last_moment(lambda: counts.append(registry.close_idle())):
            counts.append(registry.close_idle())
        assert sum(counts) == 2
    engine.check()


def test_closed_by_two_at_once() -> None:
    """A session that two threads close leaves the registry once."""
    with SessionRegistry(max_sessions=2) as registry:
        session = registry.open()
        observer = session._observer
        assert observer is not None
        session.close()
        observer.close(session)  # by who was about to close it, too
        assert registry._room == 2


def test_closed_before_it_had_to_go(engine: Engine) -> None:
    """A session that its client closes just before the registry would have is not the registry's to count."""
    with SessionRegistry(max_sessions=1) as registry:
        session = registry.open()
        entry = session._observer
        assert isinstance(entry, _registry._Entry)
        with engine.slots.borrow(session):
            session.close()
            assert not registry._remove(session, entry, session._lease, entry.use)
        assert registry._room == 1


# Idle for too long


def test_close_idle(engine: Engine, clock: Clock) -> None:
    """Exactly those are closed that weren't used for longer than the timeout, and they are counted."""
    with SessionRegistry(idle_timeout=10) as registry:
        first, second, third, fourth = (registry.open() for _ in range(4))
        engine.step(first)
        clock.now += 5
        registry[second.id]
        engine.step(third)
        clock.now += 5
        assert registry.close_idle() == 0
        clock.now += 1
        assert registry.close_idle() == 2
        assert [session.closed for session in (first, second, third, fourth)] == [
            True,
            False,
            False,
            True,
        ]
        clock.now += 1e9
        assert registry.close_idle() == 2
        assert len(registry) == 0


def test_borrowed_ones_are_not_idle(engine: Engine, clock: Clock) -> None:
    """A step that takes longer than the timeout doesn't cost the session; its idleness begins when the step ends."""
    with SessionRegistry(idle_timeout=10) as registry:
        session = registry.open()
        with engine.slots.borrow(session):
            clock.now += 100
            assert registry.close_idle() == 0
            clock.now += 100
        clock.now += 10
        assert registry.close_idle() == 0
        clock.now += 1
        assert registry.close_idle() == 1


def test_no_timeout(clock: Clock) -> None:
    """Without a timeout nothing is ever idle."""
    with SessionRegistry() as registry:
        registry.open()
        clock.now += 1e9
        assert registry.close_idle() == 0


def test_idle_ones_can_be_used_again(clock: Clock) -> None:
    """Until somebody closes it, an idle session is there for its client, and then isn't idle any more."""
    with SessionRegistry(idle_timeout=10) as registry:
        session = registry.open()
        clock.now += 100
        assert registry[session.id] is session
        assert registry.close_idle() == 0


def test_open_closes_idle_ones(clock: Clock) -> None:
    """A registry that only ever opens sessions doesn't fill up with idle ones; an idle one's id can be had again."""
    with SessionRegistry(idle_timeout=10) as registry:
        sessions = [registry.open(), registry.open(SOME_ID)]
        clock.now += 11
        registry.open(SOME_ID)
        assert all(session.closed for session in sessions)
        assert len(registry) == 1


def test_idle_ones_fail_to_release(
    engine: Engine, clock: Clock, unraisable: list[BaseException | None]
) -> None:
    """Who closes the idle ones gets what `release` raises, when all are closed; who opens another doesn't."""
    with SessionRegistry(idle_timeout=10) as registry:
        for _ in range(2):
            engine.step(registry.open())
        clock.now += 11
        engine.release_error = ConnectionError("gone")
        with pytest.raises(ConnectionError):
            registry.close_idle()
        assert len(registry) == 0
        engine.release_error = None
        engine.step(registry.open())
        clock.now += 11
        engine.release_error = ConnectionError("gone")
        registry.open()
        assert unraisable == [engine.release_error]


# Too many bytes


def test_evicts_the_least_recently_used(engine: Engine) -> None:
    """Over the budget those lose their KV caches that were longest not used; their tokens stay."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        first, second, third = (registry.open() for _ in range(3))
        for session in (first, second, third):
            engine.step(session, 3)
        registry[first.id]
        engine.step(third, 2)
        assert [engine.cached(session) for session in (first, second, third)] == [3, 0, 5]
        assert [session.token_count for session in (first, second, third)] == [3, 3, 5]
        engine.step(second, 1)
        assert [engine.cached(session) for session in (first, second, third)] == [0, 4, 5]
        assert registry._kv_total == 900


def test_never_a_borrowed_one(engine: Engine) -> None:
    """What is borrowed keeps its KV cache, whatever the budget; when the borrow ends the budget holds again."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 4)
        with engine.slots.borrow(first):
            engine.step(second, 4)
            assert [engine.cached(first), engine.cached(second)] == [4, 0]
            assert second.token_count == 4
        engine.step(second, 1)
        assert [engine.cached(first), engine.cached(second)] == [0, 5]


def test_one_that_is_too_big_alone(engine: Engine) -> None:
    """A budget is a budget: a KV cache that exceeds it alone isn't kept between steps."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        engine.step(session, 6)
        assert engine.cached(session) == 0
        assert session.token_count == 6
        assert registry._kv_total == 0


def test_a_commit_counts(engine: Engine) -> None:
    """A long step that commits makes room for what it has grown to."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        with engine.slots.borrow(second) as state:
            state.append([7] * 3)
            state.kv_cache.tokens.extend(state.pending)
            state.advance(3)
            assert engine.cached(first) == 3
            state.commit()
            assert engine.cached(first) == 0
        assert engine.cached(second) == 3


def test_a_batch(engine: Engine) -> None:
    """A batch may exceed the budget while it runs; then its own sessions are evicted, too."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        sessions = [registry.open() for _ in range(3)]
        with engine.slots.borrow_all(sessions) as states:
            for state in states:
                state.append([7] * 2)
                state.kv_cache.tokens.extend(state.pending)
                state.advance(2)
        assert [engine.cached(session) for session in sessions] == [0, 2, 2]


def test_failed_steps_count(engine: Engine) -> None:
    """After a failure a KV cache counts for what it is then."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        engine.step(session, 3)
        with pytest.raises(MemoryError), engine.slots.borrow(session) as state:
            state.append([7] * 2)
            state.kv_cache.tokens.extend(state.pending)
            state.advance(2)
            state.rewind(1)
            raise MemoryError
        assert registry._kv_total == 100 * engine.cached(session) == 0
        assert session.token_count == 3


def test_eviction_by_hand_counts(engine: Engine) -> None:
    """What an engine evicts itself isn't counted any more."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        engine.step(session, 3)
        engine.slots.evict(session)
        assert registry._kv_total == 0


def test_an_abandoned_borrow_is_evicted(engine: Engine) -> None:
    """A session whose borrow died unfinished is taken back, and evicted as any other."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session, other = registry.open(), registry.open()
        engine.step(session, 3)
        state = engine.slots.borrow(session).__enter__()
        state.append([1])
        del state
        engine.step(other, 3)
        assert engine.cached(session) == 0
        with engine.slots.borrow(session) as state:
            assert state.token_history == [7, 7, 7]


def test_release_fails_on_eviction(engine: Engine, unraisable: list[BaseException | None]) -> None:
    """A step isn't failed by the eviction of another session: it was committed."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        engine.release_error = ConnectionError("gone")
        engine.step(second, 3)
        assert second.token_count == 3
        assert unraisable == [engine.release_error]
        assert engine.cached(first) == 0
        assert registry._kv_total == 300
        engine.release_error = None


def test_release_is_interrupted_on_eviction(engine: Engine) -> None:
    """An interrupt in `release` goes on to the caller, and what was evicted isn't counted any more."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        engine.release_error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            engine.step(second, 3)
        engine.release_error = None
        assert registry._kv_total == 300
        engine.step(first, 1)
        assert [engine.cached(first), engine.cached(second)] == [4, 0]


def test_release_that_closes_the_evicted(engine: Engine) -> None:
    """A session that is closed while it is being evicted is closed in full."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        releasing: list[Session] = [first]
        release = engine.release

        def close_too(cache: Cache) -> None:
            release(cache)
            while releasing:
                releasing.pop().close()

        slots = StateSlots(
            create=engine.create,
            length=lambda it: len(it.tokens),
            release=close_too,
            nbytes=engine.nbytes,
        )
        other = registry.open()
        releasing[:] = [other]
        with slots.borrow(other) as state:
            state.append([7] * 2)
            state.kv_cache.tokens.extend(state.pending)
            state.advance(2)
        registry[first.id]
        engine.step(second, 1)
        assert other.closed
        assert other.token_count == 0
        assert set(registry) == {first.id, second.id}
        assert registry._kv_total == 400


def grow(state: BorrowedState[Cache], count: int) -> None:
    """Add some tokens in mid-borrow, and commit."""
    state.append([7] * count)
    state.kv_cache.tokens.extend(state.pending)
    state.advance(count)
    state.commit()


@pytest.mark.parametrize("fails", [False, True])
def test_passed_over_until_its_borrow_ends(engine: Engine, *, fails: bool) -> None:
    """A session that is over the budget while it's borrowed is evicted when that ends, well or not."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        first, second = registry.open(), registry.open()
        with suppress(MemoryError), engine.slots.borrow(second) as other:
            with engine.slots.borrow(first) as state:
                grow(state, 6)
                grow(other, 6)
                assert registry._kv_total == 1200
                if fails:
                    raise MemoryError
            assert engine.cached(first) == 0
            assert registry._kv_total == 600
        assert engine.cached(first) == 0
        assert first.token_count == 6
        assert engine.cached(second) == 6
        check_books(registry)


def by_hand(engine: Engine, session: Session) -> tuple[BorrowedState[Cache], object]:
    """Borrow a session without a `with` statement."""
    borrow = engine.slots.borrow(session)
    return borrow.__enter__(), borrow


def in_a_batch(engine: Engine, session: Session) -> tuple[BorrowedState[Cache], object]:
    """Borrow a batch without a `with` statement."""
    borrow = engine.slots.borrow_all([session])
    return borrow.__enter__()[0], borrow


def in_a_stack(engine: Engine, session: Session) -> tuple[BorrowedState[Cache], object]:
    """Borrow a session by an `ExitStack`."""
    stack = ExitStack()
    return stack.enter_context(engine.slots.borrow(session)), stack


def in_a_generator(engine: Engine, session: Session) -> tuple[BorrowedState[Cache], object]:
    """Borrow a session in a generator that's suspended then."""

    def stream() -> Iterator[BorrowedState[Cache]]:
        with engine.slots.borrow(session) as state:
            yield state

    generator = stream()
    return next(generator), generator


@pytest.mark.parametrize("abandon", [by_hand, in_a_batch, in_a_stack, in_a_generator])
@pytest.mark.parametrize("in_cycle", [False, True], ids=["dropped", "garbage"])
def test_passed_over_until_its_borrow_is_abandoned(
    engine: Engine,
    abandon: Callable[[Engine, Session], tuple[BorrowedState[Cache], object]],
    *,
    in_cycle: bool,
) -> None:
    """A session that was passed over while borrowed is evicted also if that borrow is dropped, and never ends."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        first, second = registry.open(), registry.open()
        held: list[object] = [*abandon(engine, first)]
        grow(cast("BorrowedState[Cache]", held[0]), 6)
        with engine.slots.borrow(second) as other:
            grow(other, 6)
            assert registry._kv_total == 1200  # both are borrowed
            if in_cycle:
                held.append(held)
                del held
            else:
                held.clear()
            gc.collect()
            grow(other, 1)
            assert [engine.cached(first), engine.cached(second)] == [0, 7]
            assert registry._kv_total == 700
        check_books(registry)
        with engine.slots.borrow(first) as state:
            assert state.token_history == [7] * 6


def test_passed_over_and_abandoned_within_the_budget(engine: Engine) -> None:
    """A session that was passed over, and whose borrow was then dropped, is the first to go at the next occasion."""
    with SessionRegistry(max_kv_bytes=1000) as registry:
        first, second, third = (registry.open() for _ in range(3))
        engine.step(first, 4)
        held = [*by_hand(engine, first)]
        engine.step(second, 4)
        engine.step(third, 4)  # over the budget: first is borrowed, second goes
        assert [engine.cached(session) for session in (first, second, third)] == [4, 0, 4]
        held.clear()
        gc.collect()
        assert engine.cached(first) == 4
        engine.step(second, 1)
        assert [engine.cached(session) for session in (first, second, third)] == [0, 5, 4]
        check_books(registry)


def test_many_borrowed_ones_cost_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a great many sessions borrowed and over the budget, each commit looks at a few of them, not at all."""
    looks: list[Session] = []
    maintain = Session._maintain

    def count(session: Session, work: Callable[[], None]) -> bool:
        looks.append(session)
        return maintain(session, work)

    monkeypatch.setattr(Session, "_maintain", count)
    with SessionRegistry(max_kv_bytes=100) as registry:
        sessions = [registry.open() for _ in range(200)]
        most = total = 0
        with engine.slots.borrow_all(sessions) as states:
            for _ in range(3):
                for state in states:
                    looks.clear()
                    grow(state, 1)
                    most = max(most, len(looks))
                    total += len(looks)
            assert registry._kv_total == 100 * 600
        assert most <= 3
        assert total <= 2 * 600
        assert registry._kv_total <= 100
        check_books(registry)


def test_given_back_when_it_is_passed_over(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is given back just when it is passed over as a borrowed one counts as used by then."""
    with SessionRegistry(max_kv_bytes=500) as registry, ExitStack() as other_thread:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        other_thread.enter_context(engine.slots.borrow(first))
        settle_at_the_end = Session._settle_at_the_end

        def too_late(session: Session) -> bool:
            monkeypatch.setattr(Session, "_settle_at_the_end", settle_at_the_end)
            other_thread.close()
            return settle_at_the_end(session)

        monkeypatch.setattr(Session, "_settle_at_the_end", too_late)
        engine.step(second, 3)
        assert (engine.cached(first), engine.cached(second)) == (3, 0)  # now the other one is older
        assert registry._kv_total == 300
        check_books(registry)


def test_nothing_to_look_at_again(engine: Engine) -> None:
    """A session that was not passed over keeps its place in the order of use."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        entry = second._observer
        assert isinstance(entry, _registry._Entry)
        registry._look_again(second, entry)
        assert in_order(registry) == [first, second]


def test_sizes_of_a_foreign_type(engine: Engine) -> None:
    """What `nbytes` returns is counted as a plain int, as NumPy's are not."""

    class Size(int):
        pass

    slots = StateSlots(
        create=engine.create,
        length=lambda cache: len(cache.tokens),
        release=engine.release,
        nbytes=lambda cache: Size(100 * len(cache.tokens)),
    )
    with SessionRegistry(max_kv_bytes=500) as registry:
        with slots.borrow(registry.open()) as state:
            grow(state, 3)
        assert [type(size) for size in (registry._kv_total, *sizes(registry).values())] == [int] * 2


# What it tells


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Give what returns, once, all that was logged since: the level, the logger, and what is said."""
    caplog.set_level(logging.DEBUG)

    def read() -> list[str]:
        said = [f"{it.levelname} {it.name}: {it.getMessage()}" for it in caplog.records]
        caplog.clear()
        return said

    return read


def test_logs_who_is_closed_for_being_idle(
    engine: Engine, clock: Clock, log: Callable[[], list[str]]
) -> None:
    """An operator sees which sessions went because nobody used them: each of them once."""
    with SessionRegistry(idle_timeout=10) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first)
        clock.now += 11
        used = registry.get(second.id)
        assert log() == []
        registry.close_idle()
        assert log() == [f"INFO inference_session: closed session {first.id}: idle"]
        clock.now += 11
        registry.open()
        assert log() == [f"INFO inference_session: closed session {second.id}: idle"]
        assert used is second


def test_logs_who_is_closed_for_room(engine: Engine, log: Callable[[], list[str]]) -> None:
    """An operator sees which sessions went because there were too many, also if `release` failed."""
    with SessionRegistry(max_sessions=1) as registry:
        first = registry.open()
        engine.step(first)
        second = registry.open()
        assert log() == [f"INFO inference_session: closed session {first.id}: to make room"]
        with engine.slots.borrow(second):
            with pytest.raises(RegistryFullError):
                registry.open()
            assert log() == []
        registry.open()
        assert log() == [f"INFO inference_session: closed session {second.id}: to make room"]


def test_logs_whose_cache_is_evicted(engine: Engine, log: Callable[[], list[str]]) -> None:
    """An operator sees whose KV caches the budget cost, and that sessions without one aren't worth a word."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        first, second, third = (registry.open() for _ in range(3))
        engine.step(first, 3)
        engine.slots.evict(second)
        assert log() == []
        with engine.slots.borrow(first):
            engine.step(third, 2)
            assert log() == []
        engine.step(third, 1)
        assert log() == [evicted(first)]
        engine.step(third, 3)
        assert log() == [evicted(third)]
        engine.step(second, 0)
        assert log() == []


def evicted(session: Session) -> str:
    """Return what is logged about a session whose KV cache was evicted."""
    return f"INFO inference_session: evicted the KV cache of session {session.id}: over the budget"


def test_logs_failing_releases_as_well(
    engine: Engine,
    log: Callable[[], list[str]],
    unraisable: list[BaseException | None],
) -> None:
    """An eviction whose `release` failed is an eviction, logged once; the error goes to the hook, not to the log."""
    with SessionRegistry(max_sessions=2, max_kv_bytes=500) as registry:
        first, second = registry.open(), registry.open()
        engine.step(first, 3)
        engine.release_error = ConnectionError("7 7 7")
        engine.step(second, 3)
        assert log() == [evicted(first)]
        registry.open()
        registry.open()
        assert log() == [
            f"INFO inference_session: closed session {first.id}: to make room",
            f"INFO inference_session: closed session {second.id}: to make room",
        ]
        assert unraisable == [engine.release_error] * 2
        engine.release_error = None


def test_logs_nothing_else(engine: Engine, log: Callable[[], list[str]]) -> None:
    """What is done by hand isn't logged, nor are steps: whoever does it knows."""
    with SessionRegistry(max_sessions=5, idle_timeout=1e9, max_kv_bytes=10**9) as registry:
        first, second, third, fourth = (registry.open() for _ in range(4))
        for session in (first, second, third, fourth):
            engine.step(session)
        with pytest.raises(MemoryError), engine.slots.borrow(fourth):
            raise MemoryError
        with engine.slots.borrow(first), pytest.raises(SessionError), engine.slots.borrow(first):
            pass
        first.close()
        registry.close(second.id)
        engine.slots.evict(third)
        with engine.slots.borrow(third):
            third.close()
        registry.get(fourth.id)
        assert registry.close_idle() == 0
    assert fourth.closed
    assert log() == []


def test_a_log_that_looks_at_the_registry(engine: Engine, clock: Clock) -> None:
    """A handler of log records may ask the registry that logs: nothing waits for itself."""
    seen: list[int] = []

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(len(registry))
            check_books(registry, 2)
            for session in registry.values():
                registry.get(session.id)

    logger, handler = logging.getLogger("inference_session"), Asking()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with SessionRegistry(max_sessions=2, idle_timeout=10, max_kv_bytes=100) as registry:
            engine.step(registry.open(), 2)
            for _ in range(2):
                registry.open()
            clock.now += 11
            assert registry.close_idle() == 1  # the handler used the other one
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert seen == [1, 1, 1]


def test_an_engine_without_nbytes() -> None:
    """A budget that nobody could keep is an error, not a silent leak; and the step that shows it changes nothing."""
    slots = StateSlots(create=list[int], length=len)
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        with slots.borrow(session) as state:
            state.append([1])  # no KV cache, no question
        with (
            pytest.raises(TypeError, match="give StateSlots an nbytes"),
            slots.borrow(session) as state,
        ):
            state.append([2])
            state.kv_cache.extend(state.pending)
            state.advance(2)
        assert session.token_count == 1
        assert len(registry) == 1
    with SessionRegistry() as registry, slots.borrow(registry.open()) as state:
        state.kv_cache.clear()


@pytest.mark.parametrize("wrong", [-1, 1.5, "100"])
def test_nbytes_that_makes_no_sense(wrong: Any) -> None:
    """A size that is none is an error, and the step that shows it changes nothing."""
    slots = StateSlots(create=list[int], length=len, nbytes=lambda cache: cast("int", wrong))
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        with pytest.raises((TypeError, ValueError)), slots.borrow(session) as state:
            state.append([2])
            state.kv_cache.append(2)
            state.advance(1)
        assert session.token_count == 0
        assert registry._kv_total == 0


@pytest.mark.parametrize("batch", [False, True])
def test_nbytes_fails(engine: Engine, *, batch: bool) -> None:
    """A KV cache that can't be measured fails the step, and isn't kept."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        engine.step(session, 2)
        engine.nbytes_error = ConnectionError("gone")
        with pytest.raises(ConnectionError) as caught:
            if batch:
                with engine.slots.borrow_all([session]) as states:
                    states[0].append([8])
            else:
                engine.step(session)
        assert caught.value is engine.nbytes_error
        assert session.token_count == 2
        assert engine.cached(session) == 0
        assert registry._kv_total == 0
        engine.nbytes_error = None
        engine.step(session)
        assert session.token_count == 3


def test_nbytes_fails_after_a_failed_step(engine: Engine) -> None:
    """The failure of the step goes on to the caller, whatever fails afterwards."""
    with SessionRegistry(max_kv_bytes=500) as registry:
        session = registry.open()
        engine.step(session, 2)
        engine.nbytes_error = ConnectionError("gone")
        with pytest.raises(MemoryError), engine.slots.borrow(session):
            raise MemoryError
        assert engine.cached(session) == 0
        engine.nbytes_error = None


# What it is


def test_repr() -> None:
    """A log tells how many sessions there are."""
    with SessionRegistry() as registry:
        registry.open()
        assert repr(registry) == "<SessionRegistry, 1 sessions>"


def test_two_registries_with_one_id(engine: Engine) -> None:
    """An id is unique within a registry only; each closes its own session."""
    with SessionRegistry() as one, SessionRegistry() as other:
        session = one.open(SOME_ID)
        engine.step(other.open(SOME_ID))
        session.close()
        assert SOME_ID not in one
        assert SOME_ID in other
