"""Rewinding, and reusing a prefix."""

# ruff: noqa: PT012 what's tested is how a block fails

from typing import Any

import pytest
from tests.caches import ERRORS, LIES, Cache, Fault, Lie, Memory, look, prepare

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    StateMismatchError,
)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("length", "pending", "covered"),
    [
        (5, 1, 4),
        (5, 0, 5),
        (3, 1, 2),
        (3, 0, 3),
        (3, 2, 1),
        (3, 9, 0),
        (1, 1, 0),
        (0, 1, 0),
        (0, 0, 0),
    ],
)
def test_rewind(length: int, pending: int, covered: int, *, functional: bool) -> None:
    """The last tokens are forgotten, and as many of the rest are pending as was asked for."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3, 4, 5)
        with slots.borrow(session) as state:
            state.rewind(length, pending=pending)
            assert state.token_history == [1, 2, 3, 4, 5][:length]
            assert state.kv_length == covered
            assert state.kv_cache.tokens == [1, 2, 3, 4, 5][:covered]
        assert look(slots, session) == ([1, 2, 3, 4, 5][:length], covered)
    memory.check_all_released()


def test_rewind_leaves_something_to_decode_from(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """By default one token is pending after a rewind, even one that forgets nothing."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        state.rewind(3)
        assert state.pending == [3]


def test_rewind_within_pending(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What isn't cached is forgotten without touching the cache."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state:
        state.append([3, 4, 5])
        memory.fail(Fault("truncate", RuntimeError()))
        state.rewind(4)
        assert state.pending == [3, 4]
        state.rewind(3)
        assert (state.pending, state.kv_length) == ([3], 2)


@pytest.mark.parametrize(
    ("length", "pending"), [(-1, 1), (4, 1), (4, 0), (2**80, 0), (2, -1), (3, -(2**80))]
)
def test_rewind_within_the_history(
    session: Session, slots: StateSlots[Cache], memory: Memory, length: int, pending: int
) -> None:
    """Wrong numbers are refused, and nothing changes."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        with pytest.raises(ValueError, match=r"rewind|pending"):
            state.rewind(length, pending=pending)
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 3)


@pytest.mark.parametrize("wrong", [1.0, "1", None], ids=repr)
def test_rewind_by_numbers(session: Session, slots: StateSlots[Cache], wrong: Any) -> None:
    """What isn't an integer is refused, and nothing changes."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        with pytest.raises(TypeError):
            state.rewind(wrong)
        with pytest.raises(TypeError):
            state.rewind(1, pending=wrong)
        assert state.token_history == [1, 2, 3]


def test_rewind_without_truncate() -> None:
    """A cache that covers too much is released, and computed anew; one that doesn't is left alone."""
    memory = Memory(truncates=False)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3)
        with slots.borrow(session) as state:
            state.append([4])
            state.rewind(3, pending=0)
            assert state.kv_length == 3
            state.rewind(3)
            assert state.kv_length == 0
            assert not memory.live()
            memory.step(state)
        assert look(slots, session) == ([1, 2, 3], 3)
    memory.check_all_released()


@pytest.mark.parametrize("lie", LIES)
def test_rewind_with_a_truncate_that_lies(
    session: Session, slots: StateSlots[Cache], memory: Memory, lie: Lie
) -> None:
    """A truncate that doesn't do as it should is found out; no cache is kept that can't be relied upon."""
    prepare(slots, memory, session, 1, 2, 3, 4)
    with slots.borrow(session) as state:
        memory.fail(Fault("truncate", lie))
        with pytest.raises(StateMismatchError) as caught:
            state.rewind(3)
        assert (caught.value.expected, caught.value.where) == (2, "truncate")
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3, 4], 0)
        assert not memory.live()
    assert look(slots, session) == ([1, 2, 3, 4], 0)


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_rewind_with_a_truncate_that_fails(
    error: type[BaseException], *, functional: bool, after_work: bool
) -> None:
    """The cache that was given to it is released; the history is what it was, and all of it pending."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3, 4)
        with slots.borrow(session) as state:
            memory.fail(Fault("truncate", error(), after_work))
            with pytest.raises(error):
                state.rewind(3)
            assert (list(state.token_history), state.kv_length) == ([1, 2, 3, 4], 0)
            assert not memory.live()
        assert look(slots, session) == ([1, 2, 3, 4], 0)
    memory.check_all_released()


def test_rollback_after_rewind(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """All tokens are back, and of the cache what was never given up."""
    prepare(slots, memory, session, 1, 2, 3, 4, 5)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.rewind(4)
        memory.step(state, 9, 9, 9, 9)
        state.rewind(3)
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3, 4, 5], 2)
    assert memory.live()[0].tokens == [1, 2]


def test_rollback_after_rewinding_new_tokens(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A speculation that is rewound and then fails costs nothing of what was cached before."""
    prepare(slots, memory, session, 1, 2, 3)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 4, 5, 6)
        state.rewind(4, pending=0)
        memory.step(state, 7)
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3], 3)


def test_rollback_of_many_rewinds(session: Session, slots: StateSlots[Cache]) -> None:
    """However the history was cut and grew again, each token of the savepoint is back in its place."""
    tokens = list(range(100))
    with slots.borrow(session) as state:
        state.append(tokens)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        for length in (90, 95, 60, 64, 60, 61, 0, 3, 1):
            state.append([7] * 5)
            state.rewind(length)
        state.reuse_prefix([0, 1, 2])
        raise MemoryError
    assert look(slots, session) == (tokens, 0)


# reuse_prefix


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("tokens", "reused"),
    [
        ([1, 2, 3, 4, 5, 6], 5),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 9, 9], 4),
        ([1, 2, 9], 2),
        ([1, 2, 3], 2),
        ([1], 0),
        ([9, 2, 3, 4, 5], 0),
        ([], 0),
    ],
)
def test_reuse_prefix(tokens: list[int], reused: int, *, functional: bool) -> None:
    """What a new prompt has in common with the history isn't computed again, but at least one token is pending."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3, 4, 5)
        with slots.borrow(session) as state:
            assert state.reuse_prefix(tokens) == reused
            assert state.token_history == tokens
            assert state.kv_length == reused
            assert state.pending == tokens[reused:]
            assert state.kv_cache.tokens == tokens[:reused]
            memory.step(state)
        assert look(slots, session) == (tokens, len(tokens))
    memory.check_all_released()


def test_reuse_prefix_of_what_is_cached(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What is in the history but not in the cache isn't reused: it must be fed."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state:
        state.append([3, 4])
        assert state.reuse_prefix([1, 2, 3, 9]) == 2
        assert state.pending == [3, 9]


def test_reuse_prefix_in_a_new_session(session: Session, slots: StateSlots[Cache]) -> None:
    """The first prompt is as any other."""
    with slots.borrow(session) as state:
        assert state.reuse_prefix([1, 2]) == 0
    assert look(slots, session) == ([1, 2], 0)


def test_reuse_prefix_without_truncate() -> None:
    """Where the cache can't be truncated, nothing is reused, unless all of it is."""
    memory = Memory(truncates=False)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3)
        with slots.borrow(session) as state:
            assert state.reuse_prefix([1, 2, 3, 4]) == 3
            assert state.reuse_prefix([1, 2, 9]) == 0
            assert state.pending == [1, 2, 9]
    memory.check_all_released()


@pytest.mark.parametrize("error", ERRORS)
def test_reuse_prefix_with_a_truncate_that_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """The history is what it was then, and all of it pending."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        memory.fail(Fault("truncate", error()))
        with pytest.raises(error):
            state.reuse_prefix([1, 9])
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 0)


def test_rollback_after_reuse_prefix(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The old conversation is back, and cached as far as both had it in common."""
    prepare(slots, memory, session, 1, 2, 3, 4)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.reuse_prefix([1, 2, 9, 9, 9, 9])
        memory.step(state)
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3, 4], 2)


# commit
