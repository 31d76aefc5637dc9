"""Tasks: cancelled in mid-borrow, timed out, racing. The session is whole and free when the exception arrives."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError


released: list[list[int]] = []


def truncate(cache: list[int], length: int) -> list[int]:
    """Do it in place."""
    del cache[length:]
    return cache


SLOTS = StateSlots(create=list[int], length=len, truncate=truncate, release=released.append)


@pytest.fixture
def session() -> Session:
    """Return a session that holds three tokens, two of them in the KV cache."""
    session = Session()
    with SLOTS.borrow(session) as state:
        state.append([1, 2, 3])
        state.kv_cache.extend([1, 2])
        state.advance(2)
    return session


@pytest.fixture(autouse=True)
def _nothing_released() -> None:
    """Begin with clean books."""
    released.clear()


def check_untouched(session: Session) -> None:
    """Require the session to be free, and as it was."""
    assert session.token_count == 3
    with SLOTS.borrow(session) as state:
        assert state.token_history == [1, 2, 3]
        assert state.kv_length == 2
        assert state.kv_cache == [1, 2]
    session.close()
    assert released == [[1, 2]]


async def step(session: Session, started: asyncio.Event, *, commit: bool = False) -> None:
    """Take a step that never ends by itself."""
    with SLOTS.borrow(session) as state:
        state.kv_cache.append(3)
        state.advance(1)
        state.append([4])
        if commit:
            state.commit()
            state.append([5])
        started.set()
        await asyncio.Event().wait()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run it, with asyncio's own checks."""
    asyncio.run(main, debug=True)


def test_a_cancelled_task_rolls_back(session: Session) -> None:
    """A cancelled client's session is as it was, at once."""

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(step(session, started))
        await started.wait()
        assert session.token_count == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_untouched(session)

    run(main())


def test_a_cancelled_task_keeps_what_it_committed(session: Session) -> None:
    """What was committed before the cancellation stays."""

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(step(session, started, commit=True))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        with SLOTS.borrow(session) as state:
            assert state.token_history == [1, 2, 3, 4]
            assert state.kv_cache == [1, 2, 3]

    run(main())
    session.close()


def test_a_second_task_is_refused(session: Session) -> None:
    """Of two tasks on one session, one gets it and the other an error; neither waits."""

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(step(session, started))
        await started.wait()
        with pytest.raises(SessionBusyError):
            await step(session, started)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        check_untouched(session)

    run(main())


def test_a_timeout_rolls_back(session: Session) -> None:
    """A step that takes too long leaves no trace."""

    async def main() -> None:
        async def too_long() -> None:
            async with asyncio.timeout(0.01):
                await step(session, asyncio.Event())

        with pytest.raises(TimeoutError):
            await too_long()
        check_untouched(session)

    run(main())


def test_a_task_group_with_a_failure(session: Session) -> None:
    """If one task of a group fails, the steps of the others are undone."""

    async def fail(started: asyncio.Event) -> None:
        await started.wait()
        raise MemoryError

    async def main() -> None:
        started = asyncio.Event()

        async def group() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(step(session, started))
                group.create_task(fail(started))

        with pytest.raises(ExceptionGroup) as caught:
            await group()
        assert caught.group_contains(MemoryError)
        check_untouched(session)

    run(main())


def test_a_cancelled_batch() -> None:
    """Cancelled in mid-batch, all sessions of the batch are as they were."""
    sessions = [Session() for _ in range(3)]

    async def batch(started: asyncio.Event) -> None:
        with SLOTS.borrow_all(sessions) as states:
            for state in states:
                state.append([1])
                state.kv_cache.append(1)
                state.advance(1)
            started.set()
            await asyncio.Event().wait()

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(batch(started))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])

    run(main())
    assert len(released) == 3
    assert [session.token_count for session in sessions] == [0, 0, 0]
    with SLOTS.borrow_all(sessions) as states:
        assert all(state.token_history == [] for state in states)


def test_a_server_that_closes_cancels(session: Session) -> None:
    """A session closed by one task in the step of another is freed when that step ends."""
    closed = asyncio.Event()

    async def obey(started: asyncio.Event) -> None:
        with SLOTS.borrow(session) as state:
            started.set()
            await closed.wait()
            assert session.closed
            assert state.kv_cache == [1, 2]
            assert released == []

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(obey(started))
        await started.wait()
        session.close()
        closed.set()
        await task
        assert released == [[1, 2]]
        with pytest.raises(SessionClosedError):
            await obey(started)

    run(main())


def test_a_cancelled_step_in_a_thread(session: Session) -> None:
    """A step in another thread goes on when its task is cancelled; the session is busy until it ends, then whole."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        started, finish = asyncio.Event(), asyncio.Event()

        def work() -> None:
            with SLOTS.borrow(session) as state:
                state.append([4])
                loop.call_soon_threadsafe(started.set)
                asyncio.run_coroutine_threadsafe(finish.wait(), loop).result()

        task = asyncio.create_task(asyncio.to_thread(work))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(SessionBusyError), SLOTS.borrow(session):
            pass
        finish.set()
        await loop.shutdown_default_executor()
        assert session.token_count == 4

    run(main())
    session.close()


def test_a_loop_that_ends_first(session: Session) -> None:
    """Tasks left over when the loop ends are cancelled, and their steps undone."""

    async def main() -> None:
        started = asyncio.Event()
        tasks.append(asyncio.create_task(step(session, started)))
        await started.wait()

    tasks: list[asyncio.Task[None]] = []
    run(main())
    assert tasks[0].cancelled()
    check_untouched(session)
