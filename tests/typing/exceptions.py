"""What type checkers know of the errors."""

from typing import assert_type
from uuid import UUID, uuid4

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import (
    BorrowExpiredError,
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionExistsError,
    SessionForkedError,
    SessionNotFoundError,
    SessionOwnerError,
    StateMismatchError,
)


def test_every_error_names_its_session(slots: StateSlots[bytes], session: Session) -> UUID | None:
    """Errors that are caught together have the id in common."""
    try:
        slots.evict(session)
    except (
        BorrowExpiredError,
        SessionBusyError,
        SessionClosedError,
        SessionForkedError,
        SessionOwnerError,
        StateMismatchError,
    ) as error:
        assert_type(error.session_id, UUID)
        return error.session_id
    return None


def test_each_error_names_its_session(
    busy: SessionBusyError,
    closed: SessionClosedError,
    expired: BorrowExpiredError,
    forked: SessionForkedError,
    owner: SessionOwnerError,
) -> None:
    """Each error has the id of its session."""
    assert_type(busy.session_id, UUID)
    assert_type(closed.session_id, UUID)
    assert_type(expired.session_id, UUID)
    assert_type(forked.session_id, UUID)
    assert_type(owner.session_id, UUID)


def test_mismatches_have_numbers(error: StateMismatchError) -> None:
    """A mismatch says what was expected, and what is."""
    assert_type(error.session_id, UUID)
    assert_type(error.expected, int)
    assert_type(error.actual, int)


def test_a_full_registry_has_a_number(error: RegistryFullError) -> None:
    """The error of a registry, not of a session, says how many sessions there may be."""
    assert_type(error.max_sessions, int)


def test_errors_have_one_root() -> None:
    """All errors can be caught as one."""
    errors: list[SessionError] = [
        SessionBusyError(uuid4()),
        SessionClosedError(uuid4()),
        SessionOwnerError(uuid4()),
        SessionForkedError(uuid4()),
        BorrowExpiredError(uuid4()),
        SessionExistsError(uuid4()),
        SessionNotFoundError(uuid4()),
        RegistryFullError(7),
        StateMismatchError(uuid4(), expected=1, actual=2),
    ]
    assert_type(errors.pop(), SessionError)


def test_errors_are_made_of_ids(session: Session) -> None:
    """An error takes the id of a session, and nothing that could show a token."""
    SessionBusyError()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    SessionBusyError(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    SessionClosedError("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateMismatchError(session.id)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    StateMismatchError(session.id, "1", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
