"""Threads, signal handlers and finalizers that race on sessions: one borrower at a time, and an end for all."""

import gc
import signal
import sysconfig
import weakref

import pytest
from tests.processes import run_script
from tests.threads import race

from inference_session import Session, _lease
from inference_session._lease import replace
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


pytestmark = pytest.mark.usefixtures("hasty")

THREADS = 4


class Cache(list[int]):
    """A KV cache."""


class Engine:
    """Makes and releases KV caches, and knows which are in use."""

    def __init__(self) -> None:
        self.created: list[Cache] = []
        self.released: list[Cache] = []
        self.in_use: set[int] = set()
        self.freed_in_use = False
        self.slots = StateSlots(
            create=self.create, length=len, truncate=self.truncate, release=self.release
        )

    def create(self) -> Cache:
        """Make a cache."""
        cache = Cache()
        self.created.append(cache)
        return cache

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Do it in place."""
        del cache[length:]
        return cache

    def release(self, cache: Cache) -> None:
        """Note it."""
        self.freed_in_use |= id(cache) in self.in_use
        self.released.append(cache)

    def step(self, state: BorrowedState[Cache], tokens: list[int]) -> None:
        """Append and feed some tokens, slowly enough for others to come between."""
        cache = state.kv_cache
        self.in_use.add(id(cache))
        state.append(tokens)
        for token in state.pending:
            cache.append(token)
            state.advance(1)
        self.in_use.discard(id(cache))

    def check(self) -> None:
        """Require that every cache was released once, and not while in use."""
        released = [id(cache) for cache in self.released]
        assert sorted(released) == sorted(id(cache) for cache in self.created)
        assert not self.freed_in_use


@pytest.fixture
def engine() -> Engine:
    """Return a new engine."""
    return Engine()


def test_one_borrower_at_a_time(engine: Engine) -> None:
    """Of threads that race for a session one gets it, the others an error, and no step is lost."""
    session = Session()
    inside: list[int] = []

    def steps(mine: int) -> int:
        done = 0
        while done < 50:
            try:
                with engine.slots.borrow(session) as state:
                    inside.append(mine)
                    assert inside == [mine]
                    engine.step(state, [mine, mine + 1])
                    inside.remove(mine)
                done += 1
            except SessionBusyError:
                pass
        return done

    race(*[lambda mine=10 * n: steps(mine) for n in range(THREADS)])
    with engine.slots.borrow(session) as state:
        history = state.token_history[:]
        assert history == list(state.kv_cache)
    assert len(history) == 2 * 50 * THREADS
    assert all(
        second == first + 1 for first, second in zip(history[::2], history[1::2], strict=True)
    )
    session.close()
    engine.check()


def test_failing_steps_of_many_threads(engine: Engine) -> None:
    """A session whose steps fail is free at once for the next thread, and holds committed tokens only."""
    session = Session()

    def steps() -> None:
        for n in range(60):
            try:
                with engine.slots.borrow(session) as state:
                    engine.step(state, [7])
                    state.commit()
                    engine.step(state, [8, 9])
                    if n % 2:
                        state.rewind(0)
                    raise MemoryError  # noqa: TRY301
            except (MemoryError, SessionBusyError):
                pass

    race(*[steps] * THREADS)
    with engine.slots.borrow(session) as state:
        assert set(state.token_history) == {7}
        assert list(state.kv_cache) == state.token_history[: state.kv_length]
    session.close()
    engine.check()


def test_close_races_with_borrows(engine: Engine) -> None:
    """Whenever a session is closed, its KV cache is released once, and never during a borrow."""
    sessions = [Session() for _ in range(200)]

    def use() -> int:
        served = 0
        for session in sessions:
            try:
                with engine.slots.borrow(session) as state:
                    engine.step(state, [1, 2, 3])
                    served += 1
            except (SessionBusyError, SessionClosedError):
                pass
        return served

    def close() -> int:
        for session in sessions:
            session.close()
            assert session.closed
        return 0

    served = race(use, use, close, close)
    assert all(session.token_count == 0 for session in sessions)
    assert served[0] + served[1] >= len(engine.created)
    engine.check()


def test_closing_a_borrowed_session_cancels_it(engine: Engine) -> None:
    """A session closed by others in mid-borrow is released when the borrow ends, and not before."""
    session = Session()
    with engine.slots.borrow(session) as state:
        engine.step(state, [1])
        race(*[session.close] * THREADS)
        assert session.closed
        assert engine.released == []
        engine.step(state, [2])
    assert len(engine.released) == 1
    engine.check()


def test_evict_races_with_borrows(engine: Engine) -> None:
    """Evicting while others step loses nothing."""
    session = Session()

    def steps() -> int:
        done = 0
        while done < 100:
            try:
                with engine.slots.borrow(session) as state:
                    assert list(state.kv_cache) == state.token_history[: state.kv_length]
                    engine.step(state, [done])
                    done += 1
            except SessionBusyError:
                pass
        return done

    def evict() -> int:
        evicted = 0
        while session.token_count < 200:
            try:
                engine.slots.evict(session)
                evicted += 1
            except SessionBusyError:
                pass
        return evicted

    race(steps, steps, evict)
    assert session.token_count == 200
    with engine.slots.borrow(session) as state:
        assert sorted(state.token_history) == sorted([*range(100)] * 2)
    session.close()
    engine.check()


def test_batches_in_opposite_orders(engine: Engine) -> None:
    """Two threads that borrow the same sessions in opposite orders never hang, and get all or none."""
    sessions = [Session() for _ in range(5)]
    together: list[int] = []

    def steps(mine: int, batch: list[Session]) -> int:
        done = 0
        for _ in range(200):
            try:
                with engine.slots.borrow_all(batch) as states:
                    together.append(mine)
                    assert together == [mine]
                    for state in states:
                        engine.step(state, [mine])
                    together.remove(mine)
                done += 1
            except SessionBusyError:
                pass
        return done

    done = race(lambda: steps(1, sessions), lambda: steps(2, sessions[::-1]))
    for session in sessions:
        assert session.token_count == sum(done)
        session.close()
    engine.check()


def test_a_thread_that_dies_in_a_borrow(engine: Engine) -> None:
    """A borrow whose thread ended without ending it is undone by the next one."""
    session = Session()
    with engine.slots.borrow(session) as state:
        engine.step(state, [1])

    def abandon() -> None:
        state = engine.slots.borrow(session).__enter__()
        engine.step(state, [2])

    race(abandon)
    gc.collect()
    with engine.slots.borrow(session) as state:
        assert state.token_history == [1]
        assert state.kv_cache == [1]
    session.close()
    engine.check()


def test_two_threads_find_an_abandoned_borrow(engine: Engine) -> None:
    """Of threads that find an abandoned borrow one undoes it, and only one has the session."""
    for _ in range(100):
        session = Session()
        with engine.slots.borrow(session) as state:
            engine.step(state, [1])
        engine.step(engine.slots.borrow(session).__enter__(), [2])

        def take(session: Session = session) -> int:
            try:
                with engine.slots.borrow(session) as state:
                    engine.step(state, [3])
            except SessionBusyError:
                return 0
            return 1

        taken = sum(race(take, take))
        assert taken > 0
        with engine.slots.borrow(session) as state:
            assert state.token_history == [1, *[3] * taken]
        session.close()
    engine.check()


def test_closers_find_an_abandoned_borrow(engine: Engine) -> None:
    """A session with an abandoned borrow is closed and released once, whoever comes."""
    for _ in range(100):
        session = Session()
        engine.step(engine.slots.borrow(session).__enter__(), [2])
        race(session.close, session.close)
        assert session.token_count == 0
    engine.check()


def test_the_last_reference_dies_anywhere(engine: Engine) -> None:
    """Sessions dropped by threads that race with their closing are released once."""

    def drop(sessions: list[Session]) -> None:
        while sessions:
            try:
                sessions.pop().close()
            except IndexError:
                return

    def begun() -> Session:
        session = Session()
        with engine.slots.borrow(session) as state:
            engine.step(state, [1])
        return session

    sessions = [begun() for _ in range(200)]
    race(*[lambda: drop(sessions)] * THREADS)
    engine.check()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_signal_handlers_that_close(engine: Engine) -> None:
    """A signal handler may close the very session at work, at any instant: it never waits for it."""
    current = [Session()]

    def close(signum: int, frame: object) -> None:
        for session in current:
            session.close()

    cancelled = 0
    previous = signal.signal(signal.SIGALRM, close)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        while cancelled < 200:
            session = Session()
            current[:] = [session]
            try:
                while True:
                    with engine.slots.borrow(session) as state:
                        engine.step(state, [1, 2])
                        state.rewind(1)
            except SessionClosedError:
                cancelled += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    current[0].close()
    engine.check()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="without a GIL allocations are counted by the hundred, so the instant can't be chosen",
)
def test_finalizers_that_close() -> None:
    """A finalizer may close sessions at any instant, whenever the garbage collector chooses to run: no deadlock."""
    done = run_script("finalizers", measured=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "the garbage collector did not run"


@pytest.mark.parametrize("alone", [True, False])
def test_heirs_of_a_dead_lease(monkeypatch: pytest.MonkeyPatch, *, alone: bool) -> None:
    """Of several that find the same dead lease, one gets the session, with and without a GIL: others come too late."""
    monkeypatch.setattr(_lease, "_ALONE", alone)
    dead, first, second = (weakref.ref(Session()) for _ in range(3))
    session = Session()
    assert not replace(session, dead, first)
    session._lease = dead
    assert replace(session, dead, first)
    assert not replace(session, dead, second)
    assert session._lease is first
