"""How an engine describes its KV cache, and reaches the state of a session."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, final

from attrs import NOTHING, Attribute, field, frozen

from inference_session._borrow import BorrowedBatch, BorrowedState
from inference_session._never_copied import NeverCopied
from inference_session._session import Session


KV = TypeVar("KV")


def _is_callable(slots: object, attribute: "Attribute[Any]", function: object) -> None:
    if not callable(function) and (function is not None or attribute.default is NOTHING):
        raise TypeError(f"{attribute.name} must be a function, got {type(function).__name__!r}")


@final
@frozen(eq=False, repr=False, kw_only=True, getstate_setstate=False)
class StateSlots(NeverCopied, Generic[KV]):
    """An engine's access to the state of its sessions: typed, exclusive and atomic.

    An engine makes one, once, of plain functions that tell how its KV cache works. The type of the KV cache is that
    which `create` returns.

    Where the device works asynchronously (JAX, MLX), wait for it before `advance`: a failure that shows only after the
    block has ended, or after `commit`, is not rolled back.

    Args:
        create: returns a new KV cache that covers no tokens.
        length: returns how many tokens a KV cache covers; in all its layers, or the check is worth little. If layers
            disagree, as after a step that failed between two of them, it returns `TORN`.
        truncate: makes a KV cache cover at most its first n tokens, as many of them as it can, and returns it, or
            another that takes its place. An empty one is an honest answer: what has slid out of a window, or went
            into a recurrent state, can't be cut just anywhere. It is also asked after a failed step, when layers may
            disagree, and when the length is n already but the step may have changed what it doesn't count. It owns
            what it's given: if it returns another, freeing the old one is its business; if it raises, the library
            releases the old one. Without `truncate`, a KV cache that covers too much, or that a failed step had in
            its hands, is released and computed anew. Where KV caches are never changed in place, give one that
            returns a KV cache of the first n.
        release: gives back the memory or the handle that a KV cache holds. It's called once for each cache that the
            library owns when the session lets go of it, also if it raises. As a session can be closed by any thread,
            and dropped at any instant, it must not wait for a lock that its own thread may hold.
        nbytes: returns how many bytes a KV cache holds, for memory budgets.
    """

    __module__ = "inference_session.engine"

    create: Callable[[], KV] = field(repr=False, validator=_is_callable)
    length: Callable[[KV], int] = field(repr=False, validator=_is_callable)
    truncate: Callable[[KV, int], KV] | None = field(
        default=None, repr=False, validator=_is_callable
    )
    release: Callable[[KV], object] | None = field(default=None, repr=False, validator=_is_callable)
    nbytes: Callable[[KV], int] | None = field(default=None, repr=False, validator=_is_callable)

    _instead = "as sessions know the one that began them: hand on this very object"

    def borrow(
        self, session: Session, *, key: str = ""
    ) -> AbstractContextManager[BorrowedState[KV], None]:
        """Borrow a session for a `with` block, which gets its `BorrowedState`.

        The session is taken at once or not at all; there's no waiting. A block that ends well commits what it did; an
        exception of whatever kind takes the session back to its last commit, and goes on to the caller.

        Args:
            session: the session.
            key: names all that the KV cache depends on besides the tokens, such as the adapter or the version of the
                weights. A KV cache that was computed under another key is released, and its tokens become pending; so a
                borrow that does not run the model needs the key, too.

        Raises:
            SessionBusyError: if it is borrowed already.
            SessionClosedError: if it was closed.
            SessionOwnerError: if another `StateSlots` began it.
            SessionForkedError: if it was inherited over `os.fork`.
            StateMismatchError: at the end of the block, if the KV cache doesn't cover `kv_length` tokens; the block is
                rolled back then.
        """
        return BorrowedState(session, self, key)

    def borrow_all(
        self, sessions: Iterable[Session], *, key: str = ""
    ) -> AbstractContextManager[list[BorrowedState[KV]], None]:
        """Borrow a whole batch of sessions, or none of it, for a `with` block, which gets their states in order.

        What happens to one happens to all: an exception takes every session of the batch back to its last commit.

        Args:
            sessions: the sessions.
            key: as for `borrow`, for all of them.

        Raises:
            SessionBusyError: as `borrow`, and if a session is twice in the batch.
            SessionClosedError, SessionOwnerError, SessionForkedError, StateMismatchError: as `borrow`.
        """
        return BorrowedBatch([BorrowedState(session, self, key) for session in sessions])

    def evict(self, session: Session) -> None:
        """Free a session's KV cache. Nothing is lost: its tokens become pending, and the next step computes it anew.

        Raises:
            SessionBusyError, SessionClosedError, SessionOwnerError, SessionForkedError: as `borrow`.
        """
        with self.borrow(session) as state:
            session._release_cache(state._lease)
