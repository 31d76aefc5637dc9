"""Which KV cache survives a failure: only one that the library can vouch for."""

# ruff: noqa: PT012 what's tested is how a block fails

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterator

import pytest
from attrs import define, field

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, StateSlots
from inference_session.exceptions import StateMismatchError


@define(eq=False)
class Recurrent:
    """A KV cache with a state that can't be cut, beside a length that says nothing of it."""

    length: int = 0
    state: list[int] = field(factory=list[int])
    """The tokens that went in: what can be seen of them in the model's answers."""
    checkpoints: list[int] = field(factory=list[int])
    """Lengths that it can be cut to."""
    released: int = 0


def free(cache: Recurrent) -> None:
    """Count it."""
    cache.released += 1


def to_checkpoint(cache: Recurrent, length: int) -> Recurrent:
    """Keep as many of the first tokens as there's a checkpoint for."""
    cache.length = max((place for place in cache.checkpoints if place <= length), default=0)
    del cache.state[cache.length :]
    return cache


def empty(cache: Recurrent, length: int) -> Recurrent:
    """Keep none."""
    return to_checkpoint(cache, -1)


def functional(cache: Recurrent, length: int) -> Recurrent:
    """Return another that covers the first tokens."""
    return Recurrent(length, cache.state[:length])


opened: list[Session] = []


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    """Close the sessions that a test leaves open."""
    yield
    while opened:
        opened.pop().close()


def slots_with(
    truncate: Callable[[Recurrent, int], Recurrent] | None = None,
) -> StateSlots[Recurrent]:
    """Return an engine's access."""
    return StateSlots(
        create=Recurrent, length=lambda cache: cache.length, truncate=truncate, release=free
    )


CUTS: list[Callable[[Recurrent, int], Recurrent] | None] = [None, to_checkpoint, empty, functional]
each_cut = pytest.mark.parametrize(
    "truncate", CUTS, ids=lambda it: "none" if it is None else it.__name__
)


def feed(state: BorrowedState[Recurrent]) -> None:
    """Feed all that is pending, with a checkpoint every 4 tokens."""
    cache = state.kv_cache
    for token in state.pending:
        cache.state.append(token)
        cache.length += 1
        if cache.length % 4 == 0:
            cache.checkpoints.append(cache.length)
    state.advance(len(state.pending))


def filled(slots: StateSlots[Recurrent], count: int = 10) -> tuple[Session, Recurrent]:
    """Return a session with some tokens, all of them cached, and the KV cache."""
    session = Session()
    opened.append(session)
    with slots.borrow(session) as state:
        state.append(range(count))
        feed(state)
        return session, state.kv_cache


def check(slots: StateSlots[Recurrent], session: Session, covered: int) -> None:
    """Check how much is cached, and that it's the tokens."""
    with slots.borrow(session) as state:
        assert state.kv_length == covered
        cache = session._kv_cache
        if covered:
            assert isinstance(cache, Recurrent)
            assert cache.state == list(state.token_history)[:covered]


# Rows of the table


@each_cut
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, CancelledError])
def test_not_handed_out(
    truncate: Callable[[Recurrent, int], Recurrent] | None, error: type[BaseException]
) -> None:
    """A step that is refused before it comes to the KV cache costs nothing, whatever the engine."""
    slots = slots_with(truncate)
    session, cache = filled(slots)
    for _ in range(3):
        with pytest.raises(error), slots.borrow(session) as state:
            state.append([7])
            assert len(state.pending) == 1
            assert state.kv_length == 10
            raise error
    assert session._kv_cache is cache
    check(slots, session, 10)
    session.close()
    assert cache.released == 1


@pytest.mark.parametrize("how", ["read", "advanced", "set", "committed"])
@pytest.mark.parametrize("truncate", [None, to_checkpoint, empty])
def test_handed_out(how: str, truncate: Callable[[Recurrent, int], Recurrent] | None) -> None:
    """A step that failed may have changed what the length doesn't count: only `truncate` can tell what's left."""
    slots = slots_with(truncate)
    session, cache = filled(slots)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        if how == "read":
            assert state.kv_cache is cache
        elif how == "advanced":
            state.advance(0)
        elif how == "set":
            state.kv_cache = cache
        else:
            feed(state)
            state.commit()
        cache.state.append(99)  # the length doesn't know
        raise MemoryError
    if truncate is None:
        assert cache.released == 1
        check(slots, session, 0)
    else:
        assert cache.released == 0
        check(slots, session, 8 if truncate is to_checkpoint else 0)
    session.close()
    assert cache.released == 1


def test_the_length_is_no_proof() -> None:
    """`truncate` is asked even if the length is right already, and told what the savepoint covered."""
    asked: list[int] = []

    def truncate(cache: Recurrent, length: int) -> Recurrent:
        asked.append(length)
        return to_checkpoint(cache, length)

    slots = slots_with(truncate)
    session, cache = filled(slots)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.kv_cache.state.append(99)
        assert state.kv_cache.length == 10
        raise MemoryError
    assert asked == [10]
    with pytest.raises(KeyError), slots.borrow(session) as state:
        feed(state)
        state.append([5, 6])
        state.commit()
        state.append([7])
        feed(state)
        raise KeyError
    assert asked == [10, 10]  # of 12 tokens, the commit covered 10
    check(slots, session, 8)
    session.close()
    assert cache.released == 1


def test_torn() -> None:
    """Layers that disagree after a failed step are `truncate`'s business as well."""

    def length(cache: Recurrent) -> int:
        return cache.length if cache.length == len(cache.state) else TORN

    slots = StateSlots(create=Recurrent, length=length, truncate=to_checkpoint)
    session, _ = filled(slots)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.append([7])
        state.kv_cache.state.append(7)
        raise MemoryError
    check(slots, session, 8)


@pytest.mark.parametrize("fits", [False, True])
@each_cut
def test_replaced(truncate: Callable[[Recurrent, int], Recurrent] | None, *, fits: bool) -> None:
    """A functional engine leaves the old KV cache alone: it comes back, if its length says so."""
    slots = slots_with(truncate)
    session, old = filled(slots)
    new = Recurrent(11, [*old.state, 7])
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.append([7])
        state.kv_cache = new
        state.advance(1)
        old.length += not fits
        raise MemoryError
    assert new.released == 1
    assert old.released == (not fits)
    check(slots, session, 10 if fits else 0)
    session.close()
    assert old.released == 1


@pytest.mark.parametrize("truncate", [to_checkpoint, functional])
def test_twice_in_a_row(truncate: Callable[[Recurrent, int], Recurrent]) -> None:
    """What fails in two borrows that follow on each other may be the KV cache's fault: it's computed anew."""
    slots = slots_with(truncate)
    session, _ = filled(slots, 8)
    fail(slots, session, MemoryError)
    check_covered(session, 8)
    cache = session._kv_cache
    fail(slots, session, MemoryError)
    check_covered(session, 0)
    assert cache.released == 1


def test_a_broken_cache_heals() -> None:
    """A `truncate` that breaks the KV cache, whose length is right, costs two steps and not the session."""

    def breaks(cache: Recurrent, length: int) -> Recurrent:
        cache.length = length
        cache.state = []
        return cache

    slots = slots_with(breaks)
    session, _ = filled(slots)

    def step() -> None:
        with slots.borrow(session) as state:
            state.append([7])
            if state.kv_cache.state != list(state.token_history)[: state.kv_length]:
                raise RuntimeError("what the model says of a broken cache")
            feed(state)

    with pytest.raises(MemoryError), slots.borrow(session) as state:
        assert state.kv_cache is not None
        raise MemoryError
    with pytest.raises(RuntimeError):
        step()
    step()
    check(slots, session, 11)


@pytest.mark.parametrize("between", ["commit", "clean exit", "evict"])
def test_a_commit_is_a_new_beginning(between: str) -> None:
    """Only failures without a commit since count."""
    slots = slots_with(to_checkpoint)
    session, _ = filled(slots, 8)
    fail(slots, session, MemoryError)
    if between == "clean exit":
        check(slots, session, 8)
    if between == "evict":
        slots.evict(session)
        with slots.borrow(session) as state:
            feed(state)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        if between == "commit":
            state.commit()
        assert state.kv_cache is not None
        raise MemoryError
    check(slots, session, 8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelledError, GeneratorExit])
def test_interrupts_are_no_failures(error: type[BaseException]) -> None:
    """A client that cancels again and again doesn't cost the KV cache."""
    slots = slots_with(to_checkpoint)
    session, cache = filled(slots, 8)
    for _ in range(5):
        fail(slots, session, error)
    assert session._kv_cache is cache
    fail(slots, session, MemoryError)
    check(slots, session, 8)


def test_refusals_are_no_failures() -> None:
    """Nor do steps that are refused before they come to the KV cache, such as those with bad tokens."""
    slots = slots_with(to_checkpoint)
    session, cache = filled(slots, 8)
    for _ in range(3):
        with pytest.raises(ValueError, match="token"), slots.borrow(session) as state:
            state.append([-1])
    assert session._kv_cache is cache
    fail(slots, session, MemoryError)
    check_covered(session, 8)


def test_a_refusal_after_a_failure() -> None:
    """After a failure any other releases the KV cache, whatever it came to."""
    slots = slots_with(to_checkpoint)
    session, _ = filled(slots, 8)
    fail(slots, session, MemoryError)
    with pytest.raises(ValueError, match="token"), slots.borrow(session) as state:
        state.append([-1])
    check_covered(session, 0)


def test_an_abandoned_block() -> None:
    """A block that is dropped rolls back by the same table, when the next begins."""
    for truncate, covered in ((to_checkpoint, 8), (None, 0)):
        slots = slots_with(truncate)
        session, _ = filled(slots)
        block = slots.borrow(session)
        cache = block.__enter__().kv_cache
        cache.state.append(99)
        del block
        check(slots, session, covered)
        session.close()
        assert cache.released == 1


def test_a_mismatch() -> None:
    """A KV cache that was seen not to cover what it should isn't kept, even if it wasn't handed out."""
    slots = slots_with(to_checkpoint)
    session, cache = filled(slots)
    cache.length = 11  # by somebody who kept a reference
    with pytest.raises(StateMismatchError) as caught, slots.borrow(session):
        pass
    assert caught.value.where == "commit"
    assert cache.released == 1
    check(slots, session, 0)


def test_in_a_batch() -> None:
    """Each session of a batch that failed keeps what can be vouched for."""
    slots = slots_with()
    (left, kept), (right, lost) = filled(slots), filled(slots)
    with pytest.raises(MemoryError), slots.borrow_all([left, right]) as (_, state):
        assert state.kv_cache is lost
        raise MemoryError
    assert left._kv_cache is kept
    check(slots, left, 10)
    check(slots, right, 0)
    left.close()


def test_the_next_borrow_begins_with_clean_hands() -> None:
    """What was handed out in one borrow isn't any more in the next."""
    slots = slots_with()
    session, cache = filled(slots)
    for batch in (False, True):
        with slots.borrow_all([session]) if batch else slots.borrow(session):
            assert not session._handed_out
        with slots.borrow(session) as state:
            assert state.kv_cache is cache
        assert not session._handed_out
        with slots.borrow_all([session]) as (state,):
            assert state.kv_cache is cache
        assert not session._handed_out
        with pytest.raises(KeyboardInterrupt), slots.borrow(session):
            raise KeyboardInterrupt
        assert session._kv_cache is cache
    session.close()


# A truncate that lands short


@pytest.mark.parametrize(("truncate", "covered"), [(to_checkpoint, 4), (empty, 0), (None, 0)])
def test_rewind_takes_what_it_gets(
    truncate: Callable[[Recurrent, int], Recurrent] | None, covered: int
) -> None:
    """The KV cache covers what it can; the rest is pending."""
    slots = slots_with(truncate)
    session, _ = filled(slots)
    with slots.borrow(session) as state:
        state.rewind(7)
        assert state.token_history == list(range(7))
        assert (state.kv_length, len(state.pending)) == (covered, 7 - covered)
        feed(state)
    check(slots, session, 7)


@pytest.mark.parametrize(("truncate", "covered"), [(to_checkpoint, 4), (empty, 0), (None, 0)])
def test_reuse_prefix_takes_what_it_gets(
    truncate: Callable[[Recurrent, int], Recurrent] | None, covered: int
) -> None:
    """It returns how many tokens needn't be fed again, and not how many are the same."""
    slots = slots_with(truncate)
    session, _ = filled(slots)
    with slots.borrow(session) as state:
        assert state.reuse_prefix([0, 1, 2, 3, 4, 5, 6, 99]) == covered
        assert state.kv_length == covered
        feed(state)
    check(slots, session, 8)


def test_what_landed_short_stays_short() -> None:
    """A rewind in a block that then fails can't bring back what `truncate` gave up."""
    slots = slots_with(to_checkpoint)
    session, _ = filled(slots)
    with pytest.raises(KeyboardInterrupt), slots.borrow(session) as state:
        state.rewind(7)
        assert state.kv_length == 4
        raise KeyboardInterrupt
    check(slots, session, 4)
    assert session.token_count == 10


@pytest.mark.parametrize("length", [8, 1000, TORN, -1])
def test_more_than_that_is_a_mismatch(length: int) -> None:
    """Only a `truncate` that keeps more, or says that it did, is a bug, and its KV cache released."""
    lengths = iter([10, 10, length, 0, 0])
    slots = StateSlots(
        create=Recurrent,
        length=lambda cache: next(lengths) if cache.length else 0,
        truncate=lambda cache, n: cache,
        release=free,
    )
    session, cache = filled(slots)
    with slots.borrow(session) as state:
        with pytest.raises(StateMismatchError) as caught:
            state.rewind(8)
        assert (caught.value.expected, caught.value.actual) == (7, length)
        assert caught.value.where == "truncate"
        assert cache.released == 1
        assert (len(state.token_history), state.kv_length) == (10, 0)
        state.rewind(8)
        assert (len(state.token_history), state.kv_length) == (8, 0)


def test_a_length_that_is_no_number() -> None:
    """It's an error of the engine's, and the KV cache isn't kept."""
    slots = StateSlots(
        create=Recurrent,
        length=lambda cache: float(cache.length),  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
        truncate=to_checkpoint,
        release=free,
    )
    session, cache = filled(slots)
    with slots.borrow(session) as state:
        with pytest.raises(TypeError):
            state.rewind(8)
        assert cache.released == 1


def fail(slots: StateSlots[Recurrent], session: Session, error: type[BaseException]) -> None:
    """Let a step fail with the KV cache in its hands."""
    with pytest.raises(error), slots.borrow(session) as state:
        assert state.kv_cache is not None
        raise error


def check_covered(session: Session, covered: int) -> None:
    """Check how much is cached, without a borrow, whose end would be a commit."""
    assert session._kv_length == covered
