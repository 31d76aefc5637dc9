"""The end of a block: commit, and rollback."""

# ruff: noqa: PT012 what's tested is how a block fails

from typing import Any

import pytest
from tests.caches import ERRORS, LIES, Cache, Fault, Lie, Memory, look, prepare

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    StateMismatchError,
)


def test_commit_is_a_savepoint(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A later failure goes back to the commit, not to the start."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.commit()
        memory.step(state, 3)
        state.commit()
        memory.step(state, 4, 5)
        state.rewind(1)
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3], 0)


def test_commit_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What doesn't fit together isn't committed, and the block may mend it."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        memory.feed(state, [1])
        with pytest.raises(StateMismatchError) as caught:
            state.commit()
        assert (caught.value.expected, caught.value.actual) == (0, 1)
        assert caught.value.where == "commit"
        assert session.token_count == 0
        state.advance(1)
        state.commit()
        assert session.token_count == 2


def test_commit_of_a_rewind(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What was committed away doesn't come back."""
    prepare(slots, memory, session, 1, 2, 3)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.rewind(1)
        state.commit()
        state.append([8, 9])
        raise MemoryError
    assert look(slots, session) == ([1], 0)


def test_clean_exit_commits(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A block that ends well is final, and gives the session back."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.append([3])
    assert session.token_count == 3
    assert look(slots, session) == ([1, 2, 3], 2)


@pytest.mark.parametrize("fed", [1, 3])
def test_clean_exit_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory, fed: int
) -> None:
    """A block that fed what it didn't say is an error, and rolled back: KV and tokens never part."""
    prepare(slots, memory, session, 1)
    with pytest.raises(StateMismatchError) as caught, slots.borrow(session) as state:
        memory.step(state, 2)
        memory.feed(state, [3] * fed)
    error = caught.value
    assert (error.session_id, error.expected, error.actual) == (session.id, 2, 2 + fed)
    assert error.where == "commit"
    assert look(slots, session) == ([1], 0)


@pytest.mark.parametrize("call", ["advance", "commit", "end"])
def test_a_cache_that_was_wrong_is_not_trusted_again(
    session: Session, slots: StateSlots[Cache], memory: Memory, call: str
) -> None:
    """Once a KV cache was seen to be other than its engine says, a rollback isn't content with its length."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(StateMismatchError), slots.borrow(session) as state:
        state.append([3])
        state.kv_cache.tokens[1:] = [9, 3, 3]  # what it covered is overwritten, too
        if call == "advance":
            state.advance(1)
        if call == "commit":
            state.commit()
    assert look(slots, session) == ([1, 2], 0)


def test_a_cache_kept_aside_is_trusted(session: Session, functional: Memory) -> None:
    """The KV cache that a step replaced has nothing to do with what is wrong about the new one."""
    slots = functional.slots()
    prepare(slots, functional, session, 1, 2)
    with pytest.raises(StateMismatchError), slots.borrow(session) as state:
        state.append([3])
        functional.feed(state, [3, 3])
        state.advance(1)
    assert look(slots, session) == ([1, 2], 2)
    session.close()


def test_return_commits(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Leaving the block by `return`, `break` or `continue` is to end it well."""

    def step() -> int:
        with slots.borrow(session) as state:
            memory.step(state, 1)
            return 5

    assert step() == 5
    for token in (2, 3, 4):
        with slots.borrow(session) as state:
            memory.step(state, token)
            if token == 2:
                continue
            break
    assert look(slots, session) == ([1, 2, 3], 3)


@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_rolls_back(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """Tokens and cache are what they were, and the caller gets the very exception, without notes."""
    prepare(slots, memory, session, 1, 2)
    raised = error("why")
    with pytest.raises(error) as caught, slots.borrow(session) as state:
        memory.step(state, 3)
        memory.feed(state, [4])  # ... and then it fails in mid-step
        raise raised
    assert caught.value is raised
    assert raised.__context__ is None
    assert raised.__cause__ is None
    assert not hasattr(raised, "__notes__")
    assert look(slots, session) == ([1, 2], 2)
    assert memory.live()[0].tokens == [1, 2]


def test_rollback_of_a_new_session(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A session whose first step failed is as new, and costs no memory."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1, 2)
        raise MemoryError
    assert not memory.live()
    assert look(slots, session) == ([], 0)


def test_rollback_of_a_cache_that_shrank(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A cache that a step left shorter than it was covers as much as it still does."""
    prepare(slots, memory, session, 1, 2, 3)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        del state.kv_cache.tokens[1:]
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3], 1)


@pytest.mark.parametrize("lie", LIES)
def test_rollback_with_a_truncate_that_lies(
    session: Session, slots: StateSlots[Cache], memory: Memory, lie: Lie
) -> None:
    """A cache that isn't what it was is released; the exception goes on as if nothing else had happened."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 3, 4)
        memory.fail(Fault("truncate", lie))
        raise MemoryError
    assert not memory.live()
    assert look(slots, session) == ([1, 2], 0)


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("function", ["length", "truncate", "release"])
def test_rollback_with_functions_that_fail(
    session: Session, slots: StateSlots[Cache], memory: Memory, function: Any, *, after_work: bool
) -> None:
    """Whatever else fails in a rollback, the exception that led to it goes on, and the tokens are right."""
    prepare(slots, memory, session, 1, 2)
    error = KeyError("why")
    with pytest.raises(KeyError) as caught, slots.borrow(session) as state:
        memory.step(state, 3)
        if function == "release":
            memory.fail(Fault("length", ConnectionError()))
        memory.fail(Fault(function, ConnectionError(), after_work))
        raise error
    assert caught.value is error
    assert hasattr(error, "__notes__") == (function == "release")
    assert not memory.live()
    assert look(slots, session) == ([1, 2], 0)


@pytest.mark.parametrize("function", ["length", "truncate", "release"])
def test_rollback_that_is_interrupted(
    session: Session, slots: StateSlots[Cache], memory: Memory, function: Any
) -> None:
    """Ctrl-C in a rollback leaves nothing borrowed: the next borrow finishes it."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(KeyboardInterrupt), slots.borrow(session) as state:
        memory.step(state, 3)
        if function == "release":
            memory.fail(Fault("truncate", ConnectionError()))
        memory.fail(Fault(function, KeyboardInterrupt()))
        raise MemoryError
    assert repr(session) == f"<Session {session.id} idle, 2 tokens>"
    assert look(slots, session) == ([1, 2], 0)
