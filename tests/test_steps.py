"""The bookkeeping of a step: append, pending, advance."""

from typing import cast

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    StateMismatchError,
)


def test_append(session: Session, slots: StateSlots[Cache]) -> None:
    """New tokens come after the old ones, and are pending."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.append([])
        state.append([3])
        assert state.token_history == [1, 2, 3]
        assert state.pending == [1, 2, 3]
        assert state.kv_length == 0


def test_pending(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The pending tokens are those after what is cached, and whatever is fed is pending no more."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        memory.feed(state, [1, 2])
        state.advance(2)
        assert state.pending == [3]
        memory.feed(state, [3])
        state.advance(1)
        assert state.pending == []
    assert look(slots, session) == ([1, 2, 3], 3)


# advance


def test_advance_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """An engine that fed other than it says learns so at once, not from garbage; nothing is advanced."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        memory.feed(state, [1, 2])
        for count in (0, 1, 3):
            with pytest.raises(StateMismatchError) as caught:
                state.advance(count)
            error = caught.value
            assert (error.session_id, error.expected, error.actual) == (session.id, count, 2)
            assert error.where == "advance"
            assert state.kv_length == 0
        state.advance(2)
        assert state.kv_length == 2


def test_advance_without_cache(session: Session, slots: StateSlots[Cache]) -> None:
    """Where there's no cache, nothing can have been fed."""
    with slots.borrow(session) as state:
        state.append([1])
        state.advance(0)
        with pytest.raises(StateMismatchError) as caught:
            state.advance(1)
        assert (caught.value.expected, caught.value.actual) == (1, 0)


@pytest.mark.parametrize("count", [-1, 3, 2**80])
def test_advance_within_pending(
    session: Session, slots: StateSlots[Cache], memory: Memory, count: int
) -> None:
    """The cache never covers fewer tokens by advancing, nor tokens that aren't in the history."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.append([3, 4])
        with pytest.raises(ValueError, match=f"{count} tokens, as 2 are pending"):
            state.advance(count)
        assert state.kv_length == 2


def test_advance_by_what_counts(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Whatever is an integer is a count, as NumPy's are; nothing else is."""

    class Two:
        def __index__(self) -> int:
            return 2

    with slots.borrow(session) as state:
        state.append([1, 2])
        memory.feed(state, [1, 2])
        for wrong in (2.0, "2", None):
            with pytest.raises(TypeError):
                state.advance(cast("int", wrong))
        state.advance(cast("int", Two()))
        assert state.kv_length == 2
        assert type(state.kv_length) is int


@pytest.mark.parametrize("error", ERRORS)
def test_advance_when_length_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """Nothing is advanced then."""
    with slots.borrow(session) as state:
        state.append([1])
        memory.feed(state, [1])
        memory.fail(Fault("length", error()))
        with pytest.raises(error):
            state.advance(1)
        assert state.kv_length == 0
        state.advance(1)
    assert look(slots, session) == ([1], 1)


# rewind
