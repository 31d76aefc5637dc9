"""A registry in the hands of threads, signal handlers, finalizers and forks: whole at every instant, and never waiting.

`create` and `release` are C functions here, as in tracked_engines.py, so that no interrupt keeps them from doing their
work.
"""

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import UUID

import pytest
from tests.books import check_books, sizes
from tests.interrupts import Interrupt, Interrupter
from tests.threads import Straggler

from inference_session import Session, SessionRegistry
from inference_session._lock import lock
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionForkedError,
)


END = sys.maxsize
IDS = [UUID(int=number) for number in range(6)]


class Cache(list[int]):
    """A KV cache."""


class Engine:
    """Gives KV caches away, and takes them back."""

    def __init__(self, count: int = 100) -> None:
        self.pool = [Cache() for _ in range(count)]
        self.left = self.pool[::-1]
        self.released: list[Cache] = []
        self.slots = StateSlots(
            create=self.left.pop, length=len, release=self.released.append, nbytes=len
        )

    def step(self, session: Session, count: int = 1) -> None:
        """Add some tokens, and feed all that are pending."""
        with self.slots.borrow(session) as state:
            state.append([7] * count)
            fed = state.pending
            state.kv_cache.extend(fed)
            state.advance(len(fed))

    def check(self) -> None:
        """Require that every KV cache that was given away came back once."""
        given = self.pool[: len(self.pool) - len(self.left)]
        assert sorted(map(id, self.released)) == sorted(map(id, given))


# Interrupts


class Story:
    """Everything that can be done with a registry."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.registry = SessionRegistry(max_sessions=3, idle_timeout=3600, max_kv_bytes=8)
        self.kept: list[Session] = []

    def open(self, id: UUID) -> Session:  # noqa: A002
        """Open a session, and keep it, so that none is finalised where an interrupt may come."""
        session = self.registry.open(id)
        self.kept[END:] = (session,)
        return session

    def run(self) -> None:
        """Tell it all."""
        registry, engine = self.registry, self.engine
        for id in IDS[:3]:  # noqa: A001
            engine.step(self.open(id), 2)
        engine.step(registry[IDS[0]], 4)  # evicts
        self.open(IDS[3])  # closes
        with engine.slots.borrow(registry[IDS[0]]) as state:
            state.commit()
            self.open(IDS[4])
        try:
            with engine.slots.borrow_all([*map(registry.__getitem__, registry)]) as states:
                states[0].append([1])
                raise MemoryError  # noqa: TRY301
        except MemoryError:
            pass
        registry.get(IDS[5])
        registry.close(IDS[4])
        registry.close_idle()
        with engine.slots.borrow(registry[IDS[0]]) as state:
            state.append([1])
            registry[IDS[0]].close()
            self.open(IDS[0])
        registry.close()

    def check(self) -> None:
        """Require a registry that works on."""
        registry, engine = self.registry, self.engine
        check_books(registry, 3)
        if not registry._closed:
            for id in IDS[:3]:  # noqa: A001
                session = registry.get(id) or registry.open(id)
                engine.step(session)
                assert registry[id] is session
                check_books(registry, 3)
                assert registry._kv_total <= 8
        registry.close()
        check_books(registry, 3)
        assert len(registry) == 0
        self.kept.clear()


def test_an_interrupt_at_every_delivery_point(interrupter: Interrupter) -> None:
    """Wherever an interrupt comes, the registry is whole and works on, and every KV cache comes back once."""
    point = 0
    while True:
        point += 1
        story = Story()
        error = interrupter.run(story.run, point)
        if error is None:
            break
        story.check()
        error.__traceback__ = error.__context__ = None
        del error
        story.engine.check()
    assert point > 300, "the delivery points are not seen"
    story.engine.check()


def test_no_delivery_point_under_the_lock(interrupter: Interrupter) -> None:
    """No signal handler ever runs while the lock is held, so whatever it waits for, it doesn't wait for itself."""
    held: list[int] = []
    point = 0
    owned: Callable[[], bool] = getattr(lock, "_is_owned")  # noqa: B009 typeshed hides it

    def look() -> None:
        if owned():
            held.append(point)

    while True:
        point += 1
        story = Story()
        interrupter.run(story.run, point, act=look)
        if interrupter.reached < point:
            break
    assert held == []
    assert point > 300


def test_a_handler_that_uses_the_registry(interrupter: Interrupter) -> None:
    """A signal handler may open, look up, step and close sessions of the registry at work, at any instant."""
    point = 0
    while True:
        point += 1
        story = Story()

        def serve(story: Story = story) -> None:
            check_books(story.registry, 3)
            for use in (
                lambda: story.engine.step(story.registry[IDS[1]]),
                lambda: story.registry.close(IDS[1]),
                lambda: story.registry.open(IDS[5]),
            ):
                with suppress(SessionError, RuntimeError):
                    use()

        with suppress(SessionError):  # of the story itself, as a session isn't there any more
            interrupter.run(story.run, point, act=serve)
        if interrupter.reached < point:
            break
        check_books(story.registry, 3)
        story.check()
        story.engine.check()
    assert point > 300


def test_a_finalizer_that_uses_the_registry() -> None:
    """A finalizer may do so, too, whenever the garbage collector or the last reference lets it run."""

    class Closer:
        def __init__(self, registry: SessionRegistry) -> None:
            self.registry = registry
            self.cycle = self

        def __del__(self) -> None:
            ran.append(1)
            for id in list(self.registry)[:1]:  # noqa: A001
                self.registry.close(id)
            self.registry.open()

    ran: list[int] = []
    engine = Engine(10_000)
    registry = SessionRegistry(max_sessions=5, idle_timeout=3600, max_kv_bytes=10)
    threshold = gc.get_threshold()
    try:
        for count in range(1, 200):
            Closer(registry)
            gc.set_threshold(gc.get_count()[0] + count % 40, 1, 1)
            session = registry.open()
            try:
                engine.step(session, 3)
                registry.get(session.id)
                registry.close_idle()
            except SessionClosedError:
                pass
            check_books(registry, 5)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert len(ran) > 100
    registry.close()
    gc.collect()
    engine.check()


# Threads


class Served:
    """What a thread's work came to."""

    def __init__(self) -> None:
        self.steps = 0
        self.refused = 0


class ThreadEngine:
    """An engine whose every step and release looks whether anybody else is there."""

    def __init__(self) -> None:
        self.created = 0
        self.released = 0
        self.misuse: list[str] = []
        self.counting = threading.Lock()
        self.slots = StateSlots(
            create=self.create,
            length=lambda cache: len(cache.tokens),
            truncate=self.truncate,
            release=self.release,
            nbytes=self.nbytes,
        )

    class Claimed:
        """A KV cache."""

        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.in_use = False
            self.gone = False

    def create(self) -> Claimed:
        """Make one."""
        with self.counting:
            self.created += 1
        return self.Claimed()

    def truncate(self, cache: Claimed, length: int) -> Claimed:
        """Do it in place."""
        del cache.tokens[length:]
        return cache

    def nbytes(self, cache: Claimed) -> int:
        """Measure one that nobody else may have."""
        if cache.gone:
            self.misuse.append("measured what is gone")
        return len(cache.tokens)

    def release(self, cache: Claimed) -> None:
        """Take one back that isn't in use."""
        if cache.in_use or cache.gone:
            self.misuse.append("released in use" if cache.in_use else "released twice")
        cache.gone = True
        with self.counting:
            self.released += 1

    def step(self, session: Session, count: int) -> None:
        """Add tokens, slowly enough for others to come between."""
        with self.slots.borrow(session) as state:
            cache = state.kv_cache
            cache.in_use = True
            try:
                state.append([7] * count)
                for token in state.pending:
                    cache.tokens.append(token)
                    state.advance(1)
                if session.token_count % 7 == 3:
                    raise MemoryError
            finally:
                cache.in_use = False


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", [1, 2])
def test_threads(seed: int) -> None:
    """Threads that open, look up, borrow, close and evict at once: no cache is lost, shared or freed twice."""
    engine = ThreadEngine()
    registry = SessionRegistry(max_sessions=4, idle_timeout=0.002, max_kv_bytes=30)
    until = time.monotonic() + 1.5

    def work(number: int) -> Served:
        dice = random.Random(f"{seed} {number}")
        served = Served()
        while time.monotonic() < until:
            id = dice.choice(IDS)  # noqa: A001
            try:
                match dice.randrange(8):
                    case 0:
                        registry.open(id)
                    case 1:
                        engine.step(registry.open(), 2)
                    case 2:
                        registry.close(id)
                    case 3:
                        engine.slots.evict(registry[id])
                    case 4:
                        registry.close_idle()
                    case 5:
                        registry[id].close()
                    case _:
                        engine.step(registry[id], dice.randrange(1, 8))
                        served.steps += 1
            except (MemoryError, SessionError):
                served.refused += 1
            assert len(registry) <= 4
        return served

    with ThreadPoolExecutor(4) as pool:
        served = [future.result() for future in [pool.submit(work, n) for n in range(4)]]
    assert engine.misuse == []
    assert sum(each.steps for each in served) > 50
    assert sum(each.refused for each in served) > 50
    check_books(registry, 4)
    held = {session.id.int: session._kv_length for session in registry.values()}
    assert sizes(registry) == {key: length for key, length in held.items() if length}
    assert registry._kv_total <= 30
    registry.close()
    gc.collect()
    assert engine.created == engine.released


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("size", [1, 2])
def test_room_for_all(size: int) -> None:
    """Where nothing is borrowed there's always room, however many threads make it at once."""
    registry = SessionRegistry(max_sessions=size)

    def work() -> None:
        for _ in range(1500):
            registry.open()
            assert len(registry) <= size

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    check_books(registry, size)
    registry.close()


def test_a_release_that_takes_long() -> None:
    """While one session is being released everybody else works on, and nobody borrows or counts the one."""
    straggler = Straggler()

    def release(cache: Cache) -> None:
        straggler.pause("release")

    slots = StateSlots(create=Cache, length=len, release=release, nbytes=len)
    registry = SessionRegistry(max_sessions=2, max_kv_bytes=2)
    first = registry.open()
    with slots.borrow(first) as state:
        state.append([1, 2])
        state.kv_cache.extend([1, 2])
        state.advance(2)
    second = registry.open()

    def evict() -> None:
        with slots.borrow(second) as state:
            state.append([1])
            state.kv_cache.append(1)
            state.advance(1)

    straggler.begin(evict, "release")
    with pytest.raises(SessionBusyError), slots.borrow(first):
        pass
    with slots.borrow(second):
        third = registry.open()  # in the place of the first, which isn't borrowed
    assert first.closed
    assert set(registry) == {second.id, third.id}
    assert straggler.go_on() is None
    assert first.token_count == 0
    registry.close()


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork() -> None:
    """In a child inherited sessions are found and refused, and are released in the parent alone."""
    engine = Engine()
    with SessionRegistry(max_sessions=2, max_kv_bytes=4) as registry:
        session, other = registry.open(IDS[0]), registry.open(IDS[1])
        engine.step(session, 2)
        engine.step(other, 2)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with pytest.raises(SessionForkedError):
                    engine.step(registry[IDS[0]])
                mine = registry.open(IDS[2])  # in the place of an inherited one
                engine.step(mine, 3)  # over the budget that the other one takes
                assert set(registry) == {IDS[0], IDS[2]}
                registry.close()
                assert engine.released == [engine.pool[2]]
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        engine.step(session)
        assert engine.left
    engine.check()


def test_interrupts_are_no_errors() -> None:
    """The interrupts of these tests pass through every `except Exception`."""
    assert not issubclass(Interrupt, Exception)
