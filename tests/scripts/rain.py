"""Interrupts rain on sessions at work: `rain.py (signals|exceptions) SEED SECONDS`.

Run by test_interrupts.py in a process of its own, which fails if a session ends up borrowed, torn or half-stepped, or
if a KV cache is leaked or freed twice.

CPython delivers interrupts on function entry, after calls and on backward jumps only. What must not be torn here (the
books that are kept of tokens and KV caches) is therefore written without any call, as in `book[END:] = (entry,)`, and
`create` and `release` are C functions, as a Python function could be struck on entry, before it does what it's for.
"""

import ctypes
import faulthandler
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


KV = TypeVar("KV")
END = sys.maxsize
POOL = 100_000


class Books(Generic[KV]):
    """Which KV caches there are, and what became of them."""

    def __init__(self, pool: list[KV]) -> None:
        self.pool = pool
        self.left = list(reversed(pool))
        self.made: list[KV] = []  # by a step or by `truncate`
        self.released: list[KV] = []
        self.consumed: list[KV] = []  # by `truncate`

    def check(self) -> None:
        """Require that every KV cache was let go of exactly once."""
        created = self.pool[: len(self.pool) - len(self.left)]
        gone = [id(cache) for cache in (*self.released, *self.consumed)]
        assert len(gone) == len(set(gone)), "released twice"
        assert {id(cache) for cache in (*created, *self.made)} <= set(gone), "leaked"


class MutableCache(list[int]):
    """A KV cache that steps change."""


class Mutable:
    """An engine whose steps change the KV cache."""

    def __init__(self, *, truncates: bool) -> None:
        self.books = Books([MutableCache() for _ in range(POOL)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=len,
            truncate=self.truncate if truncates else None,
            release=self.books.released.append,
        )

    @staticmethod
    def truncate(cache: MutableCache, length: int) -> MutableCache:
        """Do it in place."""
        del cache[length:]
        return cache

    @staticmethod
    def feed(state: BorrowedState[MutableCache], count: int) -> None:
        """Feed the next tokens, one by one, so that a strike leaves a part of them."""
        cache = state.kv_cache
        for token in state.pending[:count]:
            cache.append(token)
        state.advance(count)

    @staticmethod
    def tokens(cache: MutableCache) -> list[int]:
        """Return what the cache covers."""
        return [*cache]


FrozenCache = tuple[int, ...]  # begins with a serial number, as there's only one `()`


class Functional:
    """An engine whose steps return a new KV cache."""

    def __init__(self, *, truncates: bool) -> None:
        self.books = Books[FrozenCache]([(serial,) for serial in range(POOL)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=self.length,
            truncate=self.truncate if truncates else None,
            release=self.books.released.append,
        )

    @staticmethod
    def length(cache: FrozenCache) -> int:
        """Don't count the serial number."""
        return len(cache) - 1

    def truncate(self, cache: FrozenCache, length: int) -> FrozenCache:
        """Return another cache; the old one is gone."""
        shorter = (*cache[: length + 1],)
        books = self.books
        books.consumed[END:], books.made[END:] = (cache,), (shorter,)
        return shorter

    def feed(self, state: BorrowedState[FrozenCache], count: int) -> None:
        """Feed the next tokens; the new cache is the library's business once it took it."""
        books = self.books
        for stop in (count // 2, count):
            cache = state.kv_cache
            longer = (*cache, *state.pending[len(cache) - 1 - state.kv_length : stop])
            if len(longer) > len(cache):
                state.kv_cache = longer
                books.made[END:] = (longer,)
        state.advance(count)

    @staticmethod
    def tokens(cache: FrozenCache) -> list[int]:
        """Return what the cache covers."""
        return [*cache[1:]]


class Conversation:
    """A session, and what its history may be: what it was, or what was about to be committed."""

    def __init__(self) -> None:
        self.session = Session()
        self.committed: list[int] = []
        self.next: list[int] = []


class Workload(Generic[KV]):
    """Random work on a few sessions, and what must hold at any time."""

    def __init__(
        self,
        slots: StateSlots[KV],
        feed: Callable[[BorrowedState[KV], int], None],
        tokens: Callable[[KV], list[int]],
        dice: random.Random,
    ) -> None:
        self.slots = slots
        self.feed = feed
        self.tokens = tokens
        self.dice = dice
        self.all = [Conversation() for _ in range(POOL // 20)]  # none of them dies in the rain
        self.others = iter(self.all)
        self.open = [next(self.others) for _ in range(4)]

    def work(self) -> None:
        """Do something."""
        do = self.dice.choice(
            (self.prefill, self.prefill, self.speculate, self.reuse, self.batch, self.evict)
        )
        do()
        if self.dice.random() < 0.05:
            self.close()

    def check(self, conversation: Conversation, state: BorrowedState[KV]) -> list[int]:
        """Require a session to be as one of its commits left it."""
        history = [*state.token_history]
        assert history in (conversation.committed, conversation.next), "torn"
        assert conversation.session.token_count == len(history)
        conversation.committed = conversation.next = history
        if state.kv_length:
            assert self.tokens(state.kv_cache) == history[: state.kv_length], "ragged"
        return history

    def pick(self) -> Conversation:
        """Return one that isn't too long."""
        conversation = self.dice.choice(self.open)
        if len(conversation.committed) > 40:
            with self.slots.borrow(conversation.session) as state:
                self.check(conversation, state)
                conversation.next = []
                state.rewind(0)
            conversation.committed = []
        return conversation

    def prefill(self) -> None:
        """Append and feed some tokens, with a commit in the middle."""
        conversation = self.pick()
        new = self.dice.choices(range(1000), k=4)
        with self.slots.borrow(conversation.session) as state:
            history = self.check(conversation, state)
            assert state.kv_cache is not None  # prefetched
            state.append(new[:2])
            self.feed(state, len(state.pending) - 1)
            history = conversation.next = [*history, *new[:2]]
            state.commit()
            conversation.committed = history
            state.append(new[2:])
            self.feed(state, 2)
            history = conversation.next = [*history, *new[2:]]
        conversation.committed = history

    def speculate(self) -> None:
        """Rewind a little and go on with other tokens, half of the time in vain."""
        conversation = self.pick()
        new = self.dice.choices(range(1000), k=3)
        fails = self.dice.random() < 0.5
        try:
            with self.slots.borrow(conversation.session) as state:
                history = self.check(conversation, state)
                length = max(len(history) - 2, 0)
                state.rewind(length, pending=self.dice.choice((0, 1)))
                state.append(new)
                self.feed(state, len(state.pending))
                state.rewind(length + 2, pending=0)
                if fails:
                    raise MemoryError  # noqa: TRY301
                history = conversation.next = [*history[:length], *new[:2]]
            conversation.committed = history
        except MemoryError:
            pass

    def reuse(self) -> None:
        """Go on from a prefix."""
        conversation = self.pick()
        new = self.dice.choices(range(1000), k=3)
        with self.slots.borrow(conversation.session) as state:
            history = self.check(conversation, state)
            history = [*history[: len(history) // 2], *new]
            state.reuse_prefix(history)
            self.feed(state, len(state.pending))
            conversation.next = history
        conversation.committed = history

    def batch(self) -> None:
        """Step two at once."""
        one, other = self.dice.sample(self.open, 2)
        token = self.dice.randrange(1000)
        with self.slots.borrow_all([one.session, other.session]) as (left, right):
            histories = [self.check(one, left), self.check(other, right)]
            for state in (left, right):
                state.append([token])
                self.feed(state, len(state.pending))
            first, second = [*histories[0], token], [*histories[1], token]
            one.next, other.next = first, second
        one.committed, other.committed = first, second

    def evict(self) -> None:
        """Evict one."""
        self.slots.evict(self.pick().session)

    def close(self) -> None:
        """Close one, and go on with another in its place."""
        place = self.dice.randrange(len(self.open))
        session = self.open[place].session
        self.open[place] = next(self.others)
        session.close()

    def settle(self) -> None:
        """Require that all sessions can be borrowed at once, and hold what they should."""
        for conversation in self.open:
            with self.slots.borrow(conversation.session) as state:
                self.check(conversation, state)

    def finish(self) -> None:
        """Close all that there ever were."""
        for conversation in self.all:
            conversation.session.close()
            assert conversation.session.token_count == 0


class Sky:
    """Whether it rains."""

    rains = False


def rain_signals(work: Callable[[], None], dice: random.Random) -> None:
    """Work until a signal handler raises, which may do so again on the way out."""

    def strike(signum: int, frame: object) -> None:
        if Sky.rains:
            signal.setitimer(
                signal.ITIMER_REAL, dice.choice((2e-6, 2e-5, 1e-4)) * (0.1 + dice.random())
            )
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    Sky.rains = True
    try:
        signal.setitimer(
            signal.ITIMER_REAL, dice.choice((1e-5, 1e-4, 1e-3)) * (0.1 + dice.random())
        )
        while True:
            work()
    except KeyboardInterrupt:
        pass
    finally:
        Sky.rains = False  # no call before this


def rain_exceptions(work: Callable[[], None], dice: random.Random) -> None:
    """Work in another thread until it gets an exception from here."""
    begun = threading.Event()
    died_of: list[BaseException] = []

    def worker() -> None:
        try:
            begun.set()
            while True:
                work()
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001 told to the main thread
            died_of.append(error)

    thread = threading.Thread(target=worker)
    thread.start()
    begun.wait()
    time.sleep(dice.choice((1e-5, 1e-4, 1e-3)) * dice.random())
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
    )
    thread.join()
    for error in died_of:
        raise error


def run(engine: Mutable | Functional, rain: str, dice: random.Random, seconds: float) -> int:
    """Let it rain for a while, and return how often it struck."""
    workload: Workload[MutableCache] | Workload[FrozenCache]
    if isinstance(engine, Mutable):
        workload = Workload(engine.slots, engine.feed, engine.tokens, dice)
    else:
        workload = Workload(engine.slots, engine.feed, engine.tokens, dice)
    for _ in range(50):
        workload.work()
    strikes = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        strikes += 1
        (rain_signals if rain == "signals" else rain_exceptions)(workload.work, dice)
        if strikes % 4 == 0:
            workload.settle()
    workload.settle()
    workload.finish()
    engine.books.check()
    return strikes


def main(rain: str, seed: str, seconds: str) -> None:
    """Let it rain on every kind of engine, and print how often it struck."""
    faulthandler.dump_traceback_later(100, exit=True)
    dice = random.Random(int(seed))
    strikes = 0
    for engine in (Mutable, Functional):
        for truncates in (True, False):
            strikes += run(engine(truncates=truncates), rain, dice, float(seconds) / 4)
    print(strikes)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
