"""The scenario: an engine, its sessions and their expected state, and every call so far."""

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from copy import copy
from random import Random
from string import ascii_lowercase
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from uuid import UUID
from weakref import ref

from attrs import define, field, frozen

from inference_session import Session
from inference_session.engine import (
    BatchEngine,
    BorrowedState,
    DecodeResult,
    Engine,
    PrefillResult,
    StateSlots,
)
from inference_session.exceptions import SessionBusyError
from inference_session.testing._choices import Choices
from inference_session.testing._observer import Part, Slots, Watch, Witness, reporting, slots_of


T = TypeVar("T")

MOST_SESSIONS: Final = 8
CACHES_USED_RIGHT: Final = "each KV cache to be one session's, and to be released once"
PATIENCE: Final = 30.0
"""How many seconds a call may take, before it is assumed to wait for a lock for ever."""


class BrokenError(Exception):
    """An engine broke a promise. Only the kit sees it; a test gets an `AssertionError` with the same contents."""

    def __init__(self, expected: str, got: str, calls: Sequence[str]) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got
        self.calls = list(calls)

    @property
    def size(self) -> tuple[int, int]:
        """The length for a reader: fewer calls are better, then fewer tokens."""
        return len(self.calls), sum(map(len, self.calls))


class ConclusiveError(BaseException):
    """A promise is broken, and another try would show it no better, but might take long."""

    def __init__(self, broken: BrokenError) -> None:
        super().__init__(broken)
        self.broken = broken


@define(eq=False)
class Chat:
    """One session, and its expected tokens."""

    name: str
    session: Session
    witness: Witness
    history: list[int] = field(init=False, factory=list[int])
    shown: bool = field(init=False, default=False)
    """Whether the calls so far show where it comes from."""

    def __str__(self) -> str:
        return self.name

    @property
    def id(self) -> UUID:
        """The session's id."""
        return self.session.id

    @property
    def slots(self) -> Slots | None:
        """The engine's access to it, once the engine has begun it."""
        return slots_of(self.session)


@frozen
class Step:
    """A call of the engine: prefill some tokens, or decode."""

    tokens: list[int] | tuple[int, ...] | None = None

    def on(self, chat: Chat) -> str:
        """Return its source code."""
        if self.tokens is None:
            return f"engine.decode({chat})"
        return f"engine.prefill({chat}, {self.tokens})"

    def added(self, result: object) -> list[int]:
        """Return the tokens it added, by its result."""
        if self.tokens is not None:
            return list(self.tokens)
        return [result.token] if isinstance(result, DecodeResult) else []


DECODE: Final = Step()


def prefill(tokens: Sequence[int]) -> Step:
    """Return a step to prefill these tokens."""
    return Step(list(tokens))


def elsewhere(call: Callable[[], T]) -> Future[T]:
    """Make a call in another thread.

    No executor does it, as the thread of a call that hangs must not keep the process from exiting.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 raised by `Future.result`
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def done(*futures: Future[Any], seconds: float) -> bool:
    """Wait for calls for up to some seconds; return whether all have ended."""
    return not wait(futures, seconds).not_done


@define(eq=False)
class Scenario:
    """An engine, its sessions, and all calls so far: one example of Hypothesis."""

    make_engine: Callable[[], Engine]
    held: Callable[[Any], int] | None
    parts: Sequence[Part]
    """What the model consists of, as `fail_in` says."""
    watch: Watch
    reference: "Reference"
    choose: Choices

    engine: Engine = field(init=False)
    calls: list[str] = field(init=False, factory=lambda: ["engine = make_engine()"])
    inside: Sequence[Part] = field(init=False, default=())
    """Parts of the model whose calls are events, too."""
    proofs: int = field(init=False, default=0)
    """How often the subject of the check has happened."""
    failed: bool = field(init=False, default=False)
    """Whether a step has failed."""
    events: int = field(init=False, default=0)
    """How many events there were in the last call."""
    longest: int = field(init=False, default=0)
    """The most tokens that a session has had."""
    slowest: float = field(init=False, default=0.0)
    """The most seconds that a step has taken."""
    _held: int = field(init=False, default=0)
    _opened: int = field(init=False, default=0)
    _chats: list[Chat] = field(init=False, factory=list[Chat])
    _ids: Random = field(init=False, factory=lambda: Random(1))  # noqa: S311 not for secrets

    def __enter__(self) -> Self:
        self.watch.reset()
        self.engine = self.make_engine()
        if self.held is not None:
            self._held = self.held(self.engine)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        chats = self.open_chats
        try:
            if exc is None:
                for chat in chats:
                    self.close(chat)
                self.check_held()
        finally:
            for chat in chats:
                with suppress(Exception):
                    chat.session.close()

    @property
    def open_chats(self) -> list[Chat]:
        """The sessions not closed."""
        return [chat for chat in self._chats if not chat.session.closed]

    def room(self, chat: Chat) -> int:
        """Return how many tokens may still be added to a session."""
        return self.choose.max_tokens - len(chat.history)

    def note(self, line: str, *chats: Chat) -> None:
        """Add a line to the calls, after the lines that make its sessions."""
        for chat in chats:
            if not chat.shown:
                chat.shown = True
                self.calls.append(f'{chat} = Session.with_id(UUID("{chat.id}"))')
        self.calls.append(line)

    def remark(self, text: str, call: int = -1) -> None:
        """Add a comment to one of the calls, the last one by default."""
        separator = ", " if "  # " in self.calls[call] else "  # "
        self.calls[call] += separator + text

    # Calls on sessions

    def open(self, session_id: UUID | None = None) -> Chat:
        """Make a session."""
        return self.adopt(Session.with_id(session_id or self.new_id()))

    def new_id(self) -> UUID:
        """Return an id: the same ones in each scenario."""
        return UUID(int=self._ids.getrandbits(128), version=4)

    def adopt(self, session: Session, line: str = "", history: Sequence[int] = ()) -> Chat:
        """Take in a session, which a line of calls with a `{}` for its name has made, with its expected tokens."""
        assert len(self.open_chats) < MOST_SESSIONS
        count, self._opened = self._opened, self._opened + 1
        name = ascii_lowercase[count] if count < len(ascii_lowercase) else f"s{count}"
        chat = Chat(name, session, self.watch.add(session))
        if line:
            chat.shown = True
            self.calls[-1] = line.format(name)
        chat.history = list(history)
        self._chats.append(chat)
        return chat

    def prefill(self, chat: Chat, tokens: Sequence[int]) -> None:
        """Prefill."""
        self.step(chat, prefill(tokens))

    def decode(self, chat: Chat) -> int:
        """Decode a token, and return it."""
        self.step(chat, DECODE)
        return chat.history[-1]

    def step(self, chat: Chat, step: Step) -> None:
        """Do a step and require it to succeed."""
        self.note(step.on(chat), chat)
        self.watch.begin_step()
        self.take(chat, step, self.attempt(self.call(chat, step)))
        self.check_all()

    def decode_batch(self, chats: Sequence[Chat]) -> None:
        """Decode a token of each of some sessions in one step, and require it to succeed."""
        self.note(f"engine.decode_batch([{', '.join(map(str, chats))}])", *chats)
        self.watch.begin_step()
        self.take_batch(chats, self.attempt(self.batch_call(chats)))
        self.check_all()

    def evict(self, chat: Chat) -> None:
        """Free a session's KV cache."""
        slots = chat.slots
        if slots is not None:
            self.note(f"slots.evict({chat})", chat)
            self.watch.begin_step()
            self.attempt(lambda: slots.evict(chat.session))
            self.check_all()

    def rewind(self, chat: Chat, length: int, *, pending: int = 1) -> None:
        """Rewind a session."""
        if chat.slots is not None:
            arguments = f"{length}" if pending == 1 else f"{length}, {pending=}"
            self.note(f"with slots.borrow({chat}) as state: state.rewind({arguments})", chat)
            self.watch.begin_step()
            self.attempt(
                lambda: self.borrowing(chat, lambda state: state.rewind(length, pending=pending))
            )
            del chat.history[length:]
            self.check_all()

    def reuse_prefix(self, chat: Chat, tokens: Sequence[int]) -> None:
        """Go on with other tokens, from the prefix shared with the present ones."""
        if chat.slots is not None:
            tokens = list(tokens)
            self.note(f"with slots.borrow({chat}) as state: state.reuse_prefix({tokens})", chat)
            self.watch.begin_step()
            self.attempt(lambda: self.borrowing(chat, lambda state: state.reuse_prefix(tokens)))
            chat.history = list(tokens)
            self.check_all()

    def branch(self, chat: Chat, length: int) -> Chat:
        """Branch off a session with the first tokens of another one."""
        child_id = self.new_id()
        line = f'with slots.borrow({chat}) as state: {{}} = state.branch({length}, id=UUID("{child_id}"))'
        self.note(line, chat)
        self.watch.begin_step()

        def branch(state: BorrowedState[Any]) -> Chat:
            child = state.branch(length, id=child_id)
            return self.adopt(
                child, line, chat.history[:length]
            )  # so it's closed, whatever happens

        child = self.attempt(lambda: self.borrowing(chat, branch))
        self.check_all()
        return child

    def save(self, chat: Chat, path: str, *, move: bool) -> None:
        """Write a session to a file, and close it if it's to be moved."""
        slots = chat.slots
        assert slots is not None
        self.note(f"slots.save({chat}, path, {move=})", chat)
        self.watch.begin_step()
        self.attempt(lambda: slots.save(chat.session, path, move=move))
        if move:
            self.closed(chat)
        self.check_all()

    def restore(self, slots: Slots, path: str, history: Sequence[int], covered: int) -> Chat:
        """Read a session from a file, with its KV cache."""
        line = "{} = slots.restore(path)"
        self.note(line)
        chat = self.adopt(self.attempt(lambda: slots.restore(path)), line, history)
        self.check_all()
        kept = self.borrowing(chat, lambda state: state.kv_length)
        if kept != covered:
            raise self.broken(
                f"`load` to return the KV cache of {covered} tokens that `dump` wrote",
                f"it covers {kept}, or `load` raised an error: see the log",
            )
        return chat

    def replace_engine(self, tokens: Sequence[int]) -> Slots:
        """Go on with a new engine, as another process would, and return its slots; all sessions must be closed."""
        self.check_held()
        self.engine = self.make_engine()
        if self.held is not None:
            self._held = self.held(self.engine)
        self.calls.append("engine = make_engine()  # as in another process")
        with Session() as session:
            self.attempt(lambda: self.engine.prefill(session, tokens))
            slots = slots_of(session)
        assert slots is not None
        return slots

    def close(self, chat: Chat) -> None:
        """Close a session."""
        if chat.shown:
            self.note(f"{chat}.close()")
        self.watch.begin_step()
        self.attempt(chat.session.close)
        self.closed(chat)

    def forget(self, chat: Chat) -> None:
        """Close a session, and stop checking it."""
        self.close(chat)
        self._chats.remove(chat)

    def closed(self, chat: Chat) -> None:
        """Check that a closed session holds nothing any more."""
        chat.history = []
        if chat.session._slots is not None:
            raise self.broken("the state of a closed session to be freed", "it is still borrowed")
        self.check_caches()

    def refuse(self, chat: Chat, step: Step, error: type[Exception]) -> None:
        """Do a step and require it to be refused."""
        self.note(step.on(chat), chat)
        self.refused(self.call(chat, step), error)

    def refused(self, call: Callable[[], object], error: type[Exception]) -> None:
        """Make a call and require it to be refused."""
        self.watch.begin_step()
        try:
            self.perform(call)
        except error:
            pass
        except Exception as raised:
            raise self.broken(error.__name__, told(raised)) from raised
        else:
            raise self.broken(error.__name__, "the step went on")
        self.check_all()

    def reopen(self, chat: Chat) -> None:
        """Replace a closed session by a new one with the same id."""
        self.note(f'{chat} = Session.with_id(UUID("{chat.id}"))', chat)
        chat.session = Session.with_id(chat.id)
        chat.witness = self.watch.add(chat.session)

    def open_foreign(self, tokens: Sequence[int]) -> Chat:
        """Make a session, and begin it with other slots than the engine's."""
        chat = self.open()
        chat.history = list(tokens)
        self.note(
            f"with StateSlots(create=list, length=len).borrow({chat}) as state: "
            f"state.append({chat.history})",
            chat,
        )
        with StateSlots(create=list[int], length=len).borrow(chat.session) as state:
            state.append(chat.history)
        return chat

    @property
    def last(self) -> Chat:
        """The session opened last."""
        return self._chats[-1]

    def drop_last(self) -> None:
        """Drop the session opened last, without closing it."""
        self.watch.begin_step()
        chat = self._chats.pop()
        self.note(f"del {chat}", chat)
        session = ref(chat.session)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del chat
            if session() is not None:
                gc.collect()
        kept = session()
        if kept is not None:
            with suppress(Exception):
                kept.close()
            raise self.broken("the session to be garbage", "something still refers to it")
        self.check_all()

    # Parts of steps

    def call(self, chat: Chat, step: Step) -> Callable[[], object]:
        """Return a step as a call of the engine."""
        if step.tokens is None:
            return lambda: self.engine.decode(chat.session)
        tokens = copy(step.tokens)

        def call() -> object:
            result = self.engine.prefill(chat.session, tokens)
            if tokens != step.tokens:
                raise self.broken(f"the caller's {step.tokens} to be left alone", f"{tokens}")
            return result

        return call

    def batch_call(self, chats: Sequence[Chat]) -> Callable[[], object]:
        """Return a step of a batch as a call of the engine."""
        engine = cast("BatchEngine", self.engine)
        return lambda: engine.decode_batch([chat.session for chat in chats])

    def perform(self, call: Callable[[], T]) -> T:
        """Make a call; once a step has failed, in a new thread, as the call may wait for ever."""
        before = self.watch.count
        with reporting(self.inside, self.watch):
            result = self._perform(call)
        self.events = self.watch.count - before
        return result

    def _perform(self, call: Callable[[], T]) -> T:
        if not self.failed:
            begin = perf_counter()
            result = call()
            self.slowest = max(self.slowest, perf_counter() - begin)
            return result
        future = elsewhere(call)
        if not done(future, seconds=PATIENCE):
            raise ConclusiveError(
                self.broken(
                    "the call to end",
                    f"it still waits after {PATIENCE:g} seconds, in a thread of its own: "
                    "is there a lock that a failed step doesn't release?",
                )
            )
        return future.result()

    def borrowing(self, chat: Chat, do: Callable[[BorrowedState[Any]], T]) -> T:
        """Borrow a session as its engine does, for operations beyond the `Engine` protocol."""
        assert chat.slots is not None
        key = chat.session._key  # another key would release the KV cache
        with chat.slots.borrow(chat.session, key=key) as state:
            return do(state)

    def attempt(self, call: Callable[[], T]) -> T:
        """Make a call and require it to succeed."""
        try:
            return self.perform(call)
        except BrokenError:
            raise
        except Exception as error:
            raise self.failure("no error", error) from error

    def failure(self, expected: str, error: Exception) -> BrokenError:
        """Return the error for an exception of the engine: a misused KV cache, if there was one, is what led to it."""
        caches = self.watch.caches
        if caches.mistakes or caches.suspicions:
            found = (caches.mistakes or caches.suspicions)[0]
            return self.broken(CACHES_USED_RIGHT, f"{found}; then {told(error)}")
        if isinstance(error, SessionBusyError):
            return self.broken(expected, f"{told(error)} (it is: nobody else has borrowed it)")
        return self.broken(expected, told(error))

    def take(self, chat: Chat, step: Step, result: object) -> None:
        """Compare the result of a step with the expected one, and record it."""
        if step.tokens is not None:
            if not isinstance(result, PrefillResult):
                raise self.broken("a PrefillResult", f"{type(result).__name__}")
            if result.tokens_processed != len(step.tokens):
                raise self.broken(
                    f"tokens_processed={len(step.tokens)}",
                    f"tokens_processed={result.tokens_processed}",
                )
            chat.history += step.tokens
        else:
            self.compare(chat, self.token(result))
        self.longest = max(self.longest, len(chat.history))

    def take_batch(self, chats: Sequence[Chat], results: object) -> None:
        """Compare the results of a batch with the expected ones, and record them."""
        if not isinstance(results, Sequence):
            raise self.broken("a sequence of DecodeResults", f"{type(results).__name__}")
        found = cast("Sequence[object]", results)
        if len(found) != len(chats):
            raise self.broken(f"{len(chats)} results", f"{len(found)} results")
        for chat, result in zip(chats, found, strict=True):
            self.take(chat, DECODE, result)

    def token(self, result: object) -> int:
        """Return the token of a result."""
        if not isinstance(result, DecodeResult):
            raise self.broken("a DecodeResult", f"{type(result).__name__}")
        token: object = result.token
        if type(token) is not int or not 0 <= token < self.choose.vocab_size:
            raise self.broken(
                f"a token, an int from 0 to {self.choose.vocab_size - 1}",
                f"{token!r} of type {type(token).__name__}",
            )
        return token

    def compare(self, chat: Chat, token: int) -> None:
        """Compare a decoded token with that of a fresh session, and record it."""
        if token != self.ask(chat, self.reference.next_token):
            expected = self.ask(chat, self.reference.next_token_for_sure)
            if token != expected:
                whose = "" if DECODE.on(chat) in self.calls[-1] else f" for {chat}"
                self.remark(f"-> {token}{whose}, expected {expected}")
                raise self.broken(
                    f"token {expected} after the tokens {chat.history}, "
                    "as of a fresh session with the same id",
                    f"{token}",
                )
        chat.history.append(token)

    def ask(self, chat: Chat, reference: Callable[[UUID, Sequence[int]], int]) -> int:
        """Return the reference's answer to a session's tokens."""
        try:
            return reference(chat.id, chat.history)
        except Exception as error:
            raise BrokenError(
                "no error",
                told(error),
                [
                    "engine = make_engine()",
                    f'a = Session.with_id(UUID("{chat.id}"))',
                    f"engine.prefill(a, {chat.history})",
                    "engine.decode(a)",
                ],
            ) from error

    # Invariants

    def check_all(self) -> None:
        """Check that all sessions are free and have their tokens, and that no KV cache was misused."""
        self.watch.begin_step()
        for chat in self.open_chats:
            self.check(chat)
        self.check_caches()

    def check(self, chat: Chat) -> None:
        """Check that a session isn't borrowed, and has the expected tokens."""
        history = self.tokens(chat)
        if history != chat.history:
            raise self.broken(f"the tokens of session {chat} to be {chat.history}", f"{history}")

    def tokens(self, chat: Chat) -> list[int]:
        """Return the tokens of a session."""
        if chat.slots is None:
            return []
        try:
            return self.borrowing(chat, lambda state: list(state.token_history))
        except SessionBusyError as error:
            raise self.broken("the session to be free again", "it is still borrowed") from error
        except Exception as error:
            raise self.failure("a session that can be borrowed", error) from error

    def check_caches(self) -> None:
        """Check that no KV cache was misused."""
        if self.watch.caches.mistakes:
            raise self.broken(CACHES_USED_RIGHT, self.watch.caches.mistakes[0])

    def check_held(self) -> None:
        """Check that the engine holds no more than before the first session."""
        if self.held is None or self.held(self.engine) == self._held:
            return
        gc.collect()
        now = self.held(self.engine)
        if now != self._held:
            raise self.broken(
                f"held(engine) to be {self._held}, as it was before the first session", f"{now}"
            )

    def broken(self, expected: str, got: str) -> BrokenError:
        """Return the error for a broken promise."""
        return BrokenError(expected, got, self.calls)


def told(error: BaseException) -> str:
    """Return the kind of an error, and its message."""
    return f"{type(error).__name__}: {error}"


@define(eq=False)
class Reference:
    """Next tokens, computed in fresh sessions, from scratch.

    One engine computes them, one session at a time, and they are remembered. If its earlier sessions turn out to affect
    its answers, a new engine computes each token.
    """

    make_engine: Callable[[], Engine]
    _known: "Answers"
    """What was computed so far, for this check or another one."""
    swayed: BrokenError | None = field(init=False, default=None)
    """The broken promise of an engine that doesn't answer as a new one does."""
    _engine: Engine | None = field(init=False, default=None)
    _served: int = field(init=False, default=0)

    def next_token(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the token after this history, in a session with this id."""
        key = session_id, tuple(history)
        if key not in self._known:
            self._known[key] = self._ask(session_id, history)
        return self._known[key]

    def next_token_for_sure(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the same from an engine that has never served another session."""
        token = self.next_token(session_id, history)
        if self.swayed is not None:
            return token
        new = next_token(self.make_engine(), session_id, history)
        if new != token:
            self._sway(f"token {new} as of a new engine", f"{token}", session_id, history)
            self._known = {(session_id, tuple(history)): new}
        return new

    def _ask(self, session_id: UUID, history: Sequence[int]) -> int:
        if self._engine is None or self.swayed is not None:
            self._engine = self.make_engine()
            self._served = 0
        self._served += 1
        try:
            return next_token(self._engine, session_id, history)
        except Exception as error:  # noqa: BLE001 engines may raise anything
            new = next_token(self.make_engine(), session_id, history)
            self._sway(f"token {new} as of a new engine", told(error), session_id, history)
            assert self.swayed is not None
            self.swayed.__cause__ = error
            return new

    def _sway(self, expected: str, got: str, session_id: UUID, history: Sequence[int]) -> None:
        """Record that earlier sessions, closed by now, have changed an engine's answer."""
        self.swayed = BrokenError(
            expected,
            got,
            [
                "engine = make_engine()",
                f"# {self._served - 1} sessions, one at a time: prefill, decode, close",
                f'a = Session.with_id(UUID("{session_id}"))',
                f"engine.prefill(a, {list(history)})",
                "engine.decode(a)",
            ],
        )


Answers = dict[tuple[UUID, tuple[int, ...]], int]


def next_token(engine: Engine, session_id: UUID, history: Iterable[int]) -> int:
    """Prefill a new session, and decode a token."""
    with Session.with_id(session_id) as session:
        engine.prefill(session, list(history))
        return engine.decode(session).token
