"""States whose block has ended."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import pytest
from tests.caches import Cache, Memory, look, prepare
from tests.members import MEMBERS

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
)


USED = pytest.mark.parametrize("use", MEMBERS.values(), ids=MEMBERS.keys())


@USED
@pytest.mark.parametrize("fails", [False, True])
def test_expired(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    use: Callable[[BorrowedState[Cache]], object],
    *,
    fails: bool,
) -> None:
    """A state that was kept can't reach the session when its block is over, however it ended."""
    prepare(slots, memory, session, 1, 2)
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(MemoryError))
        state = stack.enter_context(slots.borrow(session))
        if fails:
            raise MemoryError
    with pytest.raises(BorrowExpiredError) as caught:
        use(state)
    assert caught.value.session_id == session.id
    assert look(slots, session) == ([1, 2], 2)


@USED
def test_expired_while_another_borrows(
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    use: Callable[[BorrowedState[Cache]], object],
) -> None:
    """A state that was kept can't disturb the next borrow of its session."""
    with slots.borrow(session) as old:
        memory.step(old, 1, 2)
    with slots.borrow(session) as state:
        memory.step(state, 3)
        with pytest.raises(BorrowExpiredError):
            use(old)
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 3)


@USED
def test_not_begun(
    session: Session, slots: StateSlots[Cache], use: Callable[[BorrowedState[Cache]], object]
) -> None:
    """Without a `with` statement there's no borrow."""
    borrow = cast("BorrowedState[Cache]", slots.borrow(session))
    with pytest.raises(BorrowExpiredError):
        use(borrow)
    assert repr(session) == f"<Session {session.id} idle, 0 tokens>"


HISTORY_USES: dict[str, Callable[[Sequence[int]], object]] = {
    "len": len,
    "list": list[int],
    "repr": repr,
    "item": lambda view: view[0],
    "slice": lambda view: view[:],
    "==": lambda view: view == [],
    "in": lambda view: 1 in view,
}


@pytest.mark.parametrize(
    "use",
    HISTORY_USES.values(),
    ids=HISTORY_USES.keys(),
)
def test_expired_history(
    session: Session, slots: StateSlots[Cache], use: Callable[[Sequence[int]], object]
) -> None:
    """The view of the history ends with the block, too: it never shows what a later borrow does."""
    with slots.borrow(session) as state:
        state.append([1])
        history = state.token_history
    with pytest.raises(BorrowExpiredError):
        use(history)
    with slots.borrow(session), pytest.raises(BorrowExpiredError):
        use(history)


def test_repr_of_a_state(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What a debugger shows of a state are numbers, and that it's over when it is."""
    with slots.borrow(session) as state:
        memory.step(state, 123456)
        state.append([123456])
        text = repr(state)
        assert text == f"<BorrowedState of session {session.id}, 2 tokens, 1 in the KV cache>"
    assert repr(state) == f"<BorrowedState of session {session.id}, not borrowed>"


def test_close_does_not_expire(session: Session, slots: StateSlots[Cache]) -> None:
    """Closing lets the borrow that is under way end in peace, and expire then."""
    with slots.borrow(session) as state:
        session.close()
        state.append([1])
        assert state.token_history == [1]
        state.commit()
    with pytest.raises(BorrowExpiredError):
        state.append([2])
