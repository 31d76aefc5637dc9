"""Where this interpreter delivers signals, and when its garbage collector comes in: `delivery.py`.

Run by test_delivery.py in a process of its own, as a coverage tool's callbacks would be further places of delivery. It
prints a JSON object of facts.

`trip` is a C function that makes a signal pending, as if it had come while that function was at work. The handler
raises at the next place of delivery.
"""

import faulthandler
import gc
import json
import random
import signal
import threading
import time
import weakref
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from itertools import starmap
from types import TracebackType
from typing import Any, Final, TypeAlias, cast

from inference_session import Session, _lease
from inference_session._lock import lock, locked
from inference_session.engine import StateSlots


class Strike(BaseException):
    """What the signal handler raises."""


def strike(signum: int, frame: object) -> None:
    """Raise."""
    raise Strike


trip: Final[Callable[..., None]] = interrupt_main


# Where signals are delivered


def a_call_is_torn_from_its_assignment() -> bool:
    """Tell whether a signal strikes between the call of a C function and the use of its result."""
    stored: object = "nothing"
    with suppress(Strike):
        stored = trip()  # type: ignore[func-returns-value]
    return stored == "nothing"


def is_torn_from_its_body(turns: Iterator[object]) -> bool:
    """Tell whether a signal strikes between a turn of a loop and its body, or in that."""
    entered = left = False
    stored: object = "nothing"
    try:
        for result in turns:
            try:
                stored, entered = result, True
            finally:
                left = True
            break
        time.sleep(0)
    except Strike:
        return not (entered and left and stored is None)
    raise AssertionError("it was never delivered")


def a_turn_of_iter_is_torn() -> bool:
    """Tell that of the iterator that takes the lock."""
    return is_torn_from_its_body(iter(trip, 0))


def a_turn_of_starmap_is_torn() -> bool:
    """Tell that of the iterator that calls `create`."""
    return is_torn_from_its_body(starmap(trip, ((),)))


def a_turn_of_map_is_torn() -> bool:
    """Tell that of the iterator that calls `truncate`."""
    return is_torn_from_its_body(map(trip, (signal.SIGINT,)))


def an_unpacked_result_is_torn() -> bool:
    """Tell whether a signal strikes between the unpacking of the iterator that opens a file and the return."""

    def unpack() -> bool:
        [_] = map(trip, (signal.SIGINT,))
        return True

    returned = False
    try:
        returned = unpack()
        time.sleep(0)
    except Strike:
        return not returned
    raise AssertionError("it was never delivered")


def a_turn_of_a_generator_is_torn() -> bool:
    """Tell that of an iterator that is written in Python."""
    return is_torn_from_its_body(trip() for _ in "1")  # type: ignore[func-returns-value]


class Box:
    """Something with slots, as a session is."""

    __slots__ = ("first", "second")

    first: object
    second: object


def an_instant_is_interrupted() -> bool:
    """Tell whether a signal strikes in what has neither a call nor a jump backwards."""
    box, numbers = Box(), [1, 2, 3]
    last: object = None
    try:
        for _ in starmap(trip, ((),)):
            if numbers[1] == 2 and last is None:
                box.first, numbers[3:] = (1, box), numbers[:2]
            try:
                box.second = [*numbers] if numbers[-1] == 2 else None
            finally:
                last = box.second
            break
        time.sleep(0)
    except Strike:
        return last != [1, 2, 3, 1, 2]
    raise AssertionError("it was never delivered")


def a_jump_backwards_is_struck() -> bool:
    """Tell whether a signal strikes when a loop goes on."""
    turns: list[int] = []
    try:
        for _ in starmap(trip, ((),) * 3):
            turns[9:] = (1,)
    except Strike:
        return turns == [1]
    raise AssertionError("it was never delivered")


class Manager:
    """A context manager whose end sets a flag."""

    ended = False

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *exc_info: object) -> None:
        self.ended = True


def the_entry_of_exit_is_struck() -> bool:
    """Tell whether a signal strikes on entering `__exit__`, so that nothing of it runs."""
    manager = Manager()
    with suppress(Strike), manager:
        for _ in starmap(trip, ((),)):
            break
    return not manager.ended


class Tripping:
    """A context manager whose `__enter__` is a C function, as that of a lock is."""

    ended = False
    __enter__ = staticmethod(trip)

    def __exit__(self, *exc_info: object) -> None:
        self.ended = True


def a_with_statement_leaks() -> bool:
    """Tell whether a signal strikes between the call of `__enter__` and the block."""
    manager = Tripping()
    with suppress(Strike), manager:
        time.sleep(0)
    return not manager.ended


# What a `with` statement holds


End: TypeAlias = Callable[..., None]
Make: TypeAlias = Callable[[End], End]


class Called:
    """A callable that is written in Python."""

    def __init__(self, end: End) -> None:
        self.end = end

    def __call__(self, *exc_info: object) -> None:
        """End the block."""
        self.end(*exc_info)


class Leased:
    """A context manager whose `__exit__` is made for whoever asks."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.log: list[str] = []
        self.lease: Callable[[], object] = lambda: None
        self.alive = False

    def __enter__(self) -> None:
        self.log.append("entered")

    @property
    def __exit__(self) -> End:  # noqa: PLE0302, PYI036 a property
        self.log.append("asked")
        end = self.make(self.end)
        self.lease = weakref.ref(end)
        return end

    def end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See whether the lease is alive."""
        self.alive = self.lease() is not None


def exit_is_asked_for_first() -> bool:
    """Tell whether a `with` statement asks for `__exit__` before it calls `__enter__`, and once."""
    manager = Leased(partial)
    with manager:
        pass
    return manager.log == ["asked", "entered"]


def an_exit_stack_asks_the_class() -> bool:
    """Tell whether an `ExitStack` doesn't ask the object for its `__exit__`."""
    manager = Leased(partial)
    with suppress(TypeError), ExitStack() as stack:
        stack.enter_context(cast("AbstractContextManager[None]", manager))
    return "asked" not in manager.log


def a_partial_dies_before_its_end() -> bool:
    """Tell whether a `with` statement lets go of what it got, a `partial`, before that returns."""
    for _ in range(100):  # so that the interpreter specialises it
        manager = Leased(partial)
        with manager:
            pass
        if not manager.alive:
            return True
    return False


def is_kept_by_a_traceback(make: Make) -> bool:
    """Tell whether the traceback of a strike on entering the end keeps what the `with` statement got."""
    manager = Leased(make)
    kept: BaseException | None = None
    try:
        with manager:
            for _ in starmap(trip, ((),)):
                break
    except Strike as error:
        kept = error
    assert kept is not None
    assert not manager.alive
    return manager.lease() is not None


def a_traceback_keeps_a_partial() -> bool:
    """Tell that of a `partial`, as it's used here."""
    return is_kept_by_a_traceback(partial)


def a_traceback_keeps_a_callable_in_python() -> bool:
    """Tell that of an object whose `__call__` is written in Python."""
    return is_kept_by_a_traceback(Called)


# When the garbage collector comes in


class Watcher:
    """Something with a finalizer."""

    other: Callable[[], object]
    found: bool | None = None
    itself: "Watcher"

    def __del__(self) -> None:
        Watcher.found = self.other() is not None


class Watched:
    """Something else, which is garbage at the same time."""

    watcher: Watcher


def weak_references_live_until_the_finalizers() -> bool:
    """Tell whether a finalizer still finds other garbage by a weak reference that isn't garbage."""
    watcher, watched = Watcher(), Watched()
    outside = weakref.ref(watched)
    watcher.other, watcher.itself, watched.watcher = outside, watcher, watcher
    cycle: list[object] = [watcher, watched]
    cycle.append(cycle)
    del watcher, watched, cycle
    gc.collect()
    assert Watcher.found is not None
    return Watcher.found


def a_generator_ends_after_its_lease() -> bool:
    """Tell whether a suspended block that is collected comes to its end when its lease has died."""
    manager = Leased(partial)
    manager.alive = True

    def stream() -> Iterator[None]:
        with manager:
            yield

    generator = stream()
    next(generator)
    cycle: list[object] = [generator]
    cycle.append(cycle)
    del generator, cycle
    gc.collect()
    return not manager.alive


class Garbage:
    """A cycle with a finalizer."""

    collected = False
    itself: object

    def __del__(self) -> None:
        Garbage.collected = True


def the_collector_comes_in_where_a_container_is_made() -> bool:
    """Tell whether garbage is collected in an instant, when containers are made."""
    garbage = Garbage()
    garbage.itself = garbage
    kept: list[object] = [garbage]
    del garbage
    gc.enable()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in starmap(bool, ((),)):
            Garbage.collected, kept[0] = False, None
            kept[1:] = [[], [], [], [], [], [], [], []], {0: []}, [[], [], []]
            found = Garbage.collected
            break
        else:
            found = False
    finally:
        gc.set_threshold(700, 10, 10)
        gc.disable()
    return found


# The library, with signals that are pending at its most delicate points


def the_lock_is_free() -> bool:
    """Tell whether another thread can have the lock of the leases."""
    free: list[bool] = []

    def look() -> None:
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return free[0]


def a_struck_replacement_is_torn() -> bool:
    """Tell whether a signal that comes while the lock is being acquired keeps it, or undoes what it's for."""
    session = Session()
    last, mine = session._lease, weakref.ref(session)
    struck = zip(locked, iter(trip, 0), strict=False)
    setattr(_lease, "locked", struck)  # noqa: B010 it is final
    alone = _lease._ALONE
    setattr(_lease, "_ALONE", False)  # noqa: B010
    try:
        _lease.replace(session, last, mine)
    except Strike:
        return not (the_lock_is_free() and session._lease is mine)
    finally:
        setattr(_lease, "_ALONE", alone)  # noqa: B010
        setattr(_lease, "locked", locked)  # noqa: B010
    raise AssertionError("it was never delivered")


def a_struck_cache_is_lost() -> bool:
    """Tell whether a KV cache is leaked, or freed twice, when a signal comes while `create` is at work."""
    pool: list[list[int]] = [[], [], []]
    released: list[tuple[list[int], None]] = []
    # Takes the next of the pool, puts it into a tuple with what `trip` returns, and is written in C.
    create = zip(pool, iter(trip, 0), strict=False).__next__
    slots = StateSlots(create=create, length=lambda cache: len(cache[0]), release=released.append)
    struck = 0
    with Session() as session:
        for _ in pool:
            try:
                with slots.borrow(session) as state:
                    state.kv_cache  # noqa: B018 it's made
            except Strike:
                struck += 1
    assert struck == len(pool)
    return [id(cache) for cache, _ in released] != [id(cache) for cache in pool]


# Signals of a timer, at random instants


def leaked_locks(take: Callable[[Any], None], seconds: float) -> tuple[int, int]:
    """Strike at random while a lock is taken and released, and return how often, and how often it stayed locked."""
    dice = random.Random(1)
    strikes = leaks = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lock = threading.Lock()
        try:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(5e-6, 6e-5))
            while True:
                take(lock)
        except Strike:
            strikes += 1
        leaks += lock.locked()
    return strikes, leaks


def take_in_a_loop(lock: Any) -> None:
    """Take a lock as the library does, many times."""
    done = 0
    for _ in range(100):
        for _ in iter(lock.acquire, False):  # noqa: FBT003
            try:
                done += 1
            finally:
                lock.release()
            break


def take_by_with(lock: Any) -> None:
    """Take a lock as everybody does, many times."""
    done = 0
    for _ in range(100):
        with lock:
            done += 1


EXPERIMENTS: Final[tuple[Callable[[], bool], ...]] = (
    a_call_is_torn_from_its_assignment,
    a_turn_of_iter_is_torn,
    a_turn_of_starmap_is_torn,
    a_turn_of_map_is_torn,
    an_unpacked_result_is_torn,
    a_turn_of_a_generator_is_torn,
    an_instant_is_interrupted,
    a_jump_backwards_is_struck,
    the_entry_of_exit_is_struck,
    a_with_statement_leaks,
    exit_is_asked_for_first,
    an_exit_stack_asks_the_class,
    a_partial_dies_before_its_end,
    a_traceback_keeps_a_partial,
    a_traceback_keeps_a_callable_in_python,
    weak_references_live_until_the_finalizers,
    a_generator_ends_after_its_lease,
    the_collector_comes_in_where_a_container_is_made,
    a_struck_replacement_is_torn,
    a_struck_cache_is_lost,
)


def main() -> None:
    """Print what was found out."""
    faulthandler.dump_traceback_later(100, exit=True)
    signal.signal(signal.SIGINT, strike)
    gc.collect()
    gc.disable()
    facts: dict[str, object] = {each.__name__: each() for each in EXPERIMENTS}
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, strike)
        facts["loop"] = leaked_locks(take_in_a_loop, 1)
        facts["with"] = leaked_locks(take_by_with, 1)
    print(json.dumps(facts))  # noqa: T201


if __name__ == "__main__":
    main()
