"""What type checkers know of `SessionRegistry`, and which of its misuses they find."""

from collections.abc import Callable, Iterator
from typing import assert_type
from uuid import UUID, uuid4

from inference_session import Session, SessionRegistry
from inference_session.exceptions import SessionNotFoundError


def test_limits_are_optional() -> None:
    """Every limit may be given or left out."""
    assert_type(SessionRegistry(), SessionRegistry)
    assert_type(
        SessionRegistry(max_sessions=100, idle_timeout=60.5, max_kv_bytes=2**30), SessionRegistry
    )
    SessionRegistry(max_sessions=None, idle_timeout=60, max_kv_bytes=None)


def test_limits_are_numbers_by_name() -> None:
    """A limit is known by its name, and of a type that makes sense."""
    SessionRegistry(100)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]
    SessionRegistry(max_sessions=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionRegistry(idle_timeout="60")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionRegistry(max_kv_bytes=1e9)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionRegistry(max_age=60)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[unknown-argument]


def test_members_are_typed(registry: SessionRegistry, id: UUID) -> None:  # noqa: A002
    """What a server does with a registry is typed."""
    assert_type(registry.open(), Session)
    assert_type(registry.open(id), Session)
    assert_type(registry[id], Session)
    assert_type(registry.get(id), Session | None)
    assert_type(id in registry, bool)
    assert_type(len(registry), int)
    assert_type(iter(registry), Iterator[UUID])
    assert_type(list(registry), list[UUID])
    assert_type(registry.close_idle(), int)
    assert_type(registry.values(), list[Session])
    add: Callable[[Session], None] = registry.add
    add(Session())
    close: Callable[[UUID], None] = registry.close
    close(id)
    close_all: Callable[[], None] = registry.close
    close_all()


def test_a_session_may_be_missing(registry: SessionRegistry, id: UUID) -> int:  # noqa: A002
    """What `get` returns is to be looked at."""
    return registry.get(id).token_count  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]  # ty: ignore[missing-union-attribute]


def test_not_found_is_a_key_error(registry: SessionRegistry) -> UUID | None:
    """Either name catches it."""
    try:
        registry[uuid4()].close()
    except SessionNotFoundError as error:
        assert_type(error.session_id, UUID)
        return error.session_id
    except KeyError:
        pass
    return None


def test_with_binds_the_registry() -> int:
    """A `with` block gets the registry itself, and is known to pass exceptions on: nothing need follow its return."""
    with SessionRegistry() as registry:
        assert_type(registry, SessionRegistry)
        return len(registry)


def test_ids_are_uuids(registry: SessionRegistry, session: Session) -> None:
    """A session is known by its `UUID`, not by text, nor by itself."""
    registry.open("str")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry["str"]  # type: ignore[index]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.get("str")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.add(session.id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.close(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_sessions_come_by_methods_alone(registry: SessionRegistry, session: Session) -> None:
    """Nothing is put into a registry, or deleted from it, as from a dict."""
    registry[session.id] = session  # type: ignore[index]  # pyright: ignore[reportIndexIssue]  # ty: ignore[invalid-assignment]
    del registry[session.id]  # type: ignore[attr-defined]  # pyright: ignore[reportIndexIssue]  # ty: ignore[not-subscriptable]


def test_registries_cannot_be_subclassed() -> None:
    """`SessionRegistry` is final."""

    class Chats(SessionRegistry):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]  # ty: ignore[subclass-of-final-class]
        pass
