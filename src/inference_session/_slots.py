"""An engine's description of its KV cache, and its access to the state of sessions."""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import BinaryIO, Generic, TypeVar, final

from attrs import field, frozen

from inference_session._borrow import ANY_KEY, BorrowedBatch, BorrowedState
from inference_session._file import restore, save
from inference_session._never_copied import NeverCopied
from inference_session._session import Session
from inference_session._slot import is_callable


KV = TypeVar("KV")


@final
@frozen(eq=False, repr=False, kw_only=True, getstate_setstate=False)
class StateSlots(NeverCopied, Generic[KV]):
    """An engine's access to the state of its sessions: typed, exclusive and atomic.

    An engine makes one, once, from plain functions that describe its KV cache. The return type of `create` is the type
    of the KV cache.

    If the device works asynchronously (JAX, MLX), wait for it before `advance`: a failure reported only after `commit`,
    or after the end of the block, is not rolled back.

    Args:
        create: returns a new KV cache, covering no tokens.
        length: returns how many tokens a KV cache covers. It should read all layers, or the check is worth little. If
            they disagree, as after a step that failed between two of them, it returns `TORN`.
        truncate: cuts a KV cache to at most its first n tokens, as many of them as possible, and returns it or a
            replacement. Returning an empty one is fine: a window that has moved on, or a recurrent state, can't be cut
            just anywhere. It is also called after a failed step: layers may disagree then, and even at length n, the
            step may have changed data that the length doesn't count. It owns its argument: if it returns a replacement,
            it must free the old one itself; if it raises, the library releases the old one. Without `truncate`, a KV
            cache is released and computed anew if it covers too much, or if a failed step had access to it. If your KV
            caches are never changed in place, return one of the first n.
        share: returns another KV cache of at most the first n tokens, as many of them as possible; the given one stays
            as it is. `BorrowedState.branch` calls it. A copy will do; references to the same blocks are better.
        dump: writes a KV cache to a binary stream, forwards only, for `save`. It comes with `load`.
        load: reads a KV cache back from such a file, which ends where `dump` ended. It should read nothing that could
            run code, such as a pickle: others may be able to write the file.
        release: frees the memory or the handle of a KV cache. It is called once for each cache owned by the library,
            when the session drops it, even if that call raises. Any thread can close a session, and a session can be
            dropped at any instant, so it must not wait for a lock that its own thread may hold.
        nbytes: returns the size of a KV cache in bytes, for memory budgets.
    """

    __module__ = "inference_session.engine"

    create: Callable[[], KV] = field(repr=False, validator=is_callable)
    length: Callable[[KV], int] = field(repr=False, validator=is_callable)
    truncate: Callable[[KV, int], KV] | None = field(
        default=None, repr=False, validator=is_callable
    )
    share: Callable[[KV, int], KV] | None = field(default=None, repr=False, validator=is_callable)
    dump: Callable[[KV, BinaryIO], object] | None = field(
        default=None, repr=False, validator=is_callable
    )
    load: Callable[[BinaryIO], KV] | None = field(default=None, repr=False, validator=is_callable)
    release: Callable[[KV], object] | None = field(default=None, repr=False, validator=is_callable)
    nbytes: Callable[[KV], int] | None = field(default=None, repr=False, validator=is_callable)

    _instead = "as sessions know the one that began them: hand on this very object"

    def __attrs_post_init__(self) -> None:
        if (self.dump is None) != (self.load is None):
            raise TypeError("dump and load come together: give both, or neither")

    def borrow(
        self, session: Session, *, key: str = ""
    ) -> AbstractContextManager[BorrowedState[KV], None]:
        """Borrow a session for a `with` block, which gets its `BorrowedState`.

        The session is taken at once or not at all; there is no waiting. A block that ends normally is committed; any
        exception takes the session back to its last commit, and propagates to the caller.

        Args:
            session: the session.
            key: names everything the KV cache depends on besides the tokens, such as an adapter or the version of the
                weights. A KV cache computed under another key is released, and its tokens become pending; so even a
                borrow that does not run the model needs the key.

        Raises:
            SessionBusyError: if it is borrowed already.
            SessionClosedError: if it was closed.
            SessionOwnerError: if another `StateSlots` began it.
            SessionForkedError: if it was inherited over `os.fork`.
            StateMismatchError: at the end of the block, if the KV cache doesn't cover `kv_length` tokens; the block is
                then rolled back.
        """
        return BorrowedState(session, self, key)

    def borrow_all(
        self, sessions: Iterable[Session], *, key: str = ""
    ) -> AbstractContextManager[list[BorrowedState[KV]], None]:
        """Borrow a whole batch of sessions, or none of it, for a `with` block, which gets their states in order.

        An exception takes every session of the batch back to its last commit.

        Args:
            sessions: the sessions.
            key: as for `borrow`, for all of them.

        Raises:
            SessionBusyError: as `borrow`, and if a session is in the batch twice.
            SessionClosedError, SessionOwnerError, SessionForkedError, StateMismatchError: as `borrow`.
        """
        return BorrowedBatch([BorrowedState(session, self, key) for session in sessions])

    def evict(self, session: Session) -> None:
        """Free a session's KV cache. Nothing is lost: its tokens become pending, and the next step computes it anew.

        Raises:
            SessionBusyError, SessionClosedError, SessionOwnerError, SessionForkedError: as `borrow`.
        """
        with BorrowedState(session, self, ANY_KEY) as state:
            session._release_cache(state._lease)

    def save(self, session: Session, path: str | os.PathLike[str], *, move: bool = False) -> None:
        """Write a session to a file: its id, tokens and key, and its KV cache if there is `dump`.

        Values of further slots are not saved. The file is whole or not there, whatever happens, and only its owner may
        read it. An older one is replaced. The KV cache is not copied in memory.

        Args:
            session: the session, as it was last committed.
            path: the file.
            move: whether to close the session, once the file is safe on the disk. So it is in one place at a time.

        Raises:
            SessionBusyError, SessionClosedError, SessionOwnerError, SessionForkedError: as `borrow`.
            StateMismatchError: if the KV cache doesn't cover `kv_length` tokens.
            OSError: if the file can't be written, or the path leads to something else than a file.
            Exception: any error of `dump`.
        """
        save(self, session, os.fsdecode(path), move=move)

    def restore(self, path: str | os.PathLike[str], *, take: bool = False) -> Session:
        """Return the session that a file holds, with the same id and tokens.

        It also has the KV cache, if `load` can read it and it is undamaged; else all tokens are pending, and a warning
        is logged by `logging.getLogger("inference_session")`. A borrow with another key than the saved one releases it.

        Args:
            path: the file.
            take: whether to remove the file. Of any number of processes that take it, exactly one gets the session. If
                that fails, the file is still there.

        Raises:
            FileNotFoundError: if there is no file, or another process has taken it.
            SessionFileError: if it isn't the file of a session, is of a newer format, or its tokens are damaged.
            OSError: if it can't be read; or if it can't be removed, for `take`.
        """
        return restore(self, os.fsdecode(path), take=take)
