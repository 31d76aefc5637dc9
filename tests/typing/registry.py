"""What type checkers know of a registry, and which of its misuses they find."""

from typing import assert_type
from uuid import UUID, uuid4

from inference_session import Session, SessionRegistry
from inference_session.exceptions import (
    RegistryFullError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)


def test_limits_are_optional() -> None:
    """Each limit can be left out, be None, or be a number."""
    assert_type(SessionRegistry(), SessionRegistry)
    SessionRegistry(max_sessions=None, idle_timeout=None, max_kv_bytes=None)
    SessionRegistry(max_sessions=10, idle_timeout=0.5, max_kv_bytes=2**30)
    SessionRegistry(idle_timeout=60)


def test_sessions_come_out(registry: SessionRegistry, id: UUID) -> None:  # noqa: A002
    """Who asks for a session gets one, and who asks whether there is one may get none."""
    assert_type(registry.open(), Session)
    assert_type(registry.open(id), Session)
    assert_type(registry[id], Session)
    assert_type(registry.get(id), Session | None)


def test_registry_is_a_collection_of_ids(registry: SessionRegistry) -> None:
    """It has a length, and yields ids."""
    assert_type(len(registry), int)
    assert_type(list(registry), list[UUID])
    assert_type(uuid4() in registry, bool)


def test_closing(registry: SessionRegistry, id: UUID) -> None:  # noqa: A002
    """One is closed, or all, or those that are idle."""
    registry.close(id)
    registry.close()
    assert_type(registry.close_idle(), int)


def test_with_binds_the_registry() -> int:
    """A `with` block gets the registry itself, and is known to pass exceptions on."""
    with SessionRegistry() as registry:
        assert_type(registry, SessionRegistry)
        return len(registry)


def test_errors_are_typed(
    missing: SessionNotFoundError, existing: SessionExistsError, full: RegistryFullError
) -> None:
    """Errors say which session, or how many; an unknown id can be caught as a `KeyError`."""
    assert_type(missing.session_id, UUID)
    assert_type(existing.session_id, UUID)
    assert_type(full.max_sessions, int)
    errors: list[SessionError] = [missing, existing, full]
    assert_type(errors.pop(), SessionError)
    key_error: KeyError = missing
    raise key_error


def test_ids_are_uuids(registry: SessionRegistry, session: Session) -> None:
    """An id is a `UUID`, neither its text nor the session that has it."""
    registry.open("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.open(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry["text"]  # type: ignore[index]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.get(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    registry.close(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_sessions_go_in_by_open_alone(registry: SessionRegistry, session: Session) -> None:
    """A registry is no dictionary that sessions could be put into."""
    registry[session.id] = session  # type: ignore[index]  # pyright: ignore[reportIndexIssue]  # ty: ignore[invalid-assignment]
    del registry[session.id]  # type: ignore[attr-defined]  # pyright: ignore[reportIndexIssue]  # ty: ignore[not-subscriptable]


def test_limits_are_named_numbers() -> None:
    """Three numbers in a row would be a riddle, and a limit is a number."""
    SessionRegistry(10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]
    SessionRegistry(max_sessions="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionRegistry(max_kv_bytes=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionRegistry(max_tokens=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[unknown-argument]


def test_registries_cannot_be_subclassed() -> None:
    """`SessionRegistry` is final."""

    class Registry(SessionRegistry):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]  # ty: ignore[subclass-of-final-class]
        pass
