"""Stragglers: threads that still have the state of a block which has ended change nothing, and are told so.

A step is given up (a time-out, a client that has gone), its block ends, and the session serves the next step. But the
thread that did the step is still at it: in the model, in the caller's iterable, in a function of the engine.
"""

import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Final, Literal, Self, TypeAlias, cast

import pytest
from attrs import define, field, frozen
from tests.caches import Cache, Memory
from tests.members import MEMBERS
from tests.threads import PATIENCE, Straggler

from inference_session import Session, SessionRegistry, _borrow
from inference_session import _transaction as transaction
from inference_session._lease import Lease, replace
from inference_session._session import CacheFunctions
from inference_session.engine import BorrowedState, Slot, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    StateMismatchError,
)


End: TypeAlias = Literal["failure", "commit"]


@define(eq=False)
class SlowMemory(Memory):
    """A memory whose functions hold up the straggler."""

    straggler: Straggler = field(init=False, factory=Straggler)

    def create(self) -> Cache:
        """Return a new cache."""
        self.straggler.pause("before create")
        cache = super().create()
        self.straggler.pause("after create")
        return cache

    def length(self, cache: Cache) -> int:
        """Return how many tokens a cache covers."""
        length = super().length(cache)
        self.straggler.pause("length")
        return length

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Return a cache of only the first tokens."""
        self.straggler.pause("before truncate")
        cut = super().truncate(cache, length)
        self.straggler.pause("after truncate")
        return cut

    def release(self, cache: Cache) -> None:
        """Take a cache back."""
        self.straggler.pause("release")
        super().release(cache)

    def slow(self, *tokens: int) -> Iterator[int]:
        """Stream tokens, and be held up before the last of them."""
        yield from tokens[:-1]
        self.straggler.pause("iterable")
        yield tokens[-1]

    def put(self, state: BorrowedState[Cache]) -> None:
        """Do a long step, whose result goes into the setter."""
        cache = self.new(state.token_history)
        self.straggler.pause("step")
        try:
            state.kv_cache = cache
        except BorrowExpiredError:
            super().release(cache)  # the library didn't take it
            raise

    @property
    def slot(self) -> Slot[int]:
        """A further slot, whose first value takes a while."""

        def factory() -> int:
            self.straggler.pause("factory")
            return 6

        return Slot(factory)


State: TypeAlias = BorrowedState[Cache]


@frozen
class Slow:
    """A call that is held up in some place."""

    name: str
    place: str
    call: Callable[[SlowMemory, State], object]
    cached: bool = True
    """Whether there is a KV cache when it begins."""
    torn: bool = False
    """Whether the KV cache doesn't cover what it should at this place, so that the block can't end well."""


CALLS: Final = (
    Slow("append", "iterable", lambda memory, state: state.append(memory.slow(6, 6))),
    Slow("reuse_prefix", "iterable", lambda memory, state: state.reuse_prefix(memory.slow(1, 6))),
    Slow("kv_cache", "before create", lambda memory, state: state.kv_cache, cached=False),
    Slow("kv_cache", "after create", lambda memory, state: state.kv_cache, cached=False),
    Slow("kv_cache", "length", lambda memory, state: state.kv_cache, cached=False),
    Slow("advance", "length", lambda memory, state: memory.step(state, 6), torn=True),
    Slow("commit", "length", lambda memory, state: state.commit()),
    Slow("rewind", "before truncate", lambda memory, state: state.rewind(1)),
    Slow("rewind", "after truncate", lambda memory, state: state.rewind(2, pending=0)),
    Slow("rewind", "length", lambda memory, state: state.rewind(1, pending=0), torn=True),
    Slow("reuse_prefix", "before truncate", lambda memory, state: state.reuse_prefix([1, 6])),
    Slow("reuse_prefix", "after truncate", lambda memory, state: state.reuse_prefix([1, 6, 6])),
    Slow("reuse_prefix", "length", lambda memory, state: state.reuse_prefix([6])),
    Slow("chunks", "before truncate", lambda memory, state: state.chunks(1, keep=2)),
    Slow("chunks", "after truncate", lambda memory, state: state.chunks(1, keep=3)),
    Slow("state[slot]", "factory", lambda memory, state: state[memory.slot]),
    Slow("kv_cache setter", "step", lambda memory, state: memory.put(state)),
)


def everything(session: Session) -> list[object]:
    """Return all that a session holds, as it is now."""
    names = [name for name in Session.__slots__ if not name.startswith("__")]
    values = [getattr(session, name) for name in names]
    return [value[:] if hasattr(value, "tolist") else value for value in values]


def seen(state: State) -> tuple[list[int], int, list[int]]:
    """Return what a borrower can see without a KV cache's being made."""
    return list(state.token_history), state.kv_length, list(state.pending)


def hand_over(
    memory: SlowMemory,
    slots: StateSlots[Cache],
    sessions: list[Session],
    slow: Slow,
    end: End,
) -> None:
    """Let a straggler be held up in a block, which then ends without it."""
    for session in sessions:
        with slots.borrow(session) as state:
            memory.step(state, 1, 2, 3)
        if not slow.cached:
            slots.evict(session)
    memory.straggler = straggler = Straggler()
    with suppress(TimeoutError, StateMismatchError), ExitStack() as stack:
        if len(sessions) == 1:
            states = [stack.enter_context(slots.borrow(sessions[0]))]
        else:
            states = stack.enter_context(slots.borrow_all(sessions))
        for state in states:
            state.append([5])
        straggler.begin(lambda: slow.call(memory, states[0]), slow.place)
        if end == "failure":
            raise TimeoutError


def check_committed(session: Session, slow: Slow, end: End) -> list[int]:
    """Require a session to be as its block left it, and return its history."""
    history = [1, 2, 3] if end == "failure" or slow.torn else [1, 2, 3, 5]
    assert session.token_count == len(history)
    return history


slow_calls = pytest.mark.parametrize("slow", CALLS, ids=lambda slow: f"{slow.name}, {slow.place}")
ends = pytest.mark.parametrize("end", ["failure", "commit"])
memories = pytest.mark.parametrize("functional", [False, True], ids=["in place", "functional"])
sizes = pytest.mark.parametrize("size", [1, 2], ids=["one", "batch"])


@sizes
@memories
@ends
@slow_calls
def test_a_straggler_of_an_idle_session(
    slow: Slow, end: End, *, functional: bool, size: int
) -> None:
    """Leave a session as its block left it, when a call of that block comes to its end later."""
    memory = SlowMemory(functional=functional)
    slots = memory.slots()
    sessions = [Session() for _ in range(size)]
    hand_over(memory, slots, sessions, slow, end)
    before = [everything(session) for session in sessions]
    outcome = memory.straggler.go_on()
    assert isinstance(outcome, BorrowExpiredError)
    assert outcome.session_id == sessions[0].id
    assert [everything(session) for session in sessions] == before
    for session in sessions:
        history = check_committed(session, slow, end)
        with slots.borrow(session) as state:
            assert state.token_history == history
            if state.kv_length:
                assert state.kv_cache.tokens == history[: state.kv_length]
            memory.step(state, 6)
            assert state.kv_cache.tokens == [*history, 6]
        session.close()
    memory.check_all_released()


@pytest.mark.parametrize("second", ["failure", "commit"])
@sizes
@memories
@ends
@slow_calls
def test_a_straggler_in_somebody_elses_borrow(
    slow: Slow, end: End, second: End, *, functional: bool, size: int
) -> None:
    """Keep a straggler of the block before out of a borrow that is under way, and out of what becomes of it."""
    memory = SlowMemory(functional=functional)
    slots = memory.slots()
    sessions = [Session() for _ in range(size)]
    hand_over(memory, slots, sessions, slow, end)
    session = sessions[0]
    history = check_committed(session, slow, end)
    with suppress(MemoryError), slots.borrow(session) as state:
        memory.step(state, 7, 8)
        before, all_before, cache = seen(state), everything(session), state.kv_cache
        assert before[0] == [*history, 7, 8]
        outcome = memory.straggler.go_on()
        assert isinstance(outcome, BorrowExpiredError)
        assert seen(state) == before
        assert everything(session) == all_before
        assert state.kv_cache is cache
        with pytest.raises(SessionBusyError), slots.borrow(session):
            pytest.fail("two borrowers")
        memory.step(state, 9)
        if second == "failure":
            raise MemoryError
    with slots.borrow(session) as state:
        if second == "commit":
            history = [*history, 7, 8, 9]
            assert state.kv_length == len(history)
        assert state.token_history == history
        if state.kv_length:
            assert state.kv_cache.tokens == history[: state.kv_length]
    for session in sessions:
        session.close()
    memory.check_all_released()


@sizes
@memories
@ends
@slow_calls
def test_a_straggler_of_a_closed_session(
    slow: Slow, end: End, *, functional: bool, size: int
) -> None:
    """Give nothing to a session that was closed after its block, and release what the straggler made."""
    memory = SlowMemory(functional=functional)
    slots = memory.slots()
    sessions = [Session() for _ in range(size)]
    hand_over(memory, slots, sessions, slow, end)
    for session in sessions:
        session.close()
    before = [everything(session) for session in sessions]
    assert isinstance(memory.straggler.go_on(), BorrowExpiredError)
    assert [everything(session) for session in sessions] == before
    assert [session.token_count for session in sessions] == [0] * size
    memory.check_all_released()  # without another close()
    with pytest.raises(SessionClosedError), slots.borrow(sessions[0]):
        pass


@memories
@ends
@slow_calls
def test_a_straggler_of_a_session_closed_in_mid_borrow(
    slow: Slow, end: End, *, functional: bool
) -> None:
    """Free a session that was closed while the straggler was at work, when the block ends and not later."""
    memory = SlowMemory(functional=functional)
    slots = memory.slots()
    session = Session()
    with slots.borrow(session) as state:
        memory.step(state, 1, 2, 3)
    if not slow.cached:
        slots.evict(session)
    with suppress(TimeoutError, StateMismatchError), slots.borrow(session) as state:
        memory.straggler.begin(lambda: slow.call(memory, state), slow.place)
        session.close()
        if end == "failure":
            raise TimeoutError
    before = everything(session)
    assert isinstance(memory.straggler.go_on(), BorrowExpiredError)
    assert everything(session) == before
    memory.check_all_released()


@pytest.mark.parametrize("name", ["rewind", "reuse_prefix"])
@pytest.mark.parametrize("borrowed", [False, True], ids=["idle", "borrowed"])
def test_a_straggler_that_releases(name: str, *, borrowed: bool) -> None:
    """Release a KV cache that can't be truncated once, though the block ends while it's released."""
    memory = SlowMemory(truncates=False)
    slots = memory.slots()
    with Session() as session:
        slow = Slow(name, "release", lambda memory, state: MEMBERS[name](state))
        hand_over(memory, slots, [session], slow, "failure")
        with ExitStack() as stack:
            if borrowed:
                memory.step(stack.enter_context(slots.borrow(session)), 7)
            before = everything(session)
            assert isinstance(memory.straggler.go_on(), BorrowExpiredError)
            assert everything(session) == before
        with slots.borrow(session) as state:
            assert state.token_history == ([1, 2, 3, 7] if borrowed else [1, 2, 3])
    memory.check_all_released()


def test_a_straggler_whose_truncate_fails() -> None:
    """Release the KV cache that a straggler's `truncate` failed on, and say that the borrow is over."""
    memory = SlowMemory()

    def truncate(cache: Cache, length: int) -> Cache:
        memory.straggler.pause("before truncate")
        raise MemoryError

    slots = StateSlots(
        create=memory.create, length=memory.length, truncate=truncate, release=memory.release
    )
    with Session() as session:
        slow = Slow("rewind", "before truncate", lambda memory, state: state.rewind(1))
        hand_over(memory, slots, [session], slow, "failure")
        with slots.borrow(session) as state:
            memory.step(state, 7)
            before = everything(session)
            outcome = memory.straggler.go_on()
            assert isinstance(outcome, (BorrowExpiredError, MemoryError))
            assert everything(session) == before
            assert state.token_history == [1, 2, 3, 7]
    memory.check_all_released()


@slow_calls
def test_a_call_that_ends_the_borrow(slow: Slow) -> None:
    """Change nothing more where the engine's or the caller's code ends the borrow and begins another, in one thread."""
    memory = SlowMemory()
    slots = memory.slots()
    stack, following = ExitStack(), ExitStack()
    before: list[list[object]] = []

    def ending() -> bool:
        with suppress(StateMismatchError):
            stack.close()
        following.enter_context(slots.borrow(session)).append([7])
        before.append(everything(session))
        return True

    with Session() as session:
        with slots.borrow(session) as state:
            memory.step(state, 1, 2, 3)
        if not slow.cached:
            slots.evict(session)
        state = stack.enter_context(slots.borrow(session))
        memory.straggler.place = slow.place
        memory.straggler.may_go_on.wait = lambda timeout=None: ending()  # type: ignore[method-assign]
        with following:
            with pytest.raises(BorrowExpiredError):
                slow.call(memory, state)
            assert [everything(session)] == before
        with slots.borrow(session) as state:
            assert state.token_history == [1, 2, 3, 7]
    memory.check_all_released()


class Gang:
    """Three threads that call members of expired states over and over."""

    def __init__(self, work: Callable[["Gang", int], None]) -> None:
        self.done = False
        self.refused = [0] * 3
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=work, args=(self, place)) for place in range(3)]

    def attempt(self, place: int, name: str, call: Callable[[], object]) -> None:
        """Call something that must be refused."""
        try:
            call()
        except BorrowExpiredError:
            self.refused[place] += 1
        except BaseException as error:  # noqa: BLE001 told to the main thread
            self.wrong.append(f"{name} raised {error!r}")
        else:
            self.wrong.append(f"{name} did something")

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.done = True
        for thread in self.threads:
            thread.join(PATIENCE)


def work(memory: Memory, states: list[State], history: list[int], number: int) -> list[int]:
    """Do some steps, require that nobody else does, fail sometimes, and return the history that is left."""
    tokens = [number % 7, number % 11]
    for state in states:
        assert state.token_history == history
        if len(history) > 40:
            state.rewind(2)
        memory.step(state, *tokens)
        state.commit()
    history = [*history[:2], *tokens] if len(history) > 40 else [*history, *tokens]
    for state in states:
        memory.step(state, 99)
        assert state.token_history == [*history, 99]
        assert state.kv_cache.tokens == [*history, 99]
        if number % 3:
            state.rewind(len(history), pending=0)
    return history


@pytest.mark.usefixtures("hasty")
@sizes
def test_many_stragglers(slots: StateSlots[Cache], memory: Memory, size: int) -> None:
    """Keep every borrow whole while threads hammer all members of the states of the blocks before."""
    sessions = [Session() for _ in range(size)]
    expired: list[State] = []
    current: list[State] = []
    history: list[int] = []

    def hammer(gang: Gang, place: int) -> None:
        while not gang.done:
            for name, member in MEMBERS.items():
                for state in expired[-2 * size :]:
                    gang.attempt(place, name, partial(member, state))

    number = 0
    with Gang(hammer) as gang:
        while number < 1500 or (min(gang.refused) < 100 and number < 50_000):
            number += 1
            with suppress(TimeoutError), slots.borrow_all(sessions) as states:
                current[:] = states
                history = work(memory, states, history, number)
                if number % 3 == 0:
                    raise TimeoutError
            expired[:] = current
            assert [session.token_count for session in sessions] == [len(history)] * size
    assert not gang.wrong
    assert min(gang.refused) > 0
    for session in sessions:
        session.close()


def test_a_commit_in_a_registry() -> None:
    """A straggler that commits is no use of its session: the KV cache is another's by then, and isn't measured."""
    measured_by: list[object] = []

    def nbytes(cache: Cache) -> int:
        measured_by.append(threading.current_thread())
        return len(cache.tokens)

    memory = SlowMemory()
    slots = StateSlots(
        create=memory.create, length=memory.length, release=memory.release, nbytes=nbytes
    )
    with SessionRegistry(max_kv_bytes=1000) as registry:
        session = registry.open()
        with slots.borrow(session) as state:
            memory.step(state, 1)
        with suppress(TimeoutError), slots.borrow(session) as state:
            memory.straggler.begin(state.commit, "length")
            raise TimeoutError
        with slots.borrow(session) as state:
            memory.step(state, 2, 3)
            before = registry._kv_total
            assert isinstance(memory.straggler.go_on(), BorrowExpiredError)
            assert registry._kv_total == before
        assert set(measured_by) == {threading.current_thread()}


def test_the_last_instant() -> None:
    """Whatever changes a session looks at the writer in the instant of the change, and not only some time before."""
    released: list[list[int]] = []
    slots = StateSlots(create=list[int], length=len, release=released.append)
    truncating = StateSlots(create=list[int], length=len, truncate=lambda cache, n: cache[:n])
    with Session() as session:
        with slots.borrow(session) as state:
            state.append([1, 2])
            state.kv_cache = [1, 2]
            state.advance(2)
        with slots.borrow(session) as state:
            over = state._lease
        with slots.borrow(session) as state:
            state.kv_cache = [1, 2]
            late: list[Callable[[], object]] = [
                partial(transaction.create_cache, session, slots, over),
                partial(transaction.replace_cache, session, over, [7]),
                partial(transaction.rewrite, session, over, 0, array("i")),
                partial(transaction.check_length, session, slots, over, 2, "advance"),
                partial(transaction.copy_values, session, over),
                partial(transaction.change_key, session, over, "another"),
                partial(transaction.cut_cache, session, truncating, over, 1),
                partial(transaction.new_savepoint, session, slots, over),
                partial(session._release_cache, over),
                partial(session._release_savepoint_cache, over),
            ]
            for change in late:
                with pytest.raises(BorrowExpiredError):
                    change()
            assert state.token_history == state.kv_cache == [1, 2]
            assert released == [[]]  # made by `create` too late
        assert session.token_count == 2


def test_an_observer_that_ends_the_borrow() -> None:
    """A borrow that ends while its commit is being noted commits nothing."""

    class Ending:
        def borrowing(
            self, slots: CacheFunctions[Any], lease: Lease
        ) -> tuple[CacheFunctions[Any], Lease]:
            return slots, lease

        def committing(self, session: Session) -> None:
            block.__exit__(KeyError, None, None)

        def rolled_back(self, session: Session, failure: BaseException | None) -> None: ...

        def settled(self, session: Session) -> None: ...

        def close(self, session: Session) -> None:
            session._closed = True

    slots = StateSlots(create=list[int], length=len)
    with Session() as session:
        block = slots.borrow(session)
        state = block.__enter__()
        state.append([1])
        session._observer = Ending()
        with pytest.raises(BorrowExpiredError):
            state.commit()
        assert session.token_count == 0
        assert not session.borrowed


def test_an_engine_without_release() -> None:
    """A KV cache that was made too late is dropped where there is nothing to release."""
    memory = SlowMemory()
    slots = StateSlots(create=memory.create, length=memory.length)
    with Session() as session:
        with suppress(TimeoutError), slots.borrow(session) as state:
            memory.straggler.begin(lambda: state.kv_cache, "after create")
            raise TimeoutError
        assert isinstance(memory.straggler.go_on(), BorrowExpiredError)
        assert session._slots is None


def test_taken_over_while_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose lease died too early finds that somebody else takes the session in that very instant."""
    slots = StateSlots(create=list[int], length=len)
    with Session() as session, ExitStack() as other:
        block = slots.borrow(session)
        block.__enter__().append([1])
        session._lease = session._writer = cast("BorrowedState[list[int]]", block)._lease = dead

        def too_late(session: Session, last: Lease, lease: Lease) -> bool:
            monkeypatch.setattr(_borrow, "replace", replace)
            other.enter_context(slots.borrow(session)).append([2])
            return replace(session, last, lease)

        monkeypatch.setattr(_borrow, "replace", too_late)
        with pytest.raises(BorrowExpiredError):
            block.__exit__(None, None, None)
        other.close()
        assert session.token_count == 1


def dead() -> None:
    """Be a lease that has died."""
