"""A run: an engine and some sessions, with every call checked."""

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from copy import copy
from random import Random
from string import ascii_lowercase
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from uuid import UUID
from weakref import ref

from attrs import define, field, frozen

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, Engine, PrefillResult, StateSlots
from inference_session.exceptions import SessionBusyError
from inference_session.testing import _threads
from inference_session.testing._choices import Choices
from inference_session.testing._hooks import Slots, slots_of
from inference_session.testing._reference import Reference
from inference_session.testing._report import BrokenError, ConclusiveError
from inference_session.testing._watch import Watch


T = TypeVar("T")

MOST_SESSIONS: Final = 8
MOST_TOKENS: Final = 64


@define(eq=False)
class Talk:
    """One session, and its expected state."""

    name: str
    session: Session
    history: list[int] = field(init=False, factory=list[int])
    """The expected tokens."""

    def __str__(self) -> str:
        return self.name

    @property
    def id(self) -> UUID:
        """The session's id."""
        return self.session.id

    @property
    def room(self) -> int:
        """How many tokens may still be added."""
        return MOST_TOKENS - len(self.history)

    @property
    def slots(self) -> Slots | None:
        """The engine's access to it, once the engine has begun it."""
        return None if self.session._slots is None else slots_of(self.session)


@frozen
class Step:
    """A call of the engine: prefill some tokens, or decode."""

    tokens: list[int] | tuple[int, ...] | None = None

    def on(self, talk: Talk) -> str:
        """Return its source code."""
        if self.tokens is None:
            return f"engine.decode({talk})"
        return f"engine.prefill({talk}, {self.tokens})"

    def added(self, result: object) -> list[int]:
        """Return the tokens it added, by its result."""
        if self.tokens is not None:
            return list(self.tokens)
        return [result.token] if isinstance(result, DecodeResult) else []


DECODE: Final = Step()


def prefill(tokens: Sequence[int]) -> Step:
    """Return a step to prefill these tokens."""
    return Step(list(tokens))


@define(eq=False)
class Run:
    """An engine, its sessions, and all calls so far: one example of Hypothesis."""

    make_engine: Callable[[], Engine]
    watch: Watch
    reference: Reference
    choose: Choices

    engine: Engine = field(init=False)
    calls: list[str] = field(init=False, factory=lambda: ["engine = make_engine()"])
    proofs: int = field(init=False, default=0)
    """How often the subject of the check has happened."""
    failed: bool = field(init=False, default=False)
    """Whether a step has failed."""
    _talks: list[Talk] = field(init=False, factory=list[Talk])
    _ids: Random = field(init=False, factory=lambda: Random(1))  # noqa: S311 not for secrets

    def __enter__(self) -> Self:
        self.watch.reset()
        self.engine = self.make_engine()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        open_talks = [talk for talk in self._talks if not talk.session.closed]
        try:
            if exc is None:
                for talk in open_talks:
                    self.close(talk)
        finally:
            for talk in open_talks:
                with suppress(Exception):
                    talk.session.close()

    # Calls on sessions

    def open(self, session_id: UUID | None = None) -> Talk:
        """Make a session."""
        name = ascii_lowercase[len(self._talks)]
        session_id = session_id or UUID(int=self._ids.getrandbits(128), version=4)
        talk = Talk(name, Session.with_id(session_id))
        assert sum(not other.session.closed for other in self._talks) < MOST_SESSIONS
        self._talks.append(talk)
        self.watch.add(talk.session)
        self.calls.append(f'{talk} = Session.with_id(UUID("{session_id}"))')
        return talk

    def prefill(self, talk: Talk, tokens: Sequence[int]) -> None:
        """Prefill."""
        self.step(talk, prefill(tokens))

    def decode(self, talk: Talk) -> int:
        """Decode a token, and return it."""
        self.step(talk, DECODE)
        return talk.history[-1]

    def step(self, talk: Talk, step: Step) -> None:
        """Do a step and require it to succeed."""
        self.calls.append(step.on(talk))
        self.watch.begin_step()
        self.take(talk, step, self.attempt(self.call(talk, step)))
        self.check_all()

    def evict(self, talk: Talk) -> None:
        """Free a session's KV cache."""
        slots = talk.slots
        if slots is not None:
            self.calls.append(f"slots.evict({talk})")
            self.watch.begin_step()
            self.attempt(lambda: slots.evict(talk.session))
            self.check_all()

    def rewind(self, talk: Talk, length: int) -> None:
        """Rewind a session."""
        if talk.slots is not None:
            self.calls.append(f"with slots.borrow({talk}) as state: state.rewind({length})")
            self.attempt(lambda: self.borrowing(talk, lambda state: state.rewind(length)))
            del talk.history[length:]
            self.check_all()

    def reuse_prefix(self, talk: Talk, tokens: Sequence[int]) -> None:
        """Go on with other tokens, from the prefix shared with the present ones."""
        if talk.slots is not None:
            tokens = list(tokens)
            self.calls.append(f"with slots.borrow({talk}) as state: state.reuse_prefix({tokens})")
            self.attempt(lambda: self.borrowing(talk, lambda state: state.reuse_prefix(tokens)))
            talk.history = list(tokens)
            self.check_all()

    def close(self, talk: Talk) -> None:
        """Close a session."""
        self.calls.append(f"{talk}.close()")
        self.watch.begin_step()
        self.attempt(talk.session.close)
        self.closed(talk)

    def forget(self, talk: Talk) -> None:
        """Close a session, and stop checking it."""
        self.close(talk)
        self._talks.remove(talk)

    def closed(self, talk: Talk) -> None:
        """Check that a closed session holds nothing any more."""
        talk.history = []
        if talk.session._slots is not None:
            raise self.broken("the state of a closed session to be freed", "it is still borrowed")
        self.check_books()

    def refuse(self, talk: Talk, step: Step, error: type[Exception]) -> None:
        """Do a step and require it to be refused."""
        self.calls.append(step.on(talk))
        self.watch.begin_step()
        call = self.call(talk, step)
        try:
            self.perform(call)
        except error:
            pass
        except Exception as raised:
            raise self.broken(error.__name__, f"{type(raised).__name__}: {raised}") from raised
        else:
            raise self.broken(error.__name__, "the step went on")
        self.check_all()

    def reopen(self, talk: Talk) -> None:
        """Replace a closed session by a new one with the same id."""
        self.calls.append(f'{talk} = Session.with_id(UUID("{talk.id}"))')
        talk.session = Session.with_id(talk.id)
        self.watch.add(talk.session)

    def open_foreign(self, tokens: Sequence[int]) -> Talk:
        """Make a session, and begin it with other slots than the engine's."""
        talk = self.open()
        talk.history = list(tokens)
        self.calls.append(
            f"with StateSlots(create=list, length=len).borrow({talk}) as state: "
            f"state.append({talk.history})"
        )
        with StateSlots(create=list[int], length=len).borrow(talk.session) as state:
            state.append(talk.history)
        return talk

    @property
    def last(self) -> Talk:
        """The session opened last."""
        return self._talks[-1]

    def drop_last(self) -> None:
        """Drop the session opened last, without closing it."""
        talk = self._talks.pop()
        self.calls.append(f"del {talk}")
        session = ref(talk.session)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del talk
            if session() is not None:
                gc.collect()
        kept = session()
        if kept is not None:
            with suppress(Exception):
                kept.close()
            raise self.broken("the session to be garbage", "something still refers to it")
        self.check_all()

    # Parts of steps

    def call(self, talk: Talk, step: Step) -> Callable[[], object]:
        """Return a step as a call of the engine."""
        if step.tokens is None:
            return lambda: self.engine.decode(talk.session)
        tokens = copy(step.tokens)

        def call() -> object:
            result = self.engine.prefill(talk.session, tokens)
            if tokens != step.tokens:
                raise self.broken(f"the caller's {step.tokens} to be left alone", f"{tokens}")
            return result

        return call

    def perform(self, call: Callable[[], T]) -> T:
        """Make a call; once a step has failed, in a new thread, as the call may wait for ever."""
        if not self.failed:
            return call()
        other = _threads.Elsewhere(call).start()
        if not other.done(_threads.PATIENCE):
            raise ConclusiveError(
                self.broken(
                    "the call to end",
                    f"it still waits after {_threads.PATIENCE:g} seconds, in a thread of its own: "
                    "is there a lock that a failed step doesn't release?",
                )
            )
        return other.result()

    def borrowing(self, talk: Talk, do: Callable[[BorrowedState[Any]], T]) -> T:
        """Borrow a session as its engine does, for operations beyond the `Engine` protocol."""
        assert talk.slots is not None
        key = talk.session._key  # another key would release the KV cache
        borrow: AbstractContextManager[BorrowedState[Any], None] = talk.slots.borrow(
            talk.session, key=key
        )
        with borrow as state:
            return do(state)

    def attempt(self, call: Callable[[], T]) -> T:
        """Make a call and require it to succeed."""
        try:
            return self.perform(call)
        except BrokenError:
            raise
        except Exception as error:
            raise self.broken("no error", f"{type(error).__name__}: {error}") from error

    def take(self, talk: Talk, step: Step, result: object) -> None:
        """Compare the result of a step with the expected one, and record it."""
        if step.tokens is not None:
            if not isinstance(result, PrefillResult):
                raise self.broken("a PrefillResult", f"{type(result).__name__}")
            if result.tokens_processed != len(step.tokens):
                raise self.broken(
                    f"tokens_processed={len(step.tokens)}",
                    f"tokens_processed={result.tokens_processed}",
                )
            talk.history += step.tokens
            return
        if not isinstance(result, DecodeResult):
            raise self.broken("a DecodeResult", f"{type(result).__name__}")
        token: object = result.token
        if type(token) is not int or not 0 <= token < self.choose.vocab_size:
            raise self.broken(
                f"a token, an int from 0 to {self.choose.vocab_size - 1}",
                f"{token!r} of type {type(token).__name__}",
            )
        self.compare(talk, token)
        talk.history.append(token)

    def compare(self, talk: Talk, token: int) -> None:
        """Compare a decoded token with that of a fresh session."""
        if token == self.ask(talk, self.reference.next_token):
            return
        expected = self.ask(talk, self.reference.next_token_for_sure)
        if token == expected:
            return
        self.calls[-1] += f"  # -> {token}, expected {expected}"
        raise self.broken(
            f"token {expected} after the tokens {talk.history}, as of a fresh session with the same id",
            f"{token}",
        )

    def ask(self, talk: Talk, reference: Callable[[UUID, Sequence[int]], int]) -> int:
        """Return the reference's answer to a session's tokens."""
        try:
            return reference(talk.id, talk.history)
        except Exception as error:
            raise BrokenError(
                "no error",
                f"{type(error).__name__}: {error}",
                [
                    "engine = make_engine()",
                    f'a = Session.with_id(UUID("{talk.id}"))',
                    prefill(talk.history).on(Talk("a", talk.session)),
                    "engine.decode(a)",
                ],
            ) from error

    # Invariants

    def check_all(self) -> None:
        """Check that all sessions are free and have their tokens, and that no KV cache was misused."""
        self.watch.begin_step()
        for talk in self._talks:
            if not talk.session.closed:
                self.check(talk)
        self.check_books()

    def check(self, talk: Talk) -> None:
        """Check that a session isn't borrowed, and has the expected tokens."""
        history = self.tokens(talk)
        if history != talk.history:
            raise self.broken(f"the tokens of session {talk} to be {talk.history}", f"{history}")

    def tokens(self, talk: Talk) -> list[int]:
        """Return the tokens of a session."""
        if talk.slots is None:
            return []
        try:
            return self.borrowing(talk, lambda state: list(state.token_history))
        except SessionBusyError as error:
            raise self.broken("the session to be free again", "it is still borrowed") from error
        except Exception as error:
            raise self.broken(
                "a session that can be borrowed", f"{type(error).__name__}: {error}"
            ) from error

    def check_books(self) -> None:
        """Check that no KV cache was misused, and that none is left over."""
        if self.watch.book.mistakes:
            raise self.broken(
                "each KV cache to be one session's, and to be released once",
                self.watch.book.mistakes[0],
            )
        if self.watch.book.left_over(talk.session for talk in self._talks):
            raise self.broken(
                "a KV cache that no session has any more to be released", "one that wasn't"
            )

    def broken(self, expected: str, got: str) -> BrokenError:
        """Return the error for a broken promise."""
        return BrokenError(expected, got, self.calls)
