"""What holds a conversation's state, or a way to it, is never copied: who tries is told why, and what to do instead."""

import copy
import gc
import multiprocessing
import pickle
import queue
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from operator import methodcaller
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

import attrs
import cloudpickle  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
import pytest
from tests.caches import Cache, Memory

from inference_session import Session, SessionRegistry
from inference_session._borrow import BorrowedBatch, TokenHistory
from inference_session._never_copied import NeverCopied
from inference_session.engine import BorrowedState, Slot, StateSlots


SOME_ID = UUID("12345678-1234-5678-1234-567812345678")

INSTEAD: dict[type, str] = {
    Session: r"send session\.id, or make another session of it: state\.branch\(\) here",
    BorrowedState: "borrow the session where you need its state",
    BorrowedBatch: "borrow the sessions where you need their states",
    StateSlots: "hand on this very object",
    Slot: "share this very object",
    TokenHistory: r"`token_history\[:\]` is a list",
    SessionRegistry: "send their ids, and have one registry in each process",
}
"""All that is never copied, and what one is told to do instead."""

classes = pytest.mark.parametrize("cls", INSTEAD, ids=lambda cls: cls.__name__)


def refusal(cls: type) -> str:
    """Return what the error matches that says why a thing is not copied, and what to do instead."""
    return rf"^'{cls.__name__}' can't be copied or pickled, as .+: .*{INSTEAD[cls]}"


STATES = [
    "new session",
    "used session",
    "borrowed session",
    "closed session",
    "session of a registry",
    "state",
    "state not entered",
    "state after its end",
    "history",
    "history after its end",
    "slots",
    "batch",
    "batch not entered",
    "registry",
    "closed registry",
    "slot",
]


@pytest.fixture(params=STATES)
def thing(
    request: pytest.FixtureRequest, slots: StateSlots[Cache], memory: Memory
) -> Iterator[object]:
    """Give a thing that is never copied, in every state that it can be in."""
    closed = SessionRegistry()
    closed.close()
    with SessionRegistry() as registry, Session() as used, Session() as borrowed, Session() as shut:
        mine = registry.open()
        with slots.borrow_all([used, borrowed, mine, shut]) as states:
            for state in states:
                memory.step(state, 1, 2, 3)
        shut.close()
        batch = slots.borrow_all([mine])
        with slots.borrow(used) as ended:
            history = ended.token_history
        with slots.borrow(borrowed) as state, batch:
            memory.step(state, 4)
            things: list[object] = [
                Session(),
                used,
                borrowed,
                shut,
                mine,
                state,
                slots.borrow(used),
                ended,
                state.token_history,
                history,
                slots,
                batch,
                slots.borrow_all([used]),
                registry,
                closed,
                Slot(int),
            ]
            yield things[STATES.index(request.param)]
            assert state.token_history == [1, 2, 3, 4]
        assert [session.token_count for session in (used, borrowed, shut, mine)] == [3, 4, 0, 3]


def contents(thing: object) -> list[object]:
    """Return the very objects in a thing's slots, and what it says of itself."""
    names = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    values = [getattr(thing, name, None) for name in names if name != "__weakref__"]
    try:
        return [*map(id, values), repr(thing)]
    except Exception as error:  # noqa: BLE001 of a view that has expired
        return [*map(id, values), str(error)]


class Holder:
    """Something that has one of them."""

    def __init__(self, held: object) -> None:
        self.held = held


WRAPPERS: dict[str, Callable[[object], object]] = {
    "itself": lambda it: it,
    "list": lambda it: [it],
    "dict": lambda it: {"a": (it,)},
    "object": Holder,
}


def pickled(protocol: int) -> Callable[[object], object]:
    """Return what pickles by a protocol."""
    return lambda it: pickle.dumps(it, protocol)


def reduced(protocol: int) -> Callable[[Any], object]:
    """Return what takes a thing apart by a protocol, as libraries do that call `object` and not the class."""
    return lambda it: object.__reduce_ex__(it, protocol)


def replace(it: Any, **changes: Any) -> object:
    """Do what `copy.replace` does from 3.13 on."""
    return it.__replace__(**changes)


def send(it: object) -> None:
    """Send a thing to another process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        sender.send(it)


PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

DEEP_COPIES: dict[str, Callable[[Any], object]] = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {each}": pickled(each) for each in PROTOCOLS},
    "cloudpickle": cast("Callable[[object], object]", cloudpickle.dumps),  # pyright: ignore[reportUnknownMemberType]
    "ForkingPickler": ForkingPickler.dumps,
    "Pipe.send": send,
}
"""What copies whatever it reaches."""

COPIES: dict[str, Callable[[Any], object]] = {
    "copy": copy.copy,
    "replace": getattr(copy, "replace", replace),
    "__replace__": replace,
    "evolve": attrs.evolve,
    "asdict": attrs.asdict,
    "asdict of itself alone": lambda it: attrs.asdict(it, recurse=False),
    "astuple": attrs.astuple,
    "astuple of itself alone": lambda it: attrs.astuple(it, recurse=False),
    "__getstate__": methodcaller("__getstate__"),
    "__reduce__": methodcaller("__reduce__"),
    **{f"object.__reduce_ex__ {each}": reduced(each) for each in PROTOCOLS},
}
"""What copies, or takes apart, the very thing that it is given."""


@pytest.mark.parametrize("copying", COPIES.values(), ids=COPIES.keys())
def test_copies(thing: object, copying: Callable[[object], object]) -> None:
    """No copy comes to be by any way that Python and attrs have, nor what one could be made of; and nothing changes."""
    before = contents(thing)
    with pytest.raises(TypeError, match=refusal(type(thing))):
        copying(thing)
    assert contents(thing) == before


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("copying", DEEP_COPIES.values(), ids=DEEP_COPIES.keys())
def test_deep_copies(
    thing: object, copying: Callable[[object], object], wrap: Callable[[object], object]
) -> None:
    """No copy comes to be of what holds one of them, either: two owners of one KV cache would corrupt it."""
    before = contents(thing)
    with pytest.raises(TypeError, match=refusal(type(thing))):
        copying(wrap(thing))
    assert contents(thing) == before


@pytest.mark.parametrize("copying", [attrs.evolve, replace], ids=["evolve", "replace"])
@pytest.mark.parametrize("changes", [{"id": SOME_ID}, {"_id": SOME_ID}, {"session": None}])
def test_changed_copies(
    thing: object, copying: Callable[..., object], changes: dict[str, Any]
) -> None:
    """A copy in which something differs doesn't come to be, either."""
    before = contents(thing)
    with pytest.raises(TypeError, match=refusal(type(thing))):
        copying(thing, **changes)
    assert contents(thing) == before


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_jsonpickle(thing: object, wrap: Callable[[object], object]) -> None:
    """What jsonpickle writes has nothing in it that it could make another of."""
    jsonpickle = pytest.importorskip("jsonpickle")
    before = contents(thing)
    found: list[object] = []
    try:
        text: str = jsonpickle.encode(wrap(thing), keys=True)
        found.append(jsonpickle.decode(text, keys=True))
        flat: str = jsonpickle.encode(wrap(thing), keys=True, unpicklable=False)
    except TypeError:
        text = flat = ""
    while found:
        one = found.pop()
        assert not isinstance(one, tuple(INSTEAD))
        found += [*cast("dict[str, object]", getattr(one, "__dict__", {})).values()]
        if isinstance(one, dict):
            found += [*cast("dict[str, object]", one).values()]
        if isinstance(one, (list, tuple)):
            found += [*cast("list[object]", one)]
    for private in (slot for cls in type(thing).__mro__ for slot in getattr(cls, "__slots__", ())):
        assert f'"{private}"' not in text + flat
    assert contents(thing) == before


def test_shallow_copy_of_a_container(session: Session) -> None:
    """A copied list holds the very same session, as Python has it: nothing else is stopped."""
    assert copy.copy([session])[0] is session


def test_a_queue_of_this_process(session: Session) -> None:
    """Within the process a session may be handed over: it's the same one."""
    handed: queue.SimpleQueue[Session] = queue.SimpleQueue()
    handed.put(session)
    assert handed.get() is session


def test_half_built_is_never_a_copy() -> None:
    """Not even what was made without `__init__` is copied."""
    for cls in INSTEAD:
        half_built: object = object.__new__(cast("type[object]", cls))
        for copying in (*COPIES.values(), *DEEP_COPIES.values()):
            with pytest.raises(TypeError, match=refusal(cls)):
                copying(half_built)


# Nor subclassed

T = TypeVar("T")


class Helper:
    """Another base class."""


class GenericHelper(Generic[T]):
    """A generic one."""


IMMORTAL_CLASSES = sys.version_info < (3, 14) and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
"""Without a GIL, up to 3.13, no class goes away once there was a second thread."""

SUBCLASSES: dict[str, Callable[[type], object]] = {
    "type": lambda cls: type("Subclass", (cls,), {}),
    "type with slots": lambda cls: type("Subclass", (cls,), {"__slots__": ()}),
    "new_class": lambda cls: types.new_class("Subclass", (cls,)),
    "one of several": lambda cls: types.new_class("Subclass", (Helper, cls)),
    "the first of several": lambda cls: types.new_class("Subclass", (cls, GenericHelper[int])),
    "attrs": lambda cls: attrs.make_class("Subclass", [], bases=(cls,)),
    "attrs with slots": lambda cls: attrs.make_class("Subclass", ["x"], bases=(cls,), slots=True),
}


@classes
@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES.keys())
def test_subclasses(cls: type, make: Callable[[type], object]) -> None:
    """No subclass can change what engines rely on; whoever tries is told what to do instead."""
    with pytest.raises(
        TypeError, match=rf"^'{cls.__name__}' can't be subclassed.*have one instead"
    ):
        make(cls)
    gc.collect()
    if not IMMORTAL_CLASSES:
        assert cls.__subclasses__() == []


@pytest.mark.parametrize("cls", [BorrowedState, BorrowedBatch, StateSlots])
def test_subclasses_of_a_generic(cls: Any) -> None:
    """Nor can a subclass that says which KV cache it is for."""
    with pytest.raises(TypeError, match=rf"^'{cls.__name__}' can't be subclassed"):
        types.new_class("Subclass", (cls[Cache],))


def test_subclass_statement() -> None:
    """A class statement is refused, too, and by type checkers before."""
    with pytest.raises(TypeError, match="'Session' can't be subclassed"):

        class Subclass(Session):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]
            """Not to be."""


def test_replace_without_the_help_of_attrs() -> None:
    """`copy.replace` is refused where attrs doesn't add a `__replace__` of its own, too, as older ones don't."""
    with Session() as session, pytest.raises(TypeError, match=r"send session\.id"):
        NeverCopied.__replace__(session)
