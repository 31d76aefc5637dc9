"""A borrow: what each member promises, who may borrow, and what becomes of a session when the block ends."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
import pickle
import weakref
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import attrs
import pytest
from tests.caches import Cache, Fault, Lie, Memory

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, Slot, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionOwnerError,
    StateMismatchError,
)


ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, CancelledError]


def look(slots: StateSlots[Cache], session: Session) -> tuple[list[int], int]:
    """Return a session's history, and how much of it is cached."""
    with slots.borrow(session) as state:
        return list(state.token_history), state.kv_length


def prepare(slots: StateSlots[Cache], memory: Memory, session: Session, *tokens: int) -> None:
    """Give a session tokens, all of them cached."""
    with slots.borrow(session) as state:
        memory.step(state, *tokens)


# StateSlots


@pytest.mark.parametrize("name", ["create", "length", "truncate", "release", "nbytes"])
def test_slots_take_functions(name: str) -> None:
    """An engine that passes something else is told so at once, not in the middle of a step."""
    functions: dict[str, Any] = {"create": list, "length": len, name: 5}
    with pytest.raises(TypeError):
        StateSlots(**functions)


def test_slots_need_create_and_length_only() -> None:
    """The other functions are optional; all are given by name, as nobody would remember their order."""
    slots = StateSlots[list[int]](create=list, length=len)
    assert (slots.truncate, slots.release, slots.nbytes) == (None, None, None)
    with pytest.raises(TypeError):
        cast("Callable[..., object]", StateSlots)(list, len)


def test_slots_never_change(slots: StateSlots[Cache]) -> None:
    """A cache ends by the functions it began with."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        slots.create = Memory().create  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_slots_equal_themselves_only(memory: Memory) -> None:
    """Two engines of the same functions are two: a session belongs to one."""
    assert memory.slots() != memory.slots()


@pytest.mark.parametrize("wrong", [None, "session", 5], ids=repr)
def test_only_sessions_can_be_borrowed(slots: StateSlots[Cache], wrong: object) -> None:
    """Something else is a clear error."""
    with pytest.raises(TypeError, match=type(wrong).__name__), slots.borrow(cast("Session", wrong)):
        pytest.fail("borrowed what's no session")


class Proxy:
    """Passes on whatever is asked of it, its class too, as the proxies of wrapt and Werkzeug do."""

    wrapped: Any

    def __init__(self, wrapped: object) -> None:
        object.__setattr__(self, "wrapped", wrapped)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.wrapped.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.wrapped, name, value)


@pytest.fixture(params=[weakref.proxy, Proxy])
def proxy(request: pytest.FixtureRequest, session: Session) -> Session:
    """Give something that passes for the session."""
    proxy = cast("Session", request.param(session))
    assert isinstance(proxy, Session)
    assert proxy.id == session.id
    return proxy


@pytest.mark.parametrize("borrowed", [False, True], ids=["idle", "borrowed"])
def test_a_proxy_is_no_session(
    memory: Memory, session: Session, proxy: Session, *, borrowed: bool
) -> None:
    """Refuse whatever passes for a session, name its type, and change nothing, whether it's borrowed or not."""
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2)
    idle = Session()
    with ExitStack() as stack:
        state = stack.enter_context(slots.borrow(session)) if borrowed else None
        if state is not None:
            memory.step(state, 3)
        names = [name for name in Session.__slots__ if not name.startswith("__")]
        before = [getattr(session, name) for name in names]
        for borrow in (
            slots.borrow(proxy),
            slots.borrow_all([proxy]),
            slots.borrow_all([idle, proxy]),
            slots.borrow_all([session, proxy])
            if state is None
            else slots.borrow_all([proxy, session]),
        ):
            with pytest.raises(TypeError, match=type(proxy).__name__), borrow:
                pytest.fail("borrowed what's no session")
        with pytest.raises(TypeError, match=type(proxy).__name__):
            slots.evict(proxy)
        assert not idle.borrowed
        assert session.borrowed == borrowed
        assert [getattr(session, name) for name in names] == before
        if state is not None:
            assert (state.token_history, state.kv_length) == ([1, 2, 3], 3)
            memory.step(state, 4)
    assert look(slots, idle) == ([], 0)
    assert look(slots, session) == (([1, 2, 3, 4], 4) if borrowed else ([1, 2], 2))


def test_results() -> None:
    """What engines return is compared by value, and can't be changed."""
    assert PrefillResult(3) == PrefillResult(tokens_processed=3) != PrefillResult(4)
    assert DecodeResult(3) == DecodeResult(token=3) != DecodeResult(4)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        DecodeResult(3).token = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# kv_cache


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


@pytest.fixture
def functional() -> Iterator[Memory]:
    """Give a memory for KV caches that a step replaces."""
    memory = Memory(functional=True)
    yield memory
    memory.check_all_released()


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


def test_append(session: Session, slots: StateSlots[Cache]) -> None:
    """New tokens come after the old ones, and are pending."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.append([])
        state.append([3])
        assert state.token_history == [1, 2, 3]
        assert state.pending == [1, 2, 3]
        assert state.kv_length == 0


def test_pending(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The pending tokens are those after what is cached, and whatever is fed is pending no more."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        memory.feed(state, [1, 2])
        state.advance(2)
        assert state.pending == [3]
        memory.feed(state, [3])
        state.advance(1)
        assert state.pending == []
    assert look(slots, session) == ([1, 2, 3], 3)


# advance


def test_advance_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """An engine that fed other than it says learns so at once, not from garbage; nothing is advanced."""
    with slots.borrow(session) as state:
        state.append([1, 2, 3])
        memory.feed(state, [1, 2])
        for count in (0, 1, 3):
            with pytest.raises(StateMismatchError) as caught:
                state.advance(count)
            error = caught.value
            assert (error.session_id, error.expected, error.actual) == (session.id, count, 2)
            assert error.where == "advance"
            assert state.kv_length == 0
        state.advance(2)
        assert state.kv_length == 2


def test_advance_without_cache(session: Session, slots: StateSlots[Cache]) -> None:
    """Where there's no cache, nothing can have been fed."""
    with slots.borrow(session) as state:
        state.append([1])
        state.advance(0)
        with pytest.raises(StateMismatchError) as caught:
            state.advance(1)
        assert (caught.value.expected, caught.value.actual) == (1, 0)


@pytest.mark.parametrize("count", [-1, 3, 2**80])
def test_advance_within_pending(
    session: Session, slots: StateSlots[Cache], memory: Memory, count: int
) -> None:
    """The cache never covers fewer tokens by advancing, nor tokens that aren't in the history."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.append([3, 4])
        with pytest.raises(ValueError, match=f"{count} tokens, as 2 are pending"):
            state.advance(count)
        assert state.kv_length == 2


def test_advance_by_what_counts(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Whatever is an integer is a count, as NumPy's are; nothing else is."""

    class Two:
        def __index__(self) -> int:
            return 2

    with slots.borrow(session) as state:
        state.append([1, 2])
        memory.feed(state, [1, 2])
        for wrong in (2.0, "2", None):
            with pytest.raises(TypeError):
                state.advance(cast("int", wrong))
        state.advance(cast("int", Two()))
        assert state.kv_length == 2
        assert type(state.kv_length) is int


@pytest.mark.parametrize("error", ERRORS)
def test_advance_when_length_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """Nothing is advanced then."""
    with slots.borrow(session) as state:
        state.append([1])
        memory.feed(state, [1])
        memory.fail(Fault("length", error()))
        with pytest.raises(error):
            state.advance(1)
        assert state.kv_length == 0
        state.advance(1)
    assert look(slots, session) == ([1], 1)


# rewind


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


LIES: list[Lie] = ["too long", "untouched", "untouched copy"]


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


@pytest.mark.parametrize("bad", [[1, 2, -1], [1, 2**31], [1, "2"], ["1"], [1, 2, 3, 4, 1.5]])
def test_reuse_prefix_of_bad_tokens(
    session: Session, slots: StateSlots[Cache], memory: Memory, bad: list[int]
) -> None:
    """Wrong tokens are refused before anything changes."""
    prepare(slots, memory, session, 1, 2, 3)
    with slots.borrow(session) as state:
        with pytest.raises(ValueError, match="token ids must be ints"):
            state.reuse_prefix(bad)
        assert (list(state.token_history), state.kv_length) == ([1, 2, 3], 3)


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


def test_commit_is_a_savepoint(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A later failure goes back to the commit, not to the start."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.commit()
        memory.step(state, 3)
        state.commit()
        memory.step(state, 4, 5)
        state.rewind(1)
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3], 0)


def test_commit_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What doesn't fit together isn't committed, and the block may mend it."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        memory.feed(state, [1])
        with pytest.raises(StateMismatchError) as caught:
            state.commit()
        assert (caught.value.expected, caught.value.actual) == (0, 1)
        assert caught.value.where == "commit"
        assert session.token_count == 0
        state.advance(1)
        state.commit()
        assert session.token_count == 2


def test_commit_of_a_rewind(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """What was committed away doesn't come back."""
    prepare(slots, memory, session, 1, 2, 3)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.rewind(1)
        state.commit()
        state.append([8, 9])
        raise MemoryError
    assert look(slots, session) == ([1], 0)


# The end of the block


def test_clean_exit_commits(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A block that ends well is final, and gives the session back."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        state.append([3])
    assert session.token_count == 3
    assert look(slots, session) == ([1, 2, 3], 2)


@pytest.mark.parametrize("fed", [1, 3])
def test_clean_exit_checks_the_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory, fed: int
) -> None:
    """A block that fed what it didn't say is an error, and rolled back: KV and tokens never part."""
    prepare(slots, memory, session, 1)
    with pytest.raises(StateMismatchError) as caught, slots.borrow(session) as state:
        memory.step(state, 2)
        memory.feed(state, [3] * fed)
    error = caught.value
    assert (error.session_id, error.expected, error.actual) == (session.id, 2, 2 + fed)
    assert error.where == "commit"
    assert look(slots, session) == ([1], 0)


@pytest.mark.parametrize("call", ["advance", "commit", "end"])
def test_a_cache_that_was_wrong_is_not_trusted_again(
    session: Session, slots: StateSlots[Cache], memory: Memory, call: str
) -> None:
    """Once a KV cache was seen to be other than its engine says, a rollback isn't content with its length."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(StateMismatchError), slots.borrow(session) as state:
        state.append([3])
        state.kv_cache.tokens[1:] = [9, 3, 3]  # what it covered is overwritten, too
        if call == "advance":
            state.advance(1)
        if call == "commit":
            state.commit()
    assert look(slots, session) == ([1, 2], 0)


def test_a_cache_kept_aside_is_trusted(session: Session, functional: Memory) -> None:
    """The KV cache that a step replaced has nothing to do with what is wrong about the new one."""
    slots = functional.slots()
    prepare(slots, functional, session, 1, 2)
    with pytest.raises(StateMismatchError), slots.borrow(session) as state:
        state.append([3])
        functional.feed(state, [3, 3])
        state.advance(1)
    assert look(slots, session) == ([1, 2], 2)
    session.close()


def test_return_commits(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Leaving the block by `return`, `break` or `continue` is to end it well."""

    def step() -> int:
        with slots.borrow(session) as state:
            memory.step(state, 1)
            return 5

    assert step() == 5
    for token in (2, 3, 4):
        with slots.borrow(session) as state:
            memory.step(state, token)
            if token == 2:
                continue
            break
    assert look(slots, session) == ([1, 2, 3], 3)


@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_rolls_back(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """Tokens and cache are what they were, and the caller gets the very exception, without notes."""
    prepare(slots, memory, session, 1, 2)
    raised = error("why")
    with pytest.raises(error) as caught, slots.borrow(session) as state:
        memory.step(state, 3)
        memory.feed(state, [4])  # ... and then it fails in mid-step
        raise raised
    assert caught.value is raised
    assert raised.__context__ is None
    assert raised.__cause__ is None
    assert not hasattr(raised, "__notes__")
    assert look(slots, session) == ([1, 2], 2)
    assert memory.live()[0].tokens == [1, 2]


def test_rollback_of_a_new_session(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A session whose first step failed is as new, and costs no memory."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1, 2)
        raise MemoryError
    assert not memory.live()
    assert look(slots, session) == ([], 0)


def test_rollback_without_truncate() -> None:
    """A cache that can't be truncated is released if the engine had its hands on it, and kept if it hadn't."""
    memory = Memory(truncates=False)
    slots = memory.slots()
    with Session() as session:
        prepare(slots, memory, session, 1, 2)
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            state.append([3])
            raise MemoryError
        assert look(slots, session) == ([1, 2], 2)
        with pytest.raises(MemoryError), slots.borrow(session) as state:
            memory.step(state, 3)
            raise MemoryError
        assert not memory.live()
        assert look(slots, session) == ([1, 2], 0)
    memory.check_all_released()


def test_rollback_of_a_cache_that_shrank(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A cache that a step left shorter than it was covers as much as it still does."""
    prepare(slots, memory, session, 1, 2, 3)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        del state.kv_cache.tokens[1:]
        raise MemoryError
    assert look(slots, session) == ([1, 2, 3], 1)


@pytest.mark.parametrize("lie", LIES)
def test_rollback_with_a_truncate_that_lies(
    session: Session, slots: StateSlots[Cache], memory: Memory, lie: Lie
) -> None:
    """A cache that isn't what it was is released; the exception goes on as if nothing else had happened."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 3, 4)
        memory.fail(Fault("truncate", lie))
        raise MemoryError
    assert not memory.live()
    assert look(slots, session) == ([1, 2], 0)


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("function", ["length", "truncate", "release"])
def test_rollback_with_functions_that_fail(
    session: Session, slots: StateSlots[Cache], memory: Memory, function: Any, *, after_work: bool
) -> None:
    """Whatever else fails in a rollback, the exception that led to it goes on, and the tokens are right."""
    prepare(slots, memory, session, 1, 2)
    error = KeyError("why")
    with pytest.raises(KeyError) as caught, slots.borrow(session) as state:
        memory.step(state, 3)
        if function == "release":
            memory.fail(Fault("length", ConnectionError()))
        memory.fail(Fault(function, ConnectionError(), after_work))
        raise error
    assert caught.value is error
    assert hasattr(error, "__notes__") == (function == "release")
    assert not memory.live()
    assert look(slots, session) == ([1, 2], 0)


@pytest.mark.parametrize("function", ["length", "truncate", "release"])
def test_rollback_that_is_interrupted(
    session: Session, slots: StateSlots[Cache], memory: Memory, function: Any
) -> None:
    """Ctrl-C in a rollback leaves nothing borrowed: the next borrow finishes it."""
    prepare(slots, memory, session, 1, 2)
    with pytest.raises(KeyboardInterrupt), slots.borrow(session) as state:
        memory.step(state, 3)
        if function == "release":
            memory.fail(Fault("truncate", ConnectionError()))
        memory.fail(Fault(function, KeyboardInterrupt()))
        raise MemoryError
    assert repr(session) == f"<Session {session.id} idle, 2 tokens>"
    assert look(slots, session) == ([1, 2], 0)


# After the block


SLOT = Slot(int)
USES: dict[str, Callable[[BorrowedState[Cache]], object]] = {
    "kv_cache": lambda state: state.kv_cache,
    "kv_cache =": lambda state: setattr(state, "kv_cache", Cache([])),
    "token_history": lambda state: state.token_history,
    "kv_length": lambda state: state.kv_length,
    "pending": lambda state: state.pending,
    "append": lambda state: state.append([1]),
    "append nothing": lambda state: state.append([]),
    "append nonsense": lambda state: state.append(cast("list[int]", None)),
    "advance": lambda state: state.advance(0),
    "commit": lambda state: state.commit(),
    "rewind": lambda state: state.rewind(0),
    "reuse_prefix": lambda state: state.reuse_prefix([]),
    "session": lambda state: state.session,
    "chunks": lambda state: state.chunks(1),
    "state[slot]": lambda state: state[SLOT],
    "state[slot] =": lambda state: state.__setitem__(SLOT, 1),
}
USED = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())


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


# Exclusive


def test_busy(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that is borrowed can't be borrowed again, by nobody and in no way; the borrow isn't disturbed."""
    with slots.borrow(session) as state:
        memory.step(state, 1)
        for borrow in (slots.borrow(session), slots.borrow_all([session])):
            with pytest.raises(SessionBusyError) as caught, borrow:
                pytest.fail("borrowed twice")
            assert caught.value.session_id == session.id
        with pytest.raises(SessionBusyError):
            slots.evict(session)
        memory.step(state, 2)
    assert look(slots, session) == ([1, 2], 2)


def test_busy_ends_with_the_block(session: Session, slots: StateSlots[Cache]) -> None:
    """A session is free again as soon as the block is over, however that ends."""
    for error in ERRORS:
        with pytest.raises(error), slots.borrow(session):
            raise error
        with slots.borrow(session):
            pass


def test_borrow_takes_nothing_before_its_block(session: Session, slots: StateSlots[Cache]) -> None:
    """Calling `borrow` is not yet to borrow: who comes first with the block has the session."""
    first, second = slots.borrow(session), slots.borrow(session)
    with second, pytest.raises(SessionBusyError), first:
        pytest.fail("borrowed twice")


def test_nested_borrows_of_two_sessions(slots: StateSlots[Cache], memory: Memory) -> None:
    """Sessions are independent: one may be borrowed within another's block, and fail alone."""
    with Session() as one, Session() as other:
        with slots.borrow(one) as state:
            memory.step(state, 1)
            with pytest.raises(MemoryError), slots.borrow(other) as inner:
                memory.step(inner, 2)
                raise MemoryError
            memory.step(state, 3)
        assert look(slots, one) == ([1, 3], 2)
        assert look(slots, other) == ([], 0)


def test_exit_stack(slots: StateSlots[Cache], memory: Memory) -> None:
    """A borrow works in an `ExitStack`: it commits or rolls back with it."""
    with Session() as session:
        with ExitStack() as stack:
            memory.step(stack.enter_context(slots.borrow(session)), 1)
            with pytest.raises(SessionBusyError):
                stack.enter_context(slots.borrow(session))
        with pytest.raises(MemoryError), ExitStack() as stack:
            memory.step(stack.enter_context(slots.borrow(session)), 2)
            raise MemoryError
        assert look(slots, session) == ([1], 1)


def test_exit_stack_outlives_a_failed_borrow(session: Session, slots: StateSlots[Cache]) -> None:
    """A borrow that failed to begin leaves nothing behind, even if it's kept."""
    with ExitStack() as stack:
        failed = slots.borrow(session)
        with slots.borrow(session), pytest.raises(SessionBusyError):
            stack.enter_context(failed)
        with slots.borrow(session):
            pass


def test_contextmanager(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """An engine may wrap a borrow in a context manager of its own."""

    @contextmanager
    def step(*tokens: int) -> Generator[BorrowedState[Cache], None, None]:
        with slots.borrow(session) as state:
            state.append(tokens)
            yield state
            memory.step(state)

    with step(1, 2) as state:
        assert state.pending == [1, 2]
    with pytest.raises(MemoryError), step(3):
        raise MemoryError
    assert look(slots, session) == ([1, 2], 2)


def test_by_hand(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """`__enter__` and `__exit__` may be called without a `with` statement."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    assert repr(session) == f"<Session {session.id} borrowed, 0 tokens>"
    assert borrow.__exit__(None, None, None) is None
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 2)
    error = MemoryError()
    assert borrow.__exit__(MemoryError, error, None) is None
    assert look(slots, session) == ([1], 1)


def test_by_hand_without_the_exception(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The class of an exception is enough to roll back."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    borrow.__exit__(MemoryError, None, None)
    assert look(slots, session) == ([], 0)


def test_by_hand_when_only_the_end_is_kept(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Whoever keeps nothing but the end of a borrow keeps the borrow, and can end it."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    end = borrow.__exit__
    del borrow
    with pytest.raises(SessionBusyError), slots.borrow(session):
        pytest.fail("borrowed twice")
    end(None, None, None)
    assert look(slots, session) == ([1], 1)


def test_exit_twice(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A second `__exit__` doesn't end the borrow of somebody else."""
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    borrow.__exit__(None, None, None)
    with slots.borrow(session) as state:
        memory.step(state, 2)
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            borrow.__exit__(None, None, None)
        assert session.token_count == 1
        with pytest.raises(SessionBusyError), slots.borrow(session):
            pytest.fail("borrowed twice")
        memory.step(state, 3)
    assert look(slots, session) == ([1, 2, 3], 3)


def test_exit_before_enter(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """An `__exit__` without `__enter__` doesn't touch the session."""
    prepare(slots, memory, session, 1)
    for borrow in (slots.borrow(session), slots.borrow_all([session])):
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            borrow.__exit__(None, None, None)
    assert look(slots, session) == ([1], 1)


@pytest.mark.parametrize("batch", [False, True])
def test_enter_within_the_own_block(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """A borrow entered a second time is refused, and its block isn't disturbed: it goes on, and commits."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    with borrow as got:
        state = got[0] if isinstance(got, list) else got
        memory.step(state, 1)
        with pytest.raises((SessionBusyError, RuntimeError)), borrow:
            pytest.fail("borrowed twice")
        memory.step(state, 2)
    assert look(slots, session) == ([1, 2], 2)


@pytest.mark.parametrize("batch", [False, True])
def test_enter_twice_by_hand(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """Without a `with` statement, too, a second entry is refused, and the first borrow goes on."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    got = borrow.__enter__()
    state = got[0] if isinstance(got, list) else got
    with pytest.raises(RuntimeError, match="only once"):
        borrow.__enter__()
    memory.step(state, 1)
    borrow.__exit__(None, None, None)
    assert look(slots, session) == ([1], 1)


@pytest.mark.parametrize("batch", [False, True])
def test_enter_again_after_the_block(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """A borrow is for one block: entered again it says so, and takes nothing."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    with borrow as got:
        memory.step(got[0] if isinstance(got, list) else got, 1)
    with pytest.raises(RuntimeError, match="only once"), borrow:
        pytest.fail("borrowed again")
    assert look(slots, session) == ([1], 1)


def test_looking_at_a_borrow_does_not_end_it(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A debugger that reads every attribute in the block leaves the borrow as it is."""
    for borrow in (slots.borrow(session), slots.borrow_all([session])):
        with borrow as got:
            state = got[0] if isinstance(got, list) else got
            for it in (borrow, state):
                assert all(hasattr(it, name) or True for name in dir(it))
            memory.step(state, 1)
    assert look(slots, session) == ([1, 1], 2)


def test_borrow_that_never_ends(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A borrow whose end is lost with its holder doesn't block the session: the next one rolls it back first."""
    prepare(slots, memory, session, 1, 2)
    borrow = slots.borrow(session)
    state = borrow.__enter__()
    memory.step(state, 3)
    state.rewind(1, pending=0)
    memory.step(state, 8, 9)
    del borrow, state
    assert repr(session) == f"<Session {session.id} idle, 2 tokens>"
    assert look(slots, session) == ([1, 2], 1)


def test_borrow_that_never_ends_may_be_closed(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Closing frees what a lost borrow left: the cache in use, and the one to go back to."""
    prepare(slots, memory, session, 1, 2)
    borrow = slots.borrow(session)
    borrow.__enter__().kv_cache = memory.new([1, 2])
    del borrow
    assert len(memory.live()) == 2
    session.close()
    assert not memory.live()


def test_borrow_after_one_that_never_ended_and_can_not_be_undone(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A `release` that fails in finishing a lost borrow fails the next one, but leaves nothing borrowed."""
    error = ConnectionError()
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    del borrow
    memory.fail(Fault("release", error))
    with ExitStack() as stack:
        failing = slots.borrow(session)
        with pytest.raises(ConnectionError) as caught:
            stack.enter_context(failing)
        assert caught.value is error
        assert look(slots, session) == ([], 0)


# Owners


def test_owner(session: Session, memory: Memory) -> None:
    """A session that one engine began is no other's: it would misread the cache."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    for borrow in (foreign.borrow(session), foreign.borrow_all([session])):
        with pytest.raises(SessionOwnerError) as caught, borrow:
            pytest.fail("borrowed a foreign session")
        assert caught.value.session_id == session.id
    with pytest.raises(SessionOwnerError):
        foreign.evict(session)
    assert look(own, session) == ([1], 1)


def test_owner_of_tokens_alone(session: Session, memory: Memory) -> None:
    """Another engine has another vocabulary: tokens alone make a session one's own, too."""
    own, foreign = memory.slots(), memory.slots()
    with own.borrow(session) as state:
        state.append([1])
    own.evict(session)
    with pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")


def test_owner_of_a_cache_alone(session: Session, memory: Memory) -> None:
    """A cache makes a session one's own, though it has no tokens yet; without it it's nobody's again."""
    own, foreign = memory.slots(), memory.slots()
    with own.borrow(session) as state:
        assert state.kv_cache.tokens == []
    with pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")
    own.evict(session)
    prepare(foreign, memory, session, 1)


def empty_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Do nothing."""
    with slots.borrow(session):
        pass


def failing_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail in the first step."""
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 1)
        raise MemoryError


def rewinding_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Take all back."""
    prepare(slots, memory, session, 1)
    with slots.borrow(session) as state:
        state.rewind(0)
    slots.evict(session)


def failing_batch(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail in the first step of a batch."""
    with pytest.raises(MemoryError), slots.borrow_all([session]) as states:
        memory.step(states[0], 1)
        raise MemoryError


def refused_batch(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail to take a batch."""
    closed = Session()
    closed.close()
    with pytest.raises(SessionClosedError), slots.borrow_all([session, closed]):
        pytest.fail("borrowed a closed session")


def lost_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Begin, and never end."""
    memory.step(slots.borrow(session).__enter__(), 1)


def interrupted_block(slots: StateSlots[Cache], memory: Memory, session: Session) -> None:
    """Fail, and be interrupted in taking it back."""
    with pytest.raises(KeyboardInterrupt), slots.borrow(session) as state:
        memory.step(state, 1)
        memory.fail(Fault("release", KeyboardInterrupt()))
        raise MemoryError


@pytest.mark.parametrize(
    "leave_empty",
    [
        empty_block,
        failing_block,
        rewinding_block,
        failing_batch,
        refused_batch,
        lost_block,
        interrupted_block,
    ],
)
def test_empty_session_is_nobodys(
    session: Session,
    memory: Memory,
    leave_empty: Callable[[StateSlots[Cache], Memory, Session], None],
) -> None:
    """A session that holds nothing can be begun by any engine, whoever had it and however that ended."""
    leave_empty(memory.slots(), memory, session)
    slots = memory.slots()
    prepare(slots, memory, session, 2)
    assert look(slots, session) == ([2], 1)


def test_empty_session_in_use(session: Session, memory: Memory) -> None:
    """While an engine has a session that holds nothing yet, it's busy to others: they may have it later."""
    one, other = memory.slots(), memory.slots()
    with pytest.raises(MemoryError), one.borrow(session) as state:
        memory.step(state, 1)
        with pytest.raises(SessionBusyError), other.borrow(session):
            pytest.fail("borrowed twice")
        raise MemoryError
    prepare(other, memory, session, 2)


# Which error, where several would do


def test_closed_goes_before_all(session: Session, memory: Memory) -> None:
    """What can never be borrowed again is closed, whoever had it or has it: there's no use in trying again."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    with own.borrow(session):
        session.close()
        for slots in (own, foreign):
            for borrow in (slots.borrow(session), slots.borrow_all([session])):
                with pytest.raises(SessionClosedError), borrow:
                    pytest.fail("borrowed a closed session")
            with pytest.raises(SessionClosedError):
                slots.evict(session)


def test_owner_goes_before_busy(session: Session, memory: Memory) -> None:
    """What is another engine's will be so when it's free again: there's no use in waiting."""
    own, foreign = memory.slots(), memory.slots()
    prepare(own, memory, session, 1)
    with own.borrow(session), pytest.raises(SessionOwnerError), foreign.borrow(session):
        pytest.fail("borrowed a foreign session")


# borrow_all


def test_batch(slots: StateSlots[Cache], memory: Memory) -> None:
    """A whole batch is borrowed at once, from any iterable, and its states come in its order."""
    sessions = [Session() for _ in range(3)]
    with slots.borrow_all(iter(sessions)) as states:
        assert all(isinstance(state, BorrowedState) for state in states)
        for number, state in enumerate(states):
            memory.step(state, *range(number + 1))
        for session in sessions:
            with pytest.raises(SessionBusyError), slots.borrow(session):
                pytest.fail("borrowed twice")
    for number, session in enumerate(sessions):
        assert look(slots, session) == (list(range(number + 1)), number + 1)
        session.close()


def test_empty_batch(slots: StateSlots[Cache]) -> None:
    """A server with nothing to do may borrow nothing."""
    with slots.borrow_all([]) as states:
        assert states == []
    with pytest.raises(MemoryError), slots.borrow_all(()):
        raise MemoryError


def test_batch_expires(slots: StateSlots[Cache]) -> None:
    """All states of a batch end with its block."""
    with Session() as one, Session() as other:
        with slots.borrow_all([one, other]) as states:
            pass
        for state, session in zip(states, (one, other), strict=True):
            with pytest.raises(BorrowExpiredError) as caught:
                state.append([1])
            assert caught.value.session_id == session.id


@pytest.mark.parametrize("error", ERRORS)
def test_batch_rolls_back_as_one(
    slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """What happens to one happens to all: each goes back to its own last commit."""
    with Session() as one, Session() as other:
        prepare(slots, memory, other, 7)
        with pytest.raises(error), slots.borrow_all([one, other]) as states:
            memory.step(states[0], 1)
            states[0].commit()
            memory.step(states[0], 2)
            memory.step(states[1], 8)
            raise error
        assert look(slots, one) == ([1], 1)
        assert look(slots, other) == ([7], 1)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("functional", [False, True])
def test_batch_with_one_mismatch(position: int, *, functional: bool) -> None:
    """If one cache doesn't cover what it should, none is committed, and no other cache is lost."""
    memory = Memory(functional=functional)
    slots = memory.slots()
    sessions = [Session() for _ in range(3)]
    for session in sessions:
        prepare(slots, memory, session, 1, 2)
    with pytest.raises(StateMismatchError) as caught, slots.borrow_all(sessions) as states:
        for state in states:
            memory.step(state, 3)
        memory.feed(states[position], [4])
    wrong = sessions[position]
    assert (caught.value.session_id, caught.value.where) == (wrong.id, "commit")
    for session in sessions:
        assert look(slots, session) == ([1, 2], 0 if session is wrong and not functional else 2)
        session.close()
    memory.check_all_released()


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_batch_whose_old_caches_are_not_released(
    functional: Memory, error: type[BaseException], skip: int
) -> None:
    """If the commit of one fails, none is committed, whichever comes first."""
    slots = functional.slots()
    sessions = [Session() for _ in range(3)]
    for session in sessions:
        prepare(slots, functional, session, 1, 2)
    with pytest.raises(error), slots.borrow_all(sessions) as states:
        for state in states:
            functional.step(state, 3)
        functional.fail(Fault("release", error()), skip=skip)
    assert [session.token_count for session in sessions] == [2, 2, 2]
    for session in sessions:
        assert look(slots, session)[0] == [1, 2]
        session.close()


@pytest.mark.parametrize("fails", [False, True])
def test_batch_of_sessions_closed_meanwhile(
    slots: StateSlots[Cache], memory: Memory, *, fails: bool
) -> None:
    """Each session of a batch that was closed in mid-borrow is freed, even if the `release` of the first fails."""
    sessions = [Session() for _ in range(3)]
    with pytest.raises(ConnectionError), slots.borrow_all(sessions) as states:
        for session, state in zip(sessions, states, strict=True):
            memory.step(state, 1)
            state.commit()
            session.close()
        memory.fail(Fault("release", ConnectionError()))
        if fails:
            raise ConnectionError
    assert not memory.live()
    assert [session.token_count for session in sessions] == [0, 0, 0]


def test_batch_with_one_closed_meanwhile(slots: StateSlots[Cache], memory: Memory) -> None:
    """Closing one session doesn't disturb the others of its batch."""
    with Session() as one, Session() as other:
        with slots.borrow_all([one, other]) as states:
            one.close()
            for state in states:
                memory.step(state, 1)
        assert len(memory.live()) == 1
        assert look(slots, other) == ([1], 1)


def closed_session(slots: StateSlots[Cache], memory: Memory) -> Session:
    """Return a session that is closed."""
    session = Session()
    session.close()
    return session


def foreign_session(slots: StateSlots[Cache], memory: Memory) -> Session:
    """Return another engine's session."""
    session = Session()
    foreign = StateSlots[list[int]](create=list, length=len)
    with foreign.borrow(session) as state:
        state.append([1])
    return session


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("make", "error"), [(closed_session, SessionClosedError), (foreign_session, SessionOwnerError)]
)
def test_batch_is_taken_as_a_whole(
    slots: StateSlots[Cache],
    memory: Memory,
    position: int,
    make: Callable[[StateSlots[Cache], Memory], Session],
    error: type[SessionError],
) -> None:
    """One session that can't be borrowed, and none of the batch is."""
    sessions = [Session(), Session()]
    prepare(slots, memory, sessions[0], 1, 2)
    bad = make(slots, memory)
    with (
        pytest.raises(error) as caught,
        slots.borrow_all([*sessions[:position], bad, *sessions[position:]]),
    ):
        pytest.fail("borrowed a part of a batch")
    assert getattr(caught.value, "session_id") == bad.id  # noqa: B009 each of them has it
    for session in sessions:
        assert " idle, " in repr(session)
    with slots.borrow_all(sessions) as states:
        assert [list(state.token_history) for state in states] == [[1, 2], []]
        assert [state.kv_length for state in states] == [2, 0]
    for session in sessions:
        session.close()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_batch_with_one_busy(slots: StateSlots[Cache], position: int) -> None:
    """One session that is borrowed, and none of the batch is taken; the borrow goes on."""
    sessions = [Session() for _ in range(3)]
    with slots.borrow(sessions[position]) as state:
        with pytest.raises(SessionBusyError) as caught, slots.borrow_all(sessions):
            pytest.fail("borrowed a part of a batch")
        assert caught.value.session_id == sessions[position].id
        state.append([1])
    with slots.borrow_all(sessions):
        pass


@pytest.mark.parametrize("order", [(0, 0), (0, 1, 0), (1, 0, 0)])
def test_batch_with_a_session_twice(
    slots: StateSlots[Cache], memory: Memory, order: tuple[int, ...]
) -> None:
    """Two rows of a batch can't have one cache: such a batch is refused, and nothing is taken."""
    sessions = [Session(), Session()]
    prepare(slots, memory, sessions[0], 1)
    with (
        pytest.raises(SessionBusyError) as caught,
        slots.borrow_all([sessions[number] for number in order]),
    ):
        pytest.fail("borrowed twice")
    assert caught.value.session_id == sessions[0].id
    assert look(slots, sessions[0]) == ([1], 1)
    for session in sessions:
        session.close()


def test_batch_takes_sessions_only(slots: StateSlots[Cache]) -> None:
    """Something else is a clear error, and nothing is taken."""
    with Session() as session:
        with (
            pytest.raises(TypeError, match="str"),
            slots.borrow_all(cast("list[Session]", [session, "session"])),
        ):
            pytest.fail("borrowed what's no session")
        with slots.borrow(session):
            pass


def test_batch_by_hand(slots: StateSlots[Cache], memory: Memory) -> None:
    """A batch can be entered and left without a `with` statement, or be lost."""
    with Session() as one, Session() as other:
        batch = slots.borrow_all([one, other])
        for state in batch.__enter__():
            memory.step(state, 1)
        batch.__exit__(None, None, None)
        with pytest.raises((BorrowExpiredError, RuntimeError)):
            batch.__exit__(None, None, None)
        batch = slots.borrow_all([one, other])
        states = batch.__enter__()
        memory.step(states[0], 2)
        del batch, states
        assert " idle, 1 tokens" in repr(one)
        assert look(slots, one) == look(slots, other) == ([1], 1)


def test_states_of_a_batch_do_not_keep_it(slots: StateSlots[Cache], memory: Memory) -> None:
    """A single state that is kept after a lost batch doesn't reach its session."""
    with Session() as one, Session() as other:
        kept = slots.borrow_all([one, other]).__enter__()[0]
        gc.collect()
        with slots.borrow_all([one, other]) as states:
            memory.step(states[0], 1)
            with pytest.raises(BorrowExpiredError):
                kept.append([2])
        assert look(slots, one) == ([1], 1)


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


def test_evict(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """The memory is free, no token is lost, and the next step is right, only slower."""
    prepare(slots, memory, session, 1, 2, 3)
    slots.evict(session)
    assert not memory.live()
    assert session.token_count == 3
    assert look(slots, session) == ([1, 2, 3], 0)
    with slots.borrow(session) as state:
        assert state.pending == [1, 2, 3]
        memory.step(state, 4)
    assert look(slots, session) == ([1, 2, 3, 4], 4)


def test_evict_what_holds_no_cache(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Evicting twice, or a new session, does nothing."""
    slots.evict(session)
    prepare(slots, memory, session, 1)
    slots.evict(session)
    slots.evict(session)
    assert [cache.released for cache in memory.caches] == [1]


def test_evict_without_release(session: Session) -> None:
    """Where there's no `release`, the reference is dropped."""
    slots = StateSlots[list[int]](create=list, length=len)
    with slots.borrow(session) as state:
        state.append([1])
        state.kv_cache.append(1)
        state.advance(1)
    slots.evict(session)
    with slots.borrow(session) as state:
        assert (list(state.token_history), state.kv_length) == ([1], 0)
        assert state.kv_cache == []


def test_evict_closed(session: Session, slots: StateSlots[Cache]) -> None:
    """A closed session has nothing to be evicted any more."""
    session.close()
    with pytest.raises(SessionClosedError):
        slots.evict(session)


@pytest.mark.parametrize("error", ERRORS)
def test_evict_when_release_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: type[BaseException]
) -> None:
    """The caller learns of it; the cache is gone all the same, and the tokens are safe."""
    prepare(slots, memory, session, 1, 2)
    memory.fail(Fault("release", error()))
    with pytest.raises(error):
        slots.evict(session)
    assert look(slots, session) == ([1, 2], 0)


def test_evict_what_a_lost_borrow_left(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """Evicting finishes a lost borrow first."""
    prepare(slots, memory, session, 1)
    memory.step(slots.borrow(session).__enter__(), 2)
    slots.evict(session)
    assert not memory.live()
    assert look(slots, session) == ([1], 0)


# What can't be told apart by looking


def test_states_can_not_be_pickled(session: Session, slots: StateSlots[Cache]) -> None:
    """A state doesn't take a session to another process."""
    with slots.borrow(session) as state, pytest.raises((TypeError, AttributeError)):
        pickle.dumps(state)


def test_errors_are_session_errors(session: Session, slots: StateSlots[Cache]) -> None:
    """Who catches the root catches all of them."""
    with slots.borrow(session), pytest.raises(SessionError), slots.borrow(session):
        pytest.fail("borrowed twice")
