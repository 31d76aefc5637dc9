"""What many tests begin with."""

import gc
import sys
from collections.abc import Iterator

import pytest
from tests.caches import Cache, Memory
from tests.interrupts import Interrupter, delivery_points

from inference_session import Session
from inference_session.engine import StateSlots


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Give a memory for KV caches that are changed in place, and check in the end that nothing was leaked."""
    memory = Memory()
    yield memory
    memory.faults.clear()
    memory.check_all_released()


@pytest.fixture
def functional() -> Iterator[Memory]:
    """Give a memory for KV caches that a step replaces."""
    memory = Memory(functional=True)
    yield memory
    memory.check_all_released()


@pytest.fixture
def slots(memory: Memory) -> StateSlots[Cache]:
    """Give an engine's access to sessions whose KV caches are in `memory`."""
    return memory.slots()


@pytest.fixture
def session(memory: Memory) -> Iterator[Session]:
    """Give a session, and close it in the end."""
    with Session() as session:
        yield session
        memory.faults.clear()


@pytest.fixture
def interrupter() -> Iterator[Interrupter]:
    """Count the delivery points of interrupts."""
    interrupter = Interrupter()
    gc.collect()
    gc.disable()  # no interrupts in the finalizers of other tests' objects
    try:
        with delivery_points(interrupter):
            yield interrupter
    finally:
        gc.enable()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Switch threads as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def swallowed() -> Iterator[list[object]]:
    """Collect the classes of exceptions in finalizers."""
    swallowed: list[object] = []

    def note(told: "sys.UnraisableHookArgs") -> None:
        swallowed.append(told.exc_type)

    tell, sys.unraisablehook = sys.unraisablehook, note
    yield swallowed
    sys.unraisablehook = tell
