"""What a registry costs, with a million sessions against a few, and against a `dict` of sessions."""

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle, islice
from random import Random
from uuid import UUID

import pytest
from tests.benchmarks.measuring import Cost, Measure, timed
from tests.benchmarks.steps import TOKEN, step

from inference_session import Session, SessionRegistry
from inference_session.engine import StateSlots


FEW, MANY = 1000, 1_000_000
HOUR = 3600.0


@cache
def registry_of(size: int) -> SessionRegistry:
    """Return a full registry with every limit."""
    registry = SessionRegistry(max_sessions=size, idle_timeout=HOUR, max_kv_bytes=2**30)
    for _ in range(size):
        registry.open()
    return registry


@cache
def dict_of(size: int) -> dict[UUID, Session]:
    """Return what one would write instead."""
    return {session.id: session for session in registry_of(size)._sessions.values()}


@cache
def ids_of(size: int) -> Iterator[UUID]:
    """Return ids without end that aren't found by identity, as those of requests aren't, in no order."""
    choice = Random(0)
    some = choice.sample(list(dict_of(size)), FEW)
    return cycle([UUID(int=each.int) for each in some])


def look_up(size: int, count: int) -> None:
    """Look sessions up."""
    registry = registry_of(size)
    for id in islice(ids_of(size), count):  # noqa: A001
        registry[id]


def look_up_in_dict(size: int, count: int) -> None:
    """Look sessions up."""
    sessions = dict_of(size)
    for id in islice(ids_of(size), count):  # noqa: A001
        sessions[id]


def open_over_cap(size: int, count: int) -> None:
    """Open sessions, each in the place of the least recently used one."""
    registry = registry_of(size)
    for _ in range(count):
        registry.open()


def open_and_close(size: int, count: int) -> None:
    """Open sessions, and close them."""
    registry = registry_of(size)
    for _ in range(count):
        registry.close(registry.open().id)


def close_idle(size: int, count: int) -> None:
    """Look for idle ones."""
    registry = registry_of(size)
    for _ in range(count):
        registry.close_idle()
