"""What many tests begin with."""

import gc
from collections.abc import Iterator

import pytest
from tests.caches import Cache, Memory
from tests.weather import Weather, delivery_points

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
def weather() -> Iterator[Weather]:
    """Have the delivery points counted."""
    weather = Weather()
    gc.collect()
    gc.disable()  # or else strikes hit finalizers of what other tests left
    try:
        with delivery_points(weather):
            yield weather
    finally:
        gc.enable()
