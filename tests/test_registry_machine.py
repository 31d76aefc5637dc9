"""Any sequence of calls on a registry does what a plain model says, whatever is closed, borrowed or fails meanwhile.

The model is a list of sessions, the least recently used first, which is searched from the start for everything.
"""

from __future__ import annotations

import gc
import sys
from contextlib import AbstractContextManager, ExitStack
from math import inf
from unittest import mock
from uuid import UUID

from attrs import define, field
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.books import check_books, in_order, sizes

from inference_session import Session, SessionRegistry, _registry
from inference_session.engine import BorrowedState, StateSlots
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)


IDS = [UUID(int=number) for number in range(4)]
NBYTES = 10
"""What a token takes in a KV cache."""


class FailureError(Exception):
    """What a step raises."""


class ReleaseError(Exception):
    """What `release` raises."""


@define(eq=False)
class Cache:
    """A KV cache."""

    tokens: list[int] = field(factory=list[int])
    released: int = 0
    failed: bool = False
    """Whether its release raised."""


@define(eq=False)
class Engine:
    """Makes KV caches, keeps book of them, and fails to release one if it's told to."""

    caches: list[Cache] = field(factory=list[Cache])
    failures: int = 0
    """How many of the next releases fail."""
    raised: list[ReleaseError] = field(factory=list[ReleaseError])
    slots: StateSlots[Cache] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.slots = StateSlots(
            create=self.create,
            length=lambda cache: len(cache.tokens),
            truncate=self.truncate,
            release=self.release,
            nbytes=lambda cache: NBYTES * len(cache.tokens),
        )

    def create(self) -> Cache:
        """Make one."""
        self.caches.append(Cache())
        return self.caches[-1]

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Do it in place."""
        del cache.tokens[length:]
        return cache

    def release(self, cache: Cache) -> None:
        """Take one back."""
        cache.released += 1
        if self.failures:
            self.failures -= 1
            cache.failed = True
            self.raised.append(ReleaseError())
            raise self.raised[-1]


@define(eq=False)
class Talk:
    """The model of a session."""

    session: Session
    used: float
    tokens: int = 0
    cached: int | None = None
    """How many of them are in the KV cache; None if there's none. Both as they were committed."""
    cache: Cache | None = None
    borrow: AbstractContextManager[BorrowedState[Cache]] | None = None
    state: BorrowedState[Cache] | None = None
    now: tuple[int, int | None] = (0, None)
    """The same as the borrow has it."""
    handed_out: bool = False
    """Whether the borrow had its hands on the KV cache."""
    failed: bool = False
    """Whether the last borrow had, and failed."""
    unfinished: bool = False
    """Whether the next borrow takes back what another one left."""
    nbytes: int = 0
    """What the budget counts."""
    passed: bool = False
    """Whether it was borrowed when it would have been evicted, and wasn't used since."""
    closed: bool = False


SESSIONS = st.integers(0, 99)
SEVERAL = st.lists(SESSIONS, min_size=1, max_size=3)


class Registries(RuleBasedStateMachine):
    """A registry with limits of any kind, and one engine."""

    @initialize(
        max_sessions=st.sampled_from([3, 2, 1, 5, None]),
        idle_timeout=st.sampled_from([10.0, None]),
        max_kv_bytes=st.sampled_from([60, 100, 30, 0, None]),
    )
    def begin(
        self, max_sessions: int | None, idle_timeout: float | None, max_kv_bytes: int | None
    ) -> None:
        """Begin with an empty registry."""
        self.max_sessions = max_sessions
        self.idle_timeout = idle_timeout
        self.max_kv_bytes = max_kv_bytes
        self.engine = Engine()
        self.time = 1000.0
        self.order: list[Talk] = []
        """The open sessions, the least recently used first."""
        self.closed: list[Talk] = []
        """Some that were closed, and may be borrowed still."""
        self.unraisable: list[BaseException | None] = []
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch.object(_registry, "monotonic", self.tell_time))
        self.patches.enter_context(mock.patch.object(sys, "unraisablehook", self.hook))
        self.registry = SessionRegistry(
            max_sessions=max_sessions, idle_timeout=idle_timeout, max_kv_bytes=max_kv_bytes
        )

    def tell_time(self) -> float:
        """Be the clock."""
        return self.time

    def hook(self, report: sys.UnraisableHookArgs) -> None:
        """Note what nobody was there to catch."""
        self.unraisable.append(report.exc_value)

    # The model

    def touch(self, talk: Talk) -> None:
        """Use a session."""
        talk.used, talk.passed = self.time, False
        if talk in self.order:
            self.order.remove(talk)
            self.order.append(talk)

    def leave(self, talk: Talk) -> None:
        """Close a session."""
        if talk in self.order:
            self.order.remove(talk)
            self.closed.append(talk)
        talk.closed = True
        if talk.borrow is None:
            talk.tokens, talk.cached = 0, None

    def count(self, talk: Talk) -> None:
        """Count what a KV cache holds."""
        self.touch(talk)
        talk.nbytes = 0 if self.max_kv_bytes is None else NBYTES * (talk.cached or 0)

    def enforce(self) -> None:
        """Evict KV caches until the budget holds."""
        if self.max_kv_bytes is None:
            return
        for talk in list(self.order):
            if sum(talk.nbytes for talk in self.order) <= self.max_kv_bytes:
                return
            if talk.nbytes and talk.borrow is None:
                self.evict(talk)
            elif talk.nbytes:
                talk.passed = True

    def evict(self, talk: Talk) -> None:
        """Evict a KV cache."""
        talk.cached, talk.nbytes = None, 0
        assert talk.cache is not None
        assert talk.cache.released == 1
        talk.unfinished = talk.unfinished or talk.cache.failed

    def is_idle(self, talk: Talk) -> bool:
        """Whether it wasn't used for longer than the timeout."""
        return self.idle_timeout is not None and self.time - talk.used > self.idle_timeout

    def leave_idle(self) -> int:
        """Close those that are idle."""
        closed = 0
        while self.order and self.is_idle(self.order[0]):
            first = self.order[0]
            if first.borrow is None:
                self.leave(first)
                closed += 1
            else:
                self.touch(first)
        return closed

    def find(self, id: UUID) -> Talk | None:  # noqa: A002
        """Return the open session with an id."""
        found = [talk for talk in self.order if talk.session.id == id]
        assert len(found) <= 1
        return found[0] if found else None

    def make_room(self) -> bool:
        """Close the least recently used one that isn't borrowed, if that is needed, and return whether there's room."""
        if self.max_sessions is None or len(self.order) < self.max_sessions:
            return True
        for first in list(self.order):
            if first.borrow is None:
                self.leave(first)
                return True
            self.touch(first)
        return False

    def pick(self, number: int) -> Talk | None:
        """Return one of the sessions, perhaps a closed one."""
        talks = [*self.order, *self.closed[-2:]]
        return talks[number % len(talks)] if talks else None

    # Calls

    @rule(number=st.one_of(st.none(), st.integers(0, len(IDS) - 1)))
    def open(self, number: int | None) -> None:
        """Open a session, perhaps with an id that is there."""
        id = None if number is None else IDS[number]  # noqa: A001
        error: SessionError | None = None
        session: Session | None = None
        try:
            session = self.registry.open(id)
        except (SessionExistsError, RegistryFullError) as caught:
            error = caught
        self.leave_idle()
        if id is not None and self.find(id) is not None:
            assert isinstance(error, SessionExistsError)
            assert error.session_id == id
        elif not self.make_room():
            assert isinstance(error, RegistryFullError)
            assert error.max_sessions == self.max_sessions
        else:
            assert session is not None
            assert id is None or session.id == id
            talk = Talk(session, 0)
            self.touch(talk)
            self.order.append(talk)
        self.check_raised(None)

    @rule(number=st.integers(0, len(IDS) - 1), raises=st.booleans())
    def look_up(self, number: int, *, raises: bool) -> None:
        """Look an id up."""
        id = IDS[number]  # noqa: A001
        talk = self.find(id)
        assert (id in self.registry) == (talk is not None)
        session: Session | None = None
        if raises:
            try:
                session = self.registry[id]
            except SessionNotFoundError as error:
                assert error.session_id == id  # noqa: PT017
        else:
            session = self.registry.get(id)
        assert session is (None if talk is None else talk.session)
        if talk is not None:
            self.touch(talk)

    @rule(number=SESSIONS)
    def look_up_by_session(self, number: int) -> None:
        """Look up a session that was opened with a random id, too."""
        if self.order:
            talk = self.order[number % len(self.order)]
            assert self.registry[talk.session.id] is talk.session
            self.touch(talk)

    @rule(number=SESSIONS)
    def begin_borrow(self, number: int) -> None:
        """Borrow a session, for a while."""
        talk = self.pick(number)
        if talk is None:
            return
        borrow = self.engine.slots.borrow(talk.session)
        try:
            state = borrow.__enter__()
        except SessionClosedError:
            assert talk.closed
        except SessionBusyError:
            assert talk.borrow is not None
        except ReleaseError as error:  # of what another borrow left; the next one tries again
            assert talk.unfinished
            talk.cached = None
            self.check_raised(error)
        else:
            assert not talk.closed
            assert talk.borrow is None
            self.resume(talk)
            talk.borrow, talk.state = borrow, state
            talk.now, talk.handed_out = (talk.tokens, talk.cached), False

    def resume(self, talk: Talk) -> None:
        """Take back what was left of the last borrow."""
        if talk.unfinished:
            self.undo(talk, failed=False)
            talk.unfinished = False

    def undo(self, talk: Talk, *, failed: bool) -> None:
        """Take back what a borrow did; if the last one failed as well, its KV cache isn't trusted any more."""
        if talk.failed:
            talk.cached = None
        talk.failed = failed
        self.count(talk)

    @rule(number=SESSIONS, count=st.integers(1, 3))
    def feed(self, number: int, count: int) -> None:
        """Add tokens to a session that is borrowed."""
        talk = self.pick(number)
        if talk is not None and talk.state is not None:
            self.advance(talk, talk.state, count)

    def advance(self, talk: Talk, state: BorrowedState[Cache], count: int) -> None:
        """Add tokens, and feed all that are pending."""
        assert len(state.token_history) == talk.now[0]
        assert state.kv_length == (talk.now[1] or 0)
        state.append([7] * count)
        fed = state.pending
        state.kv_cache.tokens.extend(fed)
        state.advance(len(fed))
        talk.now = talk.now[0] + count, talk.now[0] + count
        talk.cache, talk.handed_out = state.kv_cache, True

    @rule(number=SESSIONS)
    def commit(self, number: int) -> None:
        """Commit in the midst of a borrow."""
        talk = self.pick(number)
        if talk is not None and talk.state is not None:
            talk.state.commit()
            self.save(talk)
            self.enforce()
            self.check_raised(None)

    def save(self, talk: Talk) -> None:
        """Take over what a borrow did."""
        talk.tokens, talk.cached = talk.now
        talk.failed = False
        self.count(talk)

    @rule(number=SESSIONS, fails=st.booleans())
    def end_borrow(self, number: int, *, fails: bool) -> None:
        """End a borrow, well or not."""
        talk = self.pick(number)
        if talk is None or talk.borrow is None:
            return
        error: BaseException | None = None
        failure = FailureError() if fails else None
        try:
            talk.borrow.__exit__(type(failure) if failure else None, failure, None)
        except ReleaseError as caught:
            error = caught
        talk.borrow = talk.state = None
        if fails:
            self.undo(talk, failed=talk.handed_out)
        else:
            self.save(talk)
        if talk.closed:
            self.leave(talk)
        self.enforce()
        self.check_raised(error, failure)

    @rule(number=SESSIONS)
    def abandon_borrow(self, number: int) -> None:
        """Let a borrow die unfinished."""
        talk = self.pick(number)
        if talk is not None and talk.borrow is not None:
            talk.borrow = talk.state = None
            talk.unfinished = not talk.closed
            if talk.closed:
                talk.tokens, talk.cached = 0, None
            elif talk.passed:
                self.enforce()

    @rule(numbers=SEVERAL, count=st.integers(1, 3), fails=st.booleans())
    def batch(self, numbers: list[int], count: int, *, fails: bool) -> None:
        """Step some sessions that are free, at once."""
        talks = {self.pick(number) for number in numbers}
        free = [
            talk
            for talk in self.order
            if talk in talks and talk.borrow is None and not talk.unfinished
        ]
        failure = FailureError()
        error: BaseException | None = None
        entered = False
        try:
            with self.engine.slots.borrow_all([talk.session for talk in free]) as states:
                entered = True
                for talk, state in zip(free, states, strict=True):
                    talk.now, talk.handed_out = (talk.tokens, talk.cached), False
                    self.advance(talk, state, count)
                if fails:
                    raise failure
        except FailureError:
            pass
        except ReleaseError as caught:
            error = caught
        finally:
            states = []
        assert entered
        if fails:
            for talk in free:
                self.undo(talk, failed=True)
                self.enforce_but(free[free.index(talk) + 1 :])
        else:
            for talk in free:
                self.save(talk)
            for position in range(len(free)):
                self.enforce_but(free[position + 1 :])
        self.check_raised(error, failure if fails else None)

    def enforce_but(self, busy: list[Talk]) -> None:
        """Evict while some sessions are still borrowed."""
        for talk in busy:
            talk.borrow = mock.MagicMock()
        self.enforce()
        for talk in busy:
            talk.borrow = None

    @rule(number=SESSIONS, by_id=st.booleans())
    def close(self, number: int, *, by_id: bool) -> None:
        """Close a session, perhaps one that is borrowed or was closed before."""
        talk = self.pick(number)
        if talk is None:
            return
        error: BaseException | None = None
        try:
            if by_id and not talk.closed:
                self.registry.close(talk.session.id)
            else:
                talk.session.close()
        except ReleaseError as caught:
            error = caught
        self.leave(talk)
        self.check_raised(error)

    @rule(number=SESSIONS)
    def evict_by_hand(self, number: int) -> None:
        """Evict a session."""
        talk = self.pick(number)
        if talk is None or talk.closed or talk.borrow is not None or talk.unfinished:
            return
        error: BaseException | None = None
        try:
            self.engine.slots.evict(talk.session)
        except ReleaseError as caught:
            error = caught
        talk.cached, talk.failed = None, False
        self.count(talk)
        self.enforce()
        self.check_raised(error)

    @precondition(lambda self: self.idle_timeout is not None)
    @rule()
    def close_idle(self) -> None:
        """Close those that are idle."""
        error: BaseException | None = None
        closed: int | None = None
        try:
            closed = self.registry.close_idle()
        except ReleaseError as caught:
            error = caught
        expected = self.leave_idle()
        assert error is not None or closed == expected
        self.check_raised(error)

    @rule(seconds=st.sampled_from([1.0, 5.0, 10.0, 10.5, 1e6]))
    def jump(self, seconds: float) -> None:
        """Let time pass, perhaps a lot of it, as when the machine slept."""
        self.time += seconds

    @rule()
    def fail_to_release(self) -> None:
        """Let the next release fail."""
        self.engine.failures = 1

    def check_raised(
        self, error: BaseException | None, failure: BaseException | None = None
    ) -> None:
        """Require that no error of a release is lost: each is raised, noted on another, or left to the hook."""
        raised = self.engine.raised
        noted = len(getattr(failure, "__notes__", ())) + len(getattr(error, "__notes__", ()))
        assert len(raised) == (error is not None) + noted + len(self.unraisable)
        assert error is None or error in raised
        assert set(self.unraisable) <= set(raised)
        for each in (error, failure, *self.unraisable):
            if each is not None:
                each.__traceback__ = each.__context__ = None
        raised.clear()
        self.unraisable.clear()

    # What always holds

    @invariant()
    def registry_is_as_the_model(self) -> None:
        """Exactly the model's sessions are there, in the order of their use, with what they hold."""
        sessions = [talk.session for talk in self.order]
        assert in_order(self.registry) == sessions
        assert set(self.registry) == {session.id for session in sessions}
        check_books(self.registry, self.max_sessions or inf)
        assert len(self.registry) == len(sessions)
        assert self.max_sessions is None or len(sessions) <= self.max_sessions
        holders = {talk.session.id.int: talk.nbytes for talk in self.order if talk.nbytes}
        assert sizes(self.registry) == holders
        for talk in (*self.order, *self.closed):
            assert talk.session.closed == talk.closed
            assert talk.session.token_count == talk.tokens
            assert (talk.session._observer is None) == talk.closed

    @invariant()
    def budget_holds(self) -> None:
        """Keep to the budget, but for what is borrowed, or was when its borrow died."""
        if self.max_kv_bytes is not None and self.registry._kv_total > self.max_kv_bytes:
            assert all(talk.borrow or talk.unfinished for talk in self.order if talk.nbytes)

    @invariant()
    def caches_are_released_once(self) -> None:
        """Release a KV cache when its session lets go of it, and never again."""
        for cache in self.engine.caches:
            assert cache.released <= 1
        for talk in (*self.order, *self.closed):
            if talk.borrow is None and not talk.unfinished:
                assert talk.cache is None or talk.cache.released == (talk.cached is None)

    def teardown(self) -> None:
        """Close everything: all that was created was released."""
        if not hasattr(self, "patches"):
            return
        self.engine.failures = 0
        try:
            for talk in (*self.order, *self.closed):
                talk.borrow = talk.state = None
            self.registry.close()
            assert len(self.registry) == 0
            for talk in (*self.order, *self.closed):
                talk.session.close()
                assert talk.session.token_count == 0
            self.order.clear()
            self.closed.clear()
            gc.collect(0)
            assert [cache.released for cache in self.engine.caches] == [1] * len(self.engine.caches)
        finally:
            self.patches.close()


def test_any_sequence_of_calls() -> None:
    """Whatever is called in whatever order, the registry is as the model says."""
    run_state_machine_as_test(
        Registries,
        settings=settings(max_examples=300, stateful_step_count=40, deadline=None),
    )
