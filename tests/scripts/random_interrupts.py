"""Random interrupts of sessions at work: `python -m tests.scripts.random_interrupts (signals|exceptions) SEED COUNT`.

Run by test_interrupts.py in a process of its own, which fails if a session ends up borrowed, torn or half-stepped, or
if a KV cache is leaked or freed twice.
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

from tests.tracked_engines import FrozenCache, Functional, Mutable, MutableCache

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


KV = TypeVar("KV")
POOL = 100_000


class Conversation:
    """A session, and its possible histories: the committed one, and the one about to be committed."""

    def __init__(self) -> None:
        self.session = Session()
        self.committed: list[int] = []
        self.next: list[int] = []


class Workload(Generic[KV]):
    """Random work on a few sessions, and its invariants."""

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
        self.all = [Conversation() for _ in range(POOL // 20)]  # all stay alive to the end
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
        """Require a session to be as after one of its commits."""
        history = [*state.token_history]
        assert history in (conversation.committed, conversation.next), "torn"
        assert conversation.session.token_count == len(history)
        conversation.committed = conversation.next = history
        if state.kv_length:
            assert self.tokens(state.kv_cache) == history[: state.kv_length], "ragged"
        return history

    def pick(self) -> Conversation:
        """Return an open conversation; begin it anew if it is too long."""
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
        """Require all open sessions to be free, and to have their tokens."""
        for conversation in self.open:
            with self.slots.borrow(conversation.session) as state:
                self.check(conversation, state)

    def finish(self) -> None:
        """Close all sessions, past ones included."""
        for conversation in self.all:
            conversation.session.close()
            assert conversation.session.token_count == 0


class Handler:
    """The switch of the signal handler."""

    raises = False


def interrupt_by_signals(work: Callable[[], None], dice: random.Random) -> None:
    """Work until a signal handler raises, which may do so again on the way out."""

    def interrupt(signum: int, frame: object) -> None:
        if Handler.raises:
            signal.setitimer(
                signal.ITIMER_REAL, dice.choice((2e-6, 2e-5, 1e-4)) * (0.1 + dice.random())
            )
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    Handler.raises = True
    try:
        signal.setitimer(
            signal.ITIMER_REAL, dice.choice((1e-5, 1e-4, 1e-3)) * (0.1 + dice.random())
        )
        while True:
            work()
    except KeyboardInterrupt:
        pass
    finally:
        Handler.raises = False  # no call before this


def interrupt_by_exceptions(work: Callable[[], None], dice: random.Random) -> None:
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
        except BaseException as error:  # noqa: BLE001 raised in the main thread
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


def run(engine: Mutable | Functional, source: str, dice: random.Random, count: int) -> None:
    """Interrupt an engine's work a number of times."""
    workload: Workload[MutableCache] | Workload[FrozenCache]
    if isinstance(engine, Mutable):
        workload = Workload(engine.slots, engine.feed, engine.tokens, dice)
    else:
        workload = Workload(engine.slots, engine.feed, engine.tokens, dice)
    for _ in range(50):
        workload.work()
    interrupt = interrupt_by_signals if source == "signals" else interrupt_by_exceptions
    for number in range(count):
        interrupt(workload.work, dice)
        if number % 4 == 0:
            workload.settle()
    workload.settle()
    workload.finish()
    engine.books.check()


def main(source: str, seed: str, count: str) -> None:
    """Interrupt every kind of engine."""
    faulthandler.dump_traceback_later(100, exit=True)
    dice = random.Random(int(seed))
    for engine in (Mutable, Functional):
        for truncates in (True, False):
            run(engine(truncates=truncates, pool=POOL), source, dice, int(count) // 4)


if __name__ == "__main__":
    main(*sys.argv[1:])
