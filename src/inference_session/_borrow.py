"""The borrow: one session's state for one `with` block, exclusive and atomic."""

from collections.abc import Iterable, Sequence
from functools import partial
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar, final
from weakref import ref

from attrs import define, field

from inference_session import _fork
from inference_session._history import TokenHistory
from inference_session._lease import Lease, LeasedBlock, expired, leases, no_exit
from inference_session._ledger import NO_CACHE, NO_TOKENS, Ledger
from inference_session._session import Session
from inference_session._tokens import as_tokens, checked_copy, common_prefix_length
from inference_session.exceptions import (
    BorrowExpiredError,
    SessionClosedError,
    SessionError,
    SessionForkedError,
    SessionOwnerError,
)


if TYPE_CHECKING:
    from inference_session._slots import StateSlots

KV = TypeVar("KV")


@final
@define(eq=False, repr=False)
class BorrowedState(LeasedBlock, Generic[KV]):
    """The tokens and the KV cache of one session, for the length of one `with` block.

    It comes from `StateSlots.borrow` and `StateSlots.borrow_all`. The token history is the truth; the KV cache covers
    its first `kv_length` tokens; the others are `pending`: what the model must be fed next. Nothing is final before the
    block ends or `commit` is called. An exception that leaves the block takes the session back to where it was.

    After the block, every member raises `BorrowExpiredError`.
    """

    _session: Session
    _slots: "StateSlots[KV]"
    _lease: Lease = field(init=False, default=expired)
    _ledger: Ledger[KV] = field(init=False)

    @property
    def kv_cache(self) -> KV:
        """The KV cache, made by `create` when first asked for.

        Set it where a step returns a new cache instead of changing the old one. The cache that a failure would go back
        to is kept until the next commit; any other that is replaced is released.

        Raises:
            StateMismatchError: if the cache that `create` returned isn't empty.
        """
        lease = self._lease  # CPython takes longer to call it where it stands
        if lease() is None:
            raise BorrowExpiredError(self._session.id)
        cache = self._ledger.kv_cache
        return self._ledger.open_cache() if cache is NO_CACHE else cache

    @kv_cache.setter
    def kv_cache(self, cache: KV) -> None:
        self._current().replace_cache(cache)

    @property
    def token_history(self) -> Sequence[int]:
        """All tokens of the conversation: a live, read-only view. Nothing is copied but what is sliced."""
        self._current()
        return TokenHistory(self._current)

    @property
    def kv_length(self) -> int:
        """How many tokens of the history the KV cache covers."""
        return self._current().kv_length

    @property
    def pending(self) -> Sequence[int]:
        """The tokens that the KV cache doesn't cover yet, `token_history[kv_length:]`: a new list each time."""
        ledger = self._current()
        return ledger.history[ledger.kv_length :].tolist()

    def append(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the history: all of them, or none and an error.

        Args:
            tokens: token ids, ints from 0 to 2**31 - 1. An `array` or a NumPy buffer of C ints is copied as it is;
                whatever else holds ints (NumPy's and PyTorch's too) is converted.

        Raises:
            ValueError: if an id isn't such an int.
            TypeError: if `tokens` isn't iterable.
        """
        lease = self._lease
        if lease() is None:
            raise BorrowExpiredError(self._session.id)
        history = self._ledger.history
        try:
            if (
                isinstance(tokens, list)
                and (tokens[0] if len(tokens) == 1 else min(tokens, default=0)) >= 0
            ):
                history.fromlist(tokens)  # nothing is quicker for the one token of a decode
                return
        except (TypeError, OverflowError):
            pass
        history.extend(checked_copy(as_tokens(tokens)))

    def advance(self, count: int) -> None:
        """Say that the model was fed the next `count` pending tokens, so that the KV cache covers them now.

        Raises:
            ValueError: if `count` is negative, or more than are pending.
            StateMismatchError: if `length(kv_cache)` hasn't grown by `count`.
        """
        lease = self._lease
        if lease() is None:
            raise BorrowExpiredError(self._session.id)
        ledger = self._ledger
        covered = ledger.kv_length + index(count)
        if not ledger.kv_length <= covered <= len(ledger.history):
            pending = len(ledger.history) - ledger.kv_length
            raise ValueError(f"can't advance by {count} tokens, as {pending} are pending")
        cache, length_of = ledger.kv_cache, ledger.slots.length
        length = 0 if cache is NO_CACHE else length_of(cache)
        if length != covered:  # what check_cache does, less a call, as every step comes here
            raise ledger.mismatch(covered, length)
        ledger.kv_length = covered

    def commit(self) -> None:
        """Make this the state that a later failure in the block goes back to.

        Raises:
            StateMismatchError: if the KV cache doesn't cover `kv_length` tokens; nothing is committed then.
        """
        ledger, registration = self._current(), self._session._registration
        ledger.savepoint = ledger.new_savepoint()
        if registration is not None:
            registration.make_room()

    def rewind(self, length: int, *, pending: int = 1) -> None:
        """Forget all but the first `length` tokens of the history.

        The KV cache then covers at most `length - pending` of them, so that there is something to decode from; to
        go on with other tokens at once, as speculative decoding does, pass 0. A KV cache that covers more and can't be
        truncated is released.

        Raises:
            ValueError: if the history is shorter than `length`, or a number is negative.
            StateMismatchError: if `truncate` didn't do as it should.
        """
        ledger = self._current()
        length, pending = index(length), index(pending)
        if not 0 <= length <= len(ledger.history):
            raise ValueError(
                f"can't rewind to {length} tokens, as the history has {len(ledger.history)}"
            )
        if pending < 0:
            raise ValueError(f"pending must not be negative, got {pending}")
        ledger.cut_cache(max(length - pending, 0))
        ledger.rewrite(length, NO_TOKENS)

    def reuse_prefix(self, tokens: Iterable[int]) -> int:
        """Make `tokens` the history, and keep what is cached of the longest prefix that they have in common with it.

        At least one token is left pending, so that there is something to decode from.

        Args:
            tokens: as for `append`. An `array` or a NumPy buffer of C ints is fastest: it is compared as memory.

        Returns:
            How many tokens are reused, and needn't be fed again.

        Raises:
            ValueError: if an id isn't an int from 0 to 2**31 - 1; nothing changes then.
            TypeError: if `tokens` isn't iterable.
            StateMismatchError: if `truncate` didn't do as it should.
        """
        ledger = self._current()
        wanted = as_tokens(tokens)
        common = common_prefix_length(ledger.history, wanted)
        rest = checked_copy(wanted, common)
        ledger.cut_cache(max(min(common, len(wanted) - 1), 0))
        ledger.rewrite(common, rest)
        return ledger.kv_length

    def __repr__(self) -> str:
        if self._lease() is None:
            return f"<BorrowedState of session {self._session.id}, not borrowed>"
        tokens, covered = len(self._ledger.history), self._ledger.kv_length
        return f"<BorrowedState of session {self._session.id}, {tokens} tokens, {covered} in the KV cache>"

    def _current(self) -> Ledger[KV]:
        if self._lease() is None:
            raise BorrowExpiredError(self._session.id)
        return self._ledger

    def __enter__(self) -> "BorrowedState[KV]":
        if self._exit.__class__ is not partial:
            self._begin()  # raises; what follows is the rest of it, less a call
        try:
            lease = ref(self._exit)
            self._exit = no_exit
            self._take(self._keep() if lease() is None else lease)
        except BaseException:
            self._exit = no_exit
            raise
        return self

    def _take(self, lease: Lease) -> None:
        session = self._session
        try:
            ledger = session._ledger
        except AttributeError:
            if isinstance(session, Session):
                raise  # not initialised
            raise TypeError(
                f"only a Session can be borrowed, got {type(session).__name__!r}"
            ) from None
        if (
            ledger is None
            or ledger.slots is not self._slots
            or session._closed
            or session._generation != _fork.generation
        ):
            self._check_free()  # before it is taken, so as to be in nobody's way
            ledger = None
        taken = leases.setdefault(id(session), lease) is lease
        if not taken or ledger is None or ledger is not session._ledger or session._closed:
            ledger = self._take_carefully(lease)
        self._ledger, self._lease = ledger, lease

    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        session = self._session
        try:
            if self._lease is expired:
                raise BorrowExpiredError(session.id)
            if session._generation != _fork.generation:
                self._leave(exc_type)
                return
            if exc_type is not None:
                self._undo(exc)
                return
            try:
                self._ledger.savepoint = savepoint = self._ledger.new_savepoint()
            except BaseException as failure:
                self._undo(failure)
                raise
            self._lease = expired
            if (
                savepoint[0] > 0 and session._registration is None
            ):  # what _give_back does, less two calls
                del leases[id(session)]
                if session._closed:
                    session._free()
            else:
                session._give_back()
        finally:
            self._exit = no_exit

    def _check_free(self) -> None:
        session = self._session
        if session._generation != _fork.generation:
            raise SessionForkedError(session.id)
        if session._closed:
            raise SessionClosedError(session.id)
        ledger = session._ledger
        if ledger is not None and ledger.slots is not self._slots and not ledger.is_blank():
            raise SessionOwnerError(session.id)

    def _take_carefully(self, lease: Lease) -> Ledger[KV]:
        """Take a session that is new, busy, unfinished, or has changed since it was found free."""
        session = self._session
        unfinished, ledger = session._take(lease), session._ledger
        if ledger is not None:
            if unfinished:
                ledger.roll_back()
            if ledger.is_blank():
                session._ledger = None
        try:
            self._check_free()
        except SessionError:
            session._give_back()
            raise
        if session._ledger is None:
            session._ledger = session._new_ledger(self._slots)
        return session._ledger

    def _undo(self, failure: BaseException | None) -> None:
        self._ledger.roll_back(failure)
        self._give_back(failure)

    def _give_back(self, failure: BaseException | None = None) -> None:
        self._lease = expired
        self._session._give_back(failure)

    def _leave(self, exc_type: type[BaseException] | None) -> None:
        """End in a forked child, where neither the session nor its KV cache may be touched."""
        self._lease = expired
        if exc_type is None:
            raise SessionForkedError(self._session.id)
