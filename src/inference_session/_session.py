"""The session: who it is, who has it now, and how it ends."""

import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Never, NoReturn, SupportsIndex, TypeVar, final
from uuid import UUID, uuid4
from weakref import ref

from attrs import define

from inference_session import _fork
from inference_session._lease import Lease, leases, replace_dead
from inference_session._ledger import Ledger
from inference_session.exceptions import SessionBusyError


if TYPE_CHECKING:
    from inference_session._registry import Registration
    from inference_session._slots import StateSlots

KV = TypeVar("KV")

_NEVER_A_COPY: Final = (
    "'Session' can't be copied or pickled, as two owners of one KV cache would corrupt it: "
    "send session.id instead, or feed the same tokens to a new session"
)


@final
@define(eq=False, repr=False, init=False, getstate_setstate=False)
class Session:
    """One conversation's state in an inference engine: an identity, and private slots for the engine.

    The slots hold the KV cache and the token history across prefill and decode. An engine reaches them through
    `inference_session.engine.StateSlots`, one borrow at a time. A session may be handed between threads and tasks; it
    equals itself only, and is never a copy.

    `Session()` has a random id. As a context manager, a session closes itself at the end of the block.
    """

    _id: UUID
    _generation: int
    _closed: bool
    _ledger: Ledger[Any] | None
    _registration: "Registration | None"
    """What connects it to a registry, if it is in one."""

    def __init__(self, *args: Never, **kwargs: Never) -> None:
        if args or kwargs:  # attrs.evolve comes here, too
            raise TypeError(
                f"Session() takes no arguments; for an id, use Session.with_id. {_NEVER_A_COPY}"
            )
        self._begin(uuid4())

    @classmethod
    def new(cls) -> "Session":
        """Return a new session with a random id (UUID version 4), as `Session()` does."""
        return cls()

    @classmethod
    def with_id(cls, id: UUID) -> "Session":  # noqa: A002 it's what it is
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
        self._generation = _fork.generation
        self._closed = False
        self._ledger = None
        self._registration = None
        self._id = id

    @property
    def id(self) -> UUID:
        """The session's identity. It never changes."""
        return self._id

    @property
    def token_count(self) -> int:
        """How many tokens the history holds, committed ones only; 0 once the state is freed. Never blocks."""
        ledger = self._ledger
        return 0 if ledger is None else ledger.token_count

    @property
    def closed(self) -> bool:
        """Whether the session was closed. An engine can ask in mid-step, to learn that it was cancelled."""
        return self._closed

    def close(self) -> None:
        """Free the state through the engine's `release`, and refuse to be borrowed from now on.

        Any thread may call it, any number of times; it never blocks. If a borrow is under way, the state is freed when
        that ends: closing is how a server cancels. In a forked child nothing is freed, as the state is the parent's.

        Raises:
            Exception: what `release` raised. The session is closed all the same, and `release` isn't called again.
        """
        registration = self._registration
        if registration is None:
            self._closed = True
        else:
            registration.close(self)
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
        lease = leases.get(id(self))
        if self._closed:
            state = "closed"
        elif lease is not None and lease() is not None:
            state = "borrowed"
        else:
            state = "idle"
        return f"<Session {self._id} {state}, {self.token_count} tokens>"

    def __del__(self) -> None:
        try:
            ledger = self._ledger
        except AttributeError:  # not initialised
            return
        leases.pop(id(self), None)  # of something that didn't end, and won't
        if ledger is None or self._is_forked():
            return
        try:
            if ledger.holds_cache() and ledger.slots.release is not None and not self._closed:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            ledger.close()

    def _is_forked(self) -> bool:
        return self._generation != _fork.generation

    def _new_ledger(self, slots: "StateSlots[KV]") -> Ledger[KV]:
        """Return a ledger that knows what the session is a part of."""
        registration = self._registration
        if registration is None:
            return Ledger(self._id, slots)
        return registration.new_ledger(self._id, slots)

    def _take(self, lease: Lease) -> bool:
        """Take the session, at once or not at all, and return whether there is work to undo.

        Raises:
            SessionBusyError: if somebody else has it.
        """
        last = leases.setdefault(id(self), lease)
        if last is lease:
            return False
        if last() is not None or not replace_dead(id(self), last, lease):
            raise SessionBusyError(self._id)
        return True

    def _give_back(self, failure: BaseException | None = None) -> None:
        """End what `_take` began; if the session was closed meanwhile, free its state."""
        ledger, registration = self._ledger, self._registration
        if ledger is not None and ledger.is_blank():
            self._ledger = None  # any engine may begin it
        leases.pop(id(self), None)
        if self._closed:
            self._free(failure)
        elif registration is not None:
            registration.make_room()

    def _free(self, failure: BaseException | None = None) -> None:
        """Let go of the state, unless a borrow is under way: that one comes here when it ends."""
        if not self._is_forked():
            self._while_free(partial(self._let_go, failure))

    def _let_go(self, failure: BaseException | None) -> None:
        ledger = self._ledger
        if ledger is not None:
            try:
                ledger.close(failure)
            except BaseException:
                if (
                    not ledger.holds_cache()
                ):  # else it was interrupted: the next to come here goes on
                    self._ledger = None
                raise
            self._ledger = None

    def _while_free(self, work: Callable[[], None]) -> bool:
        """Do something with the session taken, unless somebody has it, and return whether that was done.

        If there is work to undo, or this work fails, that's left to the next to take the session.
        """
        keeper: Keeper | None = Keeper()
        try:
            try:
                unfinished = self._take(ref(keeper))
            except SessionBusyError:
                return False
            work()
            if not unfinished:
                leases.pop(id(self), None)
            return True
        finally:
            keeper = None  # a traceback must not keep the lease alive

    def _hold(self, lease: Lease) -> Lease | None:
        """Take the session unless it is borrowed, and return the lease: if it's being closed or evicted, that one's."""
        while True:
            last = leases.setdefault(id(self), lease)
            if last is lease or isinstance(last(), Keeper):
                return last
            if last() is not None:
                return None
            if replace_dead(id(self), last, lease):
                return lease

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(_NEVER_A_COPY)

    def __replace__(self, **changes: Never) -> NoReturn:
        raise TypeError(_NEVER_A_COPY)

    def __init_subclass__(cls, **kwargs: object) -> NoReturn:
        raise TypeError(
            "'Session' can't be subclassed, as engines rely on what it is; "
            "let your class have a session instead of being one"
        )


class Keeper:
    """What a lease refers to while the library itself has a session, to close or to evict it."""


def not_a_uuid(id: object) -> TypeError:  # noqa: A002 it's what it is
    """Return the error for something that should be an id."""
    return TypeError(
        f"id must be a uuid.UUID, got {type(id).__name__!r}; UUID(text) makes one from a string"
    )
