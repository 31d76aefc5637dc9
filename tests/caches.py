"""KV caches for tests: they hold the very tokens that they were fed, and are counted.

With them, that a session's KV cache belongs to its tokens can be looked at, and so can every leak.
"""

from __future__ import annotations

from array import array
from asyncio import CancelledError
from collections.abc import Sequence
from typing import BinaryIO, Literal, TypeAlias

from attrs import define, field, frozen

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, StateSlots


FunctionName: TypeAlias = Literal[
    "create", "length", "truncate", "share", "dump", "load", "release"
]
Lie: TypeAlias = Literal["too long", "too short", "untouched", "untouched copy"]
Damage: TypeAlias = Literal["torn", "hidden"]
"""What a step that failed did to a cache: its layers disagree; or it changed what `length` doesn't count."""


ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, CancelledError]
"""Errors of all kinds that a step may end in."""

LIES: list[Lie] = ["too long", "untouched", "untouched copy"]
"""Ways in which a `truncate` keeps too much."""


@frozen(eq=False)
class Fault:
    """Something that goes wrong in one call of a function: it raises, or doesn't do or tell what it should."""

    function: FunctionName
    what: BaseException | Lie
    after_work: bool = False
    """Whether it raises when its work is done already."""


@define(eq=False)
class Cache:
    """A KV cache."""

    tokens: list[int]
    owner: object = None
    """Whatever stands for the session that has it."""
    donated: bool = False
    """Whether a step has made another of its memory."""
    successor: Cache | None = None
    """What `truncate` returned in its place."""
    released: int = 0
    damage: Damage | None = None

    @property
    def length(self) -> int:
        """How many tokens it covers."""
        return TORN if self.damage == "torn" else len(self.tokens)

    @property
    def is_live(self) -> bool:
        """Whether it must still be released."""
        return not self.released and self.successor is None

    def latest(self) -> Cache:
        """Return what it has become by truncation."""
        return self if self.successor is None else self.successor.latest()


@define(eq=False)
class Memory:
    """Where an engine's KV caches are: it makes them, keeps book of them, and fails where it was told to."""

    functional: bool = False
    """Whether a step and `truncate` return a new cache instead of changing the old one."""
    donating: bool = False
    """Whether, in addition, the old one can't be used after a step any more."""
    truncates: bool = True
    checkpoint_every: int | None = 1
    """`truncate` and `share` cut at multiples of this; None is that they can only empty a cache."""
    shares: bool = True
    saves: bool = True

    caches: list[Cache] = field(init=False, factory=list[Cache])
    owner: object = field(init=False, default=None)
    """Whom the next cache is for."""
    faults: list[tuple[int, Fault]] = field(init=False, factory=list[tuple[int, Fault]])
    """What is going to fail, and after how many calls."""
    raised: list[BaseException] = field(init=False, factory=list[BaseException])
    lies: int = field(init=False, default=0)
    misuse: list[str] = field(init=False, factory=list[str])
    """What the library should never have done."""

    def slots(self) -> StateSlots[Cache]:
        """Return an access to sessions whose caches are here."""
        return StateSlots(
            create=self.create,
            length=self.length,
            truncate=self.truncate if self.truncates else None,
            share=self.share if self.shares else None,
            dump=self.dump if self.saves else None,
            load=self.load if self.saves else None,
            release=self.release,
        )

    def create(self) -> Cache:
        """Return a new cache, empty if it's true."""
        fault = self._due("create")
        self._strike(fault)
        return self.new([] if fault is None else [0])

    def length(self, cache: Cache) -> int:
        """Return how many tokens it covers, or nearly."""
        fault = self._due("length")
        self._strike(fault)
        self._check_live(cache, "length")
        if cache.donated:
            raise RuntimeError("this cache was donated to a step")
        if fault is None:
            return cache.length
        return cache.length + (1 if fault.what == "too long" else -1)

    def cut_at(self, length: int) -> int:
        """Return where `truncate` cuts to keep as many of the first tokens as it can."""
        return 0 if self.checkpoint_every is None else length - length % self.checkpoint_every

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Return a cache of only the first tokens, if it's true. What was damaged is sound then."""
        fault = self._due("truncate")
        if fault is not None and not fault.after_work:
            self._strike(fault)
        self._check_live(cache, "truncate")
        if cache.donated:
            raise RuntimeError("this cache was donated to a step")
        if fault is not None and fault.what in {"too long", "too short"}:
            length = max(length + (1 if fault.what == "too long" else -1), 0)
        else:
            length = self.cut_at(length)
        kept = cache.tokens[:length]
        if fault is not None and fault.what in {"untouched", "untouched copy"}:
            kept = list(cache.tokens)
        if not self.functional and (fault is None or fault.what != "untouched copy"):
            cache.tokens, cache.damage = kept, None
            self._strike(fault)
            return cache
        self._strike(fault)
        cache.successor = self.new(kept, cache.owner)
        return cache.successor

    def share(self, cache: Cache, length: int) -> Cache:
        """Return another cache of only the first tokens, if it's true."""
        fault = self._due("share")
        if fault is not None and not fault.after_work:
            self._strike(fault)
        self._check_live(cache, "share")
        if fault is not None and fault.what == "untouched":
            return cache
        length = (
            length + 1 if fault is not None and fault.what == "too long" else self.cut_at(length)
        )
        shared = self.new(cache.tokens[:length])
        if fault is not None and isinstance(fault.what, BaseException):
            shared.released += 1  # its own business, as it fails
        self._strike(fault)
        return shared

    def dump(self, cache: Cache, file: BinaryIO) -> None:
        """Write a cache, in two parts."""
        fault = self._due("dump")
        self._check_live(cache, "dump")
        middle = len(cache.tokens) // 2
        file.write(array("i", cache.tokens[:middle]))
        if fault is not None and not fault.after_work:
            self._strike(fault)
        file.write(array("i", cache.tokens[middle:]))
        self._strike(fault)

    def load(self, file: BinaryIO) -> Cache:
        """Read a cache, if it's true."""
        fault = self._due("load")
        if fault is not None and not fault.after_work:
            self._strike(fault)
        tokens = array("i")
        tokens.frombytes(file.read())
        if fault is not None and isinstance(fault.what, str):
            tokens = tokens + tokens[:1] if fault.what == "too long" else tokens[:-1]
        self._strike(fault)
        return self.new(tokens)

    def release(self, cache: Cache) -> None:
        """Take a cache back, once."""
        if not cache.is_live:
            self.misuse.append("release of what isn't the library's any more")
        cache.released += 1
        self._strike(self._due("release"))

    def new(self, tokens: Sequence[int], owner: object = None) -> Cache:
        """Return a new cache of some tokens."""
        cache = Cache(list(tokens), self.owner if owner is None else owner)
        self.caches.append(cache)
        return cache

    def feed(self, state: BorrowedState[Cache], tokens: Sequence[int]) -> None:
        """Do what a step of the model does to the KV cache."""
        cache = state.kv_cache
        if not self.functional:
            cache.tokens.extend(tokens)
            return
        new = self.new([*cache.tokens, *tokens], cache.owner)
        cache.donated = self.donating
        state.kv_cache = new

    def step(self, state: BorrowedState[Cache], *tokens: int) -> None:
        """Add tokens, and feed all that is pending."""
        state.append(tokens)
        pending = state.pending
        self.feed(state, pending)
        state.advance(len(pending))

    def fail(self, fault: Fault, *, skip: int = 0) -> None:
        """Let a function fail, though not in its next `skip` calls."""
        self.faults.append((skip, fault))

    def live(self, owner: object = None) -> list[Cache]:
        """Return the caches that must still be released: all, or those of one owner."""
        return [
            cache
            for cache in self.caches
            if cache.is_live and (owner is None or cache.owner is owner)
        ]

    def check_all_released(self) -> None:
        """Assert that nothing was leaked, released twice or used too long."""
        assert not self.misuse
        for cache in self.caches:
            assert cache.released == (cache.successor is None)

    @property
    def disturbances(self) -> int:
        """How often something went wrong."""
        return len(self.raised) + self.lies

    def _check_live(self, cache: Cache, function: FunctionName) -> None:
        if not cache.is_live:
            self.misuse.append(f"{function} of what isn't the library's any more")

    def _due(self, function: FunctionName) -> Fault | None:
        due: Fault | None = None
        faults, self.faults = self.faults, []
        for skip, fault in faults:
            if fault.function != function:
                self.faults.append((skip, fault))
            elif skip or due is not None:
                self.faults.append((max(skip - 1, 0), fault))
            else:
                due = fault
        if due is not None and isinstance(due.what, str):
            self.lies += 1
        return due

    def _strike(self, fault: Fault | None) -> None:
        if fault is not None and isinstance(fault.what, BaseException):
            self.raised.append(fault.what)
            raise fault.what


def look(slots: StateSlots[Cache], session: Session) -> tuple[list[int], int]:
    """Return a session's history, and how much of it is cached."""
    with slots.borrow(session) as state:
        return list(state.token_history), state.kv_length


def prepare(slots: StateSlots[Cache], memory: Memory, session: Session, *tokens: int) -> None:
    """Give a session tokens, all of them cached."""
    with slots.borrow(session) as state:
        memory.step(state, *tokens)
