"""Freeing a KV cache of a session that nobody has borrowed."""

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look, prepare

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    SessionClosedError,
)


def test_evict(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The memory is free, no token is lost, and the next step is right, only slower."""
    prepare(slots, memory, session, 1, 2, 3)
    slots.evict(session)
    assert not memory.live()
    assert session.token_count == 3
    assert look(slots, session) == ([1, 2, 3], 0)
    with slots.borrow(session) as state:
        assert state.pending == [1, 2, 3]
        memory.step(state, 4)
    assert look(slots, session) == ([1, 2, 3, 4], 4)


def test_evict_what_holds_no_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Evicting twice, or a new session, does nothing."""
    slots.evict(session)
    prepare(slots, memory, session, 1)
    slots.evict(session)
    slots.evict(session)
    assert [cache.released for cache in memory.caches] == [1]


def test_evict_without_release(session: Session) -> None:
    """Where there's no `release`, the reference is dropped."""
    slots = StateSlots[list[int]](create=list, length=len)
    with slots.borrow(session) as state:
        state.append([1])
        state.kv_cache.append(1)
        state.advance(1)
    slots.evict(session)
    with slots.borrow(session) as state:
        assert (list(state.token_history), state.kv_length) == ([1], 0)
        assert state.kv_cache == []


def test_evict_closed(session: Session, slots: StateSlots[Cache]) -> None:
    """A closed session has nothing to be evicted any more."""
    session.close()
    with pytest.raises(SessionClosedError):
        slots.evict(session)


@pytest.mark.parametrize("error", ERRORS)
def test_evict_when_release_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """The caller learns of it; the cache is gone all the same, and the tokens are safe."""
    prepare(slots, memory, session, 1, 2)
    memory.fail(Fault("release", error()))
    with pytest.raises(error):
        slots.evict(session)
    assert look(slots, session) == ([1, 2], 0)


def test_evict_what_a_lost_borrow_left(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Evicting finishes a lost borrow first."""
    prepare(slots, memory, session, 1)
    memory.step(slots.borrow(session).__enter__(), 2)
    slots.evict(session)
    assert not memory.live()
    assert look(slots, session) == ([1], 0)
