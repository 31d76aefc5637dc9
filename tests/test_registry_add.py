"""Sessions that a registry takes in: branched, restored, or simply made elsewhere."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread
from typing import cast

import pytest
from tests.caches import ERRORS, Cache, Memory, look, prepare
from tests.interrupts import Interrupter

from inference_session import Session, SessionRegistry
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionExistsError,
)


def measured(memory: Memory) -> StateSlots[Cache]:
    """Return an access whose KV caches take 10 bytes a token."""
    return StateSlots(
        create=memory.create,
        length=memory.length,
        share=memory.share,
        dump=memory.dump,
        load=memory.load,
        release=memory.release,
        nbytes=lambda cache: 10 * len(cache.tokens),
    )


def test_add(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """It is found by its id, has lost nothing, and is closed with the others."""
    prepare(slots, memory, session, 1, 2)
    with SessionRegistry() as registry:
        registry.add(session)
        assert registry[session.id] is session
        assert list(registry) == [session.id]
        assert look(slots, session) == ([1, 2], 2)
    assert session.closed
    assert not memory.live()


def test_branched_and_restored(memory: Memory, tmp_path: Path) -> None:
    """A server keeps branches and restored conversations among the others."""
    slots = measured(memory)
    with SessionRegistry(max_kv_bytes=1000) as registry:
        session = registry.open()
        prepare(slots, memory, session, 1, 2, 3)
        with slots.borrow(session) as state:
            child = state.branch()
        registry.add(child)
        slots.save(session, tmp_path / "file", move=True)
        assert list(registry) == [child.id]
        restored = slots.restore(tmp_path / "file", take=True)
        registry.add(restored)
        assert registry[session.id] is restored
        assert registry._kv_total == 10 * (2 + 3)
    assert not memory.live()


def test_it_counts_for_the_budget(memory: Memory) -> None:
    """Its KV cache counts at once, and makes others go, or itself if it alone is too large."""
    slots = measured(memory)
    with SessionRegistry(max_kv_bytes=60) as registry:
        first, large = registry.open(), Session()
        prepare(slots, memory, first, 1, 2)
        with Session() as second:
            prepare(slots, memory, second, 1, 2, 3, 4, 5)
            registry.add(second)
            assert (look(slots, first)[1], look(slots, second)[1]) == (0, 5)
            prepare(slots, memory, large, *range(7))
            registry.add(large)
            assert (look(slots, second)[1], look(slots, large)[1]) == (0, 0)


def test_it_is_the_most_recently_used(memory: Memory) -> None:
    """It was used just now: others are closed before it."""
    slots = memory.slots()
    with SessionRegistry(max_sessions=2) as registry, Session() as added:
        prepare(slots, memory, added, 1)
        first = registry.open()
        registry.add(added)
        registry.open()
        assert first.closed
        assert added.id in registry


def test_room_is_made(session: Session) -> None:
    """The least recently used session is closed for it; if all are borrowed, it stays outside."""
    slots = StateSlots[list[int]](create=list, length=len)
    with SessionRegistry(max_sessions=1) as registry:
        first = registry.open()
        with slots.borrow(first):
            with pytest.raises(RegistryFullError):
                registry.add(session)
            assert not session.borrowed
            assert list(registry) == [first.id]
        registry.add(session)
        assert first.closed
        assert list(registry) == [session.id]


def add_borrowed(registry: SessionRegistry, session: Session) -> None:
    """Add a session in the middle of a step."""
    with StateSlots[list[int]](create=list, length=len).borrow(session):
        registry.add(session)


def add_closed(registry: SessionRegistry, session: Session) -> None:
    """Add a session that is closed."""
    session.close()
    registry.add(session)


def add_twice(registry: SessionRegistry, session: Session) -> None:
    """Add a session to the registry that has it."""
    registry.add(session)
    registry.add(session)


def add_an_id_again(registry: SessionRegistry, session: Session) -> None:
    """Add another session with an id that is taken."""
    registry.add(session)
    registry.add(Session.with_id(session.id))


def add_to_two(registry: SessionRegistry, session: Session) -> None:
    """Add a session that another registry has."""
    registry.add(session)
    SessionRegistry().add(session)


def add_too_late(registry: SessionRegistry, session: Session) -> None:
    """Add a session to a registry that was closed."""
    registry.close()
    registry.add(session)


def add_something_else(registry: SessionRegistry, session: Session) -> None:
    """Add an id."""
    registry.add(cast("Session", session.id))


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (add_borrowed, SessionBusyError, "is borrowed already"),
        (add_closed, SessionClosedError, "is closed"),
        (add_twice, SessionExistsError, "there is an open session"),
        (add_an_id_again, SessionExistsError, "there is an open session"),
        (add_to_two, ValueError, "is in another registry"),
        (add_too_late, RuntimeError, "the registry is closed"),
        (add_something_else, TypeError, "only a Session can be added, got 'UUID'"),
    ],
)
def test_refused(
    session: Session,
    add: Callable[[SessionRegistry, Session], None],
    error: type[Exception],
    message: str,
) -> None:
    """Each refusal says why, and changes nothing."""
    with SessionRegistry() as registry:
        other = registry.open()
        with pytest.raises(error, match=message):
            add(registry, session)
        assert set(registry) <= {other.id, session.id}
        assert not session.borrowed


def test_an_engine_without_nbytes(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """With a budget, a KV cache that can't be measured isn't taken in; it stays usable where it is."""
    prepare(slots, memory, session, 1)
    with SessionRegistry(max_kv_bytes=100) as registry:
        with pytest.raises(TypeError, match="give StateSlots an nbytes"):
            registry.add(session)
        assert len(registry) == 0
    assert look(slots, session) == ([1], 1)


@pytest.mark.parametrize("error", ERRORS)
def test_nbytes_fails(session: Session, memory: Memory, error: type[BaseException]) -> None:
    """The error goes on to the caller, and the session stays outside."""
    failing = error()

    def nbytes(cache: Cache) -> int:
        if armed:
            raise failing
        return 1

    armed = False
    slots = StateSlots(
        create=memory.create, length=memory.length, release=memory.release, nbytes=nbytes
    )
    prepare(slots, memory, session, 1)
    armed = True
    with SessionRegistry(max_kv_bytes=100) as registry:
        with pytest.raises(error):
            registry.add(session)
        assert len(registry) == 0
    armed = False
    assert session.token_count == 1
    assert not session.borrowed


def test_interrupts(interrupter: Interrupter) -> None:
    """Wherever an interrupt comes, the session is in the registry or not, and free; the books are right."""
    point, inside, outside = 0, 0, 0
    slots = StateSlots[list[int]](create=list, length=len, nbytes=len)
    while True:
        point += 1
        session, registry = Session(), SessionRegistry(max_kv_bytes=100)
        with slots.borrow(session) as state:
            state.append([1, 2])
            state.kv_cache.extend([1, 2])
            state.advance(2)
        error = interrupter.run(lambda: registry.add(session), point)  # noqa: B023
        present = session.id in registry
        inside, outside = inside + present, outside + (not present)
        assert not session.borrowed
        with slots.borrow(session) as state:
            assert (list(state.token_history), state.kv_length) == ([1, 2], 2)
        assert registry._kv_total == (2 if present else 0)
        session.close()
        assert len(registry) == 0
        assert registry._kv_total == 0
        if error is None:
            break
    assert inside > 1
    assert outside > 1


def test_closed_meanwhile() -> None:
    """However adding and closing meet, no closed session stays in the registry."""
    for _ in range(300):
        session, registry, start = Session(), SessionRegistry(), Barrier(2)

        def close(session: Session = session, start: Barrier = start) -> None:
            start.wait()
            session.close()

        closer = Thread(target=close)
        closer.start()
        start.wait()
        with suppress(SessionClosedError, SessionBusyError):
            registry.add(session)
        closer.join()
        assert session.closed
        assert len(registry) == 0
