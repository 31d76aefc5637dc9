"""Chunks: the pending tokens in parts, to feed them to a model."""

# ruff: noqa: PT012 what's tested is how a block fails

from collections.abc import Callable

import pytest

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import BorrowExpiredError, SessionClosedError


def to_even(cache: list[int], length: int) -> list[int]:
    """Keep an even number of tokens."""
    return cache[: length // 2 * 2]


def exactly(cache: list[int], length: int) -> list[int]:
    """Keep the first tokens."""
    return cache[:length]


SLOTS = StateSlots(create=list[int], length=len, truncate=exactly)


def feed_in(state: BorrowedState[list[int]], size: int, keep: int = 1) -> list[list[int]]:
    """Feed the pending tokens, and return the parts."""
    parts: list[list[int]] = []
    for part in state.chunks(size, keep=keep):
        state.kv_cache = [*state.kv_cache, *part]
        state.advance(len(part))
        parts.append(part)
    return parts


@pytest.mark.parametrize(
    ("size", "keep", "parts"),
    [
        (3, 1, [[0, 1, 2], [3, 4, 5], [6]]),
        (3, 2, [[0, 1, 2], [3, 4, 5]]),
        (3, 0, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (100, 1, [[0, 1, 2, 3, 4, 5, 6]]),
        (1, 6, [[0], [1]]),
        (3, 8, []),
        (3, 100, []),
    ],
)
def test_parts(session: Session, size: int, keep: int, parts: list[list[int]]) -> None:
    """All tokens come once, in order, in lists of at most `size`; the last `keep` stay pending."""
    with SLOTS.borrow(session) as state:
        state.append(range(8))
        assert feed_in(state, size, keep) == parts
        assert len(state.pending) == min(keep, 8)
        assert feed_in(state, size, keep) == []


def test_the_last_token_is_kept_by_default(session: Session) -> None:
    """So there is something to decode from."""
    with SLOTS.borrow(session) as state:
        state.append([1, 2])
        assert next(state.chunks(10)) == [1]


@pytest.mark.parametrize("keep", [1, 2, 3, 7])
@pytest.mark.parametrize("truncate", [exactly, to_even, None], ids=["exact", "even", "none"])
def test_a_covered_session(
    truncate: Callable[[list[int], int], list[int]] | None, keep: int
) -> None:
    """What is missing to `keep` is uncovered first, and what that costs more is fed again."""
    slots = StateSlots(create=list[int], length=len, truncate=truncate)
    with Session() as session, slots.borrow(session) as state:
        state.append(range(6))
        feed_in(state, 10, keep=0)
        assert not state.pending
        feed_in(state, 2, keep=keep)
        assert len(state.pending) == min(keep, 6)
        assert state.kv_cache == list(range(6 - min(keep, 6)))
        assert state.token_history == list(range(6))


def test_an_empty_session(session: Session) -> None:
    """There is nothing to feed, and nothing to uncover."""
    with SLOTS.borrow(session) as state:
        assert list(state.chunks(1)) == []
        assert list(state.chunks(1, keep=5)) == []
        assert state.token_history == []


@pytest.mark.parametrize(("size", "keep"), [(0, 1), (-1, 1), (1, -1)])
def test_numbers_are_checked_at_once(session: Session, size: int, keep: int) -> None:
    """A number that makes no sense is told where it's given, and changes nothing."""
    with SLOTS.borrow(session) as state:
        state.append([1, 2])
        feed_in(state, 1, keep=0)
        with pytest.raises(ValueError, match=f"got {min(size, keep)}"):
            state.chunks(size, keep=keep)
        with pytest.raises(TypeError):
            state.chunks(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert state.kv_length == 2


def test_closing_cancels(session: Session) -> None:
    """A session that is closed gets no further part, and the block rolls back."""
    with pytest.raises(SessionClosedError) as caught, SLOTS.borrow(session) as state:
        state.append(range(9))
        for part in state.chunks(2):
            state.kv_cache = [*state.kv_cache, *part]
            state.advance(len(part))
            state.commit()
            if state.kv_length == 4:
                session.close()
    assert caught.value.session_id == session.id
    assert session.closed
    assert session.token_count == 0


def test_closed_before_the_first_part(session: Session) -> None:
    """Nobody waits for that one either; but where nothing is to be fed, nothing is refused."""
    with SLOTS.borrow(session) as state:
        state.append([1, 2])
        session.close()
        with pytest.raises(SessionClosedError):
            next(state.chunks(1))
        assert list(state.chunks(1, keep=2)) == []


def test_a_part_that_was_not_advanced(session: Session) -> None:
    """Feeding it again or leaving it out would be wrong, so the engine is told."""
    with SLOTS.borrow(session) as state:
        state.append(range(5))
        parts = state.chunks(2)
        assert next(parts) == [0, 1]
        with pytest.raises(RuntimeError, match=r"covers 0 tokens, .* should be 2") as caught:
            next(parts)
        assert "[0" not in str(caught.value)
        parts = state.chunks(2)
        next(parts)
        state.kv_cache = [0]
        state.advance(1)
        with pytest.raises(RuntimeError, match="call advance"):
            next(parts)


def test_the_last_part_counts_too(session: Session) -> None:
    """The end of the loop isn't reached with tokens that were never fed."""
    with pytest.raises(RuntimeError), SLOTS.borrow(session) as state:
        state.append([1, 2])
        for _ in state.chunks(5):
            pass


def test_tokens_that_come_meanwhile(session: Session) -> None:
    """What is appended between two parts is pending like the others."""
    with SLOTS.borrow(session) as state:
        state.append([0, 1, 2])
        parts: list[list[int]] = []
        for part in state.chunks(2):
            state.kv_cache = [*state.kv_cache, *part]
            state.advance(len(part))
            parts.append(part)
            if len(parts) == 1:
                state.append([3, 4])
        assert parts == [[0, 1], [2, 3]]


def test_after_the_block(session: Session) -> None:
    """Parts that are asked for too late are refused."""
    with SLOTS.borrow(session) as state:
        state.append(range(5))
        begun, untouched = state.chunks(2), state.chunks(2)
        next(begun)
    for parts in (begun, untouched):
        with pytest.raises(BorrowExpiredError):
            next(parts)


def test_a_truncate_that_fails(session: Session) -> None:
    """Its error comes from the call, and the tokens are pending."""

    def fails(cache: list[int], length: int) -> list[int]:
        raise ConnectionError

    slots = StateSlots(create=list[int], length=len, truncate=fails)
    with slots.borrow(session) as state:
        state.append([1, 2])
        feed_in(state, 5, keep=0)
        with pytest.raises(ConnectionError):
            state.chunks(5)
        assert state.pending == [1, 2]
