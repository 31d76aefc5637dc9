"""What a registry costs: with a million sessions against a few, and against a `dict` of the sessions."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from time import process_time
from uuid import UUID

import pytest
from tests.benchmarks.measuring import Cost, Measure, timed
from tests.benchmarks.steps import TOKEN, slots, step

from inference_session import Session, SessionRegistry


FEW, MANY = 1000, 1_000_000


def limited(size: int) -> SessionRegistry:
    """Return a registry with a limit of every kind."""
    return SessionRegistry(max_sessions=size, idle_timeout=3600, max_kv_bytes=2**30)


@cache
def full(size: int) -> SessionRegistry:
    """Return a registry with as many sessions as it may have."""
    registry = limited(size)
    for _ in range(size):
        registry.open()
    return registry


@cache
def plain_dict(size: int) -> dict[UUID, Session]:
    """Return what one would write instead."""
    return {session.id: session for session in map(Session.with_id, full(size))}


@cache
def requests(size: int) -> Iterator[UUID]:
    """Return ids as requests bring them: in no order, and not the very objects that the sessions have."""
    ids = Random(0).sample(list(plain_dict(size)), FEW)
    return cycle([UUID(int=each.int) for each in ids])


# --- Time


def look_up(size: int) -> Measure:
    """Measure looking sessions up."""
    registry = full(size)
    ids = requests(size)

    def work(count: int) -> None:
        for id in islice(ids, count):  # noqa: A001
            registry[id]

    return timed(work)


def look_up_in_dict(size: int) -> Measure:
    """Measure the same in a dict."""
    sessions = plain_dict(size)
    ids = requests(size)

    def work(count: int) -> None:
        for id in islice(ids, count):  # noqa: A001
            sessions[id]

    return timed(work)


def open_and_close(size: int) -> Measure:
    """Measure opening and closing one more session than there were."""
    registry = SessionRegistry(idle_timeout=3600)
    for _ in range(size):
        registry.open()

    def work(count: int) -> None:
        for _ in range(count):
            registry.close(registry.open().id)

    return timed(work)


def open_over_cap(size: int) -> Measure:
    """Measure opening sessions where others must go."""
    registry = limited(size)
    for _ in range(size):
        registry.open()

    def work(count: int) -> None:
        for _ in range(count):
            registry.open()

    return timed(work)


def open_and_close_alone(count: int) -> None:
    """Open and close sessions without a registry."""
    for _ in range(count):
        Session().close()


def fill(size: int) -> Measure:
    """Measure the CPU seconds that each of so many sessions takes to open, all that grows meanwhile included."""

    @cache
    def measure() -> float:
        gc.collect()
        start = process_time()
        for _ in range(MANY // size):
            registry = limited(size)
            for _ in range(size):
                registry.open()
        return (process_time() - start) / MANY

    return measure


def stepping(session: Session) -> Measure:
    """Measure a decode step's bookkeeping."""

    def work(count: int) -> None:
        with_limit = session.token_count + count
        step(session, count)
        assert session.token_count == with_limit

    return timed(work)


class Borrowed:
    """A registry that is over its budget, with nothing to evict: all of its sessions are borrowed."""

    def __init__(self, size: int) -> None:
        self.registry = SessionRegistry(max_kv_bytes=0)
        self.sessions = [self.registry.open() for _ in range(size)]
        self.stack = ExitStack()
        self.states = self.stack.enter_context(slots.borrow_all(self.sessions))
        for state in self.states:
            state.append(TOKEN)
            state.kv_cache.append(0)
            state.advance(1)
            state.commit()
        self.turns = cycle(self.states)

    def commit(self, count: int) -> None:
        """Commit, one session after the other."""
        for state in islice(self.turns, count):
            state.commit()


@cache
def commit_over_budget(size: int) -> Measure:
    """Measure a commit with so many sessions borrowed over the budget."""
    return timed(Borrowed(size).commit)


# --- Memory


HELD = """
from pathlib import Path
from inference_session import Session, SessionRegistry
def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = pages()
{make}
print(pages() - before)
"""

IN_REGISTRY = f"""
made = SessionRegistry(max_sessions={MANY}, idle_timeout=3600, max_kv_bytes=2**30)
for _ in range({MANY}):
    made.open()
for id in made:
    made[id]
"""

IN_DICT = f"""
made = {{}}
for _ in range({MANY}):
    session = Session()
    made[session.id] = session
"""


def held_by(make: str) -> Measure:
    """Measure the memory that a process of its own has for something, once."""

    @cache
    def measure() -> float:
        # What malloc is given back it must give back, too.
        return float(
            subprocess.check_output(
                [sys.executable, "-c", HELD.format(make=make)],
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            )
        )

    return measure


def registered() -> Session:
    """Return a session in a registry with every limit but a budget, as the engine here can't tell bytes."""
    registry = SessionRegistry(max_sessions=FEW, idle_timeout=3600)
    KEPT.append(registry)
    return registry.open()


KEPT: list[SessionRegistry] = []

Maker = Callable[[], Measure]

COSTS: list[tuple[str, Maker, str, Maker, float]] = [
    (
        f"registry[id], {MANY:,}",
        partial(look_up, MANY),
        "dict[id]",
        partial(look_up_in_dict, MANY),
        5,
    ),
    (f"registry[id], {FEW:,}", partial(look_up, FEW), "dict[id]", partial(look_up_in_dict, FEW), 5),
    (
        f"registry[id], {MANY:,}",
        partial(look_up, MANY),
        f"with {FEW:,}",
        partial(look_up, FEW),
        4,
    ),
    (
        f"open, close, {MANY:,}",
        partial(open_and_close, MANY),
        f"with {FEW:,}",
        partial(open_and_close, FEW),
        1.5,
    ),
    (
        f"open over cap, {MANY:,}",
        partial(open_over_cap, MANY),
        f"with {FEW:,}",
        partial(open_over_cap, FEW),
        3,
    ),
    (
        f"open, close, {FEW:,}",
        partial(open_and_close, FEW),
        "Session().close()",
        lambda: timed(open_and_close_alone),
        4,
    ),
    (f"fill with {MANY:,}", partial(fill, MANY), f"with {FEW:,}", partial(fill, FEW), 3),
    (
        "step, registered",
        lambda: stepping(registered()),
        "by itself",
        lambda: stepping(Session()),
        2.5,
    ),
    (
        "commit over budget, 10,000",
        partial(commit_over_budget, 10_000),
        "with 1",
        partial(commit_over_budget, 1),
        1.5,
    ),
    (
        f"memory, {MANY:,}",
        lambda: held_by(IN_REGISTRY),
        "dict",
        lambda: held_by(IN_DICT),
        1.25,
    ),
]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: f"{cost[0]} / {cost[2]}")
def test_cost(
    cost: tuple[str, Maker, str, Maker, float], record_property: Callable[[str, object], None]
) -> None:
    """Nothing costs more than it may, however many sessions there are."""
    what, subject, against, baseline, limit = cost
    if what.startswith("memory") and not Path("/proc/self/statm").exists():
        pytest.skip("no way to see the memory of a process here")
    Cost(what, subject(), against, baseline(), limit).check(record_property)
