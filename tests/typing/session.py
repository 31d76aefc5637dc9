"""What type checkers know of `Session`, and which of its misuses they find."""

from collections.abc import Callable
from typing import assert_type
from uuid import UUID, uuid4
from weakref import ReferenceType, ref

import attrs

from inference_session import Session


def test_makers_return_sessions() -> None:
    """Every way to make a session is typed."""
    assert_type(Session(), Session)
    assert_type(Session.new(), Session)
    assert_type(Session.with_id(uuid4()), Session)


def test_members_are_typed(session: Session) -> None:
    """What an application sees of a session is typed."""
    assert_type(session.id, UUID)
    assert_type(session.token_count, int)
    assert_type(session.closed, bool)
    close: Callable[[], None] = session.close
    close()


def test_sessions_are_keys(session: Session) -> None:
    """A session can be a dictionary's key, and referred to weakly."""
    assert_type({session: 1}, dict[Session, int])
    assert_type(ref(session), ReferenceType[Session])


def test_with_binds_the_session() -> UUID:
    """A `with` block gets the session itself, and is known to pass exceptions on: nothing need follow its return."""
    with Session() as session:
        assert_type(session, Session)
        return session.id


def test_members_cannot_be_set(session: Session) -> None:
    """No public member can be set, nor one invented."""
    session.id = uuid4()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    session.token_count = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    session.closed = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    session.kv_cache = []  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[missing-attribute]


def test_members_cannot_be_deleted(session: Session) -> None:
    """No public member can be deleted, though mypy and pyrefly never look at `del`."""
    del session.id  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del session.token_count  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    del session.closed  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]


def test_sessions_take_no_arguments(id: UUID) -> None:  # noqa: A002
    """An id comes in by `with_id` alone."""
    Session(id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Session(id=id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Session.new(id)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]


def test_ids_are_uuids(session: Session) -> None:
    """An id is a `UUID`, not what one is made of, nor the session that has it."""
    Session.with_id("str")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Session.with_id(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Session.with_id(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    Session.with_id()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]


def test_sessions_cannot_be_evolved(session: Session) -> None:
    """`attrs.evolve` is refused to a session, which is no attrs class to mypy. pyright and ty don't look at it."""
    attrs.evolve(session, id=uuid4())  # type: ignore[misc]


def test_sessions_have_no_order(session: Session, other: Session) -> None:
    """Sessions aren't compared by value."""
    assert session < other  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue]  # ty: ignore[unsupported-operator]


def test_sessions_cannot_be_subclassed() -> None:
    """`Session` is final."""

    class Chat(Session):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]  # ty: ignore[subclass-of-final-class]
        pass
