"""What the package costs, against what one would write by hand, and with a long history against a short one.

What is measured are ratios within one run: seconds tell more about the machine.
"""

import subprocess
import sys
import tracemalloc
from array import array
from collections.abc import Callable, Iterable
from functools import cache, partial
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.benchmarks.measuring import BATCH, Cost, Measure, timed
from tests.benchmarks.steps import (
    advance,
    append,
    borrow,
    commit,
    commit_token,
    long_step,
    look,
    read_item,
    read_slot,
    rewind,
    set_item,
    set_slot,
    slots,
    step,
    step_all,
    step_by_hand,
    timed_at,
)

from inference_session import Session, SessionRegistry


FEW, MANY = 10, 1_000_000
PROMPT = 131_072
MANY_TIMES = 4096
MODULES = "attrs, logging, threading, uuid"


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


@cache
def batch() -> list[Session]:
    """Return the sessions of a batch."""
    return [Session() for _ in range(BATCH)]


@cache
def registered_batch() -> tuple[SessionRegistry, list[Session]]:
    """Return the sessions of a batch in a registry with a budget, and the registry."""
    registry = SessionRegistry(max_kv_bytes=2**40)
    return registry, [registry.open() for _ in range(BATCH)]


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


def growth(what: str, work: Callable[[Session, int], None]) -> Cost:
    """Return the row that compares a long history with a short one."""
    return Cost(
        f"{what}, {MANY:,} tokens", timed_at(MANY, work), f"{FEW} tokens", timed_at(FEW, work), 1.25
    )


def limit(on_3_11: float, on_3_13: float) -> float:
    """Return how often the time by hand a step may take: calls are dear on 3.11, and by hand there are few."""
    return on_3_11 if sys.version_info < (3, 12) else on_3_13


BY_HAND = timed(step_by_hand)

COSTS = [
    Cost("Session()", timed(create_sessions), "id alone", timed(create_only_ids), 1.5),
    Cost("Session()", timed(create_sessions), "written by hand", timed(create_by_hand), 1.5),
    Cost("memory", partial(memory_of, Session), "id alone", partial(memory_of, OnlyId), 2),
    Cost("memory", partial(memory_of, Session), "written by hand", partial(memory_of, ByHand), 2),
    Cost("step", timed_at(FEW, step), "written by hand", BY_HAND, limit(13, 11)),
    Cost("step, in one borrow", timed_at(FEW, long_step), "written by hand", BY_HAND, limit(5, 4)),
    Cost(
        f"step of {BATCH}",
        timed(lambda _: step_all(batch())),
        "written by hand",
        BY_HAND,
        limit(11, 8),
    ),
    Cost(
        f"step of {BATCH}, in a registry",
        timed(lambda _: step_all(registered_batch()[1])),
        "written by hand",
        BY_HAND,
        limit(16, 12),
    ),
    growth("borrow", borrow),
    growth("append", append),
    growth("advance", advance),
    growth("commit", commit),
    growth("append and commit", commit_token),
    growth("rewind", rewind),
    growth("step", step),
    growth("look", look),
    Cost(
        "read a slot",
        timed(partial(read_slot, Session()), MANY_TIMES),
        "an item of a dict",
        timed(read_item, MANY_TIMES),
        4.5,
    ),
    Cost(
        "set a slot",
        timed(partial(set_slot, Session()), MANY_TIMES),
        "an item of a dict",
        timed(set_item, MANY_TIMES),
        8,
    ),
    Cost("reuse, array", reuse(partial(array, "i")), "zip loop", timed(zip_loop, 1), 1 / 15),
    Cost("reuse, NumPy", reuse(as_numpy), "zip loop", timed(zip_loop, 1), 1 / 15),
    Cost("reuse, list", reuse(list), "zip loop", timed(zip_loop, 1), 3 / 4),
    Cost("import", importing("inference_session"), MODULES, importing(MODULES), 1.5),
]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: f"{cost.what} / {cost.against}")
def test_cost(cost: Cost, record_property: Callable[[str, object], None]) -> None:
    """Nothing costs more than it may."""
    cost.check(record_property)
