"""What the package costs, against what one would write by hand, and with a long history against a short one.

What is measured are ratios within one run: seconds tell more about the machine.
"""

import subprocess
import sys
import tracemalloc
from array import array
from collections.abc import Callable, Iterable
from functools import cache, partial
from math import inf
from threading import Lock
from time import process_time
from uuid import uuid4

import numpy as np
import pytest
from attrs import frozen
from numpy.typing import NDArray

from inference_session import Session
from inference_session.engine import StateSlots


FEW, MANY = 10, 1_000_000
BATCH = 256
PROMPT = 131_072
TOKEN = [50_000]
MODULES = "attrs, uuid, threading"

LEAST_ROUNDS, MOST_ROUNDS = 50, 500

Work = Callable[[int], object]
"""Does something so many times."""
Measure = Callable[[], float]
"""Returns the cost of a round of something, in whatever unit."""


def ratio_of(subject: Measure, baseline: Measure, limit: float) -> float:
    """Compare the best of rounds that take turns, so that other load meets both; beyond the limit, take more rounds."""
    best_subject = best_baseline = inf
    for rounds in range(1, MOST_ROUNDS + 1):
        best_subject = min(best_subject, subject())
        best_baseline = min(best_baseline, baseline())
        if rounds >= LEAST_ROUNDS and best_subject <= limit * best_baseline:
            break
    return best_subject / best_baseline


def timed(work: Work, count: int = BATCH) -> Measure:
    """Measure CPU seconds, as they stand still while others run. The loop is in the work, so that no call adds up."""

    def measure() -> float:
        start = process_time()
        work(count)
        return process_time() - start

    return measure


# --- A session by itself


class OnlyId:
    """The least that could be called a session."""

    __slots__ = ("id",)

    def __init__(self) -> None:
        self.id = uuid4()


class ByHand:
    """What one would write: an id, a KV cache and the tokens, but no lock."""

    __slots__ = ("id", "kv_cache", "token_history")

    def __init__(self) -> None:
        self.id = uuid4()
        self.kv_cache: object = None
        self.token_history: list[int] = []


def create_sessions(count: int) -> None:
    """Create sessions."""
    for _ in range(count):
        Session()


def create_only_ids(count: int) -> None:
    """Create the least."""
    for _ in range(count):
        OnlyId()


def create_by_hand(count: int) -> None:
    """Create what one would write."""
    for _ in range(count):
        ByHand()


def memory_of(make: Callable[[], object], count: int = 1000) -> float:
    """Measure the bytes that each of many objects holds."""
    objects: list[object] = [None] * count
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for position in range(count):
        objects[position] = make()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / count


# --- A decode step's bookkeeping


def cut(kv_cache: list[int], length: int) -> list[int]:
    """Truncate in place."""
    del kv_cache[length:]
    return kv_cache


slots = StateSlots(create=list[int], length=len, truncate=cut)


@cache
def session_of(size: int) -> Session:
    """Return the session with so many tokens, all of them in the KV cache."""
    session = Session()
    with slots.borrow(session) as state:
        state.append(array("i", TOKEN) * size)
        state.kv_cache.extend(TOKEN * size)
        state.advance(size)
    return session


@cache
def batch() -> list[Session]:
    """Return the sessions of a batch."""
    return [Session() for _ in range(BATCH)]


def step(session: Session, count: int) -> None:
    """Do a decode step's bookkeeping."""
    for _ in range(count):
        with slots.borrow(session) as state:
            kv_cache = state.kv_cache
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)


class Locked:
    """What one would write to step a session by one thread at a time."""

    __slots__ = ("kv_cache", "lock", "token_history")

    def __init__(self) -> None:
        self.lock = Lock()
        self.kv_cache: list[int] = []
        self.token_history: list[int] = []


@cache
def by_hand() -> Locked:
    """Return a session written by hand."""
    return Locked()


def step_by_hand(count: int) -> None:
    """Do what one would write for a decode step."""
    session = by_hand()
    for _ in range(count):
        with session.lock:
            session.token_history.append(0)
            session.kv_cache.append(0)


def step_batch(_: int) -> None:
    """Do a decode step's bookkeeping for a batch."""
    with slots.borrow_all(batch()) as states:
        for state in states:
            kv_cache = state.kv_cache
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)


# --- The same with a long history


def borrow(session: Session, count: int) -> None:
    """Borrow, and no more."""
    for _ in range(count):
        with slots.borrow(session):
            pass


def append(session: Session, count: int) -> None:
    """Append a token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.append(TOKEN)


def advance(session: Session, count: int) -> None:
    """Advance by a token."""
    with slots.borrow(session) as state:
        state.append(TOKEN * count)
        kv_cache = state.kv_cache
        for _ in range(count):
            kv_cache.append(0)
            state.advance(1)


def commit(session: Session, count: int) -> None:
    """Commit what didn't change."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.commit()


def commit_token(session: Session, count: int) -> None:
    """Commit one more token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            state.append(TOKEN)
            state.commit()


def rewind(session: Session, count: int) -> None:
    """Rewind by a token that is committed and in the KV cache, and put another in its place."""
    with slots.borrow(session) as state:
        kv_cache, length = state.kv_cache, state.kv_length - 1
        for _ in range(count):
            state.rewind(length, pending=0)
            state.append(TOKEN)
            kv_cache.append(0)
            state.advance(1)
            state.commit()


def look(session: Session, count: int) -> None:
    """Look at the history, its length and its last token."""
    with slots.borrow(session) as state:
        for _ in range(count):
            history = state.token_history
            len(history)
            history[-1]


def timed_at(size: int, work: Callable[[Session, int], None]) -> Measure:
    """Measure seconds with a history of a size, which is restored after each round."""

    def measure() -> float:
        session = session_of(size)
        seconds = timed(partial(work, session))()
        with slots.borrow(session) as state:
            state.rewind(size, pending=0)
        return seconds

    return measure


# --- Reuse of a prefix


@cache
def prompts() -> tuple[list[int], list[int]]:
    """Return two long prompts that differ near the end."""
    ids = np.random.default_rng(0).integers(0, 150_000, PROMPT, dtype=np.int32)
    left, right = ids.tolist(), ids.tolist()
    right[-8] += 1
    return left, right


def as_numpy(tokens: list[int]) -> NDArray[np.int32]:
    """Return what tokenizers and models return."""
    return np.array(tokens, np.int32)


def reuse(convert: Callable[[list[int]], Iterable[int]]) -> Measure:
    """Measure seconds where one prompt takes the place of the other."""

    def measure() -> float:
        old, new = map(convert, prompts())
        with slots.borrow(Session()) as state:
            state.append(old)
            state.kv_cache.extend(old)
            state.advance(PROMPT)
            return timed(lambda _: state.reuse_prefix(new), 1)()

    return measure


def zip_loop(_: int) -> int:
    """Do what one would write to compare two prompts."""
    common = 0
    for one, other in zip(*prompts(), strict=False):
        if one != other:
            break
        common += 1
    return common


# --- Import


def importing(modules: str) -> Measure:
    """Measure seconds in an interpreter that has imported nothing but what measures."""
    code = f"from time import process_time as t; s = t(); import {modules}; print(t() - s)"
    return lambda: float(subprocess.check_output([sys.executable, "-c", code]))


@frozen
class Cost:
    """A row of the table."""

    what: str
    subject: Measure
    against: str
    baseline: Measure
    limit: float


def growth(what: str, work: Callable[[Session, int], None]) -> Cost:
    """Return the row that compares a long history with a short one."""
    return Cost(
        f"{what}, {MANY:,} tokens", timed_at(MANY, work), f"{FEW} tokens", timed_at(FEW, work), 1.25
    )


COSTS = [
    Cost("Session()", timed(create_sessions), "id alone", timed(create_only_ids), 1.5),
    Cost("Session()", timed(create_sessions), "written by hand", timed(create_by_hand), 1.5),
    Cost("memory", partial(memory_of, Session), "id alone", partial(memory_of, OnlyId), 2),
    Cost("memory", partial(memory_of, Session), "written by hand", partial(memory_of, ByHand), 2),
    Cost("step", timed_at(FEW, step), "written by hand", timed(step_by_hand), 10),
    Cost(f"step of {BATCH}", timed(step_batch), "written by hand", timed(step_by_hand), 10),
    growth("borrow", borrow),
    growth("append", append),
    growth("advance", advance),
    growth("commit", commit),
    growth("append and commit", commit_token),
    growth("rewind", rewind),
    growth("step", step),
    growth("look", look),
    Cost("reuse, array", reuse(partial(array, "i")), "zip loop", timed(zip_loop, 1), 1 / 15),
    Cost("reuse, NumPy", reuse(as_numpy), "zip loop", timed(zip_loop, 1), 1 / 15),
    Cost("reuse, list", reuse(list), "zip loop", timed(zip_loop, 1), 3 / 4),
    Cost("import", importing("inference_session"), MODULES, importing(MODULES), 1.5),
]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: f"{cost.what} / {cost.against}")
def test_cost(cost: Cost, record_property: Callable[[str, object], None]) -> None:
    """Nothing costs more than it may."""
    ratio = ratio_of(cost.subject, cost.baseline, cost.limit)
    record_property("ratio", ratio)
    record_property("limit", cost.limit)
    record_property("what", cost.what)
    record_property("against", cost.against)
    assert ratio <= cost.limit
