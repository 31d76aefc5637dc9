"""Further slots: typed values beside the tokens, committed and rolled back with them."""

# ruff: noqa: PT012 what's tested is how a block fails

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from inference_session import Session
from inference_session.engine import Slot, StateSlots
from inference_session.exceptions import BorrowExpiredError


class Grammar:
    """Something that can be told from others, and seen to be gone."""


SLOTS = StateSlots(create=list[int], length=len)
OTHERS = StateSlots(create=list[int], length=len)
TEXT = Slot(str)
SEEN = Slot(list[str])


def test_the_first_value(session: Session) -> None:
    """It's what the factory returns, once for each session, and the same object each time."""
    with SLOTS.borrow(session) as state:
        assert state[TEXT] == ""
        seen = state[SEEN]
        assert state[SEEN] is seen
    with SLOTS.borrow(session) as state:
        assert state[SEEN] is seen
    with Session() as other, SLOTS.borrow(other) as state:
        assert state[SEEN] == []
        assert state[SEEN] is not seen


def test_a_commit_keeps_and_a_failure_undoes(session: Session) -> None:
    """Values are what they were at the last commit, as the tokens are."""
    with SLOTS.borrow(session) as state:
        state[TEXT] = "a"
    with pytest.raises(MemoryError), SLOTS.borrow(session) as state:
        state[TEXT] = "b"
        state[TEXT] += "c"
        state[SEEN] = ["b"]
        assert state[TEXT] == "bc"
        raise MemoryError
    with SLOTS.borrow(session) as state:
        assert state[TEXT] == "a"
        assert state[SEEN] == []
    with pytest.raises(MemoryError), SLOTS.borrow(session) as state:
        state[TEXT] = "d"
        state.commit()
        state[TEXT] = "e"
        raise MemoryError
    with SLOTS.borrow(session) as state:
        assert state[TEXT] == "d"


def test_a_first_value_is_undone_too(session: Session) -> None:
    """The next to ask gets a new one."""
    seen: list[list[str]] = []
    with pytest.raises(MemoryError), SLOTS.borrow(session) as state:
        seen.append(state[SEEN])
        raise MemoryError
    with SLOTS.borrow(session) as state:
        assert state[SEEN] is not seen[0]


def test_a_batch_is_undone_as_one() -> None:
    """One failure undoes the values of all sessions."""
    with Session() as left, Session() as right:
        with SLOTS.borrow_all([left, right]) as states:
            for state in states:
                state[TEXT] = "a"
        with pytest.raises(MemoryError), SLOTS.borrow_all([left, right]) as states:
            for state in states:
                state[TEXT] = "b"
            raise MemoryError
        with SLOTS.borrow_all([left, right]) as states:
            assert [state[TEXT] for state in states] == ["a", "a"]


def test_an_abandoned_block_is_undone(session: Session) -> None:
    """Nobody sees what a block that was dropped has set."""
    block = SLOTS.borrow(session)
    block.__enter__()[TEXT] = "a"
    del block
    with SLOTS.borrow(session) as state:
        assert state[TEXT] == ""


def test_values_survive_what_happens_to_the_cache(session: Session) -> None:
    """Eviction, rewinding and another prompt concern the tokens and the KV cache only."""
    with SLOTS.borrow(session) as state:
        state.append([1, 2, 3])
        state.kv_cache.extend([1, 2])
        state.advance(2)
        state[TEXT] = "a"
    SLOTS.evict(session)
    with SLOTS.borrow(session) as state:
        state.rewind(1)
        state.reuse_prefix([7, 8])
        state.rewind(0)
        assert state[TEXT] == "a"
    with OTHERS.borrow(session) as state:  # it holds no tokens, so any engine may begin it
        assert state[TEXT] == "a"
    with SLOTS.borrow(session, key="another") as state:
        assert state[TEXT] == "a"


@pytest.mark.parametrize("how", ["closed", "dropped", "closed in the block", "abandoned"])
def test_values_go_with_the_session(how: str) -> None:
    """A session that was closed holds nothing of the conversation."""
    slot, undone = Slot(Grammar), Slot(Grammar)
    session = Session()
    with SLOTS.borrow(session) as state:
        state.append([1])
        value = weakref.ref(state[slot])
    del state
    block = SLOTS.borrow(session)
    if how in {"closed in the block", "abandoned"}:
        state = block.__enter__()
        late = weakref.ref(state[undone])
        session.close()
        assert value() is not None
        if how == "closed in the block":
            block.__exit__(None, None, None)
        del state, block
        gc.collect()
        assert late() is None
    elif how == "closed":
        session.close()
    else:
        del block, session
    gc.collect()
    assert value() is None


def test_a_value_that_is_replaced_goes_with_the_commit(session: Session) -> None:
    """Only the savepoint keeps it, for as long as it may come back."""
    slot = Slot(Grammar)
    with SLOTS.borrow(session) as state:
        value = weakref.ref(state[slot])
        state.commit()
        state[slot] = Grammar()
        assert value() is not None
        state.commit()
        gc.collect()
        assert value() is None


def test_none_is_a_value(session: Session) -> None:
    """A factory may return None, and is asked only once."""
    made: list[None] = []
    slot = Slot(lambda: made.append(None))
    with SLOTS.borrow(session) as state:
        assert state[slot] is state[slot] is None
    assert len(made) == 1


def test_a_factory_that_fails(session: Session) -> None:
    """Its error goes on, and nothing is changed."""

    def fails() -> int:
        raise StopIteration

    slot = Slot(fails)
    with SLOTS.borrow(session) as state:
        with pytest.raises(StopIteration):
            state[slot]
        assert session._values == {}
        state[slot] = 5
        assert state[slot] == 5


def test_a_factory_that_ends_the_borrow(session: Session) -> None:
    """What it made comes too late."""
    block = SLOTS.borrow(session)
    state = block.__enter__()
    slot = Slot(lambda: block.__exit__(None, None, None))
    with pytest.raises(BorrowExpiredError):
        state[slot]
    assert session._values == {}


def test_slots_are_told_apart(session: Session) -> None:
    """Each is a key of its own, whatever its factory."""
    one, other = Slot(int), Slot(int)
    with SLOTS.borrow(session) as state:
        state[one] = 1
        state[other] = 2
        assert (state[one], state[other]) == (1, 2)
    assert one != other
    assert len({one, other, one}) == 2


NO_SLOT: list[Any] = [0, "text", None, Slot, int, slice(1)]


@pytest.mark.parametrize("wrong", NO_SLOT, ids=repr)
def test_only_slots(session: Session, wrong: Any) -> None:
    """Whatever else is in the brackets is an error that names its type."""
    with SLOTS.borrow(session) as state:
        with pytest.raises(TypeError, match=rf"Slot.* got '{type(wrong).__name__}'|unhashable"):
            state[wrong]
        with pytest.raises(TypeError, match=rf"only a Slot.* got '{type(wrong).__name__}'"):
            state[wrong] = 1
        with pytest.raises(TypeError):
            list(cast("list[int]", state))
        assert session._values == {}


def test_factories_are_functions() -> None:
    """A value in the place of its factory is told at once, and isn't shown."""
    with pytest.raises(TypeError, match="factory must be a function, got 'str'") as caught:
        Slot(cast("Callable[[], str]", "secret"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_slots_are_never_copied(duplicate: Callable[[object], object]) -> None:
    """A copy would be another key, and what it finds another value."""
    with pytest.raises(TypeError, match="share this very object"):
        duplicate(TEXT)


def test_a_slot_never_changes() -> None:
    """What a slot is for is fixed where it's made, and nothing of it shows."""
    with pytest.raises(AttributeError):
        TEXT._factory = int  # type: ignore[misc, assignment]  # pyright: ignore[reportAttributeAccessIssue]
    assert "factory" not in repr(TEXT)


def test_a_session_without_slots_has_nothing_of_them(session: Session) -> None:
    """All such sessions share one empty dict, which stays empty."""
    with SLOTS.borrow(session) as state:
        state.append([1])
    with Session() as other:
        assert session._values is other._values
        with SLOTS.borrow(other) as state:
            state[TEXT] = "a"
        assert session._values == {}
        assert Session()._values == {}
