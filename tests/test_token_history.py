"""The token history of a borrowed state: a live, read-only sequence."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from tests.caches import Cache

from inference_session import Session
from inference_session.engine import StateSlots


def test_history_is_a_sequence(session: Session, slots: StateSlots[Cache]) -> None:
    """An engine may do with the history whatever it does with a list, but for changing it."""
    with slots.borrow(session) as state:
        state.append([5, 6, 7, 6])
        history = state.token_history
        assert isinstance(history, Sequence)
        assert len(history) == 4
        assert (history[0], history[-1]) == (5, 6)
        assert history[1:3] == [6, 7]
        assert history[::-1] == [6, 7, 6, 5]
        assert list(history) == [5, 6, 7, 6]
        assert list(reversed(history)) == [6, 7, 6, 5]
        assert 7 in history
        assert 8 not in history
        assert history.index(6) == 1
        assert history.count(6) == 2
        for position in (4, -5):
            with pytest.raises(IndexError):
                history[position]


def test_history_is_compared_as_tokens(session: Session, slots: StateSlots[Cache]) -> None:
    """A test can compare it with the tokens it expects."""
    with slots.borrow(session) as state:
        state.append([5, 6])
        history = state.token_history
        assert history == [5, 6]
        assert history == cast("object", (5, 6))
        assert history == state.token_history
        assert history != [5, 7]
        assert history != cast("object", {5, 6})
        assert history != cast("object", 5)
        with pytest.raises(TypeError, match="unhashable"):
            hash(history)


def test_history_is_live(session: Session, slots: StateSlots[Cache]) -> None:
    """It's asked for once, and always current; an iteration under way isn't disturbed."""
    with slots.borrow(session) as state:
        history = state.token_history
        assert len(history) == 0
        assert not history
        state.append([1, 2, 3])
        assert history == [1, 2, 3]
        for token in history:
            state.append([token + 10])
        assert history == [1, 2, 3, 11, 12, 13]
        state.rewind(1)
        assert history == [1]


def test_history_is_read_only(session: Session, slots: StateSlots[Cache]) -> None:
    """Only a borrow's own members change the tokens: what they hand out is a view or a copy."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        history = cast("Any", state.token_history)
        for change in (
            lambda: history.append(4),
            lambda: history.__setitem__(0, 4),
            lambda: history.__delitem__(0),
            lambda: setattr(state, "token_history", [4]),
            lambda: setattr(state, "kv_length", 4),
            lambda: setattr(state, "pending", [4]),
        ):
            with pytest.raises((AttributeError, TypeError)):
                change()
        history[:].append(4)
        cast("list[int]", state.pending).append(4)
        assert history == [1, 2, 3]


def test_history_shows_no_tokens(session: Session, slots: StateSlots[Cache]) -> None:
    """What a debugger or a log shows of it is its length."""
    with slots.borrow(session) as state:
        state.append([123456])
        assert repr(state.token_history) == "<token history, 1 tokens>"


# append and pending
