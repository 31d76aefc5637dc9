"""What can be done to a session's slots, and the way back to the savepoint.

Whoever calls has the session, and says as which writer: if that one has ended meanwhile, nothing is written (`_lease`
tells why). An exception can strike at any instant, and must leave nothing torn: assignments that belong together stand
in one statement, and what an engine's function returns is stored in the turn of the loop that calls it.
"""

from collections.abc import Callable
from itertools import starmap
from operator import index
from typing import Any

from inference_session._lease import ONCE, Lease, nobody
from inference_session._session import NO_CACHE, CacheFunctions, Savepoint, Session
from inference_session._tokens import NO_TOKENS, Ids
from inference_session.exceptions import BorrowExpiredError, StateMismatchError


def check_length(
    session: Session, slots: CacheFunctions[Any], writer: Lease, expected: int
) -> None:
    """Raise StateMismatchError if the KV cache does not cover as many tokens as it should."""
    length = 0 if session._kv_cache is NO_CACHE else slots.length(session._kv_cache)
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    if length != expected:
        raise _mismatch(session, expected, length)


def _mismatch(session: Session, expected: int, length: int) -> StateMismatchError:
    """Return the error for a KV cache of the wrong length; TypeError if that isn't even an int.

    Nobody knows what such a cache holds, so a rollback won't be content with its length.
    """
    count, dropped, _ = session._savepoint
    if session._savepoint_cache is NO_CACHE:
        session._savepoint = (count, dropped, None)
    return StateMismatchError(session._id, expected, index(length))


def create_cache(session: Session, slots: CacheFunctions[Any], writer: Lease) -> None:
    """Make a KV cache where there is none."""
    for cache in starmap(slots.create, ONCE):
        mine = session._writer is writer
        if mine:
            session._kv_cache = cache
        try:
            if not mine:
                _release_made(session, slots, cache)
        finally:
            del cache  # a traceback keeps this frame
        break
    else:
        raise RuntimeError("create() raised StopIteration")
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    try:
        check_length(session, slots, writer, 0)
    except BaseException:
        session._release_cache(writer)
        raise


def replace_cache(session: Session, writer: Lease, cache: object) -> None:
    """Put another KV cache in the place of the present one, which is kept if it is the savepoint's."""
    release = session._release_of(session._slots)
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    replaced = session._kv_cache
    if cache is replaced:
        return
    if session._savepoint_cache is NO_CACHE and session._savepoint[2] is not None:
        session._savepoint_cache, session._kv_cache = replaced, cache
        return
    aside = NO_CACHE if cache is session._savepoint_cache else session._savepoint_cache
    session._kv_cache, session._savepoint_cache = cache, aside
    try:
        if release is not None and replaced is not NO_CACHE:
            release(replaced)
    finally:
        del replaced, aside, cache  # a traceback keeps this frame


def cut_cache(session: Session, slots: CacheFunctions[Any], writer: Lease, length: int) -> None:
    """Have the KV cache cover `length` tokens at most: none, where it can't be truncated."""
    if session._kv_length <= length:
        return
    if slots.truncate is None:
        session._release_cache(writer)
    else:
        _truncate_cache(session, slots, slots.truncate, writer, length)


def rewrite(session: Session, writer: Lease, length: int, tokens: Ids) -> None:
    """Put `tokens` in the place of all that comes after the first `length` tokens of the history.

    Committed tokens that go are moved to the savepoint.
    """
    count, dropped, covered = session._savepoint
    dropped = session._token_history[length : count - len(dropped)] + dropped
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    session._savepoint, session._token_history[length:] = (count, dropped, covered), tokens


def new_savepoint(session: Session, slots: CacheFunctions[Any], writer: Lease) -> Savepoint:
    """Return a savepoint of the present state, if the KV cache covers what it should. Store it at once."""
    length = 0 if session._kv_cache is NO_CACHE else slots.length(session._kv_cache)
    if length != session._kv_length:
        if session._writer is writer:
            raise _mismatch(session, session._kv_length, length)
    elif (observer := session._observer) is not None and session._writer is writer:
        observer.committing(session)
    if session._savepoint_cache is not NO_CACHE:
        session._release_savepoint_cache(writer)
    count = len(session._token_history)
    covered = None if session._kv_cache is NO_CACHE else session._kv_length
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    return (count, NO_TOKENS, covered)


def roll_back(
    session: Session, slots: CacheFunctions[Any], failure: BaseException | None = None
) -> None:
    """Go back to the savepoint, when no block is a writer any more. If this is interrupted, it can be begun again."""
    count, dropped, covered = session._savepoint
    session._token_history[count - len(dropped) :] = dropped
    session._savepoint = (count, NO_TOKENS, covered)
    if session._savepoint_cache is not NO_CACHE:
        session._release_cache(nobody, failure)
        session._kv_cache, session._savepoint_cache = session._savepoint_cache, NO_CACHE
    if not _restored(session, slots):
        session._release_cache(nobody, failure)
    if (observer := session._observer) is not None:
        observer.rolled_back(session, failure)


def recover(session: Session) -> None:
    """Undo what a lease that has died left in the session. Nothing of it can write any more."""
    session._writer = nobody
    if session._slots is not None:
        roll_back(session, session._slots)


def _restored(session: Session, slots: CacheFunctions[Any]) -> bool:
    """Bring the KV cache back to what it covered at the savepoint, if that can be had."""
    covered = session._savepoint[2]
    if covered is None:
        return False
    try:
        if slots.truncate is None or slots.length(session._kv_cache) <= covered:
            check_length(session, slots, nobody, covered)
        else:
            _truncate_cache(session, slots, slots.truncate, nobody, covered)
    except Exception:  # noqa: BLE001 the tokens are safe; it's computed anew
        return False
    session._kv_length = covered
    return True


def _truncate_cache(
    session: Session,
    slots: CacheFunctions[Any],
    truncate: Callable[[Any, int], Any],
    writer: Lease,
    length: int,
) -> None:
    """Truncate the KV cache, which meanwhile is nobody's but `truncate`'s: the session has none."""
    count, dropped, covered = session._savepoint
    if session._savepoint_cache is NO_CACHE and covered is not None:
        covered = min(covered, length)
    cache = session._take_out_cache(writer)
    try:
        for cut in map(truncate, (cache,), (length,)):
            cache = NO_CACHE
            if session._writer is writer:
                session._kv_cache = cut
            else:
                _release_made(session, slots, cut)
            break
        else:
            raise RuntimeError("truncate(kv_cache, length) raised StopIteration")  # noqa: TRY301
        check_length(session, slots, writer, length)
    except BaseException:
        if cache is not NO_CACHE:
            if session._writer is writer:
                session._kv_cache = cache
            else:
                _release_made(session, slots, cache)
        session._release_cache(writer)
        raise
    finally:
        cache = cut = NO_CACHE  # a traceback keeps this frame
    session._kv_length, session._savepoint = length, (count, dropped, covered)


def _release_made(session: Session, slots: CacheFunctions[Any], cache: object) -> None:
    """Release what the engine has just made, or was about to change, for a borrow that has ended or failed."""
    release = session._release_of(slots)
    try:
        if release is not None:
            release(cache)
    finally:
        del cache  # a traceback keeps this frame
