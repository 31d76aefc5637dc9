"""An interrupt that strikes at any instant, inside the library too, leaves no session borrowed or torn.

CPython delivers interrupts (what signal handlers raise, and `PyThreadState_SetAsyncExc`) on entering a Python function,
after calls of C functions and on backward jumps, nowhere else. These delivery points can be counted, so that one can
strike at the first, at the second, and so on until a scenario runs through undisturbed.

So as to tell what must have happened, books are kept of tokens and KV caches. They are written without any call, as in
`book[END:] = (entry,)`, so that no strike tears them. `create` and `release` are C functions for the same reason: a
Python function can be struck on entry, before it does what it's for.
"""

import gc
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import pytest
from tests.weather import Strike, Weather, strike

from inference_session import Session
from inference_session.engine import BorrowedState, Slot, StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


KV = TypeVar("KV")
END = sys.maxsize
RAIN = Path(__file__).parent / "scripts" / "rain.py"


UNMEASURED = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
"""For processes whose interrupts, forks or finalizers would strike the locks of a coverage tool, and hang there."""


class Books(Generic[KV]):
    """Which KV caches there are, and what became of them."""

    def __init__(self, pool: list[KV]) -> None:
        self.pool = pool
        self.left = list(reversed(pool))
        self.made: list[KV] = []  # by a step or by `truncate`
        self.released: list[KV] = []
        self.consumed: list[KV] = []  # by `truncate`

    def check(self) -> None:
        """Require that every KV cache was let go of exactly once."""
        created = self.pool[: len(self.pool) - len(self.left)]
        gone = [id(cache) for cache in (*self.released, *self.consumed)]
        assert len(gone) == len(set(gone)), "released twice"
        assert {id(cache) for cache in (*created, *self.made)} <= set(gone), "leaked"


class MutableCache(list[int]):
    """A KV cache that steps change."""


class Mutable:
    """An engine whose steps change the KV cache."""

    def __init__(self, *, truncates: bool) -> None:
        self.books = Books([MutableCache() for _ in range(40)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=len,
            truncate=self.truncate if truncates else None,
            release=self.books.released.append,
        )

    @staticmethod
    def truncate(cache: MutableCache, length: int) -> MutableCache:
        """Do it in place."""
        del cache[length:]
        return cache

    @staticmethod
    def feed(state: BorrowedState[MutableCache], count: int) -> None:
        """Feed the next tokens, in two parts, so that a strike leaves one of them."""
        cache, pending = state.kv_cache, state.pending
        cache.extend(pending[: count // 2])
        cache.extend(pending[count // 2 : count])
        state.advance(count)

    @staticmethod
    def tokens(cache: MutableCache) -> list[int]:
        """Return what the cache covers."""
        return [*cache]


FrozenCache = tuple[int, ...]  # begins with a serial number, as there's only one `()`


class Functional:
    """An engine whose steps return a new KV cache."""

    def __init__(self, *, truncates: bool) -> None:
        self.books = Books[FrozenCache]([(serial,) for serial in range(40)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=self.length,
            truncate=self.truncate if truncates else None,
            release=self.books.released.append,
        )

    @staticmethod
    def length(cache: FrozenCache) -> int:
        """Don't count the serial number."""
        return len(cache) - 1

    def truncate(self, cache: FrozenCache, length: int) -> FrozenCache:
        """Return another cache; the old one is gone."""
        shorter = (*cache[: length + 1],)
        if shorter is not cache:
            books = self.books
            books.consumed[END:], books.made[END:] = (cache,), (shorter,)
        return shorter

    def feed(self, state: BorrowedState[FrozenCache], count: int) -> None:
        """Feed the next tokens, in two parts; a cache that the library took is the library's business."""
        books, pending = self.books, state.pending
        for part in (pending[: count // 2], pending[count // 2 : count]):
            if part:
                cache = (*state.kv_cache, *part)
                state.kv_cache = cache
                books.made[END:] = (cache,)
        state.advance(count)

    @staticmethod
    def tokens(cache: FrozenCache) -> list[int]:
        """Return what the cache covers."""
        return [*cache[1:]]


COUNT = Slot(int)
"""How many tokens there are: a further slot that must never be out of step with the history."""


def count(state: BorrowedState[KV]) -> None:
    """Put into the further slot how many tokens there are."""
    state[COUNT] = len(state.token_history)


class FaultError(Exception):
    """What a step of an engine raises."""


class Story(Generic[KV]):
    """Everything that can be done to two sessions, step by step, and what must hold at every instant."""

    # What the histories of both sessions are after each step.
    HISTORIES: tuple[tuple[list[int], list[int]], ...] = (
        ([], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 9], []),
        ([1, 2, 9], []),
        ([1, 2, 7, 8, 7], []),
        ([1, 2, 7, 8, 7], []),
        ([1, 2, 7, 8, 7, 6], [6]),
        ([1, 2, 7, 8, 7, 6], [6]),
        ([1, 2, 7], [6]),
    )

    def __init__(
        self,
        slots: StateSlots[KV],
        feed: Callable[[BorrowedState[KV], int], None],
        tokens: Callable[[KV], list[int]],
    ) -> None:
        self.slots = slots
        self.feed = feed
        self.tokens = tokens
        self.one = Session()
        self.other = Session()
        self.step = 0

    def run(self) -> None:  # noqa: PLR0915 it is all there is
        """Tell it all."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 2)
            count(state)
        self.step = 1
        with slots.borrow(one) as state:
            feed(state, 1)
            state.append([4, 5])
            count(state)
            state.commit()
            self.step = 2
            feed(state, 2)
            state.rewind(2, pending=0)
            state.append([9])
            feed(state, 1)
            count(state)
        self.step = 3
        try:
            with slots.borrow(one) as state:
                state.append([5])
                feed(state, 1)
                state.rewind(1)
                state.append([8, 8])
                feed(state, 2)
                count(state)
                raise FaultError  # noqa: TRY301
        except FaultError:
            self.step = 4
        with slots.borrow(one) as state:
            state.reuse_prefix([1, 2, 7, 8, 7])
            for part in state.chunks(2, keep=0):
                feed(state, len(part))
            count(state)
        self.step = 5
        slots.evict(one)
        self.step = 6
        with slots.borrow_all([one, other]) as states:
            for state in states:
                state.append([6])
                feed(state, len(state.pending))
                count(state)
        self.step = 7
        try:
            with slots.borrow_all([one, other]) as states:
                for state in states:
                    state.append([5])
                    feed(state, 1)
                raise FaultError  # noqa: TRY301
        except FaultError:
            self.step = 8
        with slots.borrow(one, key="another") as state:
            state.rewind(3)
            count(state)
        self.step = 9
        one.close()
        other.close()

    def run_closing(self) -> None:
        """Tell of sessions that are closed in mid-borrow."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 3)
            count(state)
        with slots.borrow_all([one, other]) as states:
            for state in states:
                state.append([6])
                feed(state, 1)
                count(state)
                state.commit()
            other.close()
            states[1].append([5])
            feed(states[1], 1)
        with slots.borrow(one) as state:
            state.append([4, 4])
            feed(state, 1)
            count(state)
            state.commit()
            one.close()
            feed(state, 1)
            state.rewind(5, pending=0)
            state.append([9])
            feed(state, 1)
        self.step = 9

    def stream(self, sessions: list[Session]) -> Generator[None, None, None]:
        """Be suspended in a block that has not been committed."""
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                state.append([5, 5])
                self.feed(state, 1)
                count(state)
            yield

    def run_collected(self) -> None:
        """Tell of blocks that the garbage collector ends."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 2)
            count(state)
        self.step = 1
        stream = self.stream([one])
        next(stream)
        cycle: list[object] = [stream]
        cycle[END:] = (cycle,)
        del stream, cycle
        gc.collect()
        with slots.borrow(one) as state:
            feed(state, 1)
            state.append([4, 5])
            count(state)
        self.step = 2
        stream = self.stream([one, other])
        next(stream)
        cycle = [stream]
        cycle[END:] = (cycle,)
        del stream, cycle
        other.close()
        gc.collect()
        one.close()
        self.step = 9

    def check(self) -> None:
        """Require both sessions to be free, and as one of their commits left them."""
        histories = self.check_one(self.one), self.check_one(self.other)
        following = self.HISTORIES[min(self.step + 1, 9)]
        for session, history, last in zip(
            (0, 1), histories, self.HISTORIES[self.step], strict=True
        ):
            assert history in (None, last, following[session]), "torn"
        if None not in histories:
            assert histories in (self.HISTORIES[self.step], following), "torn between sessions"

    def check_one(self, session: Session) -> list[int] | None:
        """Return the history of a session that must be free and whole."""
        total = session.token_count
        if session.closed:
            return None
        with self.slots.borrow(session) as state:
            history = [*state.token_history]
            assert total == len(history), "token_count is torn"
            assert state[COUNT] == total, "the further slot is torn"
            covered = state.kv_length
            if covered:
                assert self.tokens(state.kv_cache) == history[:covered], "ragged"
            self.feed(state, len(state.pending))
        with self.slots.borrow(session) as state:
            assert self.tokens(state.kv_cache) == history, "not healed"
        return history

    def intervene(self) -> None:
        """Borrow a session in the midst of it all, and leave it as it was."""
        with self.slots.borrow(self.one) as state:
            history = [*state.token_history]
            following = self.HISTORIES[min(self.step + 1, 9)][0]
            assert history in (self.HISTORIES[self.step][0], following), "torn"
            state.append([5])
            state.rewind(len(history), pending=0)

    def close(self) -> None:
        """Close both."""
        self.one.close()
        self.other.close()
        assert self.one.token_count == self.other.token_count == 0

    def close_both(self) -> None:
        """Close both in the midst of it all."""
        self.one.close()
        self.other.close()


def explain(failure: BaseException, error: BaseException, at: str) -> None:
    """Add to a failure where the strike was, and free what its traceback keeps."""
    failure.add_note(f"struck at {at}:")
    failure.add_note("".join(traceback.format_tb(error.__traceback__)[-4:]))
    error.__traceback__ = None


Engines = Callable[[], tuple[Story[MutableCache] | Story[FrozenCache], Callable[[], None]]]


@pytest.fixture(params=["mutable", "functional"])
def kind(request: pytest.FixtureRequest) -> str:
    """Say how an engine's KV cache changes."""
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["truncates", "no truncate"])
def begin(request: pytest.FixtureRequest, kind: str) -> Engines:
    """Return what begins a story, and checks its books."""

    def begin() -> tuple[Story[MutableCache] | Story[FrozenCache], Callable[[], None]]:
        if kind == "mutable":
            mutable = Mutable(truncates=request.param)
            return Story(mutable.slots, mutable.feed, mutable.tokens), mutable.books.check
        functional = Functional(truncates=request.param)
        return Story(functional.slots, functional.feed, functional.tokens), functional.books.check

    return begin


def test_a_strike_at_every_delivery_point(weather: Weather, begin: Engines) -> None:
    """Wherever an interrupt strikes, sessions are free and whole, even while its traceback is kept."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = weather.run(story.run, point)
        if error is None:
            break
        try:
            story.check()
            story.close()
            check_books()
        except BaseException as failure:
            explain(failure, error, f"delivery point {point}, step {story.step}")
            story.close_both()
            raise
    assert point > 300, "the delivery points are not seen"
    assert story.step == 9
    check_books()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
def test_two_strikes(weather: Weather, begin: Engines) -> None:
    """Rollback, interrupted as well, is left to the next borrow, which does it all."""
    struck_twice = 0
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = weather.run(story.run, point, point + 1 + point % 13)
        if error is None:
            break
        struck_twice += weather.reached > point + point % 13
        try:
            story.check()
            story.close()
            check_books()
        except BaseException as failure:
            explain(failure, error, f"delivery point {point}, step {story.step}")
            story.close_both()
            raise
    assert struck_twice > 20


def test_a_handler_that_closes(weather: Weather, begin: Engines) -> None:
    """Wherever a signal handler closes the sessions at work, they end, and free everything once."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = weather.run(story.run, point, act=story.close_both)
        if weather.reached < point:
            break
        assert error is None or isinstance(error, SessionClosedError)
        assert story.one.closed
        assert story.other.closed
        story.close()
        check_books()
    assert point > 300


def test_a_handler_that_borrows(weather: Weather, begin: Engines) -> None:
    """Wherever a signal handler steps a session, it either gets it whole or is refused, and disturbs nobody."""
    point = 0
    served = 0
    while True:
        point += 1
        story, check_books = begin()

        def serve(story: Story[MutableCache] | Story[FrozenCache] = story) -> None:
            nonlocal served
            try:
                story.intervene()
                served += 1
            except (SessionBusyError, SessionClosedError):
                pass

        error = weather.run(story.run, point, act=serve)
        if weather.reached < point:
            break
        assert error is None
        assert story.step == 9
        check_books()
    assert 0 < served < point


@pytest.fixture
def swallowed() -> Iterator[list[object]]:
    """Note the classes of what finalizers raise."""
    swallowed: list[object] = []

    def note(told: "sys.UnraisableHookArgs") -> None:
        swallowed.append(told.exc_type)

    tell, sys.unraisablehook = sys.unraisablehook, note
    yield swallowed
    sys.unraisablehook = tell


def test_a_strike_beside_closing(weather: Weather, begin: Engines) -> None:
    """Free what was closed in mid-borrow once, and without another `close()`, wherever an interrupt strikes."""
    point = 0
    closed_before = 0
    while True:
        point += 1
        story, check_books = begin()
        error = weather.run(story.run_closing, point)
        if error is None:
            break
        try:
            for session in (story.one, story.other):
                if session.closed:
                    closed_before += 1
                    assert session.token_count == 0
                    assert "closed" in repr(session)
                else:
                    session.close()
            check_books()
            story.close()
            check_books()
        except BaseException as failure:
            explain(failure, error, f"delivery point {point}")
            story.close_both()
            raise
    assert point > 100, "the delivery points are not seen"
    assert closed_before > 50
    assert story.step == 9
    check_books()


def test_a_strike_after_a_handler_that_closes(weather: Weather, begin: Engines) -> None:
    """Free what a handler has closed once, and without another `close()`, though an interrupt strikes soon after."""
    for distance in (1, 2, 5):
        point = struck = 0
        while True:
            point += 1
            story, check_books = begin()

            acts = iter([story.close_both, strike])

            def act(acts: Iterator[Callable[[], None]] = acts) -> None:
                next(acts)()

            error = weather.run(story.run, point, point + distance, act=act)
            if weather.reached < point:
                break
            struck += isinstance(error, Strike)
            try:
                check_books()
                story.close()
                check_books()
            except BaseException as failure:
                if error is not None:
                    explain(failure, error, f"delivery point {point}, step {story.step}")
                story.close_both()
                raise
        assert point > 300
        assert struck > 100


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
def test_two_strikes_beside_closing(
    weather: Weather, begin: Engines, swallowed: list[object]
) -> None:
    """Leave what two interrupts kept from being freed, even in a finalizer, to the next `close()`, which does all."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = weather.run(story.run_closing, point, point + 1 + point % 13)
        if error is None:
            break
        while (
            error is not None
        ):  # what counted the points has looked at the leases, and its frames are in here
            error.__traceback__, error = None, error.__context__
        story.close()
        check_books()
    assert point > 100
    assert set(swallowed) == {Strike}


def test_a_strike_beside_the_collector(
    weather: Weather, begin: Engines, swallowed: list[object]
) -> None:
    """Leave sessions whole wherever an interrupt strikes, a block that the garbage collector ends included."""
    gc.freeze()  # which makes collecting garbage fast
    try:
        point = 0
        while True:
            point += 1
            story, check_books = begin()
            error = weather.run(story.run_collected, point)
            if weather.reached < point:
                break
            if error is not None:
                error.__traceback__ = None  # with its frame, the generator goes
            gc.collect()
            story.check()
            story.close()
            check_books()
    finally:
        gc.unfreeze()
    assert point > 100, "the delivery points are not seen"
    assert Strike in swallowed, "the collector met none"
    assert set(swallowed) == {Strike}
    assert story.step == 9


@pytest.mark.parametrize(("rain", "seed"), [("signals", 1), ("signals", 2), ("exceptions", 1)])
def test_rain(rain: str, seed: int) -> None:
    """Thousands of interrupts, by signals or from another thread, leave sessions free and whole, and no KV cache."""
    if rain == "signals" and not hasattr(signal, "setitimer"):
        pytest.skip("no interval timers here")
    done = subprocess.run(
        [sys.executable, RAIN, rain, str(seed), "1.2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=UNMEASURED,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "it did not rain"
