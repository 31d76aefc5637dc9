"""Generators that hold a borrow while they stream: however they end, exactly what was committed is kept."""

import asyncio
import gc
import sys
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import ExitStack, aclosing, closing, contextmanager, suppress

import pytest

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


created: list[list[int]] = []
released: list[list[int]] = []


def truncate(cache: list[int], length: int) -> list[int]:
    """Do it in place."""
    del cache[length:]
    return cache


def new_cache() -> list[int]:
    """Make a KV cache."""
    cache: list[int] = []
    created.append(cache)
    return cache


SLOTS = StateSlots(create=new_cache, length=len, truncate=truncate, release=released.append)


@pytest.fixture
def session() -> Iterator[Session]:
    """Return a session, and close it in the end."""
    created.clear()
    released.clear()
    with Session() as session:
        yield session
    assert [id(cache) for cache in released] == [id(cache) for cache in created]


def feed(state: BorrowedState[list[int]]) -> None:
    """Feed all that is pending."""
    pending = state.pending
    state.kv_cache.extend(pending)
    state.advance(len(pending))


def fail(state: BorrowedState[list[int]]) -> None:
    """Fail in mid-step."""
    state.append([2])
    raise MemoryError


def stream(session: Session, count: int = 10) -> Generator[int, None, None]:
    """Decode tokens, and commit each before it is seen; the next is under way when it is."""
    with SLOTS.borrow(session) as state:
        for token in range(count):
            state.append([token])
            feed(state)
            state.commit()
            state.append([99])
            feed(state)
            yield token
            state.rewind(token + 1, pending=0)


async def stream_async(session: Session) -> AsyncGenerator[int, None]:
    """Do the same asynchronously."""
    with SLOTS.borrow(session) as state:
        for token in range(10):
            state.append([token])
            feed(state)
            state.commit()
            state.append([99])
            feed(state)
            await asyncio.sleep(0)
            yield token
            state.rewind(token + 1, pending=0)


def check(session: Session, history: list[int]) -> None:
    """Require the session to be free, and to hold what was committed."""
    assert session.token_count == len(history)
    with SLOTS.borrow(session) as state:
        assert state.token_history == history
        assert state.kv_length == len(history)
        assert state.kv_cache == history


def test_a_stream_that_ends(session: Session) -> None:
    """A stream read to its end keeps all."""
    assert list(stream(session, 3)) == [0, 1, 2]
    check(session, [0, 1, 2])


def test_a_stream_under_way_holds_the_session(session: Session) -> None:
    """Between two tokens the session is busy."""
    with closing(stream(session)) as tokens:
        next(tokens)
        with pytest.raises(SessionBusyError), SLOTS.borrow(session):
            pass
        assert next(tokens) == 1
        assert session.token_count == 2


def test_a_stream_not_begun_holds_nothing(session: Session) -> None:
    """A generator that wasn't begun has not borrowed."""
    tokens = stream(session)
    check(session, [])
    assert next(tokens) == 0


def test_a_stream_closed_early(session: Session) -> None:
    """Closed early, it keeps what it yielded."""
    tokens = stream(session)
    assert [next(tokens), next(tokens)] == [0, 1]
    tokens.close()
    check(session, [0, 1])


def test_a_dropped_stream(session: Session) -> None:
    """Dropped, it keeps what it yielded."""
    for token in stream(session):
        if token == 3:
            break
    gc.collect()
    check(session, [0, 1, 2, 3])


def test_a_stream_in_a_cycle(session: Session) -> None:
    """In a cycle it holds the session until it is collected, and then no more."""
    tokens = stream(session)
    next(tokens)
    cycle: list[object] = [tokens]
    cycle.append(cycle)
    gc.collect()
    gc.disable()
    try:
        del tokens, cycle
        with pytest.raises(SessionBusyError), SLOTS.borrow(session):
            pass
    finally:
        gc.enable()
    gc.collect()
    check(session, [0])


def test_a_stream_and_its_session_in_a_cycle() -> None:
    """Collected with its session, it frees the KV cache, once."""
    released.clear()
    session = Session()
    tokens = stream(session)
    next(tokens)
    cycle: list[object] = [tokens, session]
    cycle.append(cycle)
    del tokens, session, cycle
    with pytest.warns(ResourceWarning, match="unclosed"):
        collect_loudly()
    assert len(released) == 1


def collect_loudly() -> None:
    """Collect garbage, and pass on a warning that a finalizer raised."""
    caught: list[BaseException | None] = []
    previous = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: caught.append(unraisable.exc_value)
    try:
        gc.collect()
    finally:
        sys.unraisablehook = previous
    for error in caught:
        if error is not None:
            raise error


def test_a_stream_thrown_into(session: Session) -> None:
    """What is thrown into it comes out of it, and rolls back."""
    tokens = stream(session)
    next(tokens)
    with pytest.raises(MemoryError):
        tokens.throw(MemoryError())
    check(session, [0])


def test_a_stream_of_a_closed_session() -> None:
    """A session closed between two tokens stays readable to the stream, and is freed when that ends."""
    released.clear()
    session = Session()
    tokens = stream(session)
    next(tokens)
    session.close()
    assert next(tokens) == 1
    assert released == []
    tokens.close()
    assert len(released) == 1
    with pytest.raises(SessionClosedError):
        next(stream(session))


def test_a_context_manager_made_of_a_generator(session: Session) -> None:
    """A borrow inside a `contextmanager` is undone as any other."""

    @contextmanager
    def step() -> Generator[BorrowedState[list[int]], None, None]:
        with SLOTS.borrow(session) as state:
            yield state

    with step() as state:
        state.append([1])
        feed(state)
    with pytest.raises(MemoryError), step() as state:
        fail(state)
    check(session, [1])


def test_an_exit_stack(session: Session) -> None:
    """A borrow in an `ExitStack` lasts as long as the stack, and is undone as any other."""
    with ExitStack() as stack:
        state = stack.enter_context(SLOTS.borrow(session))
        gc.collect()
        state.append([1])
        feed(state)
        with pytest.raises(SessionBusyError), SLOTS.borrow(session):
            pass
    with pytest.raises(MemoryError), ExitStack() as stack:
        fail(stack.enter_context(SLOTS.borrow(session)))
    check(session, [1])


def test_an_exit_stack_of_a_batch() -> None:
    """The same holds for a batch."""
    sessions = [Session(), Session()]
    with ExitStack() as stack:
        states = stack.enter_context(SLOTS.borrow_all(sessions))
        gc.collect()
        for state in states:
            state.append([1])
        with pytest.raises(SessionBusyError), SLOTS.borrow(sessions[1]):
            pass
    assert [session.token_count for session in sessions] == [1, 1]


def test_a_dropped_exit_stack(session: Session) -> None:
    """A borrow whose stack was dropped without being closed is undone by the next one."""
    stack = ExitStack()
    state = stack.enter_context(SLOTS.borrow(session))
    state.append([1])
    feed(state)
    del state, stack
    gc.collect()
    check(session, [])


def test_an_async_stream_closed_early(session: Session) -> None:
    """Closed early by `aclose`, it keeps what it yielded, at once."""

    async def main() -> None:
        tokens = stream_async(session)
        async with aclosing(tokens):
            assert await anext(tokens) == 0
            with pytest.raises(SessionBusyError), SLOTS.borrow(session):
                pass
            assert await anext(tokens) == 1
        check(session, [0, 1])

    asyncio.run(main())


def test_a_dropped_async_stream(session: Session) -> None:
    """Dropped without `aclose`, it is closed by the event loop, and keeps what it yielded."""

    async def main() -> None:
        async for token in stream_async(session):
            if token == 2:
                break
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        check(session, [0, 1, 2])

    asyncio.run(main())


def test_an_async_stream_left_to_the_loop(session: Session) -> None:
    """What the loop closes when it ends is rolled back, too."""
    kept: list[AsyncGenerator[int, None]] = []

    async def main() -> None:
        kept.append(stream_async(session))
        await anext(kept[0])

    asyncio.run(main())
    check(session, [0])


def test_an_async_stream_without_a_loop(session: Session) -> None:
    """Driven by hand and dropped, with no loop to close it, it holds the session no longer."""
    tokens = stream_async(session)
    step = anext(tokens).__await__()
    with suppress(StopIteration):
        while True:
            next(step)
    del step, tokens
    gc.collect()
    check(session, [0])


def test_a_cancelled_reader(session: Session) -> None:
    """A task cancelled while it reads an async stream rolls back to the last token committed."""

    async def read(seen: asyncio.Event) -> None:
        async with aclosing(stream_async(session)) as tokens:
            async for _ in tokens:
                seen.set()
                await asyncio.Event().wait()

    async def main() -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(read(seen))
        await seen.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        check(session, [0])

    asyncio.run(main())
