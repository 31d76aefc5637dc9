"""What a session holds between steps: its tokens, the KV cache that covers some of them, and a savepoint.

Nothing here is guarded: whoever calls must have the session for itself. But an exception can strike at any instant,
and must leave nothing torn. CPython raises what signals cause on entering a Python function, after a call and when
jumping back, nowhere else. So assignments that belong together stand in one statement; a cache is released by the call
that follows on its removal; and what `create` and `truncate` return is stored by a loop over a `map`, which leaves no
instant between return and assignment.
"""

from array import array
from collections.abc import Callable
from itertools import starmap
from operator import index
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar
from uuid import UUID

from attrs import define, field

from inference_session import _fork
from inference_session.exceptions import StateMismatchError


if TYPE_CHECKING:
    from inference_session._slots import StateSlots

KV = TypeVar("KV")

NO_CACHE: Final[Any] = object()
NO_TOKENS: Final["array[int]"] = array("i")  # shared, so never written to
_NOT_KEPT: Final = -1

Savepoint: TypeAlias = tuple[int, "array[int]", int]
"""What can be gone back to: how many tokens; the last of them, as far as they were cut off the history; and how many of
them the KV cache covers, `_NOT_KEPT` if there's none to go back to."""


@define(eq=False, repr=False)
class Ledger(Generic[KV]):
    """The tokens and the KV cache of one session, and the way back to the savepoint."""

    session_id: UUID
    slots: "StateSlots[KV]"
    generation: int = field(init=False, factory=lambda: _fork.generation)

    history: "array[int]" = field(init=False, factory=lambda: array("i"))
    kv_cache: KV = field(init=False, default=NO_CACHE)
    kv_length: int = field(init=False, default=0)

    savepoint: Savepoint = field(init=False, default=(0, NO_TOKENS, _NOT_KEPT))
    spare: KV = field(init=False, default=NO_CACHE)
    """The savepoint's KV cache, if the engine has put another in its place."""

    @property
    def token_count(self) -> int:
        """How many tokens are committed."""
        return self.savepoint[0]

    def open_cache(self) -> KV:
        """Make a KV cache where there is none, and return it."""
        for self.kv_cache in starmap(self.slots.create, ((),)):  # noqa: B020
            break
        else:
            raise RuntimeError("create() raised StopIteration")
        try:
            self.check_cache(0)
        except BaseException:
            self.discard_cache()
            raise
        return self.kv_cache

    def replace_cache(self, cache: KV) -> None:
        """Put another KV cache in the place of the present one, which is kept if it is the savepoint's."""
        if cache is self.kv_cache:
            return
        if self.spare is NO_CACHE and self.savepoint[2] != _NOT_KEPT:
            self.spare, self.kv_cache = self.kv_cache, cache
            return
        release, replaced = self._release(), self.kv_cache
        spare = NO_CACHE if cache is self.spare else self.spare
        self.kv_cache, self.spare = cache, spare
        if release is not None and replaced is not NO_CACHE:
            release(replaced)

    def cut_cache(self, length: int) -> None:
        """Have the KV cache cover `length` tokens at most: none, where it can't be truncated."""
        if self.kv_length <= length:
            return
        if self.slots.truncate is None:
            self.discard_cache()
            return
        try:
            self._truncate_cache(self.slots.truncate, length)
        except BaseException:
            self.discard_cache()
            raise

    def check_cache(self, expected: int) -> None:
        """Raise StateMismatchError if the KV cache does not cover as many tokens as it should."""
        cache = self.kv_cache
        length = 0 if cache is NO_CACHE else self.slots.length(cache)
        if length != expected:
            raise self.mismatch(expected, length)

    def mismatch(self, expected: int, length: int) -> StateMismatchError:
        """Return the error for a KV cache of the wrong length; TypeError if that isn't even an int.

        Nobody knows what such a cache holds, so a rollback won't be content with its length.
        """
        count, cut_off, kept = self.savepoint
        self.savepoint = (count, cut_off, _NOT_KEPT if self.spare is NO_CACHE else kept)
        return StateMismatchError(self.session_id, expected, index(length))

    def discard_cache(self, failure: BaseException | None = None) -> None:
        """Let go of the KV cache, so that all tokens become pending.

        An exception from `release` becomes a note on the failure that led here, if one did.
        """
        release = self._release()
        count, cut_off, kept = self.savepoint
        left = (count, cut_off, _NOT_KEPT if self.spare is NO_CACHE else kept)
        cache, self.kv_cache, self.kv_length, self.savepoint = self.kv_cache, NO_CACHE, 0, left
        if release is None or cache is NO_CACHE:
            return
        try:
            release(cache)
        except Exception as error:
            if failure is None:
                raise
            failure.add_note(
                f"Then release(kv_cache) of session {self.session_id} raised {type(error).__name__}."
            )

    def rewrite(self, length: int, tokens: "array[int]") -> None:
        """Put `tokens` in the place of all that comes after the first `length` tokens of the history."""
        count, cut_off, kept = self.savepoint
        cut_off = self.history[length : count - len(cut_off)] + cut_off
        self.savepoint, self.history[length:] = (count, cut_off, kept), tokens

    def new_savepoint(self) -> Savepoint:
        """Return a savepoint of the present state, if the KV cache covers what it should."""
        cache, length_of = self.kv_cache, self.slots.length
        length = 0 if cache is NO_CACHE else length_of(cache)
        if (
            length != self.kv_length
        ):  # what check_cache does, without a call, as every step comes here
            raise self.mismatch(self.kv_length, length)
        if self.spare is not NO_CACHE:
            self._discard_spare()
        return (len(self.history), NO_TOKENS, _NOT_KEPT if cache is NO_CACHE else self.kv_length)

    def roll_back(self, failure: BaseException | None = None) -> None:
        """Go back to the savepoint. If this is interrupted, it can be begun again."""
        count, cut_off, _ = self.savepoint
        self.history[count - len(cut_off) :] = cut_off
        self.savepoint = (count, NO_TOKENS, self.savepoint[2])
        if self.spare is not NO_CACHE:
            self.discard_cache(failure)
            self.kv_cache, self.spare = self.spare, NO_CACHE
        if not self._cache_restored():
            self.discard_cache(failure)

    def holds_cache(self) -> bool:
        """Whether there is a KV cache to let go of."""
        return self.kv_cache is not NO_CACHE or self.spare is not NO_CACHE

    def is_blank(self) -> bool:
        """Whether the savepoint holds nothing, so that another engine may begin anew."""
        return self.savepoint[0] == 0 and self.savepoint[2] == _NOT_KEPT

    def close(self, failure: BaseException | None = None) -> None:
        """Let go of all KV caches. If this is interrupted, it can be begun again."""
        try:
            self.discard_cache(failure)
        finally:
            if self.spare is not NO_CACHE:
                self._discard_spare()

    def _truncate_cache(self, truncate: Callable[[KV, int], KV], length: int) -> None:
        count, cut_off, kept = self.savepoint
        if self.spare is NO_CACHE:
            kept = min(kept, length)
            # A KV cache that's being truncated can't be relied upon.
            self.savepoint = (count, cut_off, _NOT_KEPT)
        for self.kv_cache in map(truncate, (self.kv_cache,), (length,)):  # noqa: B020
            break
        else:
            raise RuntimeError("truncate(kv_cache, length) raised StopIteration")
        self.check_cache(length)
        self.kv_length, self.savepoint = length, (count, cut_off, kept)

    def _cache_restored(self) -> bool:
        """Bring the KV cache back to what it covered at the savepoint, if that can be had."""
        kept, truncate = self.savepoint[2], self.slots.truncate
        if kept == _NOT_KEPT:
            return False
        try:
            if truncate is None or self.slots.length(self.kv_cache) <= kept:
                self.check_cache(kept)
            else:
                self._truncate_cache(truncate, kept)
        except Exception:  # noqa: BLE001 the tokens are safe; it's computed anew
            return False
        self.kv_length = kept
        return True

    def _discard_spare(self) -> None:
        release = self._release()
        count, cut_off, _ = self.savepoint
        left = (count, cut_off, _NOT_KEPT)
        spare, self.spare, self.savepoint = self.spare, NO_CACHE, left
        if release is not None:
            release(spare)

    def _release(self) -> Callable[[KV], object] | None:
        """Return what gives a KV cache back; none does in a forked child, where they are the parent's."""
        return self.slots.release if self.generation == _fork.generation else None
