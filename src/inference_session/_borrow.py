"""The borrow: one session's state, or a batch of them, for one `with` block, exclusive and atomic."""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from operator import index
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, final, overload
from uuid import UUID

from attrs import define, field

from inference_session import _fork
from inference_session._lease import Lease, LeasedBlock, expired, nobody, replace
from inference_session._never_copied import NeverCopied, shown_without_arguments
from inference_session._session import NO_CACHE, CacheFunctions, Session
from inference_session._slot import Slot
from inference_session._tokens import (
    NO_TOKENS,
    as_tokens,
    checked,
    checked_copy,
    common_prefix_length,
    copy_of,
)
from inference_session._transaction import (
    branch,
    change_key,
    check_length,
    copy_values,
    create_cache,
    cut_cache,
    new_savepoint,
    recover,
    replace_cache,
    rewrite,
    roll_back,
)
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    SessionForkedError,
    SessionOwnerError,
)


KV = TypeVar("KV")
T = TypeVar("T")

ANY_KEY: Final[Any] = object()
"""The key of a borrow by the library itself: the session's own, whichever that is."""

_running: bool | None = True
"""None when the interpreter exits, as any module global may be. The session is then left to its finalizer."""


@final
@define(eq=False, repr=False, init=False, match_args=False, getstate_setstate=False)
class BorrowedState(LeasedBlock, NeverCopied, Generic[KV]):
    """The tokens and the KV cache of one session, for one `with` block.

    `StateSlots.borrow` and `StateSlots.borrow_all` return it. The token history is the truth; the KV cache covers its
    first `kv_length` tokens; the others are `pending`, to be fed to the model next. Nothing is final until the block
    ends or `commit` is called. An exception leaving the block takes the session back to its last commit. `state[slot]`
    is the value of a further `Slot`.

    After the block, every member raises `BorrowExpiredError`.
    """

    __module__ = "inference_session.engine"

    _session: Session
    _slots: CacheFunctions[KV] = field(repr=False)
    _key: str = field(repr=False)

    _instead = (
        "as it is valid for one `with` block only: borrow the session where you need its state"
    )

    @shown_without_arguments
    def __init__(self, session: Session, slots: CacheFunctions[KV], key: str) -> None:
        self._lease = self._exit = nobody
        self._hold = None
        self._session = session
        self._slots = slots
        self._key = key

    @property
    def session(self) -> Session:
        """The session."""
        return self._current()

    @property
    def kv_cache(self) -> KV:
        """The KV cache, made by `create` on first use.

        Set it if a step returns a new cache instead of changing the old one. The cache of the last commit is kept until
        the next one, for a rollback; any other is released when replaced.

        Raises:
            StateMismatchError: if `create` returned a cache that isn't empty.
            ValueError: when set to a KV cache that another session of the same `StateSlots` has, if there is a
                `release`: it would be called twice.
        """
        session, lease = self._session, self._lease
        if lease() is None or session._pid != _fork.pid or session._writer is not lease:
            session = self._current()
        if session._kv_cache is NO_CACHE:
            create_cache(session, self._slots, lease)
        session._handed_out = True
        return session._kv_cache  # type: ignore[no-any-return]

    @kv_cache.setter
    def kv_cache(self, cache: KV) -> None:
        try:
            replace_cache(self._current(), self._lease, cache)
        finally:
            del cache  # a traceback keeps this frame

    def take_kv_cache(self) -> KV:
        """Hand over the KV cache to the caller, without `release`. All tokens become pending.

        It can go to another session or back to a pool, and is lost to this session even if the block fails.

        Raises:
            ValueError: if there is no KV cache.
        """
        session = self._current()
        if session._kv_cache is NO_CACHE:
            raise ValueError(f"session {session._id} has no KV cache to take")
        session._handed_out = True
        return session._take_out_cache(self._lease)  # type: ignore[no-any-return]

    @property
    def token_history(self) -> Sequence[int]:
        """All tokens of the conversation, as a live, read-only view; only its slices are copies."""
        self._current()
        return TokenHistory(self._current)

    @property
    def kv_length(self) -> int:
        """How many tokens of the history the KV cache covers."""
        return self._current()._kv_length

    @property
    def pending(self) -> Sequence[int]:
        """The tokens not yet covered by the KV cache, `token_history[kv_length:]`, as a new list each time."""
        session = self._current()
        return session._token_history[session._kv_length :].tolist()

    def append(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the history: all of them, or none and an error.

        Args:
            tokens: token ids, ints from 0 to 2**31 - 1. An `array` or a NumPy buffer of C ints is copied as it is;
                other iterables of ints (NumPy's and PyTorch's too) are converted.

        Raises:
            ValueError: if an id isn't such an int.
            TypeError: if `tokens` isn't iterable.
        """
        session, lease = self._session, self._lease
        try:
            token = tokens[0] if isinstance(tokens, list) and len(tokens) == 1 else None
            if type(token) is int and 0 <= token < 2**31:  # the fast path, for decode steps
                if lease() is None or session._pid != _fork.pid or session._writer is not lease:
                    session = self._current()
                session._token_history.append(token)
            else:
                self._current()
                added = checked_copy(tokens)
                self._current()._token_history.extend(added)
        finally:
            tokens = added = NO_TOKENS  # a traceback keeps this frame
            token = None

    def advance(self, count: int) -> None:
        """Declare the next `count` pending tokens as fed to the model, and so covered by the KV cache.

        Raises:
            ValueError: if `count` is negative, or exceeds the number of pending tokens.
            StateMismatchError: if `length(kv_cache)` hasn't grown by `count`.
        """
        if type(count) is not int:
            count = index(count)
        session, lease = self._session, self._lease
        if lease() is None or session._pid != _fork.pid or session._writer is not lease:
            session = self._current()
        session._handed_out = True
        covered = session._kv_length + count
        if not session._kv_length <= covered <= len(session._token_history):
            pending = len(session._token_history) - session._kv_length
            raise ValueError(f"can't advance by {count} tokens, as {pending} are pending")
        check_length(session, self._slots, lease, covered, "advance")
        session._kv_length = covered

    def commit(self) -> None:
        """Make this the state to return to if the block fails later.

        Raises:
            StateMismatchError: if the KV cache doesn't cover `kv_length` tokens; nothing is committed then.
        """
        session, lease = self._session, self._lease
        if lease() is None or session._pid != _fork.pid or session._writer is not lease:
            session = self._current()
        session._savepoint = new_savepoint(session, self._slots, lease)
        if (observer := session._observer) is not None:
            observer.settled(session)

    def chunks(self, size: int, *, keep: int = 1) -> Iterator[list[int]]:
        """Iterate over the pending tokens, all but the last `keep`, in parts to feed to the model.

        Call `advance` for each part before the next one. If fewer than `keep` tokens are pending, the KV cache is first
        cut until there are enough.

        Args:
            size: the maximum number of tokens in a part.
            keep: how many tokens to leave pending at the end; fewer only if the history is shorter.

        Raises:
            ValueError: if `size` is less than 1, or `keep` is negative.
            SessionClosedError: instead of the next part, if the session was closed meanwhile.
            RuntimeError: after a part, if `advance` was not called for all of it.
            Exception: from `truncate`, as for `rewind`.
        """
        size, keep = index(size), index(keep)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        session = self._current()
        most = max(len(session._token_history) - keep, 0)
        cut_cache(session, self._slots, self._lease, most)
        return self._chunks(size, keep)

    def _chunks(self, size: int, keep: int) -> Iterator[list[int]]:
        session = self._current()
        while (start := session._kv_length) < (end := len(session._token_history) - keep):
            if session._closed:
                raise SessionClosedError(session._id)
            stop = min(start + size, end)
            yield session._token_history[start:stop].tolist()
            if (covered := self._current()._kv_length) != stop:
                raise RuntimeError(
                    f"the KV cache covers {covered} tokens, and with the last part it should be {stop}: "
                    "call advance(len(part)) before the next one"
                )

    def rewind(self, length: int, *, pending: int = 1) -> None:
        """Forget all but the first `length` tokens of the history.

        The KV cache then covers at most `length - pending` of them, which leaves a token to decode from. Pass 0 to go
        on with other tokens at once, as speculative decoding does. The KV cache may cover fewer, if `truncate` can't
        cut just there; without `truncate`, it is released if it covers more.

        Raises:
            ValueError: if the history is shorter than `length`, or a number is negative.
            StateMismatchError: if `truncate` returned a KV cache that covers more; it is released.
            Exception: any error of `truncate`. The KV cache is released, and the history stays as it was.
        """
        length, pending = index(length), index(pending)
        session = self._current()
        if not 0 <= length <= len(session._token_history):
            raise ValueError(
                f"can't rewind to {length} tokens, as the history has {len(session._token_history)}"
            )
        if pending < 0:
            raise ValueError(f"pending must not be negative, got {pending}")
        cut_cache(session, self._slots, self._lease, max(length - pending, 0))
        rewrite(session, self._lease, length, NO_TOKENS)

    def reuse_prefix(self, tokens: Iterable[int]) -> int:
        """Make `tokens` the history, and keep the KV cache of the longest prefix shared with the old one.

        At least one token is left pending, to decode from.

        Args:
            tokens: as for `append`. An `array` or a NumPy buffer of C ints is fastest: it is compared as memory.

        Returns:
            How many tokens are still in the KV cache, and needn't be fed again.

        Raises:
            ValueError: if an id isn't an int from 0 to 2**31 - 1; nothing changes then.
            TypeError: if `tokens` isn't iterable.
            Exception: from `truncate`, as for `rewind`.
        """
        try:
            self._current()
            wanted = as_tokens(tokens)
            session = self._current()
            common = common_prefix_length(session._token_history, wanted)
            rest = checked(copy_of(wanted[common:]), common)
            length = max(min(common, len(wanted) - 1), 0)
            cut_cache(session, self._slots, self._lease, length)
            rewrite(session, self._lease, common, rest)
            return session._kv_length
        finally:
            tokens = wanted = rest = NO_TOKENS  # a traceback keeps this frame

    def branch(self, length: int | None = None, *, id: UUID | None = None) -> Session:  # noqa: A002
        """Return a new session with the first `length` tokens of this one, committed or not.

        It also gets the KV cache for them, all but the last one, if the engine has `share`; else they are pending. It
        has the same key, but no values of further slots. It stays as it is if this block fails.

        Args:
            length: how many tokens; all of them by default.
            id: the new session's id; random by default.

        Raises:
            ValueError: if the history is shorter than `length`, or `length` is negative; or if `share` returned the KV
                cache of a session.
            TypeError: if `id` isn't a `uuid.UUID`.
            StateMismatchError: if `share` returned a KV cache that covers more tokens than it was asked for.
            Exception: any error of `share`.
        """
        child = Session() if id is None else Session.with_id(id)
        session = self._current()
        count = len(session._token_history)
        length = count if length is None else index(length)
        if not 0 <= length <= count:
            raise ValueError(f"can't branch at {length} tokens, as the history has {count}")
        branch(session, self._slots, self._lease, length, child)
        return child

    def __getitem__(self, slot: Slot[T], /) -> T:
        session, lease = self._session, self._lease
        if lease() is None or session._pid != _fork.pid or session._writer is not lease:
            session = self._current()
        try:
            return session._values[slot]  # type: ignore[no-any-return]
        except KeyError:
            pass
        return self._first_value(slot)

    def __setitem__(self, slot: Slot[T], value: T, /) -> None:
        session, lease = self._session, self._lease
        try:
            if type(slot) is not Slot:
                raise TypeError(f"only a Slot can be set, got {type(slot).__name__!r}")
            if lease() is None or session._pid != _fork.pid or session._writer is not lease:
                session = self._current()
            if session._values is session._savepoint[3]:
                copy_values(session, lease)
            session._values[slot] = value
        finally:
            del value  # a traceback keeps this frame

    def _first_value(self, slot: Slot[T]) -> T:
        """Make a slot's first value, store it and return it."""
        if type(slot) is not Slot:
            raise TypeError(f"only a Slot can be read, got {type(slot).__name__!r}")
        self[slot] = slot._factory()
        return self[slot]

    def __repr__(self) -> str:
        session = self._session
        if session._writer is not self._lease or self._lease() is None:
            return f"<BorrowedState of session {session.id}, not borrowed>"
        tokens, covered = len(session._token_history), session._kv_length
        return (
            f"<BorrowedState of session {session.id}, {tokens} tokens, {covered} in the KV cache>"
        )

    def _current(self) -> Session:
        """Return the session, if this block is still its writer.

        From here to the caller's next call is one instant (see `_lease`): call this right before a write.
        """
        session, lease = self._session, self._lease
        if session._pid != _fork.pid and session._is_forked():
            raise SessionForkedError(session._id)
        if lease() is None or session._writer is not lease:
            raise BorrowExpiredError(session._id)
        return session

    def __enter__(self) -> "BorrowedState[KV]":
        lease = self._exit  # alive in a `with` statement, where `_begin` isn't needed
        self._take(lease if self._lease is nobody and lease() is not None else self._begin())
        if self._session._key != self._key:
            _use_key([self], self)
        return self

    def _take(self, lease: Lease) -> None:
        """Take the session under a lease; or raise an error, and change nothing."""
        session = self._session
        if type(session) is not Session:  # not a proxy either, whatever its `__class__`
            raise TypeError(f"only a Session can be borrowed, got {type(session).__name__!r}")
        if session._closed or session._slots is not self._slots or session._pid != _fork.pid:
            if (observer := session._observer) is not None:
                self._slots, lease = observer.borrowing(self._slots, lease)
            self._check_free()
        last = session._lease
        if (last is not nobody and last() is not None) or not replace(session, last, lease):
            raise SessionBusyError(session._id, last is lease)
        if last is not nobody:
            self._recover_session()
        # Only now does nobody else change it: since the check, it may have been closed, or begun by another engine.
        if session._closed or session._slots is not self._slots:
            self._begin_session()
        self._lease = session._writer = lease

    def _recover_session(self) -> None:
        """Undo the leftovers of a dead lease; if that fails, leave them to the next borrow."""
        try:
            recover(self._session)
        except BaseException:
            self._session._lease = expired
            raise

    def _check_free(self) -> None:
        session = self._session
        if session._is_forked():
            raise SessionForkedError(session._id)
        if session._closed:
            raise SessionClosedError(session._id)
        if session._slots not in (None, self._slots) and not session._is_empty():
            raise SessionOwnerError(session._id)

    def _begin_session(self) -> None:
        """Begin a session that holds nothing; or give it back and raise."""
        session = self._session
        try:
            self._check_free()
        except BaseException:
            session._give_back()
            raise
        session._slots, session._token_history = self._slots, array("i")

    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        session = self._session
        try:
            if not self._stop(self):
                if exc_type is None:
                    raise BorrowExpiredError(session._id)
            elif session._pid != _fork.pid and session._is_forked():
                if exc_type is None:
                    raise SessionForkedError(session._id)
            elif exc_type is None:
                try:
                    session._savepoint = new_savepoint(session, self._slots, nobody)
                except BaseException as failure:
                    self._undo(failure)
                    raise
                if session._closed or session._observer is not None or not session._savepoint[0]:
                    session._give_back()
                else:
                    # The usual part of `_give_back`, without its call.
                    session._handed_out, session._lease = False, nobody
            else:
                self._undo(exc)
        finally:
            self._hold = None

    def _stop(self, block: LeasedBlock) -> bool:
        """Stop the block from writing, and return whether it still has the session.

        If the garbage collector has ended the lease too early, the session is taken back, unless another borrow has
        taken it.
        """
        session, lease = self._session, self._lease
        self._lease = expired
        if lease is nobody or session._lease is not lease or not _running:
            return False
        if lease() is None and not replace(session, lease, block._hold_by_hand()):
            return False
        session._writer = nobody
        return True

    def _undo(self, failure: BaseException | None) -> None:
        roll_back(self._session, self._slots, failure)
        self._session._give_back(failure)


@final
@define(eq=False, repr=False, init=False, getstate_setstate=False)
class BorrowedBatch(LeasedBlock, NeverCopied, Generic[KV]):
    """Borrows of several sessions, begun and ended together."""

    _states: "list[BorrowedState[KV]]" = field(repr=False)

    _instead = (
        "as it is valid for one `with` block only: borrow the sessions where you need their states"
    )

    def __init__(self, states: "list[BorrowedState[KV]]") -> None:
        self._lease = self._exit = nobody
        self._hold = None
        self._states = states

    def __enter__(self) -> list[BorrowedState[KV]]:
        lease = self._begin()
        taken: list[BorrowedState[KV]] = []
        try:
            for state in self._states:
                state._take(lease)
                taken.append(state)
        except BaseException:
            try:
                for state in taken:
                    state._stop(self)
                    state._session._give_back()
            finally:
                self._lease, self._hold = expired, None
            raise
        self._lease = lease
        _use_key(taken, self)
        return taken

    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self._lease = expired
        try:
            held = [state for state in self._states if state._stop(self)]
            if held and held[0]._session._is_forked():  # so are all of them
                if exc_type is None:
                    raise SessionForkedError(held[0]._session._id)
            elif exc_type is None and len(held) == len(self._states):
                self._commit()
            else:
                self._undo(held, exc)
                if exc_type is None:
                    lost = next(state for state in self._states if state not in held)
                    raise BorrowExpiredError(lost._session._id)
        finally:
            self._hold = None

    def _commit(self) -> None:
        sessions = [state._session for state in self._states]
        try:
            for state in self._states:
                covered = state._session._kv_length
                check_length(state._session, state._slots, nobody, covered, "commit")
            savepoints = [
                new_savepoint(state._session, state._slots, nobody) for state in self._states
            ]
            # All at once: a call that stays within C code is one instant.
            deque(map(setattr, sessions, repeat("_savepoint"), savepoints), maxlen=0)
        except BaseException as failure:
            self._undo(self._states, failure)
            raise
        error = None
        for session in sessions:
            try:
                session._give_back()
            except Exception as raised:  # noqa: BLE001 from releasing a session closed meanwhile
                error = raised
        if error is not None:
            raise error

    def _undo(self, states: "list[BorrowedState[KV]]", failure: BaseException | None) -> None:
        for state in states:
            state._undo(failure)


def _use_key(states: "list[BorrowedState[KV]]", block: LeasedBlock) -> None:
    """Release KV caches computed under another key, as a borrow begins."""
    try:
        for state in states:
            if state._key is not ANY_KEY and state._session._key != state._key:
                change_key(state._session, state._lease, state._key)
    except BaseException as failure:
        for state in states:
            if state._stop(block):
                state._undo(failure)
        block._lease, block._hold = expired, None
        raise


@final
@define(eq=False, repr=False, getstate_setstate=False)
class TokenHistory(NeverCopied, Sequence[int]):
    """A read-only view of the tokens: always current, and valid until the borrow ends."""

    _read: Callable[[], Session] = field(repr=False)

    _instead = "as it is valid for one `with` block only: slice it, `token_history[:]` is a list"

    @overload
    def __getitem__(self, position: int, /) -> int: ...
    @overload
    def __getitem__(self, position: slice, /) -> list[int]: ...
    def __getitem__(self, position: int | slice, /) -> int | list[int]:
        if isinstance(position, slice):
            return self._read()._token_history[position].tolist()
        return self._read()._token_history[position]

    def __len__(self) -> int:
        return len(self._read()._token_history)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence):
            return self[:] == list(other)  # pyright: ignore[reportUnknownArgumentType]
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # it changes

    def __repr__(self) -> str:
        return f"<token history, {len(self)} tokens>"
