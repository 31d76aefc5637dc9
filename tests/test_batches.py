"""A batch of sessions, borrowed together or not at all."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
from collections.abc import Callable
from typing import cast

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look, prepare

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionOwnerError,
    StateMismatchError,
)


def test_batch(slots: StateSlots[Cache], memory: Memory) -> None:
    """A whole batch is borrowed at once, from any iterable, and its states come in its order."""
    sessions = [Session() for _ in range(3)]
    with slots.borrow_all(iter(sessions)) as states:
        assert all(isinstance(state, BorrowedState) for state in states)
        for number, state in enumerate(states):
            memory.step(state, *range(number + 1))
        for session in sessions:
            with pytest.raises(SessionBusyError), slots.borrow(session):
                pytest.fail("borrowed twice")
    for number, session in enumerate(sessions):
        assert look(slots, session) == (list(range(number + 1)), number + 1)
        session.close()


def test_empty_batch(slots: StateSlots[Cache]) -> None:
    """A server with nothing to do may borrow nothing."""
    with slots.borrow_all([]) as states:
        assert states == []
    with pytest.raises(MemoryError), slots.borrow_all(()):
        raise MemoryError


def test_batch_expires(slots: StateSlots[Cache]) -> None:
    """All states of a batch end with its block."""
    with Session() as one, Session() as other:
        with slots.borrow_all([one, other]) as states:
            pass
        for state, session in zip(states, (one, other), strict=True):
            with pytest.raises(BorrowExpiredError) as caught:
                state.append([1])
            assert caught.value.session_id == session.id


@pytest.mark.parametrize("error", ERRORS)
def test_batch_rolls_back_as_one(
    slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """What happens to one happens to all: each goes back to its own last commit."""
    with Session() as one, Session() as other:
        prepare(slots, memory, other, 7)
        with pytest.raises(error), slots.borrow_all([one, other]) as states:
            memory.step(states[0], 1)
            states[0].commit()
            memory.step(states[0], 2)
            memory.step(states[1], 8)
            raise error
        assert look(slots, one) == ([1], 1)
        assert look(slots, other) == ([7], 1)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("functional", [False, True])
def test_batch_with_one_mismatch(position: int, *, functional: bool) -> None:
    """If one cache doesn't cover what it should, none is committed, and no other cache is lost."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    sessions = [Session() for _ in range(3)]
    for session in sessions:
        prepare(slots, memory, session, 1, 2)
    with pytest.raises(StateMismatchError) as caught, slots.borrow_all(sessions) as states:
        for state in states:
            memory.step(state, 3)
        memory.feed(states[position], [4])
    wrong = sessions[position]
    assert (caught.value.session_id, caught.value.where) == (wrong.id, "commit")
    for session in sessions:
        assert look(slots, session) == ([1, 2], 0 if session is wrong and not functional else 2)
        session.close()
    memory.check_all_released()


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_batch_whose_old_caches_are_not_released(
    functional: Memory, error: type[BaseException], skip: int
) -> None:
    """If the commit of one fails, none is committed, whichever comes first."""
    slots = functional.slots()
    sessions = [Session() for _ in range(3)]
    for session in sessions:
        prepare(slots, functional, session, 1, 2)
    with pytest.raises(error), slots.borrow_all(sessions) as states:
        for state in states:
            functional.step(state, 3)
        functional.fail(Fault("release", error()), skip=skip)
    assert [session.token_count for session in sessions] == [2, 2, 2]
    for session in sessions:
        assert look(slots, session)[0] == [1, 2]
        session.close()


@pytest.mark.parametrize("fails", [False, True])
def test_batch_of_sessions_closed_meanwhile(
    slots: StateSlots[Cache], memory: Memory, *, fails: bool
) -> None:
    """Each session of a batch that was closed in mid-borrow is freed, even if the `release` of the first fails."""
    sessions = [Session() for _ in range(3)]
    with pytest.raises(ConnectionError), slots.borrow_all(sessions) as states:
        for session, state in zip(sessions, states, strict=True):
            memory.step(state, 1)
            state.commit()
            session.close()
        memory.fail(Fault("release", ConnectionError()))
        if fails:
            raise ConnectionError
    assert not memory.live()
    assert [session.token_count for session in sessions] == [0, 0, 0]


def test_batch_with_one_closed_meanwhile(slots: StateSlots[Cache], memory: Memory) -> None:
    """Closing one session doesn't disturb the others of its batch."""
    with Session() as one, Session() as other:
        with slots.borrow_all([one, other]) as states:
            one.close()
            for state in states:
                memory.step(state, 1)
        assert len(memory.live()) == 1
        assert look(slots, other) == ([1], 1)


def closed_session(slots: StateSlots[Cache], memory: Memory) -> Session:
    """Return a session that is closed."""
    session = Session()
    session.close()
    return session


def foreign_session(slots: StateSlots[Cache], memory: Memory) -> Session:
    """Return another engine's session."""
    session = Session()
    foreign = StateSlots[list[int]](create=list, length=len)
    with foreign.borrow(session) as state:
        state.append([1])
    return session


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("make", "error"), [(closed_session, SessionClosedError), (foreign_session, SessionOwnerError)]
)
def test_batch_is_taken_as_a_whole(
    slots: StateSlots[Cache],
    memory: Memory,
    position: int,
    make: Callable[[StateSlots[Cache], Memory], Session],
    error: type[SessionError],
) -> None:
    """One session that can't be borrowed, and none of the batch is."""
    sessions = [Session(), Session()]
    prepare(slots, memory, sessions[0], 1, 2)
    bad = make(slots, memory)
    with (
        pytest.raises(error) as caught,
        slots.borrow_all([*sessions[:position], bad, *sessions[position:]]),
    ):
        pytest.fail("borrowed a part of a batch")
    assert getattr(caught.value, "session_id") == bad.id  # noqa: B009 each of them has it
    for session in sessions:
        assert " idle, " in repr(session)
    with slots.borrow_all(sessions) as states:
        assert [list(state.token_history) for state in states] == [[1, 2], []]
        assert [state.kv_length for state in states] == [2, 0]
    for session in sessions:
        session.close()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_batch_with_one_busy(slots: StateSlots[Cache], position: int) -> None:
    """One session that is borrowed, and none of the batch is taken; the borrow goes on."""
    sessions = [Session() for _ in range(3)]
    with slots.borrow(sessions[position]) as state:
        with pytest.raises(SessionBusyError) as caught, slots.borrow_all(sessions):
            pytest.fail("borrowed a part of a batch")
        assert caught.value.session_id == sessions[position].id
        state.append([1])
    with slots.borrow_all(sessions):
        pass


@pytest.mark.parametrize("order", [(0, 0), (0, 1, 0), (1, 0, 0)])
def test_batch_with_a_session_twice(
    slots: StateSlots[Cache], memory: Memory, order: tuple[int, ...]
) -> None:
    """Two rows of a batch can't have one cache: such a batch is refused, and nothing is taken."""
    sessions = [Session(), Session()]
    prepare(slots, memory, sessions[0], 1)
    with (
        pytest.raises(SessionBusyError) as caught,
        slots.borrow_all([sessions[number] for number in order]),
    ):
        pytest.fail("borrowed twice")
    assert caught.value.session_id == sessions[0].id
    assert look(slots, sessions[0]) == ([1], 1)
    for session in sessions:
        session.close()


def test_batch_takes_sessions_only(slots: StateSlots[Cache]) -> None:
    """Something else is a clear error, and nothing is taken."""
    with Session() as session:
        with (
            pytest.raises(TypeError, match="str"),
            slots.borrow_all(cast("list[Session]", [session, "session"])),
        ):
            pytest.fail("borrowed what's no session")
        with slots.borrow(session):
            pass


def test_batch_by_hand(slots: StateSlots[Cache], memory: Memory) -> None:
    """A batch can be entered and left without a `with` statement, or be lost."""
    with Session() as one, Session() as other:
        batch = slots.borrow_all([one, other])
        for state in batch.__enter__():
            memory.step(state, 1)
        batch.__exit__(None, None, None)
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            batch.__exit__(None, None, None)
        batch = slots.borrow_all([one, other])
        states = batch.__enter__()
        memory.step(states[0], 2)
        del batch, states
        assert " idle, 1 tokens" in repr(one)
        assert look(slots, one) == look(slots, other) == ([1], 1)


def test_states_of_a_batch_do_not_keep_it(slots: StateSlots[Cache], memory: Memory) -> None:
    """A single state that is kept after a lost batch doesn't reach its session."""
    with Session() as one, Session() as other:
        kept = slots.borrow_all([one, other]).__enter__()[0]
        gc.collect()
        with slots.borrow_all([one, other]) as states:
            memory.step(states[0], 1)
            with pytest.raises(BorrowExpiredError):
                kept.append([2])
        assert look(slots, one) == ([1], 1)
