"""Every error of the library, under one root.

Wrong arguments raise `TypeError` and `ValueError`, as everywhere in Python; the errors here are about the state of a
session. None of them ever shows a token or any part of a KV cache, and all of them can be pickled.
"""

import sys
from typing import ClassVar, Final
from uuid import UUID

from attrs import define


__all__ = [
    "BorrowExpiredError",
    "RegistryFullError",
    "SessionBusyError",
    "SessionClosedError",
    "SessionError",
    "SessionExistsError",
    "SessionFileError",
    "SessionForkedError",
    "SessionNotFoundError",
    "SessionOwnerError",
    "StateMismatchError",
]


class SessionError(Exception):
    """The root of the library's errors: catch it to catch them all.

    You do *not* get it itself, only its subclasses, and not for wrong arguments.
    """

    _message: ClassVar[str] = ""
    """The message, with the error's attributes in braces."""

    def __str__(self) -> str:
        return self._message.format(self) or super().__str__()


@define(eq=False, slots=False)
class _OneSessionError(SessionError):
    session_id: UUID
    """The session's id."""


@define(eq=False, slots=False)
class SessionBusyError(_OneSessionError):
    """The session is borrowed already: another step of it is under way.

    You do *not* get it for a session whose last step failed, was cancelled or was interrupted: its borrow is over.
    A borrow never waits; if you want to, wait before you borrow.
    """

    twice: bool = False
    """Whether it is this very batch that has the session already."""

    def __str__(self) -> str:
        if self.twice:
            return f"session {self.session_id} is in the batch twice; name it once"
        return (
            f"session {self.session_id} is borrowed already; try again when that step has ended, "
            "or use its state if it is your own"
        )


class SessionClosedError(_OneSessionError):
    """The session was closed and can't be borrowed any more.

    You do *not* get it in a borrow already under way when the session is closed, except from `BorrowedState.chunks`:
    the borrow goes on to its end, and the state is freed then. Nor from a second `Session.close()`.
    """

    _message = "session {0.session_id} is closed; go on in a new one, fed the same tokens"


class SessionOwnerError(_OneSessionError):
    """The session was begun by another `StateSlots`, whose KV cache it holds.

    You do *not* get it for an empty session: any engine may begin one.
    """

    _message = (
        "session {0.session_id} was begun by another StateSlots; use the engine that began it, "
        "or feed the same tokens to a new session"
    )


class SessionForkedError(_OneSessionError):
    """The session was inherited over `os.fork`; only the process that made it may use it.

    You do *not* get it for sessions made by the child process, nor ever in the parent.
    """

    _message = (
        "session {0.session_id} belongs to the process that this one was forked from; "
        "use it there, or feed the same tokens to a new session here"
    )


class BorrowExpiredError(_OneSessionError):
    """The `with` block that borrowed this state is over (or was never entered), and so is the right to use the state.

    You do *not* get it because the session was closed during the block: the borrow lasts until the block ends.
    """

    _message = (
        "this borrow of session {0.session_id} is over; use the state inside its `with` block only"
    )


TORN: Final = sys.maxsize
"""The length of a KV cache whose layers disagree, as after a step that failed between two of them."""

_ADVICE: Final = {
    "create": "create must return a KV cache that covers no tokens",
    "advance": "advance(count) must say how many pending tokens the model was fed",
    "commit": "call advance after each time that the model is fed",
    "truncate": "truncate(kv_cache, n) must return one that covers at most the first n tokens",
    "share": "share(kv_cache, n) must return one that covers at most the first n tokens",
}


@define(eq=False, slots=False)
class StateMismatchError(_OneSessionError):
    """The KV cache does not cover as many tokens as expected, by the engine's own `length`.

    The engine fed other tokens than it declared, `length` is wrong (does it read *all* layers?), or `create` or
    `truncate` broke its contract. A rollback releases that KV cache, whatever its length by then. You do *not* get it
    when a KV cache can't be rolled back after a failed step: it is released as well, and the next step computes it
    anew. Nor from a `truncate` that keeps fewer tokens than it could.
    """

    expected: int
    """How many tokens the KV cache should cover; after `truncate` and `share`, at most."""
    actual: int
    """How many it covers, by `length`."""
    where: str = ""
    """Where it was detected: "create", "advance", "commit" (also at the end of a block), "truncate" or "share"."""

    def __str__(self) -> str:
        seen = f"{self.where}: " if self.where else ""
        most = "at most " if self.where in {"truncate", "share"} else ""
        actual = "TORN, as its layers disagree" if self.actual == TORN else self.actual
        advice = f"; {_ADVICE[self.where]}" if self.where in _ADVICE else ""
        return (
            f"{seen}the KV cache of session {self.session_id} should cover {most}{self.expected} "
            f"tokens, but its length is {actual}{advice}"
        )


class SessionNotFoundError(_OneSessionError, KeyError):
    """The registry has no open session with this id.

    It was never opened there, or has been closed since: by anyone, as idle, or to make room for another. You do *not*
    get it because a KV cache was evicted: the session is still there, with all of its tokens.
    """

    _message = (
        "there is no open session {0.session_id} here; "
        "open one with this id, and feed it the tokens of the conversation"
    )


class SessionExistsError(_OneSessionError):
    """The registry has an open session with this id already.

    You do *not* get it for the id of a closed session, even if a borrow of it is still under way.
    """

    _message = "there is an open session {0.session_id} already; look it up, or close it first"


@define(eq=False, slots=False)
class RegistryFullError(SessionError):
    """The registry has as many sessions as it may have, and all of them were borrowed at the same instant.

    You do *not* get it while one of them isn't borrowed: the least recently used of these is closed to make room.
    """

    max_sessions: int
    """How many sessions the registry may have."""

    _message = (
        "all sessions are borrowed (max_sessions={0.max_sessions}); try again when a step has ended"
    )


@define(eq=False, slots=False)
class SessionFileError(SessionError, ValueError):
    """No session can be restored from this file: it isn't one of a session, or its tokens can't be trusted.

    You do *not* get it for a damaged or unreadable KV cache: the session is restored then, with all tokens pending.
    """

    path: str
    """The path of the file."""
    problem: str
    """What is wrong with it, as the end of the message."""

    _message = "no session can be restored from {0.path!r}: {0.problem}"
