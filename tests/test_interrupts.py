"""An interrupt at any instant, inside the library too, leaves no session borrowed or torn.

The delivery points of interrupts can be counted (see interrupts.py), so one can come at the first, at the second, and
so on until a scenario runs through undisturbed. The engines keep books of KV caches, which stay whole meanwhile.
"""

import gc
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
from tests.interrupts import Interrupt, Interrupter, interrupt
from tests.processes import run_script
from tests.stories import BEGINNINGS, AnyStory

from inference_session.exceptions import SessionBusyError, SessionClosedError


Begin = Callable[[], AnyStory]


@pytest.fixture(params=[*BEGINNINGS.values()], ids=[*BEGINNINGS])
def begin(request: pytest.FixtureRequest) -> Begin:
    """Return a function that begins a story."""
    beginning: Begin = request.param
    return beginning


@contextmanager
def explained(story: AnyStory, error: BaseException | None, point: int) -> Generator[None]:
    """Add the place of the interrupt to a failure, and free the objects kept by its traceback."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(f"interrupted at delivery point {point}, step {story.step}:")
        if error is not None:
            failure.add_note("".join(traceback.format_tb(error.__traceback__)[-4:]))
            error.__traceback__ = None
        story.close_both()
        raise


def test_an_interrupt_at_every_delivery_point(interrupter: Interrupter, begin: Begin) -> None:
    """Wherever an interrupt comes, sessions are free and whole, even while its traceback is kept."""
    for point in count(1):
        story = begin()
        error = interrupter.run(story.run, point)
        if error is None:
            assert point > 300, "the delivery points are not seen"
            assert story.step == 9
            story.check_books()
            break
        with explained(story, error, point):
            story.check()
            story.end()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
def test_two_interrupts(interrupter: Interrupter, begin: Begin) -> None:
    """Rollback, interrupted as well, is left to the next borrow, which does it all."""
    interrupted_twice = 0
    for point in count(1):
        story = begin()
        error = interrupter.run(story.run, point, point + 1 + point % 13)
        if error is None:
            break
        interrupted_twice += interrupter.reached > point + point % 13
        with explained(story, error, point):
            story.check()
            story.end()
    assert interrupted_twice > 20


def test_a_handler_that_closes(interrupter: Interrupter, begin: Begin) -> None:
    """Wherever a signal handler closes the sessions at work, they end, and free everything once."""
    for point in count(1):
        story = begin()
        error = interrupter.run(story.run, point, act=story.close_both)
        if interrupter.reached < point:
            assert point > 300
            break
        assert error is None or isinstance(error, SessionClosedError)
        assert story.one.closed
        assert story.other.closed
        story.end()


def test_a_handler_that_borrows(interrupter: Interrupter, begin: Begin) -> None:
    """Wherever a signal handler steps a session, it either gets it whole or is refused, and disturbs nobody."""
    served = 0
    for point in count(1):
        story = begin()

        def serve(story: AnyStory = story) -> None:
            nonlocal served
            try:
                story.intervene()
                served += 1
            except (SessionBusyError, SessionClosedError):
                pass

        error = interrupter.run(story.run, point, act=serve)
        if interrupter.reached < point:
            assert 0 < served < point
            break
        assert error is None
        assert story.step == 9
        story.check_books()


def test_an_interrupt_beside_closing(interrupter: Interrupter, begin: Begin) -> None:
    """Free what was closed in mid-borrow once, and without another `close()`, wherever an interrupt comes."""
    closed_before = 0
    for point in count(1):
        story = begin()
        error = interrupter.run(story.run_closing, point)
        if error is None:
            assert point > 100, "the delivery points are not seen"
            assert closed_before > 50
            assert story.step == 9
            story.check_books()
            break
        with explained(story, error, point):
            for session in (story.one, story.other):
                if session.closed:
                    closed_before += 1
                    assert session.token_count == 0
                    assert "closed" in repr(session)
                else:
                    session.close()
            story.check_books()
            story.end()


def test_an_interrupt_after_a_handler_that_closes(interrupter: Interrupter, begin: Begin) -> None:
    """Free what a handler has closed once, and without another `close()`, though an interrupt comes soon after."""
    for distance in (1, 2, 5):
        interrupted = 0
        for point in count(1):
            story = begin()
            acts = iter([story.close_both, interrupt])

            def act(acts: Iterator[Callable[[], None]] = acts) -> None:
                next(acts)()

            error = interrupter.run(story.run, point, point + distance, act=act)
            if interrupter.reached < point:
                assert point > 300
                break
            interrupted += isinstance(error, Interrupt)
            with explained(story, error, point):
                story.check_books()
                story.end()
        assert interrupted > 100


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
def test_two_interrupts_beside_closing(
    interrupter: Interrupter, begin: Begin, swallowed: list[object]
) -> None:
    """Leave what two interrupts kept from being freed, even in a finalizer, to the next `close()`, which does all."""
    for point in count(1):
        story = begin()
        error = interrupter.run(story.run_closing, point, point + 1 + point % 13)
        if error is None:
            assert point > 100
            break
        # The counter of delivery points has looked at the leases, and its frames are in the tracebacks.
        while error is not None:
            error.__traceback__, error = None, error.__context__
        story.end()
    assert set(swallowed) == {Interrupt}


def test_an_interrupt_beside_the_collector(
    interrupter: Interrupter, begin: Begin, swallowed: list[object]
) -> None:
    """Leave sessions whole wherever an interrupt comes, a block that the garbage collector ends included."""
    gc.freeze()  # makes collections fast
    try:
        for point in count(1):
            story = begin()
            error = interrupter.run(story.run_collected, point)
            if interrupter.reached < point:
                assert point > 100, "the delivery points are not seen"
                assert story.step == 9
                break
            if error is not None:
                error.__traceback__ = None  # its frame keeps the generator
            gc.collect()
            story.check()
            story.end()
    finally:
        gc.unfreeze()
    assert Interrupt in swallowed, "no interrupt in the collector"
    assert set(swallowed) == {Interrupt}


@pytest.mark.parametrize(
    ("source", "seed", "number"),
    [("signals", 1, 500), ("signals", 2, 500), ("exceptions", 1, 40)],
)
def test_random_interrupts(source: str, seed: int, number: int) -> None:
    """Many interrupts, by signals or from another thread, leave sessions free and whole, and no KV cache."""
    if source == "signals" and not hasattr(signal, "setitimer"):
        pytest.skip("no interval timers here")
    done = run_script("random_interrupts", source, str(seed), str(number), measured=False)
    assert done.returncode == 0, done.stderr
