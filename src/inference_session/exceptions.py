"""Every error of the library, under one root.

Wrong arguments raise `TypeError` and `ValueError`, as everywhere in Python; the errors here are about the state a
session is in. None of them ever shows a token or any part of a KV cache, and all of them can be pickled.
"""

from uuid import UUID

from attrs import define


__all__ = [
    "BorrowExpiredError",
    "RegistryFullError",
    "SessionBusyError",
    "SessionClosedError",
    "SessionError",
    "SessionExistsError",
    "SessionForkedError",
    "SessionNotFoundError",
    "SessionOwnerError",
    "StateMismatchError",
]


class SessionError(Exception):
    """The root of the library's errors: catch it to catch them all.

    You do *not* get it itself, only its subclasses, and not for wrong arguments.
    """


@define(eq=False, slots=False)
class SessionBusyError(SessionError):
    """The session is borrowed already: another step of it is under way.

    You do *not* get it for a session whose last step failed, was cancelled or was interrupted: its borrow is over.
    A borrow never waits, so a caller that wants to must do so before it borrows.
    """

    session_id: UUID
    """The session's id."""

    def __str__(self) -> str:
        return f"session {self.session_id} is borrowed already; try again when that step has ended"


@define(eq=False, slots=False)
class SessionClosedError(SessionError):
    """The session was closed and can't be borrowed any more.

    You do *not* get it in a borrow that was under way when the session was closed: that one may end in peace, and
    the state is freed when it does. Nor from a second `Session.close()`.
    """

    session_id: UUID
    """The session's id."""

    def __str__(self) -> str:
        return f"session {self.session_id} is closed; go on in a new one, fed the same tokens"


@define(eq=False, slots=False)
class SessionOwnerError(SessionError):
    """The session was begun by another `StateSlots`, whose KV cache it holds.

    You do *not* get it for a session that holds nothing: any engine may begin an empty one.
    """

    session_id: UUID
    """The session's id."""

    def __str__(self) -> str:
        return (
            f"session {self.session_id} was begun by another StateSlots; use the engine that began it, "
            "or feed the same tokens to a new session"
        )


@define(eq=False, slots=False)
class SessionForkedError(SessionError):
    """The session was inherited over `os.fork`; only the process that made it may use it.

    You do *not* get it for sessions that the child process made, nor ever in the parent.
    """

    session_id: UUID
    """The session's id."""

    def __str__(self) -> str:
        return (
            f"session {self.session_id} belongs to the process that this one was forked from; "
            "use it there, or feed the same tokens to a new session here"
        )


@define(eq=False, slots=False)
class BorrowExpiredError(SessionError):
    """The `with` block that borrowed this state is over (or was not entered), and with it the right to use the state.

    You do *not* get it because the session was closed during the block: the borrow lasts until the block ends.
    """

    session_id: UUID
    """The session's id."""

    def __str__(self) -> str:
        return f"this borrow of session {self.session_id} is over; use the state inside its `with` block only"


@define(eq=False, slots=False)
class StateMismatchError(SessionError):
    """The KV cache does not cover as many tokens as it should, by the engine's own `length`.

    The engine fed other tokens than it said, `length` does not tell the truth (does it read *all* layers?), or
    `create` or `truncate` did not do what they should. A rollback releases that KV cache, whatever its length is then.
    You do *not* get it when a KV cache can't be rolled back after a failed step: that one is released as well, and the
    next step computes it anew.
    """

    session_id: UUID
    """The session's id."""
    expected: int
    """How many tokens the KV cache should cover."""
    actual: int
    """How many it covers, by `length`."""

    def __str__(self) -> str:
        return (
            f"the KV cache of session {self.session_id} should cover {self.expected} tokens, "
            f"but its length is {self.actual}"
        )


@define(eq=False, slots=False)
class SessionNotFoundError(SessionError, KeyError):
    """The registry has no open session with this id.

    It was never opened there, or it was closed since: by anyone, for being idle, or to make room for another. You do
    *not* get it because a KV cache was evicted: that session is still there, with all of its tokens.
    """

    session_id: UUID
    """The id that was looked for."""

    def __str__(self) -> str:
        return (
            f"there is no open session {self.session_id} here; "
            "open one with this id, and feed it the tokens of the conversation"
        )


@define(eq=False, slots=False)
class SessionExistsError(SessionError):
    """The registry has an open session with this id already.

    You do *not* get it for the id of a session that was closed, even if a borrow of that one is still under way.
    """

    session_id: UUID
    """The id."""

    def __str__(self) -> str:
        return f"there is an open session {self.session_id} already; look it up, or close it first"


@define(eq=False, slots=False)
class RegistryFullError(SessionError):
    """The registry has as many sessions as it may have, and each of them is borrowed.

    You do *not* get it while one of them isn't borrowed: the least recently used of those is closed to make room.
    """

    max_sessions: int
    """How many sessions the registry may have."""

    def __str__(self) -> str:
        return f"all sessions are borrowed (max_sessions={self.max_sessions}); try again when a step has ended"
