"""What an engine tells of its KV cache, and which sessions it can borrow."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import attrs
import pytest
from tests.caches import Cache, Memory, look, prepare

from inference_session import Session
from inference_session.engine import DecodeResult, PrefillResult, StateSlots


@pytest.mark.parametrize(
    "name", ["create", "length", "truncate", "share", "dump", "load", "release", "nbytes"]
)
def test_slots_take_functions(name: str) -> None:
    """An engine that passes something else is told so at once, not in the middle of a step."""
    functions: dict[str, Any] = {"create": list, "length": len, name: 5}
    with pytest.raises(TypeError):
        StateSlots(**functions)


def test_slots_need_create_and_length_only() -> None:
    """The other functions are optional; all are given by name, as nobody would remember their order."""
    slots = StateSlots[list[int]](create=list, length=len)
    assert (slots.truncate, slots.release, slots.nbytes) == (None, None, None)
    with pytest.raises(TypeError):
        cast("Callable[..., object]", StateSlots)(list, len)


@pytest.mark.parametrize("name", ["dump", "load"])
def test_what_is_written_can_be_read(name: str) -> None:
    """An engine that can only write KV caches, or only read them, has forgotten something."""
    functions: dict[str, Any] = {"create": list, "length": len, name: print}
    with pytest.raises(TypeError, match="dump and load come together: give both, or neither"):
        StateSlots(**functions)


def test_slots_never_change(slots: StateSlots[Cache]) -> None:
    """A cache ends by the functions it began with."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        slots.create = Memory().create  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_slots_equal_themselves_only(memory: Memory) -> None:
    """Two engines of the same functions are two: a session belongs to one."""
    assert memory.slots() != memory.slots()


@pytest.mark.parametrize("wrong", [None, "session", 5], ids=repr)
def test_only_sessions_can_be_borrowed(slots: StateSlots[Cache], wrong: object) -> None:
    """Something else is a clear error."""
    with pytest.raises(TypeError, match=type(wrong).__name__), slots.borrow(cast("Session", wrong)):
        pytest.fail("borrowed what's no session")


class Proxy:
    """Passes on whatever is asked of it, its class too, as the proxies of wrapt and Werkzeug do."""

    wrapped: Any

    def __init__(self, wrapped: object) -> None:
        object.__setattr__(self, "wrapped", wrapped)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.wrapped.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.wrapped, name, value)


@pytest.fixture(params=[weakref.proxy, Proxy])
def proxy(request: pytest.FixtureRequest, session: Session) -> Session:
    """Give something that passes for the session."""
    proxy = cast("Session", request.param(session))
    assert isinstance(proxy, Session)
    assert proxy.id == session.id
    return proxy


@pytest.mark.parametrize("borrowed", [False, True], ids=["idle", "borrowed"])
def test_a_proxy_is_no_session(
    memory: Memory, session: Session, proxy: Session, *, borrowed: bool
) -> None:
    """Refuse whatever passes for a session, name its type, and change nothing, whether it's borrowed or not."""
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2)
    idle = Session()
    with ExitStack() as stack:
        state = stack.enter_context(slots.borrow(session)) if borrowed else None
        if state is not None:
            memory.step(state, 3)
        names = [name for name in Session.__slots__ if not name.startswith("__")]
        before = [getattr(session, name) for name in names]
        for borrow in (
            slots.borrow(proxy),
            slots.borrow_all([proxy]),
            slots.borrow_all([idle, proxy]),
            slots.borrow_all([session, proxy])
            if state is None
            else slots.borrow_all([proxy, session]),
        ):
            with pytest.raises(TypeError, match=type(proxy).__name__), borrow:
                pytest.fail("borrowed what's no session")
        with pytest.raises(TypeError, match=type(proxy).__name__):
            slots.evict(proxy)
        assert not idle.borrowed
        assert session.borrowed == borrowed
        assert [getattr(session, name) for name in names] == before
        if state is not None:
            assert (state.token_history, state.kv_length) == ([1, 2, 3], 3)
            memory.step(state, 4)
    assert look(slots, idle) == ([], 0)
    assert look(slots, session) == (([1, 2, 3, 4], 4) if borrowed else ([1, 2], 2))


def test_results() -> None:
    """What engines return is compared by value, and can't be changed."""
    assert PrefillResult(3) == PrefillResult(tokens_processed=3) != PrefillResult(4)
    assert DecodeResult(3) == DecodeResult(token=3) != DecodeResult(4)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        DecodeResult(3).token = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# kv_cache
