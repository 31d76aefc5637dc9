"""All changes to a session's slots, and the way back to the savepoint.

The caller has the session, and passes its lease as the writer: once that is no longer the session's writer, nothing is
written (`_lease` explains why). An exception can arrive at any instant, and must leave nothing torn: assignments that
belong together share one statement, and the result of an engine's function is stored in the same turn of a loop.
"""

from collections.abc import Callable, Iterator
from itertools import starmap
from operator import index
from typing import Any
from weakref import ref

from inference_session._lease import ONCE, Lease, nobody
from inference_session._session import (
    HOLDERS,
    NO_CACHE,
    NOTHING,
    CacheFunctions,
    Savepoint,
    Session,
)
from inference_session._slot import NO_VALUES
from inference_session._tokens import NO_TOKENS, Ids
from inference_session.exceptions import BorrowExpiredError, StateMismatchError


def check_length(
    session: Session, slots: CacheFunctions[Any], writer: Lease, expected: int, where: str
) -> None:
    """Raise StateMismatchError if the KV cache does not cover as many tokens as expected."""
    length = 0 if session._kv_cache is NO_CACHE else slots.length(session._kv_cache)
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    if length != expected:
        raise _mismatch(session, expected, length, where)


def _mismatch(session: Session, expected: int, length: int, where: str) -> StateMismatchError:
    """Return the error for a KV cache of the wrong length; raise TypeError if that isn't even an int.

    The contents of such a cache are unknown, so a rollback won't keep it.
    """
    if session._savepoint_cache is NO_CACHE:
        session._savepoint = _covering(session._savepoint, None)
    return StateMismatchError(session._id, expected, index(length), where)


def change_key(session: Session, writer: Lease, key: str) -> None:
    """Set the key, and release the KV cache, computed under another one."""
    if not isinstance(key, str):
        raise TypeError(f"key must be a str, got {type(key).__name__!r}")
    session._release_cache(writer)
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    session._key = key


def create_cache(session: Session, slots: CacheFunctions[Any], writer: Lease) -> None:
    """Give the session the KV cache it lacks."""
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
        _record_holder(session, slots)
        check_length(session, slots, writer, 0, "create")
    except BaseException:
        session._release_cache(writer)
        raise


def replace_cache(session: Session, writer: Lease, cache: object) -> None:
    """Replace the present KV cache; it is kept if it is the savepoint's, and else released."""
    release = session._release_of(session._slots)
    replaced = aside = NO_CACHE
    try:
        if (other := _other_holder(session, id(cache))) is not None:
            raise ValueError(
                f"session {other._id} has this KV cache, so session {session._id} can't have it, "
                "too: take it from there first, by take_kv_cache()"
            )
        if release is not None:
            HOLDERS[id(cache)] = ref(session)
        holders, key = HOLDERS, id(session._kv_cache)
        if session._writer is not writer:
            raise BorrowExpiredError(session._id)
        session._handed_out = True
        replaced = session._kv_cache
        if cache is replaced:
            return
        if session._savepoint_cache is NO_CACHE and session._savepoint[2] is not None:
            session._savepoint_cache, session._kv_cache = replaced, cache
            return
        aside = NO_CACHE if cache is session._savepoint_cache else session._savepoint_cache
        session._kv_cache, session._savepoint_cache = cache, aside
        if key in holders:
            del holders[key]
        if release is not None and replaced is not NO_CACHE:
            release(replaced)
    finally:
        del replaced, aside, cache  # a traceback keeps this frame


def _other_holder(session: Session, key: int) -> Session | None:
    """Return the other session that has the KV cache of this `id()`, and would release it, too; or None."""
    if session._slots is None or session._slots.release is None:
        return None
    holder = HOLDERS.get(key)
    other = None if holder is None else holder()
    if other is None or other is session or other._slots is not session._slots:
        return None
    return other if key in {id(other._kv_cache), id(other._savepoint_cache)} else None


def _record_holder(session: Session, slots: CacheFunctions[Any]) -> None:
    if slots.release is not None:
        HOLDERS[id(session._kv_cache)] = ref(session)


def cut_cache(session: Session, slots: CacheFunctions[Any], writer: Lease, length: int) -> None:
    """Cut the KV cache to at most `length` tokens, as many of them as it can keep."""
    if session._kv_length <= length:
        return
    if slots.truncate is None:
        session._release_cache(writer)
        return
    try:
        _truncate_cache(session, slots, slots.truncate, writer, length)
    except BaseException:
        session._release_cache(writer)
        raise


def rewrite(session: Session, writer: Lease, length: int, tokens: Ids) -> None:
    """Replace all but the first `length` tokens of the history by `tokens`.

    Committed tokens are moved to the savepoint.
    """
    savepoint = session._savepoint
    try:
        count, dropped, covered, values, failed = savepoint
        dropped = session._token_history[length : count - len(dropped)] + dropped
        savepoint = (count, dropped, covered, values, failed)
        if session._writer is not writer:
            raise BorrowExpiredError(session._id)
        session._savepoint, session._token_history[length:] = savepoint, tokens
    finally:
        savepoint = NOTHING  # a traceback keeps this frame
        dropped, values, tokens = NO_TOKENS, NO_VALUES, NO_TOKENS


def copy_values(session: Session, writer: Lease) -> None:
    """Leave the values of further slots to the savepoint, and make a copy to change."""
    try:
        values = session._values.copy()
        if session._writer is not writer:
            raise BorrowExpiredError(session._id)
        session._values = values
    finally:
        values = NO_VALUES  # a traceback keeps this frame


def new_savepoint(session: Session, slots: CacheFunctions[Any], writer: Lease) -> Savepoint:
    """Return a savepoint of the present state, if the KV cache has the right length. Store it at once."""
    length = 0 if session._kv_cache is NO_CACHE else slots.length(session._kv_cache)
    if length != session._kv_length:
        if session._writer is writer:
            raise _mismatch(session, session._kv_length, length, "commit")
    elif (observer := session._observer) is not None and session._writer is writer:
        observer.committing(session)
    if session._savepoint_cache is not NO_CACHE:
        session._release_savepoint_cache(writer)
    count = len(session._token_history)
    covered = None if session._kv_cache is NO_CACHE else session._kv_length
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    return (count, NO_TOKENS, covered, session._values, False)


def roll_back(
    session: Session, slots: CacheFunctions[Any], failure: BaseException | None = None
) -> None:
    """Return to the savepoint, once no block is a writer any more. If interrupted, it can be started again."""
    _restore_tokens(session)
    replaced = session._savepoint_cache is not NO_CACHE
    if replaced:
        session._release_cache(nobody, failure)
        session._kv_cache, session._savepoint_cache = session._savepoint_cache, NO_CACHE
    if not _restored(session, slots, replaced=replaced):
        session._release_cache(nobody, failure)
    failed = session._handed_out and isinstance(failure, Exception)
    session._savepoint = (*session._savepoint[:4], failed)
    if (observer := session._observer) is not None:
        observer.rolled_back(session, failure)


def _restore_tokens(session: Session) -> None:
    """Restore the tokens of the savepoint, and the values of further slots."""
    dropped, values = NO_TOKENS, NO_VALUES
    try:
        count, dropped, covered, values, failed = session._savepoint
        session._token_history[count - len(dropped) :] = dropped
        session._savepoint, session._values = (count, NO_TOKENS, covered, values, failed), values
    finally:
        dropped, values = NO_TOKENS, NO_VALUES  # a traceback keeps this frame


def recover(session: Session) -> None:
    """Undo the leftovers of a dead lease. Nothing can write under it any more."""
    session._writer = nobody
    if session._slots is not None:
        roll_back(session, session._slots)
    session._handed_out = False


def _restored(session: Session, slots: CacheFunctions[Any], *, replaced: bool) -> bool:
    """Cut the KV cache back to its length at the savepoint, or less; return False if it can't be trusted.

    - A cache not handed out in this borrow is as it was.
    - One `replaced` by a functional engine should be as it was; its length confirms it.
    - The length of any other proves nothing: a failed step may have written to parts it doesn't count, such as a
      recurrent state. Only `truncate` can undo this.
    - If the borrow before failed as well, the cache may be at fault.
    """
    covered, failed = session._savepoint[2], session._savepoint[4]
    if covered is None or failed:
        return False
    try:
        if replaced:
            check_length(session, slots, nobody, covered, "rollback")
        elif session._handed_out:
            if slots.truncate is None:
                return False
            _truncate_cache(session, slots, slots.truncate, nobody, covered)
            return True
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
    """Truncate the KV cache, which meanwhile belongs to `truncate` alone: the session has none.

    If this fails, the session has the cache again, but can't trust it: the caller releases it.
    """
    covered = session._savepoint[2]
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
        _record_holder(session, slots)
        kept = _kept_length(session, slots, writer, length, "truncate")
    except BaseException:
        if cache is not NO_CACHE:
            if session._writer is writer:
                session._kv_cache = cache
            else:
                _release_made(session, slots, cache)
        raise
    finally:
        cache = cut = NO_CACHE  # a traceback keeps this frame
    if session._savepoint_cache is NO_CACHE and covered is not None:
        covered = min(covered, kept)
    savepoint = _covering(session._savepoint, covered)
    if session._writer is not writer:
        raise BorrowExpiredError(session._id)
    session._kv_length, session._savepoint = kept, savepoint


def _covering(savepoint: Savepoint, covered: int | None) -> Savepoint:
    """Return the savepoint with another number of tokens covered by its KV cache."""
    count, dropped, _, values, failed = savepoint
    return (count, dropped, covered, values, failed)


def _kept_length(
    session: Session, slots: CacheFunctions[Any], writer: Lease, most: int, where: str
) -> int:
    """Return how many tokens the KV cache covers now; raise StateMismatchError if more than `most`."""
    kept = index(slots.length(session._kv_cache))
    if not 0 <= kept <= most:
        if session._writer is not writer:
            raise BorrowExpiredError(session._id)
        raise _mismatch(session, most, kept, where)
    return kept


def branch(
    session: Session, slots: CacheFunctions[Any], writer: Lease, length: int, child: Session
) -> None:
    """Give a new session the first tokens of this one; and its KV cache, as far as `share` can."""
    child._token_history = session._token_history[:length]
    begin(child, slots, session._key)
    most = min(session._kv_length, length - 1)
    if slots.share is not None and most > 0:
        adopt(child, slots, map(slots.share, (session._kv_cache,), (most,)), most, "share")
    if session._writer is not writer:
        child.close()
        raise BorrowExpiredError(session._id)


def begin(session: Session, slots: CacheFunctions[Any], key: str) -> None:
    """Commit the tokens of a new session, known to nobody yet. All are pending."""
    count = len(session._token_history)
    session._slots, session._key = slots, key
    session._savepoint = (count, NO_TOKENS, None, NO_VALUES, False)


def adopt(
    session: Session, slots: CacheFunctions[Any], made: Iterator[Any], most: int, where: str
) -> None:
    """Give a new session, known to nobody yet, the KV cache made by an iterator."""
    try:
        for session._kv_cache in made:
            break
        else:
            raise RuntimeError(f"{where} raised StopIteration")  # noqa: TRY301
        if _other_holder(session, id(session._kv_cache)) is not None:
            session._kv_cache = NO_CACHE
            raise ValueError(f"{where} must return another KV cache than a session has already")  # noqa: TRY301
        _record_holder(session, slots)
        kept = _kept_length(session, slots, nobody, most, where)
        savepoint = _covering(session._savepoint, kept)
        session._kv_length, session._savepoint = kept, savepoint
    except BaseException as error:
        session._release_cache(nobody, error)
        raise


def _release_made(session: Session, slots: CacheFunctions[Any], cache: object) -> None:
    """Release a cache the engine has just made, or was about to change, as the borrow has ended or failed."""
    release = session._release_of(slots)
    try:
        if release is not None:
            release(cache)
    finally:
        del cache  # a traceback keeps this frame
