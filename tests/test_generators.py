"""Generators that hold a borrow while they stream: however they end, exactly what was committed is kept."""

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    aclosing,
    closing,
    contextmanager,
    suppress,
)
from typing import Any, Final, TypeAlias

import pytest
from tests.threads import Straggler, in_thread

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
)


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


# What the garbage collector ends


State: TypeAlias = BorrowedState[list[int]]


@pytest.fixture
def noise() -> Iterator[list[str]]:
    """Collect no garbage by chance, note what finalizers raise, and require that it's nothing."""
    noise: list[str] = []

    def note(unraisable: "sys.UnraisableHookArgs") -> None:
        noise.append(repr(unraisable.exc_value))

    gc.collect()
    previous, sys.unraisablehook = sys.unraisablehook, note
    gc.disable()
    try:
        yield noise
    finally:
        gc.enable()
        sys.unraisablehook = previous
    assert not noise


@contextmanager
def borrow_one(sessions: list[Session]) -> Generator[list[State], None, None]:
    """Borrow each, as in as many blocks, in a generator of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(SLOTS.borrow(session)) for session in sessions]


def begun(sessions: list[Session]) -> None:
    """Give sessions a token that is committed and cached."""
    for session in sessions:
        with SLOTS.borrow(session) as state:
            state.append([1])
            feed(state)


def work(states: list[State]) -> None:
    """Begin what is never committed."""
    for state in states:
        state.append([2])
        feed(state)
        state.append([3])


def in_one(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in a block of one session."""
    [session] = sessions
    with SLOTS.borrow(session) as state:
        work([state])
        yield


def in_nested(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in a block in a block."""
    with SLOTS.borrow(sessions[0]) as first, SLOTS.borrow(sessions[1]) as second:
        work([first, second])
        yield


def in_batch(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in the block of a batch."""
    with SLOTS.borrow_all(sessions) as states:
        work(states)
        yield


def in_context_manager(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in a block that another generator makes."""
    with borrow_one(sessions) as states:
        work(states)
        yield


def in_stack(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in an `ExitStack`."""
    with ExitStack() as stack:
        work(stack.enter_context(SLOTS.borrow_all(sessions)))
        yield


def in_cleanup(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in a block with a clean-up of its own."""
    with SLOTS.borrow_all(sessions) as states:
        work(states)
        try:
            yield
        finally:
            for state in states:
                with suppress(BorrowExpiredError):
                    state.append([4])


def in_catch(sessions: list[Session]) -> Generator[None, None, None]:
    """Be suspended in a block that takes its being closed for a good end."""
    with SLOTS.borrow_all(sessions) as states:
        work(states)
        with suppress(GeneratorExit):
            yield


async def in_coroutine(sessions: list[Session]) -> None:
    """Be suspended in a coroutine."""
    with SLOTS.borrow_all(sessions) as states:
        work(states)
        await Forever()


async def in_async_generator(sessions: list[Session]) -> AsyncGenerator[None, None]:
    """Be suspended in an asynchronous generator."""
    with SLOTS.borrow_all(sessions) as states:
        work(states)
        yield


class Forever:
    """Never done."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def suspend(thing: object) -> object:
    """Run something that can be suspended to where that happens."""
    if isinstance(thing, Generator):
        next(thing)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(thing, Coroutine):
        thing.send(None)  # pyright: ignore[reportUnknownMemberType]
    else:
        assert isinstance(thing, AsyncGenerator)
        with suppress(StopIteration):
            anext(thing).__await__().__next__()  # pyright: ignore[reportUnknownArgumentType]
    return thing  # pyright: ignore[reportUnknownVariableType]


SUSPENDED: Final[dict[str, tuple[int, Callable[[list[Session]], object]]]] = {
    "one": (1, in_one),
    "nested": (2, in_nested),
    "batch": (2, in_batch),
    "contextmanager": (2, in_context_manager),
    "ExitStack": (2, in_stack),
    "with a clean-up": (2, in_cleanup),
    "coroutine": (2, in_coroutine),
    "async generator": (2, in_async_generator),
}
suspended = pytest.mark.parametrize("how", SUSPENDED)


def drop_in_cycle(thing: object, *others: object) -> None:
    """Leave something to the garbage collector, which finalizes what's older first, as a rule."""
    cycle: list[object] = [thing, *others]
    cycle.append(cycle)


def is_held(session: Session) -> bool:
    """Whether somebody has a session."""
    try:
        with SLOTS.borrow(session):
            return False
    except SessionBusyError:
        return True


@suspended
def test_what_is_collected_is_rolled_back(how: str, noise: list[str]) -> None:
    """Roll back what a suspended block did when it's collected, free its sessions, and tell nobody."""
    size, begin = SUSPENDED[how]
    sessions = [Session() for _ in range(size)]
    begun(sessions)
    drop_in_cycle(suspend(begin(sessions)))
    assert all(map(is_held, sessions))
    gc.collect()
    assert not noise
    for session in sessions:
        check(session, [1])
        session.close()


@suspended
def test_a_closed_session_is_freed_when_its_block_is_collected(how: str, noise: list[str]) -> None:
    """Release the KV cache of a session that was closed meanwhile, once, when its block is collected."""
    created.clear()
    released.clear()
    size, begin = SUSPENDED[how]
    sessions = [Session() for _ in range(size)]
    begun(sessions)
    drop_in_cycle(suspend(begin(sessions)))
    for session in sessions:
        session.close()
    assert released == []
    gc.collect()
    assert sorted(map(id, released)) == sorted(map(id, created))
    for session in sessions:
        session.close()
        assert session.token_count == 0
    assert len(released) == size
    assert not noise


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_stream_that_catches_its_end(noise: list[str], *, closed: bool) -> None:
    """Commit a collected block that ends well or roll it back, but whole, and free its sessions."""
    created.clear()
    released.clear()
    sessions = [Session(), Session()]
    begun(sessions)
    drop_in_cycle(suspend(in_catch(sessions)))
    if closed:
        for session in sessions:
            session.close()
    gc.collect()
    if closed:
        assert sorted(map(id, released)) == sorted(map(id, created))
        noise.clear()  # a block that ends well is told that its session is gone
        return
    assert sessions[0].token_count == sessions[1].token_count
    for session in sessions:
        with SLOTS.borrow(session) as state:
            assert state.token_history in ([1], [1, 2, 3])
            feed(state)
            assert state.token_history == state.kv_cache
        session.close()
    assert len(released) == len(created)


class Other:
    """Something else that has a finalizer, and borrows a session there."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.borrow: AbstractContextManager[State, None] | None = None
        self.state: State | None = None
        self.refused = False

    def __del__(self) -> None:
        KEPT.append(self)
        borrow = SLOTS.borrow(self.session)
        try:
            self.state = borrow.__enter__()
        except SessionBusyError:
            self.refused = True
            return
        self.borrow = borrow
        self.state.append([7, 8])
        feed(self.state)

    def go_on(self, end: str) -> tuple[list[int]]:
        """Find all tokens, go on, come to an end, and return the history that must be left."""
        assert self.state is not None
        assert self.borrow is not None
        tokens = list(self.state.token_history)
        assert tokens in ([1, 7, 8], [1, 2, 3, 7, 8])
        assert self.state.kv_cache == tokens
        assert is_held(self.session)
        self.state.append([9])
        feed(self.state)
        if end == "failure":
            self.borrow.__exit__(MemoryError, MemoryError(), None)
            return (tokens[:-2],)
        self.borrow.__exit__(None, None, None)
        return ([*tokens, 9],)


KEPT: Final[list[Other]] = []
"""What was finalized."""


@pytest.mark.parametrize("older", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("end", ["commit", "failure"])
@pytest.mark.parametrize("how", [*SUSPENDED, "catch"])
def test_a_borrower_between_the_collection_and_the_end(
    how: str, end: str, noise: list[str], *, older: bool
) -> None:
    """Leave alone who took the session after the lease of a collected block has died, before its end has come."""
    created.clear()
    released.clear()
    KEPT.clear()
    size, begin = {**SUSPENDED, "catch": (2, in_catch)}[how]
    sessions = [Session() for _ in range(size)]
    begun(sessions)

    def drop() -> None:
        other = Other(sessions[0]) if older else None
        thing = suspend(begin(sessions))
        drop_in_cycle(other, thing) if older else drop_in_cycle(thing, Other(sessions[0]))

    drop()
    gc.collect()
    [other] = KEPT
    histories: tuple[list[int], ...] = (
        [1],
        [1, 2, 3],
    )  # of which the second was committed by a block that ended well
    if not other.refused:
        histories = other.go_on(end)
    for session in sessions:
        with SLOTS.borrow(session) as state:
            assert state.token_history in (
                histories if session is sessions[0] else ([1], [1, 2, 3])
            )
            feed(state)
            assert state.kv_cache == state.token_history
    KEPT.clear()
    for session in sessions:
        session.close()
    assert sorted(map(id, released)) == sorted(map(id, created))
    if how == "catch":
        noise.clear()  # a block that ends well is told if it was rolled back before


def test_a_task_left_to_the_collector(session: Session, noise: list[str]) -> None:
    """Roll back a task that its loop never finished, when both are collected."""
    begun([session])

    async def main() -> None:
        with SLOTS.borrow(session) as state:
            work([state])
            await asyncio.Event().wait()

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # of a task that was pending
        task = loop.create_task(main())
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert is_held(session)
        loop.close()
        drop_in_cycle(loop, task)

    abandon()
    gc.collect()
    check(session, [1])


@pytest.mark.usefixtures("hasty")
def test_streams_collected_beside_another_thread(session: Session) -> None:
    """Let another thread step a session, whole, while one collects streams of it beside other finalizers."""
    steps = 0
    done = False

    class Request:
        def __del__(self) -> None:
            time.sleep(0)  # others run meanwhile

    def leave() -> None:
        while not done:
            request, stream = Request(), in_one([session])
            with suppress(SessionBusyError):
                next(stream)
                drop_in_cycle(request, stream)
            del request, stream
            gc.collect()
            time.sleep(0)

    def step() -> int:
        with SLOTS.borrow(session) as state:
            before = list(state.token_history)
            state.append([7])
            feed(state)
            for _ in range(200):
                pass
            assert state.token_history == state.kv_cache == [*before, 7]
            if len(before) > 50:
                state.rewind(0)
        return 1

    gc.collect()
    gc.freeze()  # which makes collecting garbage fast
    thread = threading.Thread(target=leave)
    thread.start()
    try:
        attempts = 0
        while steps < 1000 and attempts < 100_000:
            attempts += 1
            with suppress(SessionBusyError):
                steps += step()
            time.sleep(0)
    finally:
        done = True
        thread.join(30)
        gc.unfreeze()
    gc.collect()
    assert steps > 0


# Entered in another way, and elsewhere


def merge() -> None:
    """Let a free-threaded interpreter come to what it has put off: references that other threads dropped."""
    for _ in range(1000):
        pass
    gc.collect()


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_a_borrow_entered_by_hand_in_another_thread(session: Session, *, batch: bool) -> None:
    """Hold what another thread entered by hand until its end, and refuse a second borrower as long."""
    borrow: AbstractContextManager[Any, None]
    borrow = SLOTS.borrow_all([session]) if batch else SLOTS.borrow(session)
    entered: Any = in_thread(borrow.__enter__)
    state: State = entered[0] if batch else entered
    del entered
    merge()
    state.append([1])
    feed(state)
    assert is_held(session)
    in_thread(merge)
    state.append([2])
    feed(state)
    in_thread(lambda: borrow.__exit__(None, None, None))
    check(session, [1, 2])


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_an_exit_stack_handed_to_another_thread(session: Session, *, batch: bool) -> None:
    """Hold what is on an `ExitStack` that one thread filled, another uses and a third closes."""
    stack = ExitStack()

    def enter() -> State:
        if batch:
            return stack.enter_context(SLOTS.borrow_all([session]))[0]
        return stack.enter_context(SLOTS.borrow(session))

    state: State = in_thread(enter)
    merge()
    state.append([1])
    feed(state)
    assert is_held(session)
    in_thread(stack.close)
    check(session, [1])
    with pytest.raises(BorrowExpiredError):
        state.append([2])


@pytest.mark.parametrize("stack", [False, True], ids=["with", "ExitStack"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_a_block_in_another_thread(session: Session, *, batch: bool, stack: bool) -> None:
    """Hold what is borrowed in one thread and entered in another until that block ends."""
    borrow: AbstractContextManager[Any, None]
    borrow = SLOTS.borrow_all([session]) if batch else SLOTS.borrow(session)
    straggler = Straggler()

    def work(got: Any) -> None:
        state: State = got[0] if batch else got
        del got
        straggler.pause("block")
        merge()
        state.append([1])
        feed(state)

    def run() -> None:
        if stack:
            with ExitStack() as entering:
                work(entering.enter_context(borrow))
        else:
            with borrow as got:
                work(got)

    straggler.begin(run, "block")
    merge()
    assert is_held(session)
    assert straggler.go_on() is None
    check(session, [1])
    assert weakref.ref(borrow)() is borrow  # it was kept all the time
