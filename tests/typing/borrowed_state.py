"""What type checkers know of a borrowed state, and which of its misuses they find."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import assert_type
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, Slot


def test_members_are_typed(state: BorrowedState[bytes]) -> None:
    """What an engine reads is typed, the KV cache by what `create` returns."""
    assert_type(state.kv_cache, bytes)
    assert_type(state.token_history, Sequence[int])
    assert_type(state.kv_length, int)
    assert_type(state.pending, Sequence[int])
    assert_type(state.session, Session)


def test_methods_are_typed(state: BorrowedState[bytes]) -> None:
    """What an engine calls is typed: only `reuse_prefix` has something to return."""
    assert_type(state.reuse_prefix([1, 2]), int)
    append: Callable[[list[int]], None] = state.append
    append([1])
    advance: Callable[[int], None] = state.advance
    advance(1)
    commit: Callable[[], None] = state.commit
    commit()
    rewind: Callable[[int], None] = state.rewind
    rewind(1)
    state.rewind(1, pending=0)
    assert_type(state.chunks(512), Iterator[list[int]])
    for part in state.chunks(512, keep=0):
        state.advance(len(part))
    assert_type(state.take_kv_cache(), bytes)
    assert_type(state.branch(), Session)
    assert_type(state.branch(3, id=uuid4()), Session)


def test_kv_cache_can_be_set(state: BorrowedState[bytes]) -> None:
    """A functional KV cache is set, in place too, and keeps its type."""
    state.kv_cache = b"kv"
    state.kv_cache += b"kv"
    assert_type(state.kv_cache, bytes)


def test_tokens_come_in_many_shapes(
    state: BorrowedState[bytes],
    buffer: "array[int]",
    tensor: NDArray[np.int32],
    iterator: Iterator[int],
) -> None:
    """Whatever holds ints is taken as tokens."""
    state.append([1])
    state.append((1, 2))
    state.append(range(3))
    state.append(buffer)
    state.append(tensor)
    state.append(iterator)
    state.append(token + 1 for token in state.pending)
    state.append(state.token_history[:2])
    state.reuse_prefix(buffer)
    state.reuse_prefix(tensor)


def test_token_history_is_a_sequence(state: BorrowedState[bytes]) -> None:
    """The history reads as a sequence of ints."""
    assert_type(state.token_history[-1], int)
    assert_type(state.token_history[1:], Sequence[int])
    assert_type(len(state.token_history), int)
    assert_type(1 in state.token_history, bool)
    assert_type(list(state.token_history), list[int])


def empty_text() -> str:
    """Return what a slot begins with."""
    return ""


TEXT = Slot(empty_text)
COUNTS = Slot(dict[str, int])
OWNER: Slot[str | None] = Slot(lambda: None)


def test_slots_are_typed(state: BorrowedState[bytes]) -> None:
    """A further slot has the type of its first value, without an annotation, or the one that is annotated."""
    assert_type(TEXT, Slot[str])
    assert_type(COUNTS, Slot[dict[str, int]])
    assert_type(state[TEXT], str)
    assert_type(state[COUNTS], dict[str, int])
    assert_type(state[OWNER], str | None)
    state[TEXT] = "a"
    state[TEXT] += "b"
    state[COUNTS]["a"] = 1
    state[OWNER] = "somebody"


def test_slots_keep_their_types(state: BorrowedState[bytes]) -> None:
    """A value of another type can't be set, and only slots are keys."""
    state[TEXT] = 1  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-assignment]
    state[TEXT] = None  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-assignment]
    state["text"] = "a"  # type: ignore[index]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-assignment]
    state[0]  # type: ignore[index]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    del state[TEXT]  # type: ignore[attr-defined]  # pyright: ignore[reportIndexIssue]  # ty: ignore[not-subscriptable]


def test_slots_begin_with_a_function() -> None:
    """Neither with a value, nor with nothing."""
    Slot("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Slot(len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Slot()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]


def test_torn_is_a_length() -> None:
    """`TORN` is what `length` returns where layers disagree: an int."""

    def length(layers: list[int]) -> int:
        return layers[0] if len(set(layers)) == 1 else TORN

    assert_type(length([1, 2]), int)


def test_kv_cache_keeps_its_type(state: BorrowedState[bytes]) -> None:
    """A KV cache of another type can't be set."""
    state.kv_cache = "kv"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.kv_cache = None  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]


def test_members_cannot_be_set(state: BorrowedState[bytes]) -> None:
    """Only the KV cache can be set, nothing else, nor anything invented."""
    state.token_history = [1]  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.kv_length = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.kv_length += 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.session = Session()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.pending = [1]  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    state.tokens = [1]  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[missing-attribute]


def test_members_cannot_be_deleted(state: BorrowedState[bytes]) -> None:
    """Nothing can be deleted, the KV cache neither: it is evicted instead. mypy and pyrefly never look at `del`."""
    del state.kv_cache  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del state.token_history  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del state.kv_length  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del state.session  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del state.pending  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]


def test_token_history_cannot_be_changed(state: BorrowedState[bytes]) -> None:
    """The history is changed by methods of the state, not by its own."""
    state.token_history[0] = 1  # type: ignore[index]  # pyright: ignore[reportIndexIssue]  # ty: ignore[invalid-assignment]
    del state.token_history[0]  # type: ignore[attr-defined]  # pyright: ignore[reportIndexIssue]  # ty: ignore[not-subscriptable]
    state.token_history.append(1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # ty: ignore[missing-attribute]


def test_pending_cannot_be_changed(state: BorrowedState[bytes]) -> None:
    """Nor is what is pending."""
    state.pending[0] = 1  # type: ignore[index]  # pyright: ignore[reportIndexIssue]  # ty: ignore[invalid-assignment]
    state.pending.append(1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # ty: ignore[missing-attribute]


def test_tokens_are_ints(state: BorrowedState[bytes]) -> None:
    """Tokens are several ints: no text, no floats, not a single one."""
    state.append(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.append([0.5])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.append("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.append(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.append(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.reuse_prefix(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.reuse_prefix(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_counts_are_ints(state: BorrowedState[bytes]) -> None:
    """What is counted is an int, and must be said."""
    state.advance(0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.advance([1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.advance()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    state.chunks("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.chunks()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    state.rewind("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    state.rewind(1, pending=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_pending_is_by_keyword(state: BorrowedState[bytes]) -> None:
    """Two numbers in a row would be a riddle."""
    state.chunks(1, 0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]
    state.rewind(1, 0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]


def test_states_cannot_be_subclassed() -> None:
    """`BorrowedState` is final."""

    class State(BorrowedState[bytes]):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]  # ty: ignore[subclass-of-final-class]
        pass
