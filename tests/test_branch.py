"""Branches: a new session with the first tokens of another, and with their KV cache if the engine can share it."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
import warnings
from typing import cast
from uuid import UUID, uuid4

import pytest
from tests.caches import ERRORS, Cache, Fault, Memory, look, prepare
from tests.interrupts import Interrupter
from tests.tracked_engines import Mutable

from inference_session import Session
from inference_session.engine import Slot, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionOwnerError,
    StateMismatchError,
)


def test_all_tokens(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A branch has all tokens by default, and a KV cache of its own; one token is left to decode from."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        child = state.branch()
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 3)
    with slots.borrow(child) as state:
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 2)
        assert state.kv_cache.tokens == [1, 2]
    assert look(slots, session) == ([1, 2, 3], 3)
    child.close()


@pytest.mark.parametrize(("length", "covered"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 3)])
def test_some_tokens(
    session: Session, slots: StateSlots[Cache], memory: Memory, length: int, covered: int
) -> None:
    """A branch may begin anywhere, also in tokens that are pending, or not committed yet."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        state.append([4, 5])
        child = state.branch(length)
    assert child.token_count == length
    assert look(slots, child) == ([1, 2, 3, 4, 5][:length], covered)
    child.close()


@pytest.mark.parametrize(("every", "covered"), [(2, 2), (None, 0)])
def test_what_can_be_shared(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    every: int | None,
    covered: int,
) -> None:
    """`share` returns as much as it can; the rest is pending."""
    memory.checkpoint_every = every
    prepare(slots, memory, session, 1, 2, 3, 4)
    with slots.borrow(session) as state:
        child = state.branch(4)
    assert look(slots, child) == ([1, 2, 3, 4], covered)
    child.close()


def test_without_share(session: Session, memory: Memory) -> None:
    """Without `share`, the tokens are pending, and nothing of the engine is called."""
    memory.shares = False
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        child = state.branch(2)
    assert look(slots, child) == ([1, 2], 0)
    assert len(memory.caches) == 1
    session.close()


def test_independent(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Parent and children go their own ways: what one does, and its end, changes no other."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        children = [state.branch() for _ in range(3)]
    for number, child in enumerate(children):
        prepare(slots, memory, child, 10 + number)
    prepare(slots, memory, session, 4)
    session.close()
    for number, child in enumerate(children):
        assert look(slots, child) == ([1, 2, 3, 10 + number], 4)
        (cache,) = [cache for cache in memory.live() if cache.tokens[-1] == 10 + number]
        assert cache.tokens == [1, 2, 3, 10 + number]
        child.close()
    assert not memory.live()


def test_of_a_branch(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A branch can be branched, while its parent is borrowed too."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        child = state.branch()
        with slots.borrow(child) as branched:
            grandchild = branched.branch(2)
    assert look(slots, grandchild) == ([1, 2], 1)
    child.close()
    grandchild.close()


def test_block_that_fails(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A branch was made when the call returns: it stays if the block fails, with tokens that the parent has lost."""
    prepare(slots, memory, session, 1, 2)
    children: list[Session] = []
    with pytest.raises(KeyError), slots.borrow(session) as state:
        memory.step(state, 3)
        children.append(state.branch())
        raise KeyError
    assert look(slots, session) == ([1, 2], 2)
    assert look(slots, children[0]) == ([1, 2, 3], 2)
    children[0].close()


def test_the_parent_s_cache_is_not_suspect(session: Session, memory: Memory) -> None:
    """`share` only reads: a block that branches and then fails keeps the KV cache, even without `truncate`."""
    memory.truncates = False
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(KeyError), slots.borrow(session) as state, state.branch():
        raise KeyError
    assert look(slots, session) == ([1, 2], 2)
    session.close()


def test_id(session: Session, slots: StateSlots[Cache]) -> None:
    """A branch has an id of its own: a random one, or the one it's given."""
    wanted = uuid4()
    with slots.borrow(session) as state:
        children = [state.branch(), state.branch(), state.branch(id=wanted)]
    assert len({session.id, *(child.id for child in children)}) == 4
    assert children[2].id is wanted


def test_key(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A branch has the key of its parent, so its KV cache is used with that key only."""
    with slots.borrow(session, key="a") as state:
        memory.step(state, 1, 2, 3)
        same, other = state.branch(), state.branch()
    with slots.borrow(same, key="a") as state:
        assert state.kv_length == 2
    with slots.borrow(other, key="b") as state:
        assert (state.kv_length, state.pending) == (0, [1, 2, 3])
    same.close()


def test_further_slots(session: Session, slots: StateSlots[Cache]) -> None:
    """Values of further slots begin anew, as two conversations may not share what is changed in place."""
    words = Slot(list[str])
    with slots.borrow(session) as state:
        state.append([1])
        state[words] = ["one"]
        child = state.branch()
    with slots.borrow(child) as state:
        assert state[words] == []


def test_owner(session: Session, slots: StateSlots[Cache]) -> None:
    """A branch belongs to the engine that began its parent; an empty one to nobody yet."""
    with slots.borrow(session) as state:
        state.append([1])
        child, empty = state.branch(), state.branch(0)
    other = StateSlots[list[int]](create=list, length=len)
    with other.borrow(empty):
        pass
    with pytest.raises(SessionOwnerError), other.borrow(child):
        pass


@pytest.mark.parametrize("length", [-1, 4, 1 << 70])
def test_lengths_that_are_not_there(
    session: Session, slots: StateSlots[Cache], memory: Memory, length: int
) -> None:
    """The error says how long the history is, and nothing is made."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        with pytest.raises(ValueError, match=rf"can't branch at {length} tokens.* has 3$"):
            state.branch(length)
        with pytest.raises(TypeError):
            state.branch(cast("int", 1.5))
        with pytest.raises(TypeError, match=r"must be a uuid\.UUID, got 'str'"):
            state.branch(id=cast("UUID", "x"))
    assert len(memory.caches) == 1


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("error", [*ERRORS, StopIteration])
def test_share_fails(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    error: type[BaseException],
    *,
    after_work: bool,
) -> None:
    """The error goes on to the caller, and the parent is as it was."""
    prepare(slots, memory, session, 1, 2, 3)
    memory.fail(Fault("share", error(), after_work=after_work))
    with slots.borrow(session) as state:
        with pytest.raises(RuntimeError if error is StopIteration else error):
            state.branch()
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 3)
    assert look(slots, session) == ([1, 2, 3], 3)
    assert len(memory.live()) == 1


def test_share_covers_too_much(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Such a KV cache would give wrong answers: it is released, and the error says who is to blame."""
    prepare(slots, memory, session, 1, 2, 3)
    memory.fail(Fault("share", "too long"))
    with slots.borrow(session) as state:
        with pytest.raises(StateMismatchError, match=r"^share: .* at most 2 tokens") as caught:
            state.branch()
        assert (caught.value.expected, caught.value.actual) == (2, 3)
    assert [cache.released for cache in memory.caches] == [0, 1]


def test_share_returns_what_it_was_given(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """One KV cache of two sessions would be released twice: it is refused, and stays the parent's."""
    prepare(slots, memory, session, 1, 2, 3)
    memory.fail(Fault("share", "untouched"))
    with (
        slots.borrow(session) as state,
        pytest.raises(ValueError, match=r"^share must return another"),
    ):
        state.branch()
    assert [cache.released for cache in memory.caches] == [0]
    assert look(slots, session) == ([1, 2, 3], 3)


def test_immutable_caches_are_shared_as_they_are(session: Session) -> None:
    """Without `release`, a cache that is never changed may belong to many sessions."""

    def first(cache: tuple[int, ...], length: int) -> tuple[int, ...]:
        return cache[:length]

    slots = StateSlots[tuple[int, ...]](create=tuple, length=len, truncate=first, share=first)
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        state.kv_cache = (1, 2)
        state.advance(2)
        children = [state.branch(), state.branch()]
    for child in children:
        with slots.borrow(child) as state:
            assert state.kv_cache == (1, 2)
            assert state.kv_cache is session._kv_cache


def test_straggler(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A borrow that ended while `share` was under way gets no branch, and what was shared is released."""
    prepare(slots, memory, session, 1, 2, 3)
    block = slots.borrow(session)
    state = block.__enter__()

    def share(cache: Cache, length: int) -> Cache:
        block.__exit__(None, None, None)
        return memory.new(cache.tokens[:length])

    object.__setattr__(slots, "share", share)
    with pytest.raises(BorrowExpiredError):
        state.branch()
    assert [cache.released for cache in memory.caches] == [0, 1]


def test_interrupts(interrupter: Interrupter) -> None:
    """Wherever an interrupt comes, the parent is as it was, and the branch is whole or nowhere."""
    engine, point, whole = Mutable(truncates=True, pool=200), 0, 0
    while True:
        point += 1
        session, children = Session(), list[Session]()
        with engine.slots.borrow(session) as state:
            state.append([1, 2, 3])
            engine.feed(state, 3)

        def branch(session: Session = session, children: list[Session] = children) -> None:
            with engine.slots.borrow(session) as state:
                children.append(state.branch())

        error = interrupter.run(branch, point)
        with engine.slots.borrow(session) as state:
            assert (state.kv_cache, state.pending) == ([1, 2, 3], [])
        for child in children:
            whole += 1
            with engine.slots.borrow(child) as state:
                assert (state.kv_cache, state.pending) == ([1, 2], [3])
            child.close()
        session.close()
        if error is None:
            break
    assert point > whole > 1
    engine.books.check()


def test_dropped(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A branch that is dropped without `close` frees its KV cache, with a warning, as any session."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        child = state.branch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del child
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert len(memory.live()) == 1


def test_after_the_block(session: Session, slots: StateSlots[Cache]) -> None:
    """After the block there is nothing to branch."""
    with slots.borrow(session) as state:
        state.append([1])
    with pytest.raises(BorrowExpiredError):
        state.branch()
