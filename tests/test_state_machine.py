"""Any sequence of calls, on several sessions of two engines, keeps all promises, whatever fails meanwhile.

A plain model of the promises is driven beside the real thing, and both are compared after every call. The KV caches
hold the tokens that they were fed, so that they can be compared with the history, too.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
import warnings
import weakref
from array import array
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, TypeAlias, cast, get_args
from uuid import UUID

import pytest
from attrs import define, field, frozen
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.caches import Cache, Damage, Fault, FunctionName, Lie, Memory

from inference_session import Session
from inference_session.engine import BorrowedState, Slot, StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionOwnerError,
    StateMismatchError,
)


# What a test does


class FailureError(Exception):
    """What goes wrong in an engine."""


FREE_THREADED: Final = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
EXAMPLES: Final = 40 if FREE_THREADED else 300
"""Without a GIL, collecting garbage takes a hundred times as long, as it looks at everything each time."""

ErrorClass: TypeAlias = type[BaseException]
ERRORS: Final[tuple[ErrorClass, ...]] = (
    FailureError,
    MemoryError,
    KeyboardInterrupt,
    GeneratorExit,
    CancelledError,
)


def fail_to_make() -> object:
    """Fail to make the first value of a slot."""
    raise FailureError


# The factory of the last one fails.
SLOTS: Final = (Slot(object), Slot[object](dict), Slot(fail_to_make))
KEYS: Final = ("", "other")


@frozen
class Append:
    """Add tokens."""

    tokens: list[int]


@frozen
class Turn:
    """Add tokens, and feed all that are pending."""

    tokens: list[int]


@frozen
class Step:
    """Feed pending tokens."""

    count: int
    misreport: Literal[-2, 0, 2] = 0
    crash: ErrorClass | None = None
    damage: Damage | None = None
    """What a crash does to the cache that was fed; hidden is that the length tells nothing of it."""


@frozen
class Chunks:
    """Feed all but the last pending tokens in parts, and do something else after one of them."""

    size: int
    keep: int
    after: int
    then: Literal["nothing", "skip a part", "close"]


@frozen
class Rewind:
    """Forget the last tokens, or more than there are."""

    drop: int
    pending: int


@frozen
class Reuse:
    """Begin with a part of the history, and go on otherwise."""

    keep: int
    tokens: list[int]


DoName: TypeAlias = Literal[
    "look at cache", "replace cache", "put cache back", "keep cache", "advance by none", "commit"
]


@frozen
class Do:
    """Do something that has no choice."""

    what: DoName


@frozen
class Get:
    """Get the value of a further slot."""

    slot: int


@frozen
class Set:
    """Set the value of a further slot."""

    slot: int
    value: int


@frozen
class Raise:
    """Fail."""

    error: ErrorClass


@frozen
class Break:
    """Let a function fail soon."""

    function: FunctionName
    error: ErrorClass | Lie
    after_work: bool
    skip: int


@frozen
class Close:
    """Close a session, also in mid-borrow."""

    session: int


@frozen
class Evict:
    """Free a session's KV cache."""

    session: int
    engine: int


@frozen
class Branch:
    """Branch a session, at a token that is there or not."""

    drop: int


@frozen
class Take:
    """Take the KV cache, and put it back or not."""

    back: bool


@frozen
class Save:
    """Save a session, and restore what the file holds."""

    session: int
    engine: int
    move: bool
    take: bool


@frozen
class Misuse:
    """Come too late, with the state of a block that has ended; or with what only passes for a session."""

    session: int
    what: str


Simple: TypeAlias = (
    Append
    | Turn
    | Step
    | Chunks
    | Rewind
    | Reuse
    | Do
    | Get
    | Set
    | Raise
    | Break
    | Close
    | Evict
    | Branch
    | Take
    | Save
    | Misuse
)
Style: TypeAlias = Literal["with", "stack", "by hand", "abandoned", "collected"]

MEMBERS: Final[dict[str, Callable[[BorrowedState[Cache]], object]]] = {
    "session": lambda state: state.session,
    "kv_cache": lambda state: state.kv_cache,
    "kv_cache setter": lambda state: setattr(state, "kv_cache", Cache([0])),
    "token_history": lambda state: state.token_history,
    "kv_length": lambda state: state.kv_length,
    "pending": lambda state: state.pending,
    "append": lambda state: state.append([0]),
    "advance": lambda state: state.advance(0),
    "commit": lambda state: state.commit(),
    "chunks": lambda state: state.chunks(1),
    "rewind": lambda state: state.rewind(0),
    "branch": lambda state: state.branch(0),
    "take_kv_cache": lambda state: state.take_kv_cache(),
    "reuse_prefix": lambda state: state.reuse_prefix([0]),
    "get slot": lambda state: state[SLOTS[0]],
    "set slot": lambda state: state.__setitem__(SLOTS[0], 0),
}
PROXIES: Final[dict[str, Callable[[StateSlots[Cache], Session], object]]] = {
    "borrow a proxy": lambda slots, proxy: slots.borrow(proxy).__enter__(),
    "borrow proxies": lambda slots, proxy: slots.borrow_all([proxy, proxy]).__enter__(),
    "evict a proxy": lambda slots, proxy: slots.evict(proxy),
}


@frozen
class Block:
    """Borrow some sessions, and do things to them."""

    sessions: list[int]
    engine: int
    key: str
    style: Style
    generation: int
    """Which one the garbage collector looks at."""
    does: list[Act]


@frozen
class Act:
    """Do something to one of the borrowed sessions."""

    session: int
    what: Simple | Block
    caught: bool
    """Whether the block goes on if it fails."""


def tokens(choice: Random) -> list[int]:
    """Choose some tokens."""
    return choice.choices(range(3), k=choice.choice((1, 2, 3, 4, 0)))


def turn(choice: Random) -> Turn:
    """Choose what to add."""
    return Turn(tokens(choice) or [1])


def append(choice: Random) -> Append:
    """Choose what to add."""
    return Append(tokens(choice))


def step(choice: Random) -> Step:
    """Choose how much to feed, and what to say."""
    count = choice.choice((99, 1, 2, 3, 0))
    crash = choice.choice((None, None, None, None, None, *ERRORS))
    misreport: Literal[-2, 0, 2] = choice.choice((0, 0, 0, 0, 0, 0, -2, 2))
    damage: Damage | None = choice.choice((None, "torn", "hidden"))
    return Step(count, misreport, crash, damage)


def chunks(choice: Random) -> Chunks:
    """Choose how large parts are, and what to do after which."""
    size, keep = choice.choice((1, 2, 2, 3, 3, 99, 0)), choice.choice((0, 1, 1, 1, 2, 3, 99, -1))
    then: Literal["nothing", "skip a part", "close"]
    then = choice.choice(("nothing", "nothing", "nothing", "nothing", "skip a part", "close"))
    return Chunks(size, keep, choice.randrange(3), then)


def rewind(choice: Random) -> Rewind:
    """Choose how much to forget."""
    drop = choice.choice((0, 1, 1, 2, 2, 3, 3, 5, 5, 99, -1))
    return Rewind(drop, pending=choice.choice((0, 0, 0, 1, 1, 1, 2, 2, 99, -1)))


def reuse(choice: Random) -> Reuse:
    """Choose how much to keep, and how to go on."""
    return Reuse(choice.choice((99, 1, 2, 3, 4, 6, 8, 0)), tokens(choice))


def do(choice: Random) -> Do:
    """Choose what to do."""
    return Do(choice.choice(get_args(DoName)))


def get(choice: Random) -> Get:
    """Choose what to get."""
    return Get(choice.randrange(3))


def set_(choice: Random) -> Set:
    """Choose what to set."""
    return Set(choice.randrange(2), choice.randrange(100))


def fail(choice: Random) -> Raise:
    """Choose how to fail."""
    return Raise(choice.choice(ERRORS))


def break_(choice: Random) -> Break:
    """Choose which function is to fail, and how."""
    functions: Sequence[FunctionName] = ("release", "truncate", "length", "create")
    function = choice.choice((*functions, *functions, *get_args(FunctionName)))
    lies: Sequence[Lie] = ()
    if function in {"truncate", "length", "create"}:
        lies = ("too long", "too short", "untouched", "untouched copy")
    error = choice.choice((*ERRORS, *lies))
    return Break(function, error, choice.choice((False, True)), choice.choice((0, 1, 0, 2)))


def close(choice: Random) -> Close:
    """Choose what to close."""
    return Close(choice.choice(range(3)))


def evict(choice: Random) -> Evict:
    """Choose what to evict."""
    return Evict(choice.choice(range(3)), choice.choice(range(2)))


def branch(choice: Random) -> Branch:
    """Choose where to branch."""
    return Branch(choice.choice((0, 0, 0, 1, 1, 2, 3, 99, -1)))


def take(choice: Random) -> Take:
    """Choose what to do with a cache that was taken."""
    return Take(choice.random() < 0.6)


def save(choice: Random) -> Save:
    """Choose what to save, and how."""
    move, take = choice.choice((False, True)), choice.choice((False, True))
    return Save(choice.choice(range(3)), choice.choice(range(2)), move, take)


def misuse(choice: Random) -> Misuse:
    """Choose what to do wrong."""
    return Misuse(choice.randrange(3), choice.choice((*MEMBERS, *PROXIES)))


KINDS: Final[Sequence[Callable[[Random], Simple] | None]] = (
    *(turn,) * 5,
    *(append,) * 2,
    *(step,) * 3,
    *(chunks,) * 2,
    *(rewind,) * 4,
    *(reuse,) * 3,
    *(do,) * 6,
    get,
    *(set_,) * 2,
    *(fail,) * 2,
    *(break_,) * 3,
    close,
    evict,
    *(branch,) * 3,
    take,
    save,
    *(misuse,) * 2,
    None,  # a block within the block
)


def choose_block(choice: Random, length: int) -> Block:
    """Choose what to borrow, and what to do to it."""
    batches = ([0], [1], [2], [0, 1], [1, 0], [2, 0], [0, 1, 0])
    (sessions,) = choice.choices(batches, (4, 2, 3, 2, 1, 1, 1))
    engine = int((2 in sessions) is (choice.random() < 0.9))  # the one that has them, mostly
    key = KEYS[choice.random() < 0.1]
    (style,) = choice.choices(get_args(Style), (5, 2, 2, 1, 2))
    does: list[Act] = []
    for number in range(choice.choice((0, 0, 0, 1, 2))):  # so that there is something to lose
        does += [Act(number, what, caught=True) for what in (turn(choice), Do("commit"))]
    for _ in range(length):
        kind = choice.choice(KINDS)
        what = choose_block(choice, length // 4) if kind is None else kind(choice)
        does.append(Act(choice.randrange(3), what, caught=choice.random() < 0.8))
    return Block(sessions, engine, key, style, choice.randrange(3), does)


# A few large draws: they are far faster than many small ones.
CHOICES: Final = st.integers(0, 2**24 - 1).map(Random)
BLOCKS: Final = st.builds(choose_block, CHOICES, st.integers(1, 16))


# What must come of it


@define(eq=False)
class Engine:
    """One engine: its memory, and its access to sessions."""

    memory: Memory
    slots: StateSlots[Cache] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.slots = self.memory.slots()


@define(eq=False)
class Talk:
    """The model of a session."""

    session: Session = field(factory=Session)
    engine: Engine | None = None
    """Whose it is; None is nobody."""
    closed: bool = False

    saved: list[int] = field(factory=list[int])
    """The tokens at the savepoint."""
    kept: int | None = None
    """How many of them the savepoint's cache still covers; None if it's gone."""
    key: str = ""
    """What the cache was computed under, if there is one."""
    values: dict[Slot[object], object] = field(factory=dict[Slot[object], object])
    """The values of further slots, at the savepoint."""
    failed: bool = False
    """Whether the borrow before failed with the cache handed out, and nothing was committed since."""
    sure: bool = True
    """Whether it's known what becomes of the cache: nothing failed in dealing with it since the savepoint."""

    expired: BorrowedState[Cache] | None = None
    """The state of a block that has ended."""

    # While it's borrowed:
    state: BorrowedState[Cache] | None = None
    borrower: Engine | None = None
    history: list[int] = field(factory=list[int])
    values_now: dict[Slot[object], object] = field(factory=dict[Slot[object], object])
    handed_out: bool = False
    """Whether the engine has had its hands on the cache."""
    kv_length: int = 0
    cache: Cache | None = None
    original: Cache | None = None
    """The savepoint's cache, if another is in its place."""

    @property
    def borrowed(self) -> BorrowedState[Cache]:
        """Return the state."""
        assert self.state is not None
        return self.state

    @property
    def covered(self) -> int:
        """How many tokens the cache really covers."""
        return 0 if self.cache is None else self.cache.length

    def restored(self, memory: Memory) -> int | None:
        """Return how much is cached after a failure; None if no cache can be trusted."""
        if self.kept is None:  # it's gone, or was seen not to cover what it should
            return None
        if self.failed:  # twice in a row, which may be its fault
            return None
        if self.original is not None:  # it was replaced, and comes back
            is_as_it_was = not self.original.donated and self.original.length == self.kept
            return self.kept if is_as_it_was else None
        assert self.cache is not None
        if not self.handed_out:  # it's the very same
            assert self.cache.is_live or self.closed
            return self.kept
        return self.cuttable(memory, self.kept) if memory.truncates else None

    def cuttable(self, memory: Memory, length: int) -> int:
        """Return how many of the first tokens are left in the cache when `truncate` is asked for so many."""
        assert self.cache is not None
        return min(memory.cut_at(length), len(self.cache.tokens))

    def save(self) -> None:
        """Take over what was done."""
        self.saved, self.values = list(self.history), dict(self.values_now)
        self.kept = None if self.cache is None else self.kv_length
        self.sure, self.original, self.failed = True, None, False

    def undo(self, memory: Memory, failure: BaseException | None, *, abandoned: bool) -> None:
        """Take back what was done."""
        if self.sure:
            kept, self.kept = self.kept, self.restored(memory)
            # What is lost with an abandoned block is known to all only when the next one begins.
            self.sure = not abandoned or kept == self.kept
        self.failed = self.handed_out and isinstance(failure, Exception)
        self.history, self.cache, self.original = [], None, None

    def use_key(self, key: str) -> None:
        """Let go of a cache that was computed under another key."""
        if key != self.key:
            self.key, self.kept = key, None

    def free(self) -> None:
        """Let go of everything."""
        self.saved, self.values, self.kept, self.sure, self.engine = [], {}, None, True, None

    def cut(self, memory: Memory, length: int) -> None:
        """Let the cache cover less."""
        if self.kv_length <= length:
            return
        if memory.truncates:
            self.kv_length = self.cuttable(memory, length)
            if self.kept is not None and self.original is None:
                self.kept = min(self.kept, self.kv_length)
            assert self.cache is not None
            self.cache = self.cache.latest()
        else:
            self.kv_length, self.cache = 0, None
            if self.original is None:
                self.kept = None

    def distrust(self) -> None:
        """Take note that the present cache was seen not to cover what it should."""
        if self.original is None:
            self.kept = None

    def put(self, cache: Cache) -> None:
        """Put another cache in the place of the present one."""
        if cache is self.original:
            self.original = None
        elif self.cache is not None and self.kept is not None and self.original is None:
            self.original = self.cache
        self.cache = cache


def copied(value: object) -> object:
    """Return what a field holds now, if it can be changed."""
    if isinstance(value, dict):
        return cast("dict[object, object]", value).copy()
    return cast("array[int]", value)[:] if isinstance(value, array) else value


def next_part(parts: Iterator[list[int]], part: list[int]) -> None:
    """Put the tokens of the next part into a list: none if there is no such part."""
    part += next(parts, ())


def strip(error: BaseException | None) -> None:
    """Take the tracebacks off an error, as they would keep alive what the test lets go of."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def collect(stream: Generator[None, None, None], generation: int) -> None:
    """Suspend a generator, and have it collected in a cycle."""
    next(stream)
    alive = weakref.ref(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect(generation)
    if alive() is not None:  # it's in an older one
        gc.collect()
    assert alive() is None


class Sessions(RuleBasedStateMachine):
    """Three sessions and two engines."""

    @initialize(
        memories=st.lists(
            st.builds(
                Memory,
                functional=st.booleans(),
                donating=st.booleans(),
                truncates=st.sampled_from([True, True, False]),
                checkpoint_every=st.sampled_from([1, 1, 4, None]),
            ),
            min_size=2,
            max_size=2,
        )
    )
    def begin(self, memories: list[Memory]) -> None:
        """Begin with nothing."""
        self.engines = [Engine(memory) for memory in memories]
        self.talks = [Talk() for _ in range(3)]
        self.made: list[Talk] = []
        """Sessions branched and restored meanwhile."""
        self.open: list[AbstractContextManager[object]] = []
        self.folder = TemporaryDirectory()
        self.file: Talk | None = None
        """What the file holds, as far as it's known."""
        self.failed = False

    # Calls

    # One rule: of several, Hypothesis leaves out some in many examples.
    @rule(block=BLOCKS, choice=CHOICES)
    def borrow(self, block: Block, choice: Random) -> None:
        """Borrow sessions, then perhaps do something else, and go on with new ones where some were closed, or not."""
        note(str(block))
        self.failed = True
        self.run(block)
        self.failed = False
        self.repair()
        if choice.random() < 0.3:
            self.call(choice)
        for talk in self.made:
            self.adopt(talk, choice.randrange(5))
        self.made.clear()
        if choice.random() < 0.7:
            self.talks = [Talk() if talk.closed else talk for talk in self.talks]

    def call(self, choice: Random) -> None:
        """Close, evict or drop a session that isn't borrowed, whether its cache can be released or not."""
        what = choice.choice((*(misuse,) * 5, close, evict, *(save,) * 3, None))
        fails = choice.choice((False, True))
        note(f"{what} {fails}")
        if what is None:
            self.drop(choice.randrange(3))
            return
        if fails:
            function: FunctionName = choice.choice(("release", "release", "dump", "load"))
            for engine in self.engines:
                engine.memory.fail(Fault(function, choice.choice(ERRORS)()))
        match what(choice):
            case Close() as act:
                self.do_close(act)
            case Evict() as act:
                self.do_evict(act)
            case Save() as act:
                self.do_save(act)
            case Misuse() as act:
                self.do_misuse(act)
        self.repair()

    def adopt(self, talk: Talk, number: int) -> None:
        """Go on with a session branched or restored in the place of another one; or look at it, and close it."""
        if number < 3:
            self.do_close(Close(number))
            self.talks[number] = talk
            return
        self.talks.append(talk)
        for engine in range(2):
            if talk.engine in {None, self.engines[engine]}:
                self.run(Block([3], engine, talk.key, "with", 0, []))
        self.do_close(Close(3))
        self.talks.pop()

    def drop(self, number: int) -> None:
        """Drop a session, and go on with a new one: its cache is released, and there's a warning."""
        talk, self.talks[number] = self.talks[number], Talk()
        leaked = not talk.closed and bool(self.live(talk))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            talk.expired = None
            del talk.session
        warned = [ResourceWarning] * leaked
        unfinished = not talk.sure or talk.engine is None
        assert [warning.category for warning in caught] == warned or unfinished
        assert not self.live(talk)

    def look(self) -> None:
        """Look at all sessions, and change nothing."""
        for number, talk in enumerate(self.talks):
            for engine in range(2):
                if talk.engine in {None, self.engines[engine]}:
                    self.run(Block([number], engine, talk.key, "with", 0, []))

    # What always holds

    @invariant()
    def nothing_is_borrowed(self) -> None:
        """No session is left borrowed."""
        for talk in self.talks:
            state = "closed" if talk.closed else "idle"
            count = len(talk.saved)
            assert repr(talk.session) == f"<Session {talk.session.id} {state}, {count} tokens>"
            assert talk.session.closed == talk.closed
            assert talk.session.token_count == count
            if talk.closed:
                assert not self.live(talk)
                assert not talk.session._values

    @invariant()
    def caches_are_released_once(self) -> None:
        """No cache is released twice, or used after its release."""
        for engine in self.engines:
            assert not engine.memory.misuse
            assert not engine.memory.faults
            for cache in engine.memory.caches:
                assert cache.released <= (cache.successor is None)

    def teardown(self) -> None:
        """Close everything: exactly what was created was released."""
        if hasattr(self, "folder"):
            self.folder.cleanup()
        if getattr(self, "failed", True):  # also where Hypothesis has stopped before `begin`
            return
        self.look()
        for number in range(3):
            assert self.do_close(Close(number)) is None
        for engine in self.engines:
            engine.memory.check_all_released()

    # How to do it, and to compare

    def live(self, talk: Talk) -> list[Cache]:
        """Return the caches of a session."""
        return [cache for engine in self.engines for cache in engine.memory.live(talk)]

    def repair(self) -> None:
        """Let nothing fail any more."""
        for engine in self.engines:
            engine.memory.faults.clear()
            engine.memory.raised.clear()
            engine.memory.lies = 0

    def strip_all(self) -> None:
        """Take the tracebacks off all errors that were raised."""
        for engine in self.engines:
            for error in engine.memory.raised:
                strip(error)

    @property
    def disturbances(self) -> int:
        """How often something failed."""
        return sum(engine.memory.disturbances for engine in self.engines)

    def was_injected(self, error: BaseException | None) -> bool:
        """Whether this very error was raised by a function of an engine."""
        return any(error is raised for engine in self.engines for raised in engine.memory.raised)

    def refusals(self, engine: Engine, talks: list[Talk]) -> set[type[SessionError] | None]:
        """Return the errors that borrowing may end in; None is that it may succeed."""
        if len(set(talks)) < len(talks):
            return {*self.refusals(engine, [*dict.fromkeys(talks)]), SessionBusyError} - {None}
        unknown = False
        for talk in talks:
            may_be_empty = not talk.saved and not talk.sure
            if talk.closed:
                refusals: set[type[SessionError] | None] = {SessionClosedError}
            elif talk.borrower is not None:
                is_empty = not talk.saved and (talk.kept is None or not talk.sure)
                refusals = {SessionBusyError if talk.borrower is engine else SessionOwnerError}
                if is_empty:
                    refusals.add(SessionBusyError)
            elif talk.engine in {None, engine}:
                continue
            elif may_be_empty:
                unknown = True
                continue
            else:
                refusals = {SessionOwnerError}
            return refusals | {SessionOwnerError} if unknown else refusals
        return {None, SessionOwnerError} if unknown else {None}

    def run(self, block: Block) -> BaseException | None:
        """Do a block, and return what it raised."""
        engine = self.engines[block.engine]
        talks = [self.talks[number] for number in block.sessions]
        refusals = self.refusals(engine, talks)
        busy = [talk for talk in talks if talk.borrower is not None]
        depth = len(self.open)
        before = self.disturbances
        body = Body(self, engine, talks, block)
        raised = self.drive(block.style, body)
        del self.open[depth:]
        if isinstance(raised, AssertionError):
            raise raised
        strip(raised)
        if block.style == "stack" and raised is not None:
            gc.collect()  # an ExitStack whose exit raises leaves a cycle of its frame and the traceback
        if not body.entered:
            disturbed = self.disturbances > before
            if type(raised) in refusals:
                assert getattr(raised, "session_id") in {talk.session.id for talk in talks}  # noqa: B009 each has it
            else:
                assert disturbed
                assert self.was_injected(raised)
            for talk in talks:
                # A borrow that never ended may have been undone first, as well as that was possible.
                talk.sure = talk.sure and (not disturbed or talk in busy)
            return raised
        assert None in refusals
        self.compare_end(body, raised)
        self.let_go(body)
        return raised

    def drive(self, style: Style, body: Body) -> BaseException | None:
        """Borrow in one of the ways that there are. No frame keeps what was borrowed."""
        slots = body.engine.slots
        sessions = [talk.session for talk in body.talks]
        try:
            if len(sessions) == 1:
                self.open.append(slots.borrow(sessions[0], key=body.block.key))
            else:
                self.open.append(slots.borrow_all(sessions, key=body.block.key))
            depth = len(self.open) - 1
            match style:
                case "with":
                    with self.open[depth] as body.got:
                        body.run()
                case "stack":
                    with ExitStack() as stack:
                        body.got = stack.enter_context(self.open[depth])
                        body.run()
                case "collected":
                    collect(self.stream(depth, body), body.block.generation)
                case _:
                    body.got = self.open[depth].__enter__()
                    try:
                        body.run()
                    except BaseException as error:
                        if style == "by hand":
                            self.open[depth].__exit__(type(error), error, error.__traceback__)
                        raise
                    if style == "by hand":
                        self.open[depth].__exit__(None, None, None)
        except BaseException as error:  # noqa: BLE001 that's the point
            return error
        finally:
            self.strip_all()
        return None

    def stream(self, depth: int, body: Body) -> Generator[None, None, None]:
        """Borrow in a generator, and be suspended in the block."""
        with self.open[depth] as body.got:
            body.run()
            yield

    def compare_end(  # noqa: C901 as many ways to end
        self, body: Body, raised: BaseException | None
    ) -> None:
        """Compare what became of sessions when their block ended."""
        engine, talks, left = body.engine, body.talks, body.left
        disturbed = self.disturbances > body.disturbances
        open_talks = [talk for talk in talks if not talk.closed]
        abandoned = body.block.style == "abandoned"
        if abandoned:
            assert raised is left
            assert not disturbed or len(open_talks) < len(talks)  # a closed one is freed at once
            committed = False
        elif body.block.style == "collected" and left is None:
            assert raised is None
            committed = False
        elif left is not None:
            if raised is not left:  # an interrupt struck on the way out
                assert self.was_injected(raised)
                assert not isinstance(raised, Exception)
            committed = False
        elif raised is None:
            assert not body.mismatches or disturbed
            committed = True
        elif disturbed:
            assert self.was_injected(raised) or isinstance(raised, StateMismatchError)
            committed = False
            if len(open_talks) < len(talks):  # perhaps only that of closing, in the end
                committed = self.was_committed(engine, open_talks)
        else:
            assert isinstance(raised, StateMismatchError)
            mismatch = (raised.session_id, raised.expected, raised.actual)
            assert mismatch == body.mismatches[0]
            next(talk for talk in talks if talk.session.id == raised.session_id).distrust()
            committed = False
        for talk in talks:
            if committed:
                talk.save()
            if disturbed:
                talk.sure = False
            if not committed:
                talk.undo(engine.memory, None if abandoned else left or raised, abandoned=abandoned)

    def was_committed(self, engine: Engine, talks: list[Talk]) -> bool:
        """Look whether sessions were committed or taken back: all or none."""
        self.hold_faults()
        found: list[tuple[list[int], dict[Slot[Any], Any]]] = []
        for talk in talks:
            try:
                with engine.slots.borrow(talk.session, key=talk.key) as state:
                    found.append((list(state.token_history), dict(talk.session._values)))
            except StateMismatchError:  # a lie went through
                assert self.disturbances
        saved = [(talk.saved, talk.values) for talk in talks]
        if found == [(talk.history, talk.values_now) for talk in talks]:
            return found != saved
        assert found == saved
        return False

    def hold_faults(self) -> None:
        """Let nothing more fail."""
        for engine in self.engines:
            engine.memory.faults.clear()

    def let_go(self, body: Body) -> None:
        """Compare what sessions hold after their block."""
        abandoned = body.block.style == "abandoned"
        disturbed = self.disturbances > body.disturbances
        for talk in body.talks:
            # Who has the state of a block that was begun by hand holds the session.
            talk.expired = talk.expired if abandoned else talk.state
            talk.state = talk.borrower = None
            if talk.closed:
                if abandoned or disturbed:  # what was interrupted is finished by the next call
                    self.hold_faults()
                    talk.session.close()
                talk.free()
                assert not self.live(talk)
                continue
            if talk.sure and not abandoned:
                assert len(self.live(talk)) == (talk.kept is not None)
            else:
                assert len(self.live(talk)) <= 2
            is_empty = talk.sure and not talk.saved and talk.kept is None
            talk.engine = None if is_empty else body.engine

    def do_close(self, act: Close) -> BaseException | None:
        """Close a session, and return what that raised."""
        talk = self.talks[act.session]
        before = self.disturbances
        error = self.attempt(talk.session.close)
        talk.closed = True
        if self.disturbances > before:
            assert self.was_injected(error)
        else:
            assert error is None
        if talk.borrower is None:
            talk.free()
            assert not self.live(talk)
        assert talk.session.closed
        return error

    def do_evict(self, act: Evict) -> BaseException | None:
        """Evict a session, and return what that raised."""
        talk, engine = self.talks[act.session], self.engines[act.engine]
        refusals = self.refusals(engine, [talk])
        before = self.disturbances
        error = self.attempt(lambda: engine.slots.evict(talk.session))
        if self.disturbances > before:
            assert error is None or self.was_injected(error) or type(error) in refusals
            talk.sure = False
        elif error is not None:
            assert type(error) in refusals
        else:
            assert None in refusals
            talk.kept, talk.sure, talk.failed = None, True, False
            assert not self.live(talk)
            if not talk.saved:
                talk.engine = None
        return error

    def do_save(self, act: Save) -> BaseException | None:
        """Save a session, restore what the file holds then, and return what one of both raised."""
        talk, engine = self.talks[act.session], self.engines[act.engine]
        path = Path(self.folder.name, "file")
        refusals = self.refusals(engine, [talk])
        before = self.disturbances
        error = self.attempt(lambda: engine.slots.save(talk.session, path, move=act.move))
        if self.disturbances > before:
            assert error is None or self.was_injected(error) or type(error) in refusals
            talk.sure, self.file = False, None
            path.unlink(missing_ok=True)
        elif error is not None:
            assert type(error) in refusals
        else:
            assert None in refusals
            kept = talk.kept or None if engine.memory.saves else None
            self.file = Talk(talk.session, engine, saved=talk.saved, kept=kept, key=talk.key)
            self.file.sure = talk.sure
            talk.failed = False
        assert talk.session.closed == talk.closed or act.move
        if talk.session.closed and not talk.closed:
            self.hold_faults()
            talk.session.close()
            talk.closed = True
            talk.free()
            assert not self.live(talk)
        return error or self.restore(path, take=act.take)

    def restore(self, path: Path, *, take: bool) -> BaseException | None:
        """Restore what the file holds."""
        before, file = self.disturbances, self.file
        if file is None or file.engine is None:
            return None
        slots, made = file.engine.slots, list[Session]()
        file.engine.memory.owner = talk = Talk()
        error = self.attempt(lambda: made.append(slots.restore(path, take=take)))
        disturbed = self.disturbances > before
        assert error is None or (disturbed and self.was_injected(error))
        assert path.exists() == (error is not None or not take)
        if made:
            talk.session, talk.engine, talk.key = made.pop(), file.engine, file.key
            talk.saved, talk.kept, talk.sure = file.saved, file.kept, file.sure and not disturbed
            assert talk.session.id == file.session.id
            assert talk.session.token_count == len(talk.saved)
            if talk.sure:
                assert talk.session._kv_length == (talk.kept or 0)
            if not talk.saved:
                talk.engine = None
            self.made.append(talk)
        self.file = file if path.exists() else None
        return error

    def do_misuse(self, act: Misuse) -> None:
        """Do something wrong, which is refused and changes nothing."""
        talk = self.talks[act.session]
        names = [name for name in Session.__slots__ if not name.startswith("__")]
        before = [copied(getattr(talk.session, name)) for name in names]
        disturbances = self.disturbances
        state = talk.expired
        if act.what in PROXIES:
            slots, proxy = self.engines[0].slots, weakref.proxy(talk.session)
            error = self.attempt(lambda: PROXIES[act.what](slots, proxy))
            assert type(error) is TypeError
        elif state is not None:
            error = self.attempt(lambda: MEMBERS[act.what](state))
            assert type(error) is BorrowExpiredError
        assert self.disturbances == disturbances
        assert [copied(getattr(talk.session, name)) for name in names] == before

    def attempt(self, call: Callable[[], object]) -> BaseException | None:
        """Call something, and return what it raised, without what it was raised from."""
        try:
            call()
        except AssertionError:
            raise
        except BaseException as error:  # noqa: BLE001 that's the point
            strip(error)
            return error
        finally:
            self.strip_all()
        return None


@define(eq=False)
class Body:
    """The inside of a block."""

    machine: Sessions
    engine: Engine
    talks: list[Talk]
    block: Block
    got: Any = None
    entered: bool = False
    left: BaseException | None = None
    """What left the block."""
    disturbances: int = 0
    """How often something had failed when the block ended."""
    mismatches: list[tuple[UUID, int, int]] = field(factory=list[tuple[UUID, int, int]])
    """Whose cache didn't cover what it should when the block ended."""

    def run(self) -> None:
        """Do what is to be done."""
        got, self.got = self.got, None
        states = cast("list[BorrowedState[Cache]]", got if isinstance(got, list) else [got])
        self.entered = True
        assert len(states) == len(self.talks)
        for talk in self.talks:
            self.enter(talk, states.pop(0))
        del got, states
        try:
            for act in self.block.does:
                talk = self.talks[act.session % len(self.talks)]
                error = self.act(talk, act)
                self.compare(talk)
                # Of what the length doesn't tell, only the engine knows: it lets the block fail.
                is_hidden = talk.cache is not None and talk.cache.damage == "hidden"
                if error is not None and (is_hidden or not act.caught):
                    self.left = error
                    raise error
        finally:
            self.disturbances = self.machine.disturbances
            self.mismatches = [
                (talk.session.id, talk.kv_length, talk.covered)
                for talk in self.talks
                if talk.covered != talk.kv_length
            ]

    def enter(self, talk: Talk, state: BorrowedState[Cache]) -> None:
        """Compare what is borrowed with what was left."""
        assert isinstance(state, BorrowedState)
        assert state.session is talk.session
        talk.state, talk.borrower = state, self.engine
        talk.use_key(self.block.key)
        talk.history, talk.values_now = list(talk.saved), dict(talk.values)
        talk.kv_length, live = state.kv_length, self.machine.live(talk)
        if talk.sure:
            assert talk.kv_length == (talk.kept or 0)
            assert len(live) == (talk.kept is not None)
            assert all(cache.tokens == talk.history[: talk.kv_length] for cache in live)
        else:
            assert 0 <= talk.kv_length <= (talk.kept or 0)
            assert len(live) <= 1
            talk.failed = talk.session._savepoint[4]  # nothing else tells
        talk.cache = live[0] if live else None
        assert talk.cache is None or talk.cache.damage is None
        talk.kept = talk.kv_length if live else None
        talk.original, talk.handed_out = None, False
        talk.sure = talk.covered == talk.kv_length  # unless a lie went through
        self.compare(talk)

    def compare(self, talk: Talk) -> None:
        """Compare all that can be seen of a state with the model. The cache is not asked for: that changes things."""
        state = talk.borrowed
        assert list(state.token_history) == talk.history
        assert state.kv_length == talk.kv_length
        assert state.pending == talk.history[talk.kv_length :]
        assert talk.session.token_count == len(talk.saved)
        assert talk.session._values == talk.values_now
        if talk.cache is not None:
            assert talk.session._kv_cache is talk.cache
            covered = talk.cache.tokens[: talk.kv_length]
            assert covered == talk.history[: len(covered)]
        if talk.sure:
            expected = [cache for cache in (talk.cache, talk.original) if cache is not None]
            assert set(self.machine.live(talk)) == set(expected)

    def attempt(
        self,
        talk: Talk,
        call: Callable[[], object],
        refused: ErrorClass | None = None,
        *,
        cache: Cache | None = None,
    ) -> tuple[BaseException | None, bool]:
        """Call a member, and return what it raised, and whether it did what it should."""
        before = self.machine.disturbances
        self.engine.memory.owner = talk
        error = self.machine.attempt(call)
        if self.machine.disturbances == before:
            assert type(error) is (type(None) if refused is None else refused), error
            if refused is StateMismatchError:
                talk.distrust()
            return error, error is None
        talk.sure = False
        if error is None:
            return None, True
        assert self.machine.was_injected(error) or isinstance(error, StateMismatchError)
        kv_length = talk.borrowed.kv_length
        assert kv_length in {talk.kv_length, 0}
        talk.kv_length = kv_length
        cache = talk.cache if cache is None else cache
        talk.cache = cache.latest() if cache is not None and cache.latest().is_live else None
        return error, False

    def act(  # noqa: C901, PLR0911, PLR0912 a case for each act
        self, talk: Talk, act: Act
    ) -> BaseException | None:
        """Do one thing, and return the error it ended in."""
        machine = self.machine
        match act.what:
            case Raise(error=error_class):
                return error_class()
            case Break():
                self.break_function(act.what)
                return None
            case Close():
                return machine.do_close(act.what)
            case Evict():
                return machine.do_evict(act.what)
            case Save():
                return machine.do_save(act.what)
            case Misuse():
                machine.do_misuse(act.what)
                return None
            case Block():
                return machine.run(act.what)
            case Append(tokens=tokens):
                error, _ = self.attempt(talk, lambda: talk.borrowed.append(tokens))
                talk.history += tokens
                return error
            case Do(what=what):
                return self.do(talk, what)
            case Get(slot=number):
                return self.get(talk, SLOTS[number])
            case Set(slot=number, value=value):
                slot = SLOTS[number]
                error, _ = self.attempt(talk, lambda: talk.borrowed.__setitem__(slot, value))
                talk.values_now[slot] = value
                return error
            case Rewind(drop=drop, pending=pending):
                return self.rewind(talk, max(len(talk.history) - drop, 0), pending)
            case Reuse(keep=keep, tokens=tokens):
                return self.reuse(talk, talk.history[:keep] + tokens)
            case Chunks():
                return self.chunks(talk, act.what)
            case _ if talk.covered != talk.kv_length:
                return None  # no engine can go on with a cache that isn't what it thinks
            case Branch():
                return self.branch(talk, len(talk.history) - act.what.drop)
            case Take(back=back):
                return self.take(talk, back=back)
            case Step():
                return self.step(talk, act.what)
            case Turn(tokens=tokens):
                error, _ = self.attempt(talk, lambda: talk.borrowed.append(tokens))
                talk.history += tokens
                return error or self.step(talk, Step(99))

    def break_function(self, act: Break) -> None:
        """Let a function fail soon. One lie at a time: two could agree."""
        memory = self.engine.memory
        if isinstance(act.error, str):
            if not memory.lies and not any(isinstance(f.what, str) for _, f in memory.faults):
                memory.fail(Fault(act.function, act.error), skip=act.skip)
        else:
            memory.fail(Fault(act.function, act.error(), act.after_work), skip=act.skip)

    def do(self, talk: Talk, what: str) -> BaseException | None:  # noqa: PLR0911 as above
        """Do what has no choice."""
        match what:
            case "look at cache":
                return self.open(talk)
            case "replace cache":
                self.engine.memory.owner = talk
                new = self.engine.memory.new(talk.history[: talk.kv_length])
                return self.put(talk, new)
            case "put cache back":
                old = talk.original
                if old is None or old.donated or not old.is_live:
                    return None
                if old.tokens != talk.history[: talk.kv_length]:
                    return None
                return self.put(talk, old)
            case "keep cache":
                return None if talk.cache is None else self.put(talk, talk.cache)
            case "advance by none":
                return self.advance(talk, 0)
            case _:
                mismatched = talk.covered != talk.kv_length
                refused = StateMismatchError if mismatched else None
                error, done = self.attempt(talk, talk.borrowed.commit, refused)
                if done:
                    talk.save()
                return error

    def get(self, talk: Talk, slot: Slot[object]) -> BaseException | None:
        """Get the value of a further slot, its first one if there is none."""
        values: list[object] = []
        refused = FailureError if slot is SLOTS[2] else None
        error, done = self.attempt(talk, lambda: values.append(talk.borrowed[slot]), refused)
        if done:
            (value,) = values
            assert value is talk.values_now.setdefault(slot, value)
        return error

    def open(self, talk: Talk) -> BaseException | None:
        """Get the cache, a new one if there is none."""
        error, done = self.attempt(talk, lambda: talk.borrowed.kv_cache)
        talk.handed_out |= done
        if done and talk.cache is None:
            (talk.cache,) = (
                cache for cache in self.machine.live(talk) if cache is not talk.original
            )
            assert not talk.cache.tokens
        return error

    def put(self, talk: Talk, cache: Cache) -> BaseException | None:
        """Set the cache."""
        talk.handed_out = True
        if cache is talk.cache:
            error, _ = self.attempt(talk, lambda: setattr(talk.borrowed, "kv_cache", cache))
            return error
        original = talk.original
        error, done = self.attempt(
            talk, lambda: setattr(talk.borrowed, "kv_cache", cache), cache=cache
        )
        if done:
            talk.put(cache)
        elif cache is original:
            talk.original = None
        return error

    def step(self, talk: Talk, act: Step) -> BaseException | None:
        """Feed some of the pending tokens."""
        tokens = talk.history[talk.kv_length :][: act.count]
        if act.crash is not None and act.damage == "hidden":
            tokens = []
        error = self.open(talk)
        if error is not None:
            return error
        assert talk.cache is not None
        if not self.engine.memory.functional:
            talk.cache.tokens += tokens
        else:
            old = talk.cache
            new = self.engine.memory.new([*old.tokens, *tokens], talk)
            error = self.put(talk, new)
            old.donated = self.engine.memory.donating and old.is_live
            if error is not None:
                return error
        if act.crash is not None:
            talk.cache.damage = act.damage
            return act.crash()
        return self.advance(talk, len(tokens) + act.misreport)

    def advance(self, talk: Talk, count: int) -> BaseException | None:
        """Say how much was fed."""
        talk.handed_out = True
        refused: ErrorClass | None = None
        if not 0 <= count <= len(talk.history) - talk.kv_length:
            refused = ValueError
        elif talk.covered != talk.kv_length + count:
            refused = StateMismatchError
        error, done = self.attempt(talk, lambda: talk.borrowed.advance(count), refused)
        if done:
            talk.kv_length += count
        return error

    def chunks(self, talk: Talk, act: Chunks) -> BaseException | None:
        """Feed all but the last pending tokens in parts."""
        made: list[Iterator[list[int]]] = []
        refused = ValueError if act.size < 1 or act.keep < 0 else None
        error, done = self.attempt(
            talk, lambda: made.append(talk.borrowed.chunks(act.size, keep=act.keep)), refused
        )
        if not done:
            return error
        self.cut(talk, max(len(talk.history) - act.keep, 0))
        return self.feed(talk, act, made.pop())

    def feed(self, talk: Talk, act: Chunks, parts: Iterator[list[int]]) -> BaseException | None:
        """Feed parts, until there is none or something goes wrong."""
        number, skipped = 0, False
        while talk.covered == talk.kv_length:
            end = max(len(talk.history) - act.keep, talk.kv_length)
            expected = talk.history[talk.kv_length : min(talk.kv_length + act.size, end)]
            is_cancelled = talk.closed and expected
            refused = RuntimeError if skipped else SessionClosedError if is_cancelled else None
            part: list[int] = []
            error, done = self.attempt(talk, partial(next_part, parts, part), refused)
            if not done:
                return error
            assert part == expected
            if not part:
                return None
            skipped = act.then == "skip a part" and number == act.after
            if act.then == "close" and number == act.after:
                error = self.machine.do_close(Close(self.machine.talks.index(talk)))
            if not skipped:
                error = error or self.step(talk, Step(len(part)))
            if error is not None:
                return error
            number += 1
        return None

    def branch(self, talk: Talk, length: int) -> BaseException | None:
        """Branch the session."""
        if talk.cache is not None and talk.cache.donated:
            return None
        child, made = Talk(saved=talk.history[: max(length, 0)]), list[Session]()
        memory, before = self.engine.memory, self.machine.disturbances
        refused = None if 0 <= length <= len(talk.history) else ValueError
        error, done = self.attempt(talk, lambda: made.append(talk.borrowed.branch(length)), refused)
        if done:
            child.session, child.key = made.pop(), talk.key
            child.engine = self.engine if length else None
            child.sure = self.machine.disturbances == before
            most = min(talk.kv_length, length - 1)
            if memory.shares and most > 0:
                child.kept = self.engine.memory.cut_at(most)
                child.session._kv_cache.owner = child
            assert child.session.token_count == length
            self.machine.made.append(child)
        return error

    def take(self, talk: Talk, *, back: bool) -> BaseException | None:
        """Take the cache, and put it back, or not."""
        taken = list[Cache]()
        refused = ValueError if talk.cache is None else None
        error, done = self.attempt(
            talk, lambda: taken.append(talk.borrowed.take_kv_cache()), refused
        )
        if not done:
            return error
        (cache,), length = taken, talk.kv_length
        assert cache is talk.cache
        if talk.original is None:
            talk.kept = None
        talk.cache, talk.kv_length, talk.handed_out = None, 0, True
        if not back:
            cache.released += 1
            return None
        return self.put(talk, cache) or self.advance(talk, length)

    def rewind(self, talk: Talk, length: int, pending: int) -> BaseException | None:
        """Forget the last tokens."""
        refused = None
        if not 0 <= length <= len(talk.history) or pending < 0:
            refused = ValueError
        error, done = self.attempt(
            talk, lambda: talk.borrowed.rewind(length, pending=pending), refused
        )
        if done:
            self.cut(talk, max(length - pending, 0))
            del talk.history[length:]
        return error

    def reuse(self, talk: Talk, tokens: list[int]) -> BaseException | None:
        """Go on from what both histories begin with."""
        common = 0
        for left, right in zip(talk.history, tokens, strict=False):
            if left != right:
                break
            common += 1
        reused: list[int] = []
        error, done = self.attempt(talk, lambda: reused.append(talk.borrowed.reuse_prefix(tokens)))
        if done:
            self.cut(talk, max(min(common, len(tokens) - 1), 0))
            talk.history = list(tokens)
            assert reused == [talk.kv_length]
        return error

    def cut(self, talk: Talk, length: int) -> None:
        """Let the cache cover less. A length that lies may pass for a cut that landed short."""
        talk.cut(self.engine.memory, length)
        if not talk.sure:
            assert talk.borrowed.kv_length <= max(length, 0)
            talk.kv_length = talk.borrowed.kv_length


# Hypothesis looks for what refers to its generator, and doesn't find what `gc.freeze` put aside.
@pytest.mark.filterwarnings("ignore:It looks like `register_random`")
def test_any_sequence_of_calls_keeps_all_promises() -> None:
    """Exclusive, atomic, freed once: for every sequence of calls, and wherever something fails."""
    gc.freeze()  # which makes collecting garbage fast
    tell = sys.unraisablehook

    def unraisable(report: sys.UnraisableHookArgs) -> None:
        """Pass over what a `release` raises for a session that was closed in a borrow that had no end."""
        if isinstance(report.exc_value, ERRORS):
            report.exc_value.__traceback__ = report.exc_value.__context__ = None
        else:
            tell(report)

    sys.unraisablehook = unraisable
    try:
        run_state_machine_as_test(
            Sessions,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=16,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate, Phase.shrink],
            ),
        )
    finally:
        gc.unfreeze()
        sys.unraisablehook = tell
