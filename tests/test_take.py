"""One KV cache, one session: taking a cache out, exchanging two, and refusing one that another session has."""

# ruff: noqa: PT012 what's tested is how a block fails

from collections.abc import Callable

import pytest
from tests.caches import Cache, Memory, look, prepare
from tests.interrupts import Interrupter
from tests.tracked_engines import Mutable, MutableCache

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import BorrowExpiredError


def test_take(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The caller gets the KV cache, which isn't released; all tokens are pending."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        cache = state.take_kv_cache()
        assert (cache.tokens, state.kv_length, state.pending) == ([1, 2, 3], 0, [1, 2, 3])
    assert look(slots, session) == ([1, 2, 3], 0)
    session.close()
    assert cache.released == 0
    memory.release(cache)


def test_nothing_to_take(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The error names the session; a cache can be taken only once."""
    with slots.borrow(session) as state:
        with pytest.raises(ValueError, match=f"session {session.id} has no KV cache to take"):
            state.take_kv_cache()
        memory.step(state, 1)
        memory.release(state.take_kv_cache())
        with pytest.raises(ValueError, match="no KV cache"):
            state.take_kv_cache()
        assert state.kv_cache.tokens == []
    with pytest.raises(BorrowExpiredError):
        state.take_kv_cache()


def test_take_and_fail(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A cache that was taken is the caller's, even if the block fails: it doesn't come back, and isn't released."""
    prepare(slots, memory, session, 1, 2)
    taken: list[Cache] = []
    with pytest.raises(KeyError), slots.borrow(session) as state:
        taken.append(state.take_kv_cache())
        raise KeyError
    assert look(slots, session) == ([1, 2], 0)
    assert taken[0].released == 0
    memory.release(taken[0])


def test_take_what_replaced_the_savepoint_s(session: Session) -> None:
    """A functional step's new cache can be taken; the one of the last commit comes back if the block fails."""
    memory = Memory(functional=True)
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2)
    taken: list[Cache] = []
    with pytest.raises(KeyError), slots.borrow(session) as state:
        memory.step(state, 3)
        taken.append(state.take_kv_cache())
        raise KeyError
    assert look(slots, session) == ([1, 2], 2)
    memory.release(taken[0])
    session.close()
    memory.check_all_released()


def test_interrupts(interrupter: Interrupter) -> None:
    """Wherever an interrupt comes, the cache is the session's or the caller's, and never lost."""
    engine, point, mine = Mutable(truncates=True, pool=200), 0, 0
    while True:
        point += 1
        session, taken = Session(), list[MutableCache]()
        with engine.slots.borrow(session) as state:
            state.append([1, 2])
            engine.feed(state, 2)

        def take(session: Session = session, taken: list[MutableCache] = taken) -> None:
            with engine.slots.borrow(session) as state:
                taken.append(state.take_kv_cache())

        error = interrupter.run(take, point)
        with engine.slots.borrow(session) as state:
            assert (len(taken), state.kv_length) in {(0, 2), (1, 0)}
        mine += len(taken)
        engine.books.released.extend(taken)
        session.close()
        if error is None:
            break
    assert point > mine > 1
    engine.books.check()


def test_put_back(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A cache that was taken can be given back, and covers the tokens again once they are advanced over."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        state.kv_cache = state.take_kv_cache()
        assert state.kv_length == 0
        state.advance(3)
    assert look(slots, session) == ([1, 2, 3], 3)
    assert len(memory.caches) == 1


def test_moved_to_another_session(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A KV cache goes to another session with its tokens, and is released once: there."""
    prepare(slots, memory, session, 1, 2, 3)
    with Session() as heir:
        with slots.borrow_all([session, heir]) as (giver, taker):
            taker.append(giver.token_history)
            taker.kv_cache = giver.take_kv_cache()
            taker.advance(3)
        assert look(slots, heir) == ([1, 2, 3], 3)
        session.close()
        assert len(memory.live()) == 1
    memory.check_all_released()


def swap_by_taking(one: BorrowedState[Cache], other: BorrowedState[Cache]) -> None:
    """Exchange two caches and their tokens."""
    caches = one.take_kv_cache(), other.take_kv_cache()
    for state, cache in zip((other, one), caches, strict=True):
        state.rewind(0)
        state.append(cache.tokens)
        state.kv_cache = cache
        state.advance(len(cache.tokens))


def test_exchange(slots: StateSlots[Cache], memory: Memory) -> None:
    """Two sessions of a batch exchange their caches, as beams do."""
    with Session() as one, Session() as other:
        prepare(slots, memory, one, 1, 2)
        prepare(slots, memory, other, 3, 4, 5)
        with slots.borrow_all([one, other]) as states:
            swap_by_taking(*states)
        assert [look(slots, each) for each in (one, other)] == [([3, 4, 5], 3), ([1, 2], 2)]
        assert len(memory.caches) == len(memory.live()) == 2
    memory.check_all_released()


def test_exchange_that_fails(slots: StateSlots[Cache], memory: Memory) -> None:
    """The tokens are as before, and both caches are released once: neither belongs to those tokens any more."""
    with Session() as one, Session() as other:
        prepare(slots, memory, one, 1, 2)
        prepare(slots, memory, other, 3, 4, 5)
        with pytest.raises(KeyError), slots.borrow_all([one, other]) as states:
            swap_by_taking(*states)
            raise KeyError
        assert [look(slots, each) for each in (one, other)] == [([1, 2], 0), ([3, 4, 5], 0)]
        assert not memory.live()
    memory.check_all_released()


def test_a_cache_of_another_session(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A KV cache of two sessions would be released twice: setting it is refused, and changes nothing."""
    prepare(slots, memory, session, 1, 2)
    with Session() as other:
        prepare(slots, memory, other, 3)
        with slots.borrow_all([session, other]) as (mine, theirs):
            before = mine.kv_cache, theirs.kv_cache
            with pytest.raises(
                ValueError, match=f"session {session.id} has this KV cache.* take"
            ) as c:
                theirs.kv_cache = mine.kv_cache
            assert str(other.id) in str(c.value)
            assert (mine.kv_cache, theirs.kv_cache) == before
        assert (look(slots, session), look(slots, other)) == (([1, 2], 2), ([3], 1))
    session.close()
    memory.check_all_released()


def keep_reference(slots: StateSlots[Cache], memory: Memory, session: Session) -> Cache:
    """Return the cache of an idle session, as an engine may have kept it."""
    prepare(slots, memory, session, 1)
    with slots.borrow(session) as state:
        return state.kv_cache


def keep_what_create_made(slots: StateSlots[Cache], memory: Memory, session: Session) -> Cache:
    """Return a cache that its session has not used yet."""
    with slots.borrow(session) as state:
        state.append([1])
        return state.kv_cache


def keep_what_was_cut(slots: StateSlots[Cache], memory: Memory, session: Session) -> Cache:
    """Return a cache that has been truncated."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state:
        state.rewind(1, pending=0)
        return state.kv_cache


def keep_what_was_set(slots: StateSlots[Cache], memory: Memory, session: Session) -> Cache:
    """Return a cache that the engine has set."""
    with slots.borrow(session) as state:
        state.append([1])
        state.kv_cache = cache = memory.new([])
    return cache


@pytest.mark.parametrize(
    "keep", [keep_reference, keep_what_create_made, keep_what_was_cut, keep_what_was_set]
)
@pytest.mark.parametrize("functional", [False, True])
def test_wherever_it_came_from(
    session: Session,
    keep: Callable[[StateSlots[Cache], Memory, Session], Cache],
    *,
    functional: bool,
) -> None:
    """Whatever put the cache into its session, no other session gets it, too."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    cache = keep(slots, memory, session)
    with Session() as other, slots.borrow(other) as state:
        with pytest.raises(ValueError, match="has this KV cache"):
            state.kv_cache = cache
        assert cache.released == 0
    session.close()


def test_the_cache_of_a_branch(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What `share` has made belongs to the branch."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state, state.branch():
        memory.feed(state, [])
        with pytest.raises(ValueError, match="has this KV cache"):
            state.kv_cache = memory.caches[-1]


def test_a_cache_kept_for_a_rollback(session: Session) -> None:
    """The cache of the last commit is still the session's after a step has replaced it: it may come back."""
    memory = Memory(functional=True)
    slots = memory.slots()
    prepare(slots, memory, session, 1)
    (first,) = memory.live()
    with Session() as other, slots.borrow_all([session, other]) as (mine, theirs):
        memory.step(mine, 2)
        with pytest.raises(ValueError, match="has this KV cache"):
            theirs.kv_cache = first
    session.close()
    memory.check_all_released()


def take(slots: StateSlots[Cache], session: Session) -> None:
    """Take the cache out."""
    with slots.borrow(session) as state:
        state.take_kv_cache()


def replace(slots: StateSlots[Cache], session: Session) -> None:
    """Set another cache."""
    with slots.borrow(session) as state:
        state.kv_cache = Cache([1])


def evict(slots: StateSlots[Cache], session: Session) -> None:
    """Free the cache."""
    slots.evict(session)


def close(slots: StateSlots[Cache], session: Session) -> None:
    """Close the session."""
    session.close()


@pytest.mark.parametrize("free", [evict, close, take, replace])
def test_free_again(
    slots: StateSlots[Cache],
    memory: Memory,
    free: Callable[[StateSlots[Cache], Session], None],
) -> None:
    """A cache that its session has no more can be given to another one, as from a pool."""
    with Session() as session, Session() as other:
        prepare(slots, memory, session, 1)
        (cache,) = memory.live()
        free(slots, session)
        cache.released, cache.tokens = 0, []  # the pool makes it new
        with slots.borrow(other) as state:
            state.kv_cache = cache
        assert other._kv_cache is cache


def test_free_again_after_a_drop(slots: StateSlots[Cache], memory: Memory) -> None:
    """The same holds if the session was dropped."""
    with pytest.warns(ResourceWarning):
        prepare(slots, memory, Session(), 1)
    (cache,) = memory.caches
    cache.released, cache.tokens = 0, []
    with Session() as other, slots.borrow(other) as state:
        state.kv_cache = cache
        assert state.kv_cache is cache


def test_without_release(session: Session) -> None:
    """Without `release`, nothing can be freed twice, and sessions may share a cache that is never changed."""
    slots = StateSlots[tuple[int, ...]](create=tuple, length=len)
    with Session() as other, slots.borrow_all([session, other]) as states:
        for state in states:
            state.append([1])
            state.kv_cache = one = (1,)
            state.advance(1)
            assert state.kv_cache is one


def test_nothing_is_remembered_of_the_past(slots: StateSlots[Cache], memory: Memory) -> None:
    """However many caches come and go, no trace is left of those that are gone."""
    from inference_session._session import HOLDERS  # noqa: PLC0415

    before = len(HOLDERS)
    functional = Memory(functional=True).slots()
    for _ in range(100):
        with Session() as one, Session() as other:
            prepare(slots, memory, one, 1, 2)
            with functional.borrow(other) as state:
                for token in range(5):
                    state.append([token])
                    state.kv_cache = Cache([*state.kv_cache.tokens, token])
                    state.advance(1)
                state.rewind(2)
                state.branch().close()
    assert len(HOLDERS) == before
