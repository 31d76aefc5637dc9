"""The session: its identity, the engine's slots, and the end of both."""

import warnings
from collections.abc import Callable
from os import getpid
from types import TracebackType
from typing import Any, BinaryIO, Final, Never, Protocol, TypeAlias, TypeVar, final
from uuid import UUID, uuid4
from weakref import ReferenceType, ref

from attrs import define, field

from inference_session import _fork
from inference_session._lease import Lease, expired, nobody, replace, take
from inference_session._never_copied import NeverCopied, shown_without_arguments
from inference_session._slot import NO_VALUES, Values
from inference_session._tokens import NO_TOKENS, Ids
from inference_session.exceptions import BorrowExpiredError


KV = TypeVar("KV")

NO_CACHE: Final[Any] = object()

Savepoint: TypeAlias = tuple[int, Ids, int | None, Values, bool]
"""The state to return to after a failure: how many tokens; the last of them, as far as the history has dropped them
since; how many of them the KV cache covers, None if there is no KV cache to return to; the values of further slots; and
whether the last borrow failed after handing out the KV cache. A tuple, for speed: every step makes one."""

NOTHING: Final[Savepoint] = (0, NO_TOKENS, None, NO_VALUES, False)


HOLDERS: Final[dict[int, "ReferenceType[Session]"]] = {}
"""Which session has a KV cache, by its `id()`, if there is a `release`. Ask that session, as an entry may be old."""


class CacheFunctions(Protocol[KV]):
    """An engine's description of its KV cache: see `StateSlots`, the only implementation."""

    @property
    def create(self) -> Callable[[], KV]: ...
    @property
    def length(self) -> Callable[[KV], int]: ...
    @property
    def truncate(self) -> Callable[[KV, int], KV] | None: ...
    @property
    def share(self) -> Callable[[KV, int], KV] | None: ...
    @property
    def dump(self) -> Callable[[KV, BinaryIO], object] | None: ...
    @property
    def load(self) -> Callable[[BinaryIO], KV] | None: ...
    @property
    def release(self) -> Callable[[KV], object] | None: ...
    @property
    def nbytes(self) -> Callable[[KV], int] | None: ...


class Observer(Protocol):
    """Is told of a session's steps, as a registry is."""

    def borrowing(
        self, slots: CacheFunctions[Any], lease: Lease, /
    ) -> tuple[CacheFunctions[Any], Lease]:
        """Return the engine's functions and the lease for a borrow about to begin: these, or others that report calls.

        It is asked at least once for each `StateSlots`, and at every borrow if it returns other functions.
        """
        ...

    def committing(self, session: "Session", /) -> None:
        """Record a step about to be committed. An error here fails the step."""
        ...

    def rolled_back(self, session: "Session", failure: BaseException | None, /) -> None:
        """Record a failed step, while the session is still taken."""
        ...

    def settled(self, session: "Session", /) -> None:
        """Record a committed step, or the end of a borrow."""
        ...

    def close(self, session: "Session", /) -> None:
        """Set `session._closed`, in one instant with the observer's own record of it."""
        ...


@final
@define(eq=False, repr=False, init=False, match_args=False, getstate_setstate=False)
class Session(NeverCopied):
    """One conversation's state in an inference engine: an identity, and private slots for the engine.

    The slots hold the KV cache and the token history across prefill and decode. An engine reaches them through
    `inference_session.engine.StateSlots`, one borrow at a time. A session may be handed between threads and tasks; it
    equals only itself, and is never copied.

    `Session()` has a random id. As a context manager, a session closes itself at the end of the block.
    """

    __module__ = "inference_session"  # the public module, for pickles and `help`

    _id: UUID

    # The engine's slots. Opaque here; StateSlots gives them back with their types.
    _kv_cache: Any = field(init=False, repr=False)
    _token_history: Ids = field(init=False, repr=False)
    _kv_length: int = field(init=False, repr=False)
    """How many tokens of the history the KV cache covers."""
    _key: str = field(init=False, repr=False)
    """The engine's name for everything the KV cache depends on besides the tokens."""
    _values: Values = field(init=False, repr=False)
    """The values of further slots. Copied before a change, if the savepoint has them."""
    _slots: CacheFunctions[Any] | None = field(init=False, repr=False)
    """The engine of this session, from its first borrow on; None as long as nothing is committed."""

    # The way back.
    _savepoint: Savepoint = field(init=False, repr=False)
    _savepoint_cache: Any = field(init=False, repr=False)
    """The KV cache of the savepoint, if the engine has replaced it since."""
    _handed_out: bool = field(init=False, repr=False)
    """Whether this borrow has handed out the KV cache to the engine."""

    # Exclusive use: see `_lease`.
    _lease: Lease = field(init=False, repr=False)
    _writer: Lease = field(init=False, repr=False)

    # The end.
    _pid: int = field(init=False, repr=False)
    """The process it belongs to."""
    _closed: bool = field(init=False, repr=False)
    _at_the_end: object = field(init=False, repr=False)
    """Set if the session was closed or passed over while borrowed: a weak reference, whose callback settles the matter
    when the lease dies, in case the borrow never reaches its end."""
    _observer: Observer | None = field(init=False, repr=False)

    _instead = (
        "as two owners of one KV cache would corrupt it: "
        "send session.id, or make another session of it: state.branch() here, slots.save() elsewhere"
    )

    @shown_without_arguments
    def __init__(self, *args: Never, **kwargs: Never) -> None:
        if args or kwargs:  # attrs.evolve comes here, too
            raise TypeError(
                f"Session() takes no arguments; for an id, use Session.with_id. {self._refusal()}"
            )
        self._begin(uuid4())

    @classmethod
    def new(cls) -> "Session":
        """Return a new session with a random id (UUID version 4), as `Session()` does."""
        return cls()

    @classmethod
    def with_id(cls, id: UUID) -> "Session":  # noqa: A002 its natural name
        """Return a new session with exactly this id, for tests and replay.

        Raises:
            TypeError: if `id` isn't a `uuid.UUID`.
        """
        if not isinstance(id, UUID):
            raise not_a_uuid(id)
        session = cls.__new__(cls)
        session._begin(id)
        return session

    def _begin(self, id: UUID) -> None:  # noqa: A002
        if hasattr(self, "_id"):
            raise TypeError("a 'Session' is initialised only once; make a new one with Session()")
        self._kv_cache = self._savepoint_cache = NO_CACHE
        self._token_history = NO_TOKENS
        self._kv_length = 0
        self._key = ""
        self._values = NO_VALUES
        self._slots = None
        self._savepoint = NOTHING
        self._handed_out = False
        self._lease = self._writer = nobody
        self._pid = _fork.pid or getpid()
        self._closed = False
        self._at_the_end = None
        self._observer = None
        self._id = id

    @property
    def id(self) -> UUID:
        """The session's identity. It never changes."""
        return self._id

    @property
    def token_count(self) -> int:
        """How many committed tokens the history holds; 0 once the state is freed. Never blocks."""
        return self._savepoint[0]

    @property
    def borrowed(self) -> bool:
        """Whether a step is under way at this moment. To decide whether to begin one, borrow: this may have changed."""
        holder = self._lease()
        return not (holder is None or isinstance(holder, Maintenance) or self._is_forked())

    @property
    def closed(self) -> bool:
        """Whether the session was closed. An engine can check it in mid-step, to notice a cancellation."""
        return self._closed

    def close(self) -> None:
        """Free the state through the engine's `release`, and refuse to be borrowed from now on.

        Any thread may call it, any number of times; it never blocks. If a borrow is under way, the state is freed at
        its end: a server cancels a step by closing its session. In a forked child nothing is freed, as the state is the
        parent's.

        Raises:
            Exception: any error of `release`. The session is closed all the same, and `release` isn't called again.
        """
        # In a child still being forked, the observer's lock may be held by a thread of the parent.
        alone = not _fork.pid and self._is_forked()
        if alone or self._observer is None:
            self._closed = True
        if not alone and (observer := self._observer) is not None:  # set by now, maybe
            observer.close(self)
        self._free()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "borrowed" if self.borrowed else "idle"
        return f"<Session {self._id} {state}, {self.token_count} tokens>"

    def _is_forked(self) -> bool:
        return self._pid != _fork.pid and not _fork.is_here(self._pid)

    def _is_empty(self) -> bool:
        """Whether nothing is committed: neither tokens nor a KV cache."""
        return self._savepoint[0] == 0 and self._savepoint[2] is None

    def _give_back(self, failure: BaseException | None = None) -> None:
        """Give up the lease; if the session was closed meanwhile, free its state."""
        if self._is_empty():
            self._slots = None  # any engine may begin it next
        self._handed_out, self._lease = False, nobody
        if self._closed or self._observer is not None:
            self._settle(failure)

    def _maintain(self, work: Callable[[], None]) -> bool:
        """Take the session and do some work, unless it is taken already; return whether the work was done.

        Leftovers of a dead lease, and of this work if it fails, remain for the next borrow to undo.
        """
        holder: Maintenance | None = Maintenance()
        try:
            last = take(self, ref(holder))
            if last is None:
                return False
            work()
            self._lease = last
            return True
        finally:
            holder = None  # a traceback must not keep the lease alive

    def _free(self, failure: BaseException | None = None) -> None:
        """Free the state; if a borrow is under way, its end does so."""
        if self._is_forked():
            return
        while not self._maintain(lambda: self._let_go(failure)):
            if self._settle_at_the_end():
                return

    def _settle_at_the_end(self) -> bool:
        """Settle once the present borrow is over, even if its end never runs; return False if its lease is dead."""
        lease = self._lease

        def died(_: object) -> None:
            replace(self, lease, expired)  # CPython 3.15 calls this a little before it dies
            self._settle()

        try:
            self._at_the_end = ref(lease(), died)
        except TypeError:  # None has no weak references
            return False
        return True

    def _settle(self, failure: BaseException | None = None) -> None:
        observer = self._observer  # another thread may close the session meanwhile
        if self._closed:
            self._free(failure)
        elif observer is not None:
            observer.settled(self)

    def _let_go(self, failure: BaseException | None = None) -> None:
        """Release all KV caches, and forget the tokens. If interrupted, it can be started again."""
        try:
            self._release_caches(failure)
        finally:
            if not self._holds_cache():
                self._token_history, self._savepoint = self._token_history[:0], self._nothing
                self._values = self._no_values
                self._slots = self._at_the_end = None

    def _release_caches(self, failure: BaseException | None = None) -> None:
        self._writer = writer = self._nobody
        try:
            self._release_cache(writer, failure)
        finally:
            self._release_savepoint_cache(writer)

    def _holds_cache(self) -> bool:
        return self._kv_cache is not self._no_cache or self._savepoint_cache is not self._no_cache

    def _release_cache(self, writer: Lease, failure: BaseException | None = None) -> None:
        """Release the KV cache, which makes all tokens pending.

        An exception from `release` becomes a note on the failure that led here, if there is one.
        """
        release = self._release_of(self._slots)
        if release is None or self._kv_cache is self._no_cache:
            self._take_out_cache(writer)
            return
        try:
            release(self._take_out_cache(writer))
        except Exception as error:
            if failure is None:
                raise
            failure.add_note(
                f"Then release(kv_cache) of session {self._id} raised {type(error).__name__}."
            )

    def _release_savepoint_cache(self, writer: Lease) -> None:
        release = self._release_of(self._slots)
        if release is None or self._savepoint_cache is self._no_cache:
            self._take_out_savepoint_cache(writer)
        else:
            release(self._take_out_savepoint_cache(writer))

    # A cache goes straight from here to `release`, so no frame of a traceback has it among its variables, and no
    # interrupt comes in between.

    def _take_out_cache(self, writer: Lease) -> Any:
        holders, key = self._holders, id(self._kv_cache)
        if self._writer is not writer:
            raise BorrowExpiredError(self._id)
        cache = self._kv_cache
        count, dropped, covered, values, failed = self._savepoint
        if self._savepoint_cache is self._no_cache:
            covered = None
        left = (count, dropped, covered, values, failed)
        self._kv_cache, self._kv_length, self._savepoint = self._no_cache, 0, left
        if key in holders:
            del holders[key]
        return cache

    def _take_out_savepoint_cache(self, writer: Lease) -> Any:
        holders, key = self._holders, id(self._savepoint_cache)
        if self._writer is not writer:
            raise BorrowExpiredError(self._id)
        cache = self._savepoint_cache
        if cache is not self._no_cache:
            count, dropped, _, values, failed = self._savepoint
            left = (count, dropped, None, values, failed)
            self._savepoint_cache, self._savepoint = self._no_cache, left
            if key in holders:
                del holders[key]
        return cache

    # A module's globals may be None when the interpreter exits, so finalizers use class attributes and defaults.

    _no_cache = NO_CACHE
    _nothing = NOTHING
    _no_values = NO_VALUES
    _holders = HOLDERS
    _nobody = staticmethod(nobody)

    def _release_of(
        self, slots: CacheFunctions[KV] | None, getpid: Callable[[], int] = getpid
    ) -> Callable[[KV], object] | None:
        """Return the engine's `release`, if any; None in a forked child, whose KV caches are the parent's."""
        return None if slots is None or self._pid != getpid() else slots.release

    @shown_without_arguments
    def __del__(
        self, getpid: Callable[[], int] = getpid, warn: Callable[..., None] = warnings.warn
    ) -> None:
        try:
            slots = self._slots
        except AttributeError:  # not initialised
            return
        if slots is None or slots.release is None or self._pid != getpid():
            return
        self._lease = self._nobody  # its holder is garbage, too
        try:
            if self._holds_cache() and not self._closed:
                warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self._closed = True  # a recorded warning keeps the session alive
            self._let_go()


class Maintenance:
    """Referent of a lease while the library itself has a session, to close or to evict it."""


def not_a_uuid(id: object) -> TypeError:  # noqa: A002 its natural name
    """Return the error for an id of another type."""
    return TypeError(
        f"id must be a uuid.UUID, got {type(id).__name__!r}; UUID(text) makes one from a string"
    )
