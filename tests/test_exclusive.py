"""One borrow at a time, of one session or a batch."""

# ruff: noqa: PT012 what's tested is how a block fails

import pickle
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look, prepare

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
)


def test_busy(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that is borrowed can't be borrowed again, by nobody and in no way; the borrow isn't disturbed."""
    with slots.borrow(session) as state:
        memory.step(state, 1)
        for borrow in (slots.borrow(session), slots.borrow_all([session])):
            with pytest.raises(SessionBusyError) as caught, borrow:
                pytest.fail("borrowed twice")
            assert caught.value.session_id == session.id
        with pytest.raises(SessionBusyError):
            slots.evict(session)
        memory.step(state, 2)
    assert look(slots, session) == ([1, 2], 2)


def test_session_twice_in_a_batch_is_told(session: Session, slots: StateSlots[Cache]) -> None:
    """A session that is in a batch twice is not somebody else's, and no reason to try again."""
    with pytest.raises(SessionBusyError) as caught, slots.borrow_all([session, session]):
        pytest.fail("borrowed twice")
    for error in caught.value, pickle.loads(pickle.dumps(caught.value)):
        assert error.twice
        assert str(error) == f"session {session.id} is in the batch twice; name it once"
    with slots.borrow(session):
        for borrow in (slots.borrow(session), slots.borrow_all([session])):
            with pytest.raises(SessionBusyError, match="try again") as caught, borrow:
                pytest.fail("borrowed twice")
            assert not caught.value.twice


def test_busy_ends_with_the_block(session: Session, slots: StateSlots[Cache]) -> None:
    """A session is free again as soon as the block is over, however that ends."""
    for error in ERRORS:
        with pytest.raises(error), slots.borrow(session):
            raise error
        with slots.borrow(session):
            pass


def test_borrow_takes_nothing_before_its_block(session: Session, slots: StateSlots[Cache]) -> None:
    """Calling `borrow` is not yet to borrow: who comes first with the block has the session."""
    first, second = slots.borrow(session), slots.borrow(session)
    with second, pytest.raises(SessionBusyError), first:
        pytest.fail("borrowed twice")


def test_nested_borrows_of_two_sessions(slots: StateSlots[Cache], memory: Memory) -> None:
    """Sessions are independent: one may be borrowed within another's block, and fail alone."""
    with Session() as one, Session() as other:
        with slots.borrow(one) as state:
            memory.step(state, 1)
            with pytest.raises(MemoryError), slots.borrow(other) as inner:
                memory.step(inner, 2)
                raise MemoryError
            memory.step(state, 3)
        assert look(slots, one) == ([1, 3], 2)
        assert look(slots, other) == ([], 0)


def test_exit_stack(slots: StateSlots[Cache], memory: Memory) -> None:
    """A borrow works in an `ExitStack`: it commits or rolls back with it."""
    with Session() as session:
        with ExitStack() as stack:
            memory.step(stack.enter_context(slots.borrow(session)), 1)
            with pytest.raises(SessionBusyError):
                stack.enter_context(slots.borrow(session))
        with pytest.raises(MemoryError), ExitStack() as stack:
            memory.step(stack.enter_context(slots.borrow(session)), 2)
            raise MemoryError
        assert look(slots, session) == ([1], 1)


def test_exit_stack_outlives_a_failed_borrow(session: Session, slots: StateSlots[Cache]) -> None:
    """A borrow that failed to begin leaves nothing behind, even if it's kept."""
    with ExitStack() as stack:
        failed = slots.borrow(session)
        with slots.borrow(session), pytest.raises(SessionBusyError):
            stack.enter_context(failed)
        with slots.borrow(session):
            pass


def test_contextmanager(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """An engine may wrap a borrow in a context manager of its own."""

    @contextmanager
    def step(*tokens: int) -> Generator[BorrowedState[Cache], None, None]:
        with slots.borrow(session) as state:
            state.append(tokens)
            yield state
            memory.step(state)

    with step(1, 2) as state:
        assert state.pending == [1, 2]
    with pytest.raises(MemoryError), step(3):
        raise MemoryError
    assert look(slots, session) == ([1, 2], 2)


def test_by_hand(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """`__enter__` and `__exit__` may be called without a `with` statement."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    assert repr(session) == f"<Session {session.id} borrowed, 0 tokens>"
    assert borrow.__exit__(None, None, None) is None
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 2)
    error = MemoryError()
    assert borrow.__exit__(MemoryError, error, None) is None
    assert look(slots, session) == ([1], 1)


def test_by_hand_without_the_exception(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The class of an exception is enough to roll back."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    borrow.__exit__(MemoryError, None, None)
    assert look(slots, session) == ([], 0)


def test_by_hand_when_only_the_end_is_kept(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Whoever keeps nothing but the end of a borrow keeps the borrow, and can end it."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    end = borrow.__exit__
    del borrow
    with pytest.raises(SessionBusyError), slots.borrow(session):
        pytest.fail("borrowed twice")
    end(None, None, None)
    assert look(slots, session) == ([1], 1)


def test_exit_twice(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A second `__exit__` doesn't end the borrow of somebody else."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    borrow.__exit__(None, None, None)
    with slots.borrow(session) as state:
        memory.step(state, 2)
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            borrow.__exit__(None, None, None)
        assert session.token_count == 1
        with pytest.raises(SessionBusyError), slots.borrow(session):
            pytest.fail("borrowed twice")
        memory.step(state, 3)
    assert look(slots, session) == ([1, 2, 3], 3)


def test_exit_before_enter(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """An `__exit__` without `__enter__` doesn't touch the session."""
    prepare(slots, memory, session, 1)
    for borrow in (slots.borrow(session), slots.borrow_all([session])):
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            borrow.__exit__(None, None, None)
    assert look(slots, session) == ([1], 1)


@pytest.mark.parametrize("batch", [False, True])
def test_enter_within_the_own_block(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """A borrow entered a second time is refused, and its block isn't disturbed: it goes on, and commits."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    with borrow as got:
        state = got[0] if isinstance(got, list) else got
        memory.step(state, 1)
        with pytest.raises((SessionBusyError, RuntimeError)), borrow:
            pytest.fail("borrowed twice")
        memory.step(state, 2)
    assert look(slots, session) == ([1, 2], 2)


@pytest.mark.parametrize("batch", [False, True])
def test_enter_again_after_the_block(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """A borrow is for one block: entered again it says so, and takes nothing."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    with borrow as got:
        memory.step(got[0] if isinstance(got, list) else got, 1)
    with pytest.raises(RuntimeError, match="only once"), borrow:
        pytest.fail("borrowed again")
    assert look(slots, session) == ([1], 1)


def test_looking_at_a_borrow_does_not_end_it(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A debugger that reads every attribute in the block leaves the borrow as it is."""
    for borrow in (slots.borrow(session), slots.borrow_all([session])):
        with borrow as got:
            state = got[0] if isinstance(got, list) else got
            for it in (borrow, state):
                assert all(hasattr(it, name) or True for name in dir(it))
            memory.step(state, 1)
    assert look(slots, session) == ([1, 1], 2)


def test_borrow_that_never_ends(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A borrow whose end is lost with its holder doesn't block the session: the next one rolls it back first."""
    prepare(slots, memory, session, 1, 2)
    borrow = slots.borrow(session)
    state = borrow.__enter__()
    memory.step(state, 3)
    state.rewind(1, pending=0)
    memory.step(state, 8, 9)
    del borrow, state
    assert repr(session) == f"<Session {session.id} idle, 2 tokens>"
    assert look(slots, session) == ([1, 2], 1)


def test_borrow_that_never_ends_may_be_closed(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Closing frees what a lost borrow left: the cache in use, and the one to go back to."""
    prepare(slots, memory, session, 1, 2)
    borrow = slots.borrow(session)
    borrow.__enter__().kv_cache = memory.new([1, 2])
    del borrow
    assert len(memory.live()) == 2
    session.close()
    assert not memory.live()


def test_borrow_after_one_that_never_ended_and_can_not_be_undone(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A `release` that fails in finishing a lost borrow fails the next one, but leaves nothing borrowed."""
    error = ConnectionError()
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    del borrow
    memory.fail(Fault("release", error))
    with ExitStack() as stack:
        failing = slots.borrow(session)
        with pytest.raises(ConnectionError) as caught:
            stack.enter_context(failing)
        assert caught.value is error
        assert look(slots, session) == ([], 0)
