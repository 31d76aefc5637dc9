"""A session belongs to the engine that began it."""

# ruff: noqa: PT012 what's tested is how a block fails

from collections.abc import Callable

import pytest
from tests.caches import Cache, Fault, Memory, look, prepare

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    SessionOwnerError,
)


def test_owner(session: Session, memory: Memory) -> None:
    """A session that one engine began is no other's: it would misread the cache."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    for borrow in (foreign.borrow(session), foreign.borrow_all([session])):
        with pytest.raises(SessionOwnerError) as caught, borrow:
            pytest.fail("borrowed a foreign session")
        assert caught.value.session_id == session.id
    with pytest.raises(SessionOwnerError):
        foreign.evict(session)
    assert look(own, session) == ([1], 1)


def test_owner_of_tokens_alone(session: Session, memory: Memory) -> None:
    """Another engine has another vocabulary: tokens alone make a session one's own, too."""
    own, foreign = memory.slots(), memory.slots()
    with own.borrow(session) as state:
        state.append([1])
    own.evict(session)
    with pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")


def test_owner_of_a_cache_alone(session: Session, memory: Memory) -> None:
    """A cache makes a session one's own, though it has no tokens yet; without it it's nobody's again."""
    own, foreign = memory.slots(), memory.slots()
    with own.borrow(session) as state:
        assert state.kv_cache.tokens == []
    with pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")
    own.evict(session)
    prepare(foreign, memory, session, 1)


def empty_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Do nothing."""
    with slots.borrow(session):
        pass


def failing_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail in the first step."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1)
        raise MemoryError


def rewinding_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Take all back."""
    prepare(slots, memory, session, 1)
    with slots.borrow(session) as state:
        state.rewind(0)
    slots.evict(session)


def failing_batch(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail in the first step of a batch."""
    with pytest.raises(MemoryError), slots.borrow_all([session]) as states:
        memory.step(states[0], 1)
        raise MemoryError


def refused_batch(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail to take a batch."""
    closed = Session()
    closed.close()
    with pytest.raises(SessionClosedError), slots.borrow_all([session, closed]):
        pytest.fail("borrowed a closed session")


def lost_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Begin, and never end."""
    memory.step(slots.borrow(session).__enter__(), 1)


def interrupted_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail, and be interrupted in taking it back."""
    with pytest.raises(KeyboardInterrupt), slots.borrow(session) as state:
        memory.step(state, 1)
        memory.fail(Fault("release", KeyboardInterrupt()))
        raise MemoryError


@pytest.mark.parametrize(
    "leave_empty",
    [
        empty_block,
        failing_block,
        rewinding_block,
        failing_batch,
        refused_batch,
        lost_block,
        interrupted_block,
    ],
)
def test_empty_session_is_nobodys(
    session: Session,
    memory: Memory,
    leave_empty: Callable[[StateSlots[Cache], Memory, Session], None],
) -> None:
    """A session that holds nothing can be begun by any engine, whoever had it and however that ended."""
    leave_empty(memory.slots(), memory, session)
    slots = memory.slots()
    prepare(slots, memory, session, 2)
    assert look(slots, session) == ([2], 1)


def test_empty_session_in_use(session: Session, memory: Memory) -> None:
    """While an engine has a session that holds nothing yet, it's busy to others: they may have it later."""
    one, other = memory.slots(), memory.slots()
    with pytest.raises(MemoryError), one.borrow(session) as state:
        memory.step(state, 1)
        with pytest.raises(SessionBusyError), other.borrow(session):
            pytest.fail("borrowed twice")
        raise MemoryError
    prepare(other, memory, session, 2)


def test_closed_goes_before_all(session: Session, memory: Memory) -> None:
    """What can never be borrowed again is closed, whoever had it or has it: there's no use in trying again."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    with own.borrow(session):
        session.close()
        for slots in (own, foreign):
            for borrow in (slots.borrow(session), slots.borrow_all([session])):
                with pytest.raises(SessionClosedError), borrow:
                    pytest.fail("borrowed a closed session")
            with pytest.raises(SessionClosedError):
                slots.evict(session)


def test_owner_goes_before_busy(session: Session, memory: Memory) -> None:
    """What is another engine's will be so when it's free again: there's no use in waiting."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    with own.borrow(session), pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")


# borrow_all
