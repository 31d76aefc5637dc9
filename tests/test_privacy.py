"""No token and nothing of a KV cache is ever shown: not by `repr`, nor in errors, warnings, logs or tracebacks."""

import ctypes
import gc
import importlib.util
import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, cast
from uuid import UUID

import attrs
import pytest
from hypothesis.vendor.pretty import pretty
from tests.interrupts import Interrupter

from inference_session import Session, SessionRegistry
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, Slot, StateSlots


TOKENS = [1234567, 1234568, 1234569]
TOO_BIG = 1234567 << 40
SECRETS = ("12345", "0x12d6", str(TOO_BIG)[:8], "hush")
"""What the tokens and KV caches here can be known by."""


RICH = importlib.util.find_spec("rich") is not None

NAMES = re.compile("0x[0-9a-f]{8,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Addresses and ids, which may look like secrets by chance."""


def shown(thing: object) -> str:
    """Return how crash reporters show a variable: by `repr`, and as `rich` does, where it's installed."""
    ways: list[Callable[[object], str]] = [repr, pretty]
    if RICH:
        ways.append(pytest.importorskip("rich.pretty").pretty_repr)
    said: list[str] = []
    for way in ways:
        try:
            said.append(way(thing))
        except Exception as error:  # noqa: BLE001 of a view that has expired
            said.append(f"{error!r} {error}")
    return NAMES.sub("", " ".join(said))


def frames(error: BaseException | None) -> Iterator[FrameType]:
    """Yield the frames in the tracebacks of an error, and of all errors that led to it."""
    errors, seen = [error], set[int]()
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors += [one.__cause__, one.__context__]
        for frame, _ in traceback.walk_tb(one.__traceback__):
            yield frame


def variables(error: BaseException | None, package: str = "inference_session") -> list[str]:
    """Return what a crash reporter would show of a package's frames: where, which variable, and how it looks."""
    return [
        f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}: {name} = {shown(value)}"
        for frame in frames(error)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
        for name, value in frame.f_locals.items()
    ]


class Hush:
    """Something that tells its secret wherever it's shown."""

    def __repr__(self) -> str:
        return "hush"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "hush"


VALUE = Slot(Hush)


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
            share=self.share,
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

    def share(self, cache: Cache, length: int) -> Cache:
        """Make another one."""
        self.fail("share")
        shared = Cache()
        shared.length = 7 if "share" in self.lies else length
        return cache if "another" in self.lies else shared

    def release(self, cache: Cache) -> None:
        """Free it."""
        self.fail("release")


class Ear:
    """Hears all that is said, by whatever way."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.reports_crashes = True
        """Whether it looks into the frames of a traceback. A wrong argument that is neither tokens nor a KV cache is
        among the variables there, whatever it is."""

    def error(self, error: BaseException | None) -> None:
        """Hear what an error says, what led to it, and what a crash reporter finds in the package's frames."""
        if error is None:
            return
        if self.reports_crashes:
            self.heard += variables(error)
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
        state[VALUE] = Hush()
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

    ear.reports_crashes = False
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
    """A KV cache given where a function should be isn't shown by the error."""
    ear.reports_crashes = False
    ear.fail(lambda: StateSlots(create=cast("Any", Cache()), length=len))
    ear.fail(lambda: StateSlots(create=list[int], length=cast("Any", Cache())))
    ear.fail(lambda: StateSlots(create=list[int], length=len, release=cast("Any", Cache())))


class Tensor(Hush):
    """A tensor, as PyTorch has it: no buffer, but a `tolist`. It shows what it holds."""

    def __init__(self, data: object) -> None:
        self.data = data

    def tolist(self) -> object:
        """Return the data, or fail."""
        if isinstance(self.data, BaseException):
            raise self.data
        return self.data


class Tokens(list[int]):
    """A list of one's own."""


class Index(Hush):
    """An int of a foreign type, which does something when it's read."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def __index__(self) -> int:
        self.do()
        return 1234567


class Failing(Hush):
    """What should be an int, but is an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __index__(self) -> int:
        raise self.error


def failing(error: BaseException) -> Iterator[int]:
    """Yield some tokens, and fail."""
    yield from TOKENS
    raise error


class FailingIterable(Hush):
    """What fails as soon as it's read, and shows what it holds."""

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError


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
    Tokens([*TOKENS, -1234567]),
    deque([*TOKENS, -1234567]),
    dict.fromkeys((*TOKENS, -1234567)).keys(),
    range(1234567, 2**31 + 1, 2**30),
    map(int, ["1234567", "-1234567"]),
    array("I", [*TOKENS, 2**31 + 1234567]),
    array("b", [*b"hush", -1]),
    memoryview(array("i", [*TOKENS, -1234567])),
    memoryview(array("q", [*TOKENS, TOO_BIG])),
    memoryview(b"hush"),
    bytearray(b"hush"),
    (ctypes.c_int * 2)(1234567, -1234567),
    (ctypes.c_int64 * 2)(1234567, TOO_BIG),
    Tensor([*TOKENS, -1234567]),
    Tensor([TOKENS, TOKENS]),
    Tensor([*TOKENS, True]),
    Tensor([True, False]),
    Tensor(1234567),
    Tensor(MemoryError()),
    Tensor(RuntimeError()),
    Tensor(KeyboardInterrupt()),
    FailingIterable(),
    failing(KeyError()),
    failing(KeyboardInterrupt()),
    [*TOKENS, Failing(RuntimeError())],
    [*TOKENS, Failing(MemoryError())],
    [*TOKENS, Failing(KeyboardInterrupt())],
    (*TOKENS, Failing(KeyboardInterrupt())),
    iter([*TOKENS, Failing(KeyboardInterrupt())]),
    [Failing(RuntimeError())],
    [Failing(KeyboardInterrupt())],
]


@pytest.mark.parametrize("position", range(len(BAD_TOKENS)))
@pytest.mark.parametrize("reuse", [False, True], ids=["append", "reuse_prefix"])
def test_bad_tokens(
    ear: Ear, engine: Engine, session: Session, position: int, *, reuse: bool
) -> None:
    """A token refused isn't shown, nor are those around it: neither by the error nor by a crash reporter."""
    tokens = BAD_TOKENS[position]
    with engine.slots.borrow(session) as state:
        use: Callable[[Any], object] = state.reuse_prefix if reuse else state.append
        ear.attempt(partial(use, tokens))
        state.rewind(0)


def test_bad_arguments(ear: Ear, engine: Engine, session: Session) -> None:
    """Wrong arguments are told by their types."""
    ear.reports_crashes = False
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
            lambda: state.append(TOKENS[:1]),
            lambda: state.append(tuple(TOKENS)),
            lambda: state.append(array("i", TOKENS)),
            lambda: state.append(iter(TOKENS)),
            lambda: state.advance(1),
            state.commit,
            lambda: state.rewind(1),
            lambda: state.reuse_prefix(TOKENS),
            lambda: state.reuse_prefix(array("i", TOKENS)),
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
@pytest.mark.parametrize("where", ["create", "length", "truncate", "share", "release"])
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
            lambda: state.branch().close(),
            lambda: state.take_kv_cache().length,
        ]

    def block(position: int, *, fails: bool) -> None:
        with engine.slots.borrow(session) as state:
            getattr(engine, how).add(where)
            ear.attempt(steps(state)[position])
            if fails:
                state.append(TOKENS)
                raise KeyError

    ear.reports_crashes = (where, how) != ("length", "lies")  # a length is no secret
    for position in range(8):
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


# Who looks further than `repr` does


KINDS = ["session", "state", "history", "slots", "batch", "registry", "closed session"]


@pytest.fixture(params=KINDS)
def thing(request: pytest.FixtureRequest, engine: Engine, session: Session) -> Iterator[object]:
    """Give whatever holds tokens or a KV cache, or a way to them, while it does."""
    with SessionRegistry(max_kv_bytes=1) as registry, Session() as closed:
        mine = registry.open()
        batch = engine.slots.borrow_all([closed, mine])
        with batch as states:
            for state in states:
                state.append(TOKENS)
                state.kv_cache.length = 2
                state.advance(2)
            with engine.slots.borrow(session) as state:
                state.append(TOKENS)
                state.kv_cache = Cache()
                state.kv_cache.length = 2
                closed.close()
                yield dict(
                    zip(
                        KINDS,
                        [
                            session,
                            state,
                            state.token_history,
                            engine.slots,
                            batch,
                            registry,
                            closed,
                        ],
                        strict=True,
                    )
                )[request.param]


def refuse_all(thing: object) -> list[Callable[[], object]]:
    """Return the functions of attrs that read one field after another, and what they are asked."""
    known = cast("attrs.AttrsInstance", thing)
    return [
        partial(attrs.asdict, known, recurse=False),
        partial(attrs.asdict, known),
        partial(attrs.astuple, known, recurse=False),
        partial(attrs.astuple, known),
        partial(attrs.evolve, known),
    ]


def test_rich_printing(ear: Ear, thing: object) -> None:
    """`rich.print`, and whatever else prints by it, shows of a thing what `repr` may show."""
    rich = pytest.importorskip("rich")
    printed = io.StringIO()
    console = pytest.importorskip("rich.console").Console(file=printed, width=200)
    to_repr = pytest.importorskip("rich.pretty").pretty_repr
    for it in (thing, [thing], {"it": (thing,)}):
        rich.print(it, file=printed)
        console.print(it)
        ear.heard += [to_repr(it), to_repr(it, expand_all=True)]
    ear.heard = [NAMES.sub("", saying) for saying in (*ear.heard, printed.getvalue())]


def test_rich_prints_no_telling_function(ear: Ear) -> None:
    """`rich.print` of a `StateSlots` shows nothing of the object whose methods it was made of."""
    to_repr = pytest.importorskip("rich.pretty").pretty_repr

    class Telling(Hush):
        def create(self) -> list[int]:
            return []

    ear.heard.append(to_repr(StateSlots(create=Telling().create, length=len)))


@pytest.mark.parametrize("kind", ["session", "slots", "registry", "batch"])
def test_rich_inspection(ear: Ear, engine: Engine, session: Session, kind: str) -> None:
    """`rich.inspect`, which reads every attribute that is listed, private ones too, finds nothing that is secret."""
    rich = pytest.importorskip("rich")
    printed = io.StringIO()
    console = pytest.importorskip("rich.console").Console(file=printed, width=200)
    with SessionRegistry() as registry, engine.slots.borrow(session) as state:
        state.append(TOKENS)
        things = {
            "session": session,
            "slots": engine.slots,
            "registry": registry,
            "batch": engine.slots.borrow_all([session]),
        }
        rich.inspect(things[kind], console=console, all=True, private=True, value=True)
        rich.inspect(things[kind], console=console, all=True, dunder=True)
    ear.heard.append(NAMES.sub("", printed.getvalue()))


def test_members(ear: Ear, engine: Engine, session: Session) -> None:
    """`inspect.getmembers`, which debuggers and notebooks list attributes by, finds nothing that is secret."""
    with SessionRegistry() as registry, engine.slots.borrow(session) as state:
        state.append(TOKENS)
        for it in (session, engine.slots, registry, engine.slots.borrow_all([session])):
            for members in (inspect.getmembers(it), inspect.getmembers_static(it)):
                ear.heard.append(shown(members))
                names = {name for name, _ in members}
                assert not [name for name in names if re.match("_(?!_)", name)]


def test_pretty_printers(ear: Ear, thing: object) -> None:
    """Hypothesis, which prints the arguments of a failing test, and IPython show of a thing what `repr` does."""

    class Printer:
        def text(self, text: str) -> None:
            printed.append(text)

    printed: list[str] = []
    cast("Any", thing)._repr_pretty_(Printer(), cycle=False)
    assert printed == [repr(thing)]
    assert pretty(thing) == repr(thing)
    ear.heard += [pretty(thing), pretty([thing]), pretty({"it": (thing,)}), *printed]
    ear.heard = [NAMES.sub("", saying) for saying in ear.heard]


@pytest.mark.parametrize(
    "how", range(5), ids=["dict", "deep dict", "tuple", "deep tuple", "evolve"]
)
def test_attrs_reads_nothing(ear: Ear, thing: object, how: int) -> None:
    """`attrs.asdict`, `astuple` and `evolve` are refused before they have read anything that a traceback could show."""
    error = ear.attempt(refuse_all(thing)[how])
    assert isinstance(error, TypeError)
    assert "can't be copied" in str(error)
    ear.heard += variables(error, "attr")
    assert len(ear.heard) > 5


def test_attrs_shows_nothing_to_filters(thing: object) -> None:
    """Not even the function that says which fields `attrs.asdict` and `attrs.astuple` take is shown one."""
    known, seen = cast("attrs.AttrsInstance", thing), list[object]()

    def take(field: "attrs.Attribute[Any]", value: object) -> bool:
        seen.append(value)
        return True

    with pytest.raises(TypeError, match="can't be copied"):
        attrs.asdict(known, filter=take)
    with pytest.raises(TypeError, match="can't be copied"):
        attrs.astuple(known, filter=take)
    assert seen == []


# Crash reporters, which show the variables of every frame in a traceback


def report(error: BaseException) -> str:
    """Return what `rich.traceback` shows of an error, and of the variables of all frames but those of tests."""
    tell = pytest.importorskip("rich.traceback").Traceback.from_exception
    printed = io.StringIO()
    console = pytest.importorskip("rich.console").Console(file=printed, width=200)
    tests = [str(Path(__file__).parent)]
    told = tell(type(error), error, error.__traceback__, show_locals=True, suppress=tests)
    console.print(told)
    return NAMES.sub("", printed.getvalue())


Use = Callable[[BorrowedState[Cache]], object]
Crash = Callable[[Engine, Session], object]


def set_twice(state: BorrowedState[Cache]) -> None:
    """Replace the KV cache of the savepoint, and then the one in its place."""
    state.kv_cache = Cache()
    state.kv_cache = Cache()


def set_cache(state: BorrowedState[Cache]) -> None:
    """Replace the KV cache."""
    state.kv_cache = Cache()


def wrong_length(state: BorrowedState[Cache]) -> None:
    """Feed other tokens than are said."""
    state.kv_cache.length = 7


def end_in(borrow: "AbstractContextManager[Any, Any]") -> Iterator[int]:
    """Yield tokens, and end the borrow meanwhile."""
    yield from TOKENS
    borrow.__exit__(None, None, None)


def block(*uses: Use, fails: str = "", lies: str = "") -> Crash:
    """Return what does something in a block, while a function of the engine's fails or lies."""

    def crash(engine: Engine, session: Session) -> None:
        with engine.slots.borrow(session) as state:
            engine.fails |= {fails}
            engine.lies |= {lies}
            for use in uses:
                use(state)

    return crash


def late(use: Use) -> Crash:
    """Return what does something when the block is over."""

    def crash(engine: Engine, session: Session) -> None:
        with engine.slots.borrow(session) as state:
            pass
        use(state)

    return crash


def after(*steps: Crash) -> Crash:
    """Return what does one thing after another."""

    def crash(engine: Engine, session: Session) -> None:
        for step in steps:
            step(engine, session)

    return crash


def skip_part(state: BorrowedState[Cache]) -> None:
    """Ask for two parts, and advance for none."""
    parts = state.chunks(1, keep=0)
    next(parts)
    next(parts)


def ask_for_more(state: BorrowedState[Cache]) -> None:
    """Ask for a part of a session that was closed."""
    state.session.close()
    next(state.chunks(1, keep=0))


def set_value(state: BorrowedState[Cache]) -> None:
    """Put something into a further slot."""
    state[VALUE] = Hush()


def set_no_slot(state: BorrowedState[Cache]) -> None:
    """Take something else for a slot."""
    state[cast("Slot[Hush]", "slot")] = Hush()


def rewind_twice(state: BorrowedState[Cache]) -> None:
    """Drop committed tokens, and then fail to truncate."""
    state.rewind(2, pending=0)
    state.rewind(1)


def exchange(engine: Engine, session: Session) -> None:
    """Give one KV cache to two sessions."""
    with Session() as other, engine.slots.borrow_all([session, other]) as (mine, theirs):
        theirs.kv_cache = mine.kv_cache


def take_twice(state: BorrowedState[Cache]) -> None:
    """Take what isn't there any more."""
    state.take_kv_cache()
    state.take_kv_cache()


def change_key(engine: Engine, session: Session) -> None:
    """Let go of a KV cache of another key."""
    with engine.slots.borrow(session, key="another"):
        pass


def evict(engine: Engine, session: Session) -> None:
    """Evict the KV cache."""
    engine.slots.evict(session)


def close(engine: Engine, session: Session) -> None:
    """Close the session."""
    session.close()


def no_release(engine: Engine, session: Session) -> None:
    """Have `release` fail from now on."""
    engine.fails.add("release")


def borrow_twice(engine: Engine, session: Session) -> None:
    """Borrow what is borrowed."""
    with engine.slots.borrow(session), engine.slots.borrow(session):
        pass


def borrow_batch_twice(engine: Engine, session: Session) -> None:
    """Borrow a batch of which one is borrowed."""
    with engine.slots.borrow(session), engine.slots.borrow_all([Session(), session]):
        pass


def borrow_elsewhere(engine: Engine, session: Session) -> None:
    """Borrow what another engine began."""
    with Engine().slots.borrow(session):
        pass


CRASHES: dict[str, Crash] = {
    "append": block(lambda state: state.append([*TOKENS, -1234567])),
    "append one": block(lambda state: state.append([-1234567])),
    "reuse_prefix": block(lambda state: state.reuse_prefix([*TOKENS, -1234567])),
    "create lies": after(evict, block(lambda state: state.kv_cache, lies="create")),
    "create fails": after(evict, block(lambda state: state.kv_cache, fails="create")),
    "advance": block(wrong_length, lambda state: state.advance(1)),
    "commit": block(wrong_length, lambda state: state.commit()),
    "the end": block(wrong_length),
    "truncate lies": block(lambda state: state.rewind(1), lies="truncate"),
    "truncate fails": block(lambda state: state.rewind(1), fails="truncate"),
    "truncate fails in reuse_prefix": block(
        lambda state: state.reuse_prefix(TOKENS[:1]), fails="truncate"
    ),
    "length fails": block(lambda state: state.commit(), fails="length"),
    "release fails in the setter": block(set_twice, fails="release"),
    "release fails in commit": block(
        set_cache, match_length, lambda state: state.commit(), fails="release"
    ),
    "release fails in evict": after(no_release, evict),
    "release fails in close": after(no_release, close),
    "release fails in a rollback": after(
        no_release, block(set_cache, lambda state: state.append([*TOKENS, -1234567]))
    ),
    "busy": borrow_twice,
    "busy in a batch": borrow_batch_twice,
    "another owner": borrow_elsewhere,
    "closed": after(close, block()),
    "late append": late(lambda state: state.append(TOKENS)),
    "late append of one": late(lambda state: state.append(TOKENS[:1])),
    "late reuse_prefix": late(lambda state: state.reuse_prefix(TOKENS)),
    "late setter": late(set_cache),
    "late history": late(lambda state: state.token_history),
    "late value": late(set_value),
    "late first value": late(lambda state: state[Slot(Hush)]),
    "no slot": block(set_no_slot),
    "a factory fails": block(lambda state: state[Slot(lambda: 1 / 0)]),
    "a failure with a value": block(
        set_value, lambda state: state.append([*TOKENS, -1234567]), fails="release"
    ),
    "chunks without advance": block(skip_part),
    "chunks of a closed session": block(ask_for_more),
    "truncate fails in chunks": block(
        lambda state: state.rewind(2, pending=0),
        lambda state: state.chunks(1, keep=2),
        fails="truncate",
    ),
    "truncate fails after a rewind": block(rewind_twice, fails="truncate"),
    "release fails for another key": after(no_release, change_key),
    "share fails": block(lambda state: state.branch(), fails="share"),
    "share lies": block(lambda state: state.branch(), lies="share"),
    "share lies, and release fails": after(
        no_release, block(lambda state: state.branch(), lies="share")
    ),
    "share returns what it was given": block(lambda state: state.branch(), lies="another"),
    "branch at no token": block(lambda state: state.branch(4)),
    "late branch": late(lambda state: state.branch()),
    "one KV cache for two": exchange,
    "taken twice": block(take_twice),
    "late take": late(lambda state: state.take_kv_cache()),
}


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES.keys())
def test_crash_reports(
    ear: Ear,
    engine: Engine,
    session: Session,
    crash: Callable[[Engine, Session], object],
) -> None:
    """Whatever call fails, no variable of a frame in its traceback shows a token or a KV cache."""
    error = ear.attempt(partial(crash, engine, session))
    assert error is not None
    assert variables(error), "no frame of the package was looked at"
    if RICH:
        ear.heard.append(report(error))
    engine.fails.clear()
    engine.lies.clear()


@pytest.mark.parametrize("reuse", [False, True], ids=["append", "reuse_prefix"])
@pytest.mark.parametrize("made", ["generator", "list"])
def test_crash_reports_of_a_borrow_that_ends_meanwhile(
    ear: Ear, engine: Engine, session: Session, made: str, *, reuse: bool
) -> None:
    """Tokens that come too late, as the borrow ended while they were read, aren't shown."""
    borrow = engine.slots.borrow(session)
    state = borrow.__enter__()

    tokens: Iterable[int] = end_in(borrow)
    if made == "list":
        tokens = [*TOKENS, cast("int", Index(lambda: borrow.__exit__(None, None, None)))]
    ear.fail(partial(state.reuse_prefix if reuse else state.append, tokens))
    assert session.token_count == 3


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("where", ["create", "truncate"])
def test_crash_reports_of_a_straggler(
    ear: Ear, engine: Engine, session: Session, where: str, *, fails: bool
) -> None:
    """A KV cache that comes too late, as the borrow ended while it was made, isn't shown, even if `release` fails."""

    def end() -> None:
        if fails:
            engine.fails.add("release")
        borrow.__exit__(MemoryError, MemoryError(), None)

    def create() -> Cache:
        end()
        return Cache()

    def truncate(cache: Cache, length: int) -> Cache:
        if cache.length > length:
            end()
        return Cache()

    slots = StateSlots(
        create=create if where == "create" else Cache,
        length=engine.length,
        truncate=truncate if where == "truncate" else None,
        release=engine.release,
    )
    with Session() as mine:
        borrow = slots.borrow(mine)
        state = borrow.__enter__()
        state.append(TOKENS)
        if where == "create":
            ear.fail(lambda: state.kv_cache)
        else:
            state.kv_cache.length = 2
            state.advance(2)
            ear.fail(lambda: state.reuse_prefix(TOKENS[:1]))
        engine.fails.clear()


@pytest.mark.parametrize("step", ["commit", "end", "failure", "batch"])
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "lies"])
def test_crash_reports_of_a_registry(ear: Ear, engine: Engine, step: str, *, raises: bool) -> None:
    """Where a KV cache can't be measured, no frame of the registry shows it."""

    def nbytes(cache: Cache) -> int:
        if raises:
            raise MemoryError
        return cast("int", Hush())

    slots = StateSlots(create=Cache, length=engine.length, release=engine.release, nbytes=nbytes)

    def work() -> None:
        with slots.borrow_all([mine]) if step == "batch" else slots.borrow(mine) as entered:
            state = entered[0] if isinstance(entered, list) else entered
            state.append(TOKENS)
            state.kv_cache.length = 3
            state.advance(3)
            if step == "failure":
                engine.fails.add("release")
                raise KeyError
            if step == "commit":
                state.commit()

    with SessionRegistry(max_kv_bytes=100) as registry:
        mine = registry.open()
        ear.fail(work)
        engine.fails.clear()


class Saving(Engine):
    """An engine that can save its KV caches, and fails where it's told to."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = StateSlots(
            create=self.create,
            length=self.length,
            dump=self.dump,
            load=self.load,
            release=self.release,
        )

    def dump(self, cache: Cache, file: BinaryIO) -> None:
        """Write a cache."""
        file.write(b"hush")
        self.fail("dump")
        file.write(b"hush" * 10_000)

    def load(self, file: BinaryIO) -> Cache:
        """Read a cache."""
        self.fail("load")
        cache = self.create()
        cache.length = 7 if "load" in self.lies else 2
        return cache


@pytest.fixture
def saving() -> Saving:
    """Return an engine that can save its KV caches, and doesn't fail yet."""
    return Saving()


@pytest.fixture
def saved(saving: Saving) -> Iterator[Session]:
    """Return a session of that engine with some tokens, the first of them in the KV cache."""
    with Session() as session:
        with saving.slots.borrow(session) as state:
            state.append(TOKENS)
            state.kv_cache.length = 2
            state.advance(2)
        yield session
        saving.fails.clear()


def test_crash_reports_of_files(ear: Ear, saving: Saving, saved: Session, tmp_path: Path) -> None:
    """Nothing shows what is written to a file, or read from it, if that fails."""
    path = tmp_path / "file"
    for fails in ("dump", "length", ""):
        saving.fails = {fails}
        ear.attempt(partial(saving.slots.save, saved, path))
    content = path.read_bytes()
    for fails, lies in (("load", ""), ("length", ""), ("release", "load"), ("", "load")):
        saving.fails, saving.lies = {fails}, {lies}
        ear.attempt(lambda: saving.slots.restore(path).close())
    saving.fails, saving.lies = set(), set()
    for position in range(72):
        path.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
        ear.attempt(lambda: saving.slots.restore(path, take=True).close())
    ear.heard = [NAMES.sub("", saying) for saying in ear.heard]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_crash_reports_of_interrupted_files(
    ear: Ear, saving: Saving, saved: Session, interrupter: Interrupter, tmp_path: Path
) -> None:
    """Wherever an interrupt comes, no frame of what writes and reads files shows tokens or a KV cache."""
    path = tmp_path / "file"
    saving.slots.save(saved, path)
    for action in (
        partial(saving.slots.save, saved, path),
        lambda: saving.slots.restore(path).close(),
    ):
        point = 0
        while True:
            point += 1
            error = interrupter.run(action, point)
            if interrupter.reached < point:
                break
            for frame in frames(error):
                if frame.f_globals["__name__"] == "inference_session._file":
                    ear.heard += [f"{name}: {shown(it)}" for name, it in frame.f_locals.items()]
        assert point > 30
    ear.heard = [NAMES.sub("", saying) for saying in ear.heard]


def test_crash_reports_of_an_eviction(ear: Ear, engine: Engine) -> None:
    """What `release` raises when a registry evicts is told to the hook for such errors, and shows no KV cache."""
    with SessionRegistry(max_kv_bytes=1) as registry:
        for session in (registry.open(), registry.open()):
            engine.fails.add("release")
            with engine.slots.borrow(session) as state:
                state.append(TOKENS)
                state.kv_cache.length = 3
                state.advance(3)
        heard = len(ear.heard)
        assert heard
        engine.fails.clear()


@attrs.define
class Told:
    """Something that `attrs` reads."""

    secret: Hush = attrs.field(factory=Hush)


def refuse(field: "attrs.Attribute[Any]", value: object) -> bool:
    """Fail."""
    raise KeyError


def test_the_crash_reporter_reports() -> None:
    """What the crash reporter of these tests looks for would be found."""
    with pytest.raises(KeyError) as caught:
        attrs.asdict(Told(), filter=refuse)
    told = "".join(variables(caught.value, "attr"))
    assert "hush" in told
    if RICH:
        assert "hush" in report(caught.value)
