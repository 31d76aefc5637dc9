"""No token and nothing of a KV cache is ever shown: not by `repr`, nor in errors, warnings, logs or tracebacks."""

import gc
import logging
import sys
import traceback
import warnings
from array import array
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest

from inference_session import Session, SessionRegistry
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots


TOKENS = [1234567, 1234568, 1234569]
TOO_BIG = 1234567 << 40
SECRETS = ("12345", "0x12d6", str(TOO_BIG)[:8], "hush")
"""What the tokens and KV caches here can be known by."""


class Hush:
    """Something that tells its secret wherever it's shown."""

    def __repr__(self) -> str:
        return "hush"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "hush"


class Cache(Hush):
    """A KV cache that tells its secret wherever it's shown."""

    def __init__(self) -> None:
        self.length = 0


class Engine:
    """An engine that fails where it's told to."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.lies: set[str] = set()
        self.slots = StateSlots(
            create=self.create,
            length=self.length,
            truncate=self.truncate,
            release=self.release,
            nbytes=lambda cache: 1,
        )

    def fail(self, where: str) -> None:
        """Fail, but without a word."""
        if where in self.fails:
            raise MemoryError

    def create(self) -> Cache:
        """Make a cache."""
        self.fail("create")
        cache = Cache()
        cache.length = 2 if "create" in self.lies else 0
        return cache

    def length(self, cache: Cache) -> int:
        """Tell its length."""
        self.fail("length")
        if "length" in self.lies:
            return cast("int", Hush())
        return cache.length

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Cut it."""
        self.fail("truncate")
        if "truncate" not in self.lies:
            cache.length = length
        return cache

    def release(self, cache: Cache) -> None:
        """Free it."""
        self.fail("release")


class Ear:
    """Hears all that is said, by whatever way."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def error(self, error: BaseException | None) -> None:
        """Hear what an error says, and what led to it."""
        if error is None:
            return
        told = traceback.TracebackException.from_exception(error)
        while_told: list[traceback.TracebackException | None] = [told]
        while while_told:
            one = while_told.pop()
            if one is not None:
                self.heard += [str(one), *one.format_exception_only()]
                while_told += [one.__cause__, one.__context__, *(one.exceptions or ())]
        for each in (error, error.__cause__, error.__context__):
            if each is not None:
                self.heard += [repr(each), str(each), repr(each.args)]
                self.heard += [repr(vars(each)), *getattr(each, "__notes__", ())]

    def attempt(self, do: Callable[[], object]) -> BaseException | None:
        """Do something, and hear what is said about it."""
        try:
            self.heard.append(repr(do()))
        except BaseException as error:  # noqa: BLE001 whatever it is
            self.error(error)
            return error
        return None

    def fail(self, do: Callable[[], object]) -> None:
        """Do something that must fail."""
        assert self.attempt(do) is not None

    def check(self) -> None:
        """Require that no secret was heard."""
        assert self.heard
        told = [saying for saying in self.heard if any(secret in saying for secret in SECRETS)]
        assert told == []


@pytest.fixture
def ear(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Ear]:
    """Hear what is said by exceptions, warnings, logs, hooks and on the standard streams."""
    ear = Ear()

    def unraisable(args: Any) -> None:
        ear.error(args.exc_value)
        ear.heard += [str(args.err_msg)]

    monkeypatch.setattr(sys, "unraisablehook", unraisable)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ear
        gc.collect()
    ear.heard += [str(warning) for warning in caught]
    ear.heard += [record.getMessage() for record in caplog.records]
    ear.heard += capfd.readouterr()
    ear.check()


@pytest.fixture
def engine() -> Engine:
    """Return an engine that doesn't fail yet."""
    return Engine()


@pytest.fixture(autouse=True)
def session(engine: Engine) -> Iterator[Session]:
    """Return a session with some tokens, the first of them in the KV cache."""
    session = Session.with_id(UUID(int=0))
    with engine.slots.borrow(session) as state:
        state.append(TOKENS)
        state.kv_cache.length = 2
        state.advance(2)
    yield session
    engine.fails.clear()
    session.close()


def test_the_ear_hears(engine: Engine) -> None:
    """What these tests look for would be found."""
    for tell in (
        lambda: repr(TOKENS),
        lambda: repr(Cache()),
        lambda: f"{Cache()}",
        lambda: int(f"{TOKENS[0]}x"),
        lambda: {"": 0}[str(TOKENS[0])],
    ):
        ear = Ear()
        ear.attempt(tell)
        with pytest.raises(AssertionError):
            ear.check()


def test_representations(ear: Ear, engine: Engine, session: Session) -> None:
    """No object of the library shows what it holds."""
    ear.heard += [repr(session), str(session), f"{session}", repr(engine.slots.borrow(session))]
    with engine.slots.borrow(session) as state:
        views = state.token_history, iter(state.token_history), reversed(state.token_history)
        for one in (session, state, *views, state.append, state.commit):
            ear.heard += [repr(one), str(one), f"{one}", ascii(one)]
        batch = engine.slots.borrow_all([Session()])
        ear.heard.append(repr(batch))
        with batch as states:
            ear.heard += [repr(states), repr(batch)]
    ear.heard += [repr(state), repr(views[0].__class__), repr(DecodeResult(TOKENS[0]))]
    ear.heard += [repr(PrefillResult(3))]
    session.close()
    ear.heard.append(repr(session))


def test_registries(ear: Ear, engine: Engine) -> None:
    """A registry shows ids and numbers: not what its sessions hold, nor what it was given for an id or a limit."""

    def cast_size(cache: Cache) -> int:
        return cast("int", Hush())

    def step(session: Session, slots: StateSlots[Cache]) -> None:
        with slots.borrow(session) as state:
            state.append(TOKENS)
            state.kv_cache.length = 3
            state.advance(3)

    unmeasurable = StateSlots(create=Cache, length=engine.length, nbytes=cast_size)
    with SessionRegistry(max_sessions=1, max_kv_bytes=0) as registry:
        session = registry.open()
        step(session, engine.slots)  # evicted at once
        ear.heard += [repr(registry), str(registry), f"{registry}", repr(list(registry))]
        ear.fail(lambda: registry.open(session.id))
        with engine.slots.borrow(session):
            ear.fail(registry.open)
        engine.fails.add("release")
        step(session, engine.slots)
        ear.attempt(registry.open)
        engine.fails.clear()
        ear.fail(lambda: step(registry.open(), unmeasurable))
    ear.fail(registry.open)
    for secret in (TOKENS, Hush(), "hush", b"hush", 1234567.5, Cache):
        bad = cast("Any", secret)
        for call in (registry.open, registry.get, registry.__getitem__, registry.close):
            ear.fail(partial(cast("Callable[[Any], object]", call), bad))
        ear.fail(partial(cast("Any", SessionRegistry), max_sessions=bad))
        ear.fail(partial(cast("Any", SessionRegistry), max_kv_bytes=bad))
    ear.fail(lambda: SessionRegistry(idle_timeout=cast("Any", Hush())))


def test_slots_with_telling_functions(ear: Ear) -> None:
    """A `StateSlots` made of methods of something that tells its secrets doesn't."""

    class Telling(Hush):
        def create(self) -> list[int]:
            return []

        def release(self, cache: list[int]) -> None:
            cache.clear()

    telling = Telling()
    ear.heard.append(repr(StateSlots(create=telling.create, length=len, release=telling.release)))


def test_slots_with_wrong_arguments(ear: Ear) -> None:
    """A KV cache given where a function should be isn't shown."""
    ear.fail(lambda: StateSlots(create=cast("Any", Cache()), length=len))
    ear.fail(lambda: StateSlots(create=list[int], length=cast("Any", Cache())))
    ear.fail(lambda: StateSlots(create=list[int], length=len, release=cast("Any", Cache())))


BAD_TOKENS: list[Any] = [
    [*TOKENS, -1234567],
    [*TOKENS, TOO_BIG],
    [*TOKENS, -TOO_BIG],
    [*TOKENS, "1234567"],
    [*TOKENS, 1234567.0],
    [*TOKENS, Fraction(1234567)],
    [*TOKENS, None],
    [*TOKENS, Hush()],
    [*TOKENS, TOKENS],
    (*TOKENS, -1234567),
    (*TOKENS, "hush"),
    [-1234567],
    ["hush"],
    [Hush()],
    array("q", [*TOKENS, TOO_BIG]),
    array("i", [*TOKENS, -1234567]),
    array("d", [1234567.0]),
    b"hush",
    "hush",
    {"hush": 1},
    {-1234567},
    iter([*TOKENS, -1234567]),
    1234567,
    1234567.0,
    Hush(),
    Cache,
]


@pytest.mark.parametrize("position", range(len(BAD_TOKENS)))
def test_bad_tokens(ear: Ear, engine: Engine, session: Session, position: int) -> None:
    """A token refused isn't shown, nor are those around it."""
    tokens = BAD_TOKENS[position]
    with engine.slots.borrow(session) as state:
        ear.attempt(lambda: state.append(tokens))
        ear.attempt(lambda: state.reuse_prefix(tokens))
        state.rewind(0)


def test_bad_arguments(ear: Ear, engine: Engine, session: Session) -> None:
    """Wrong arguments are told by their types."""
    for secret in (TOKENS, Hush(), "hush", b"hush", 1234567.5, Cache):
        bad = cast("Any", secret)
        calls: list[Callable[[Any], object]] = [
            Session.with_id,
            cast("Any", Session),
            lambda bad: engine.slots.borrow(bad).__enter__(),
            lambda bad: engine.slots.borrow_all([bad]).__enter__(),
            lambda bad: engine.slots.borrow_all(bad).__enter__(),
            engine.slots.evict,
        ]
        for call in calls:
            ear.fail(partial(call, bad))
        with engine.slots.borrow(session) as state:
            refusing: list[Callable[[Any], object]] = [
                state.advance,
                state.rewind,
                partial(rewind_pending, state),
                state.token_history.__getitem__,
            ]
            for call in refusing:
                ear.fail(partial(call, bad))
            history = state.token_history
            for call in (history.index, history.count, history.__contains__, history.__eq__):
                ear.attempt(partial(call, bad))


def rewind_pending(state: BorrowedState[Cache], pending: int) -> None:
    """Rewind with a number of pending tokens."""
    state.rewind(0, pending=pending)


def test_the_token_history(ear: Ear, engine: Engine, session: Session) -> None:
    """What can't be done with the history is refused without showing it."""
    with engine.slots.borrow(session) as state:
        history = cast("Any", state.token_history)
        ear.fail(lambda: history[7])
        ear.fail(lambda: history[-7])
        ear.fail(lambda: history.index(7))
        ear.fail(lambda: hash(history))
        ear.fail(lambda: history.append(7))
        ear.fail(lambda: history + history)
        ear.fail(lambda: history < [7])
        ear.fail(lambda: setattr(history, "secret", 7))
        ear.fail(lambda: history.__setitem__(0, 7))
        ear.fail(lambda: setattr(state, "token_history", TOKENS))
        ear.fail(lambda: setattr(state, "pending", TOKENS))
        ear.fail(lambda: setattr(session, "id", 7))
    ear.fail(lambda: history[0])
    ear.fail(lambda: list(history))
    ear.heard.append(str(ear.attempt(lambda: repr(history))))


def test_every_state_of_a_session(ear: Ear, engine: Engine, session: Session) -> None:
    """Busy, closed, owned by another, expired: no error shows what the session holds."""
    other = StateSlots(create=Cache, length=lambda cache: cache.length)

    def use_all(state: BorrowedState[Cache]) -> None:
        for use in (
            lambda: state.kv_cache,
            lambda: setattr(state, "kv_cache", Cache()),
            lambda: state.token_history,
            lambda: state.kv_length,
            lambda: state.pending,
            lambda: state.append(TOKENS),
            lambda: state.advance(1),
            state.commit,
            lambda: state.rewind(1),
            lambda: state.reuse_prefix(TOKENS),
        ):
            ear.fail(use)

    def take_all() -> None:
        ear.fail(engine.slots.borrow(session).__enter__)
        ear.fail(engine.slots.borrow_all([Session(), session]).__enter__)
        ear.fail(lambda: engine.slots.evict(session))

    ear.fail(other.borrow(session).__enter__)
    with engine.slots.borrow(session) as state:
        take_all()
        ear.fail(lambda: state.advance(7))
        ear.fail(lambda: state.rewind(7))
        ear.fail(lambda: state.rewind(0, pending=-7))
        state.kv_cache.length = 7
        ear.fail(lambda: state.advance(1))
        ear.fail(state.commit)
        state.kv_cache.length = 2
    use_all(state)
    session.close()
    take_all()


def match_length(state: BorrowedState[Cache]) -> None:
    """Have the KV cache cover what it should."""
    state.kv_cache.length = state.kv_length


@pytest.mark.parametrize("how", ["fails", "lies"])
@pytest.mark.parametrize("where", ["create", "length", "truncate", "release"])
def test_engines_that_fail(
    ear: Ear, engine: Engine, session: Session, where: str, how: str
) -> None:
    """Where an engine's function fails or lies, before or during the rollback, no message shows what it was given."""

    def steps(state: BorrowedState[Cache]) -> list[Callable[[], object]]:
        return [
            lambda: state.rewind(1),
            lambda: state.kv_cache.length,
            lambda: setattr(state, "kv_cache", Cache()),
            lambda: state.advance(1),
            state.commit,
            lambda: state.reuse_prefix(TOKENS[:1]),
        ]

    def block(position: int, *, fails: bool) -> None:
        with engine.slots.borrow(session) as state:
            getattr(engine, how).add(where)
            ear.attempt(steps(state)[position])
            if fails:
                state.append(TOKENS)
                raise KeyError

    for position in range(6):
        for fails in (True, False):
            ear.attempt(partial(block, position, fails=fails))
            getattr(engine, how).clear()
            with engine.slots.borrow(session) as state:
                state.reuse_prefix(TOKENS)
                ear.attempt(partial(match_length, state))


def test_a_release_that_fails_in_rollback(ear: Ear, engine: Engine, session: Session) -> None:
    """The note about it tells nothing of what it said."""

    class LeakyError(Exception):
        def __str__(self) -> str:
            return "hush"

    def release(cache: Cache) -> None:
        raise LeakyError(cache, TOKENS)

    slots = StateSlots(create=Cache, length=lambda cache: cache.length, release=release)
    session = Session()

    def block() -> None:
        with slots.borrow(session) as state:
            state.append(TOKENS)
            assert state.kv_cache is not None
            raise KeyError

    error = ear.attempt(block)
    assert error is not None
    assert error.__notes__ != []


def test_a_session_dropped(ear: Ear, engine: Engine) -> None:
    """The warning about an unclosed session shows its id only."""
    session = Session()
    with engine.slots.borrow(session) as state:
        state.append(TOKENS)
        state.kv_cache.length = 3
        state.advance(3)
    del state, session
    gc.collect()


def test_copies(ear: Ear, engine: Engine, session: Session) -> None:
    """What refuses to be copied doesn't do so with examples."""
    import copy  # noqa: PLC0415
    import pickle  # noqa: PLC0415

    with engine.slots.borrow(session) as state:
        for one in (session, state, state.token_history):
            for do in (copy.copy, copy.deepcopy, pickle.dumps):
                ear.attempt(partial(do, one))
