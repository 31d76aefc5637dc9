"""The KV cache of a borrowed state: made on first use, replaced, put back."""

# ruff: noqa: PT012 what's tested is how a block fails

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look, prepare

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    StateMismatchError,
)


def test_cache_is_created_on_first_use(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Who only looks at tokens costs no memory; who looks twice gets the same cache."""
    with slots.borrow(session) as state:
        state.append([1])
        assert state.kv_length == 0
        assert not memory.caches
        cache = state.kv_cache
        assert state.kv_cache is cache
    assert memory.caches == [cache]


def test_cache_is_the_same_in_the_next_borrow(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A cache lives across prefill and decode."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        cache = state.kv_cache
    with slots.borrow(session) as state:
        assert state.kv_cache is cache
        assert state.kv_length == 2


@pytest.mark.parametrize("falsy", [None, 0, (), False], ids=repr)
def test_cache_may_be_anything(session: Session, falsy: object) -> None:
    """A cache is opaque: an index, or None, is one as well as any."""
    released: list[object] = []
    slots = StateSlots(create=lambda: falsy, length=lambda cache: 0, release=released.append)
    with slots.borrow(session) as state:
        assert state.kv_cache is falsy
        state.kv_cache = falsy
    assert not released
    slots.evict(session)
    assert released == [falsy]


def test_cache_that_is_not_created_empty(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A `create` that returns a used cache is found out before that is fed, and the cache is released."""
    memory.fail(Fault("create", "too long"))
    with slots.borrow(session) as state:
        with pytest.raises(StateMismatchError) as caught:
            state.kv_cache  # noqa: B018 it's made here
        assert (caught.value.expected, caught.value.actual) == (0, 1)
        assert caught.value.where == "create"
        assert not memory.live()
        memory.step(state, 1)
    assert look(slots, session) == ([1], 1)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("function", ["create", "length"])
def test_cache_that_can_not_be_created(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    function: Any,
    error: type[BaseException],
) -> None:
    """The block gets the error, and may try again."""
    with slots.borrow(session) as state:
        memory.fail(Fault(function, error()))
        with pytest.raises(error):
            state.kv_cache  # noqa: B018 it's made here
        assert not memory.live()
        memory.step(state, 1)
    assert look(slots, session) == ([1], 1)


# kv_cache, set


def test_replaced_cache_is_kept_until_commit(functional: Memory) -> None:
    """The savepoint's cache is still there for a rollback; others are released as they are replaced."""
    slots = functional.slots()
    with Session() as session:
        prepare(slots, functional, session, 1, 2)
        (first,) = functional.live()
        with slots.borrow(session) as state:
            functional.step(state, 3)
            second = state.kv_cache
            functional.step(state, 4)
            assert functional.live() == [first, state.kv_cache]
            assert second.released
            state.commit()
            assert functional.live() == [state.kv_cache]
        assert look(slots, session) == ([1, 2, 3, 4], 4)


def test_rollback_to_a_replaced_cache(functional: Memory) -> None:
    """A failed step of a functional engine goes back to the very cache it began with, and computes nothing anew."""
    slots = functional.slots()
    with Session() as session:
        prepare(slots, functional, session, 1, 2)
        (first,) = functional.live()
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            functional.step(state, 3)
            functional.step(state, 4)
            raise MemoryError
        assert functional.live() == [first]
        assert look(slots, session) == ([1, 2], 2)


def test_rollback_to_a_replaced_cache_after_rewinding(functional: Memory) -> None:
    """Truncating the new cache doesn't touch the old one: a rollback has all of it again."""
    slots = functional.slots()
    with Session() as session:
        prepare(slots, functional, session, 1, 2, 3)
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            functional.step(state, 4)
            state.rewind(1)
            functional.step(state, 9)
            raise MemoryError
        assert look(slots, session) == ([1, 2, 3], 3)


def test_rollback_without_truncate_to_a_replaced_cache() -> None:
    """A functional engine needs no `truncate` to be rolled back, not even where a rewind dropped its new cache."""
    memory = Memory(functional=True, truncates=False)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3)
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            memory.step(state, 4)
            state.rewind(1)
            assert state.kv_length == 0
            memory.step(state, 9)
            raise MemoryError
        assert look(slots, session) == ([1, 2, 3], 3)
    memory.check_all_released()


def test_rollback_to_a_donated_cache() -> None:
    """A step that used up the old cache's memory can't be undone in it: the tokens become pending."""
    memory = Memory(functional=True, donating=True)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2, 3)
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            memory.step(state, 4)
            raise MemoryError
        assert look(slots, session) == ([1, 2, 3], 0)
    memory.check_all_released()


def test_cache_put_back(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """An engine that puts the old cache back, as one that gave up a speculation does, loses none and leaks none."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state:
        old = state.kv_cache
        state.kv_cache = memory.new([1, 2])
        state.kv_cache = old
        assert memory.live() == [old]
        memory.step(state, 3)
        state.rewind(2)
        state.kv_cache = memory.new([1])
    assert look(slots, session) == ([1, 2], 1)
    assert old.released


def test_cache_set_where_there_is_none(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """An engine may bring a cache of its own, restored from disk for instance, and say what it covers."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        state.kv_cache = memory.new([1, 2])
        state.advance(2)
    assert look(slots, session) == ([1, 2, 3], 2)
    assert len(memory.caches) == 1


def test_cache_set_twice_before_the_first_commit(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Where there's no cache to go back to, none is kept."""
    with slots.borrow(session) as state:
        state.kv_cache = memory.new([])
        state.kv_cache = memory.new([])
        assert memory.live() == [state.kv_cache]


@pytest.mark.parametrize("error", ERRORS)
def test_cache_set_when_release_of_the_old_one_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """A cache once set is the session's, also if the old one can't be released: it isn't leaked."""
    with slots.borrow(session) as state:
        old = state.kv_cache
        new = memory.new([])
        memory.fail(Fault("release", error()))
        with pytest.raises(error):
            state.kv_cache = new
        assert old.released
        assert state.kv_cache is new
    session.close()
    assert new.released


@pytest.mark.parametrize("error", ERRORS)
def test_commit_when_release_of_the_old_cache_fails(
    session: Session, functional: Memory, error: type[BaseException]
) -> None:
    """What isn't committed for a `release` that fails is rolled back as a whole."""
    slots = functional.slots()
    prepare(slots, functional, session, 1)
    with pytest.raises(error), slots.borrow(session) as state:
        functional.step(state, 2)
        functional.fail(Fault("release", error()))
    assert session.token_count == 1
    assert look(slots, session) == ([1], 0)
    session.close()


# token_history


def test_create_out_of_handles(session: Session) -> None:
    """A `create` that takes from an iterator which is at its end doesn't end in a puzzle."""
    slots = StateSlots(create=partial(next, iter([list[int]()])), length=len)
    with slots.borrow(session) as state:
        assert state.kv_cache == []
    with (
        Session() as other,
        pytest.raises(RuntimeError, match=r"create\(\) raised StopIteration"),
        slots.borrow(other) as state,
    ):
        state.append([1])
        _ = state.kv_cache
    assert other.token_count == 0


def test_truncate_stops(session: Session) -> None:
    """A `truncate` that raises StopIteration is named, and what it was given is released."""
    released: list[list[int]] = []
    nothing: Iterator[list[int]] = iter([])
    slots = StateSlots(
        create=list[int],
        length=len,
        truncate=lambda cache, length: next(nothing),
        release=released.append,
    )
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        state.kv_cache.extend(state.pending)
        state.advance(3)
    with (
        pytest.raises(RuntimeError, match=r"truncate\(kv_cache, length\) raised StopIteration"),
        slots.borrow(session) as state,
    ):
        state.rewind(1)
    assert released == [[1, 2, 3]]
    with slots.borrow(session) as state:
        assert state.pending == [1, 2, 3]


# evict
