"""The key: what a KV cache depends on besides the tokens."""

# ruff: noqa: PT012 what's tested is how a block fails

from collections.abc import Sequence
from typing import cast

import pytest
from tests.caches import Cache, Fault, Memory

from inference_session import Session, SessionRegistry
from inference_session.engine import StateSlots
from inference_session.exceptions import BorrowExpiredError, SessionBusyError


def fill(slots: StateSlots[Cache], memory: Memory, session: Session, key: str) -> None:
    """Give a session three tokens, all of them cached."""
    with slots.borrow(session, key=key) as state:
        memory.step(state, 1, 2, 3)


def covered(session: Session) -> int:
    """Return how much is cached, without a borrow."""
    return session._kv_length


def test_the_same_key(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What was computed under a key is kept for it, also if the text is another object."""
    fill(slots, memory, session, "adapter-a@7")
    with slots.borrow(session, key=f"adapter-a@{3 + 4}") as state:
        assert (state.kv_length, state.kv_cache.tokens) == (3, [1, 2, 3])
    with slots.borrow_all([session], key="adapter-a@7") as (state,):
        assert state.kv_length == 3


@pytest.mark.parametrize(("before", "after"), [("", "a"), ("a", "b"), ("a", "")])
@pytest.mark.parametrize("batch", [False, True])
def test_another_key(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    before: str,
    after: str,
    *,
    batch: bool,
) -> None:
    """A KV cache of another key is released when the borrow begins; all tokens are there, and pending."""
    fill(slots, memory, session, before)
    (old,) = memory.live()
    if batch:
        with slots.borrow_all([session], key=after) as (state,):
            assert old.released == 1
            assert (state.kv_length, state.pending) == (0, [1, 2, 3])
    else:
        with slots.borrow(session, key=after) as state:
            assert old.released == 1
            assert (state.kv_length, state.pending) == (0, [1, 2, 3])
    with slots.borrow(session, key=after) as state:
        memory.step(state)
    with slots.borrow(session, key=after) as state:
        assert state.kv_length == 3


def test_the_default_is_a_key(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Not to name one is to name the empty one."""
    fill(slots, memory, session, "a")
    with slots.borrow(session) as state:
        assert state.kv_length == 0


def test_a_failure_keeps_the_new_key(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What the borrow let go of doesn't come back; what it computed is of its own key."""
    fill(slots, memory, session, "a")
    with pytest.raises(MemoryError), slots.borrow(session, key="b") as state:
        memory.step(state, 4)
        state.commit()
        raise MemoryError
    with slots.borrow(session, key="b") as state:
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3, 4], 4)
    with pytest.raises(MemoryError), slots.borrow(session, key="a") as state:
        raise MemoryError
    assert covered(session) == 0
    assert not memory.live()


def test_a_borrow_that_is_refused_changes_nothing(slots: StateSlots[Cache], memory: Memory) -> None:
    """A batch that isn't had releases nothing, whatever its key."""
    with Session() as free, Session() as busy:
        fill(slots, memory, free, "a")
        fill(slots, memory, busy, "a")
        with slots.borrow(busy, key="a"):
            for batch in ([free, busy], [busy, free]):
                with pytest.raises(SessionBusyError), slots.borrow_all(batch, key="b"):
                    pass
        assert (covered(free), covered(busy)) == (3, 3)
        with slots.borrow_all([free, busy], key="a") as states:
            assert [state.kv_length for state in states] == [3, 3]


@pytest.mark.parametrize("key", [None, b"a", 7], ids=repr)
def test_keys_are_strings(
    session: Session, slots: StateSlots[Cache], memory: Memory, key: object
) -> None:
    """Something else is an error that says what it got, and changes nothing."""
    fill(slots, memory, session, "a")
    for batch in (False, True):
        wrong = cast("str", key)
        with pytest.raises(TypeError, match=f"key must be a str, got '{type(key).__name__}'"):
            if batch:
                slots.borrow_all([session], key=wrong).__enter__()
            else:
                slots.borrow(session, key=wrong).__enter__()
        assert not session.borrowed
        assert covered(session) == 3


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_a_release_that_fails(
    slots: StateSlots[Cache], memory: Memory, error: type[BaseException], *, batch: bool
) -> None:
    """Its error comes from the borrow that let go of the KV cache; no session stays taken, no token is lost."""
    sessions: Sequence[Session] = [Session(), Session()] if batch else [Session()]
    registry = SessionRegistry()
    for session in sessions:
        fill(slots, memory, session, "a")
    memory.fail(Fault("release", error()))
    with pytest.raises(error):
        if batch:
            slots.borrow_all(sessions, key="b").__enter__()
        else:
            slots.borrow(sessions[0], key="b").__enter__()
    assert not any(session.borrowed for session in sessions)
    assert [session.token_count for session in sessions] == [3] * len(sessions)
    assert covered(sessions[0]) == 0
    with slots.borrow_all(sessions, key="b") as states:
        assert [state.pending for state in states] == [[1, 2, 3]] * len(sessions)
    for session in sessions:
        session.close()
    registry.close()
    memory.check_all_released()


def test_a_budget_knows(memory: Memory) -> None:
    """A registry counts what is released for another key as free, at the end of the step."""
    registry = SessionRegistry(max_kv_bytes=10)
    slots = StateSlots(
        create=memory.create,
        length=memory.length,
        release=memory.release,
        nbytes=lambda cache: len(cache.tokens),
    )
    session = registry.open()
    fill(slots, memory, session, "a")
    assert registry._kv_total == 3
    with slots.borrow(session, key="b"):
        pass
    assert registry._kv_total == 0
    fill(slots, memory, session, "b")
    memory.fail(Fault("release", ConnectionError()))
    with pytest.raises(ConnectionError):
        slots.borrow(session, key="c").__enter__()
    assert registry._kv_total == 0
    registry.close()


def test_evict_under_any_key(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Eviction doesn't ask for the key: it keeps nothing that depends on it."""
    fill(slots, memory, session, "a")
    slots.evict(session)
    assert not memory.live()
    with slots.borrow(session, key="a") as state:
        assert state.pending == [1, 2, 3]


@pytest.mark.parametrize("batch", [False, True])
def test_a_release_that_ends_the_borrow(memory: Memory, *, batch: bool) -> None:
    """A borrow that is over before it has begun gets nothing, and changes nothing any more."""

    def release(cache: Cache) -> None:
        memory.release(cache)
        if block is not None:
            block.__exit__(None, None, None)

    slots = StateSlots(create=memory.create, length=memory.length, release=release)
    block = None
    with Session() as session:
        fill(slots, memory, session, "a")
        block = slots.borrow_all([session], key="b") if batch else slots.borrow(session, key="b")
        with pytest.raises(BorrowExpiredError):
            block.__enter__()
        block = None
        assert not session.borrowed
        with slots.borrow(session, key="a") as state:
            assert state.pending == [1, 2, 3]
    memory.check_all_released()
