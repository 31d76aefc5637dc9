"""An interrupt at any instant, inside the library too, leaves no session borrowed or torn.

The delivery points of interrupts can be counted (see interrupts.py), so one can come at the first, at the second, and
so on until a scenario runs through undisturbed. The engines keep books of KV caches, which stay whole meanwhile.
"""

import gc
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

import pytest
from tests.interrupts import Interrupt, Interrupter, interrupt
from tests.processes import run_script
from tests.tracked_engines import END, FrozenCache, Functional, Mutable, MutableCache

from inference_session import Session
from inference_session.engine import BorrowedState, Slot, StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


KV = TypeVar("KV")
COUNT = Slot(int)
"""The number of tokens: a further slot, never to be out of step with the history."""


def count(state: BorrowedState[KV]) -> None:
    """Set the further slot to the number of tokens."""
    state[COUNT] = len(state.token_history)


class FaultError(Exception):
    """An error in a step of an engine."""


class Story(Generic[KV]):
    """Every operation on two sessions, step by step, and the invariants at every instant."""

    # The histories of both sessions after each step.
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

    def run(self) -> None:  # noqa: PLR0915 one step after the other
        """Do everything with both sessions."""
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
        """Close both sessions in mid-borrow."""
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
        """Suspend in a block before it is committed."""
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                state.append([5, 5])
                self.feed(state, 1)
                count(state)
            yield

    def run_collected(self) -> None:
        """Leave blocks to be ended by the garbage collector."""
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
        """Require both sessions to be free, and as after one of their commits."""
        histories = self.check_one(self.one), self.check_one(self.other)
        following = self.HISTORIES[min(self.step + 1, 9)]
        for session, history, last in zip(
            (0, 1), histories, self.HISTORIES[self.step], strict=True
        ):
            assert history in (None, last, following[session]), "torn"
        if None not in histories:
            assert histories in (self.HISTORIES[self.step], following), "torn between sessions"

    def check_one(self, session: Session) -> list[int] | None:
        """Require a session to be free and whole, and return its history."""
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
        """Borrow a session in the middle of a step, and leave it as it was."""
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
        """Close both in the middle of a step."""
        self.one.close()
        self.other.close()


def explain(failure: BaseException, error: BaseException, at: str) -> None:
    """Add the place of the interrupt to a failure, and free the objects kept by its traceback."""
    failure.add_note(f"interrupted at {at}:")
    failure.add_note("".join(traceback.format_tb(error.__traceback__)[-4:]))
    error.__traceback__ = None


Engines = Callable[[], tuple[Story[MutableCache] | Story[FrozenCache], Callable[[], None]]]


@pytest.fixture(params=["mutable", "functional"])
def kind(request: pytest.FixtureRequest) -> str:
    """Say how an engine's KV cache changes."""
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["truncates", "no truncate"])
def begin(request: pytest.FixtureRequest, kind: str) -> Engines:
    """Return a function that begins a story, and returns it with the check of its books."""

    def begin() -> tuple[Story[MutableCache] | Story[FrozenCache], Callable[[], None]]:
        if kind == "mutable":
            mutable = Mutable(truncates=request.param)
            return Story(mutable.slots, mutable.feed, mutable.tokens), mutable.books.check
        functional = Functional(truncates=request.param)
        return Story(functional.slots, functional.feed, functional.tokens), functional.books.check

    return begin


def test_an_interrupt_at_every_delivery_point(interrupter: Interrupter, begin: Engines) -> None:
    """Wherever an interrupt comes, sessions are free and whole, even while its traceback is kept."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = interrupter.run(story.run, point)
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
def test_two_interrupts(interrupter: Interrupter, begin: Engines) -> None:
    """Rollback, interrupted as well, is left to the next borrow, which does it all."""
    interrupted_twice = 0
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = interrupter.run(story.run, point, point + 1 + point % 13)
        if error is None:
            break
        interrupted_twice += interrupter.reached > point + point % 13
        try:
            story.check()
            story.close()
            check_books()
        except BaseException as failure:
            explain(failure, error, f"delivery point {point}, step {story.step}")
            story.close_both()
            raise
    assert interrupted_twice > 20


def test_a_handler_that_closes(interrupter: Interrupter, begin: Engines) -> None:
    """Wherever a signal handler closes the sessions at work, they end, and free everything once."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = interrupter.run(story.run, point, act=story.close_both)
        if interrupter.reached < point:
            break
        assert error is None or isinstance(error, SessionClosedError)
        assert story.one.closed
        assert story.other.closed
        story.close()
        check_books()
    assert point > 300


def test_a_handler_that_borrows(interrupter: Interrupter, begin: Engines) -> None:
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

        error = interrupter.run(story.run, point, act=serve)
        if interrupter.reached < point:
            break
        assert error is None
        assert story.step == 9
        check_books()
    assert 0 < served < point


@pytest.fixture
def swallowed() -> Iterator[list[object]]:
    """Collect the classes of exceptions in finalizers."""
    swallowed: list[object] = []

    def note(told: "sys.UnraisableHookArgs") -> None:
        swallowed.append(told.exc_type)

    tell, sys.unraisablehook = sys.unraisablehook, note
    yield swallowed
    sys.unraisablehook = tell


def test_an_interrupt_beside_closing(interrupter: Interrupter, begin: Engines) -> None:
    """Free what was closed in mid-borrow once, and without another `close()`, wherever an interrupt comes."""
    point = 0
    closed_before = 0
    while True:
        point += 1
        story, check_books = begin()
        error = interrupter.run(story.run_closing, point)
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


def test_an_interrupt_after_a_handler_that_closes(interrupter: Interrupter, begin: Engines) -> None:
    """Free what a handler has closed once, and without another `close()`, though an interrupt comes soon after."""
    for distance in (1, 2, 5):
        point = interrupted = 0
        while True:
            point += 1
            story, check_books = begin()

            acts = iter([story.close_both, interrupt])

            def act(acts: Iterator[Callable[[], None]] = acts) -> None:
                next(acts)()

            error = interrupter.run(story.run, point, point + distance, act=act)
            if interrupter.reached < point:
                break
            interrupted += isinstance(error, Interrupt)
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
        assert interrupted > 100


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
def test_two_interrupts_beside_closing(
    interrupter: Interrupter, begin: Engines, swallowed: list[object]
) -> None:
    """Leave what two interrupts kept from being freed, even in a finalizer, to the next `close()`, which does all."""
    point = 0
    while True:
        point += 1
        story, check_books = begin()
        error = interrupter.run(story.run_closing, point, point + 1 + point % 13)
        if error is None:
            break
        # The counter of delivery points has looked at the leases, and its frames are in the tracebacks.
        while error is not None:
            error.__traceback__, error = None, error.__context__
        story.close()
        check_books()
    assert point > 100
    assert set(swallowed) == {Interrupt}


def test_an_interrupt_beside_the_collector(
    interrupter: Interrupter, begin: Engines, swallowed: list[object]
) -> None:
    """Leave sessions whole wherever an interrupt comes, a block that the garbage collector ends included."""
    gc.freeze()  # makes collections fast
    try:
        point = 0
        while True:
            point += 1
            story, check_books = begin()
            error = interrupter.run(story.run_collected, point)
            if interrupter.reached < point:
                break
            if error is not None:
                error.__traceback__ = None  # its frame keeps the generator
            gc.collect()
            story.check()
            story.close()
            check_books()
    finally:
        gc.unfreeze()
    assert point > 100, "the delivery points are not seen"
    assert Interrupt in swallowed, "no interrupt in the collector"
    assert set(swallowed) == {Interrupt}
    assert story.step == 9


@pytest.mark.parametrize(
    ("source", "seed", "count"),
    [("signals", 1, 1000), ("signals", 2, 1000), ("exceptions", 1, 40)],
)
def test_random_interrupts(source: str, seed: int, count: int) -> None:
    """Many interrupts, by signals or from another thread, leave sessions free and whole, and no KV cache."""
    if source == "signals" and not hasattr(signal, "setitimer"):
        pytest.skip("no interval timers here")
    done = run_script("random_interrupts", source, str(seed), str(count), measured=False)
    assert done.returncode == 0, done.stderr
