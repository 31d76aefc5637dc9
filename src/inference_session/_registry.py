"""The registry: many sessions by their ids, and the limits that they share.

A lock guards the books; no code of others runs while it is held. So what is done under the lock makes no call: Python
lets neither a signal handler in then, nor what a signal raises, and all of it is one instant. An entry is moved by one
turn of a loop over a `map`, which is none. What others wrote (`nbytes`, `release`) is called before or after, under the
session's lease.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from operator import index
from threading import RLock
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, SupportsIndex, TypeVar, cast, final
from uuid import UUID
from weakref import ReferenceType, ref

from attrs import define

from inference_session import _fork
from inference_session._lease import Lease, leases
from inference_session._ledger import NO_CACHE, Ledger, Savepoint
from inference_session._session import Keeper, Session, not_a_uuid
from inference_session.exceptions import (
    RegistryFullError,
    SessionExistsError,
    SessionNotFoundError,
)


if TYPE_CHECKING:
    from inference_session._slots import StateSlots

KV = TypeVar("KV")

_move_to_end: Final = OrderedDict[int, Any].move_to_end

_lock = RLock()  # a finalizer can come in at any allocation; it does no harm


@_fork.in_child
def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 a lock that another thread held can't be made new in place
    _lock = RLock()


@define(eq=False, repr=False)
class Registration:
    """What connects a session to its registry, and tells when it was last used.

    Sessions that were last used at about the same time share one.
    """

    registry: "ReferenceType[SessionRegistry]"
    """Weak, or else a registry and its sessions would be garbage in a cycle."""
    since: float
    until: float
    """When the last of them was last used."""

    def new_ledger(self, session_id: UUID, slots: "StateSlots[KV]") -> Ledger[KV]:
        """Return a ledger whose use the registry takes note of."""
        return RegisteredLedger(session_id, slots, self.registry)

    def make_room(self) -> None:
        """Evict KV caches, least recently used first, until those that are left are within the budget."""
        registry = self.registry()
        if registry is not None and registry._kv_total > registry._kv_limit:
            registry._evict_over_budget()

    def close(self, session: Session) -> None:
        """Close a session: that, and that it isn't registered any more, is one instant."""
        registry = self.registry()
        if registry is None:
            session._closed = True
        else:
            registry._remove(session)


@define(eq=False, repr=False)
class RegisteredLedger(Ledger[KV]):
    """The ledger of a session in a registry, which it tells of its use and of its KV cache's size.

    It does so while the session is taken, and before anything is committed: a KV cache can be measured at no other
    time, and the step fails if that does.
    """

    registry: "ReferenceType[SessionRegistry]"

    def new_savepoint(self) -> Savepoint:
        """Take note of a step that is about to be committed."""
        registry = self.registry()
        if registry is not None:
            registry._note(self, registry._measure(self))
        return super().new_savepoint()

    def roll_back(self, failure: BaseException | None = None) -> None:
        """Take note of a step that has failed; a KV cache that can't be measured then is let go of."""
        super().roll_back(failure)
        registry = self.registry()
        if registry is not None:
            try:
                nbytes = registry._measure(self)
            except Exception:  # noqa: BLE001 the tokens are safe; it's computed anew
                self.discard_cache(failure)
                nbytes = 0
            registry._note(self, nbytes)

    def nbytes(self) -> int:
        """Return how many bytes the KV cache holds, by the engine's own `nbytes`."""
        if self.kv_cache is NO_CACHE:
            return 0
        if self.slots.nbytes is None:
            raise TypeError(
                "the registry has max_kv_bytes, so it must know what a KV cache holds: give StateSlots an nbytes"
            )
        nbytes = index(self.slots.nbytes(self.kv_cache))
        if nbytes < 0:
            raise ValueError(f"nbytes(kv_cache) must not be negative, got {nbytes}")
        return nbytes


@final
@define(eq=False, repr=False, init=False, getstate_setstate=False)
class SessionRegistry:
    """The open sessions of a process by their ids, and limits to how many there are and what they hold.

    A session is used when it is borrowed or looked up. One that is borrowed is never closed or evicted from here,
    whatever the limits. A session that is closed, by whomever, isn't in the registry any more. Any thread may call
    anything here. Nothing happens in the background.

    As a context manager, a registry closes itself at the end of the block.

    Args:
        max_sessions: how many sessions may be open. If `open` would exceed it, the least recently used one that isn't
            borrowed is closed first.
        idle_timeout: after how many seconds without use a session may be closed (give or take a thousandth). It is
            closed by `close_idle`, or by `open`, which begins with that; until then it can be found, and used again.
        max_kv_bytes: how many bytes all KV caches may hold, as `StateSlots(nbytes=...)` tells. When a borrow that has
            exceeded it commits or ends, KV caches are evicted, the least recently used first. No token is lost: the
            next step of those sessions computes them anew. An engine without `nbytes` gets a `TypeError` at the end of
            its first borrow.

    Raises:
        TypeError, ValueError: if a limit isn't a number of its kind, or leaves nothing.
    """

    _max_sessions: int | None
    _idle_timeout: float | None
    _kv_limit: float

    # By the ids' ints, as the hash of a UUID itself is slow; the least recently used first.
    _sessions: OrderedDict[int, Session]
    _kv_bytes: OrderedDict[int, int]
    _orders: tuple[OrderedDict[int, Any], ...]
    _room: float
    """How many more sessions may be opened."""
    _kv_total: int
    _closed: bool
    _latest: Registration
    _resolution: float
    """How exactly it's known when a session was last used, in seconds."""

    def __init__(
        self,
        *,
        max_sessions: int | None = None,
        idle_timeout: float | None = None,
        max_kv_bytes: int | None = None,
    ) -> None:
        _check_limit("max_sessions", max_sessions, 1)
        _check_limit("max_kv_bytes", max_kv_bytes, 0)
        _check_timeout(idle_timeout)
        self._max_sessions = max_sessions
        self._idle_timeout = idle_timeout
        self._kv_limit = math.inf if max_kv_bytes is None else max_kv_bytes
        self._sessions = OrderedDict()
        self._kv_bytes = OrderedDict()
        self._resolution = (idle_timeout or math.inf) / 1024
        self._orders = (self._sessions, self._kv_bytes)
        self._room = math.inf if max_sessions is None else max_sessions
        self._kv_total = 0
        self._closed = False
        self._latest = Registration(ref(self), -math.inf, -math.inf)

    def open(self, id: UUID | None = None) -> Session:  # noqa: A002 it's what it is
        """Return a new session, with a random id if none is given.

        What `release` raises for a session that had to go is left to `sys.unraisablehook`, as it isn't about this one.

        Raises:
            SessionExistsError: if there is an open session with this id.
            RegistryFullError: if there are `max_sessions` already, and all of them are borrowed.
            TypeError: if `id` isn't a `uuid.UUID`.
            RuntimeError: if the registry was closed.
        """
        session = Session() if id is None else Session.with_id(id)
        if self._idle_timeout is not None:
            self._close_idle(_say)
        borrowed: set[Session] = set()
        while not self._add(session):
            if len(borrowed) >= len(self):
                present = self._snapshot()  # perhaps none, as other threads close them
                if present and borrowed.issuperset(present):
                    raise RegistryFullError(cast("int", self._max_sessions))
            first = self._first()
            if first is not None and self._close_unused(first, first._registration, _say) is None:
                borrowed.add(first)
                self.get(first.id)  # it's being used
        return session

    def __getitem__(self, id: UUID) -> Session:  # noqa: A002
        """Return the open session with this id.

        Raises:
            SessionNotFoundError: if there's none.
        """
        session = self.get(id)
        if session is None:
            raise SessionNotFoundError(id)
        return session

    def get(self, id: UUID) -> Session | None:  # noqa: A002
        """Return the open session with this id, or None."""
        try:
            key = id.int
        except AttributeError:
            raise not_a_uuid(id) from None
        now = self._latest if self._idle_timeout is None else self._now()
        sessions, kv_bytes = self._sessions, self._kv_bytes
        moves = map(_move_to_end, self._orders, (key, key))
        with _lock:
            if key not in sessions:
                return None
            session = sessions[key]
            session._registration = now
            for _ in moves:
                break
            if key in kv_bytes:
                for _ in moves:
                    break
        return session

    def __contains__(self, id: UUID) -> bool:  # noqa: A002
        return _key(id) in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[UUID]:
        """Iterate over the ids of the sessions that are open now, whatever becomes of them."""
        return iter([session.id for session in self._snapshot()])

    def close(self, id: UUID | None = None) -> None:  # noqa: A002
        """Close the session with this id; or, without an id, all of them, and open no more.

        Raises:
            SessionNotFoundError: if there's no open session with this id.
            Exception: what `release` raised. The sessions are closed all the same.
        """
        if id is not None:
            key = _key(id)
            with _lock:
                session = self._sessions[key] if key in self._sessions else None  # noqa: SIM401 no call
            if session is None:
                raise SessionNotFoundError(id)
            session.close()
            return
        self._closed = True
        errors: list[Exception] = []
        while (first := self._first()) is not None:
            try:
                first.close()
            except Exception as error:  # noqa: BLE001 raised when all are closed
                errors.append(error)
        _raise_first(errors)

    def close_idle(self) -> int:
        """Close the sessions that weren't used for longer than `idle_timeout`, and return how many that were.

        Raises:
            Exception: what `release` raised. The sessions are closed all the same.
        """
        errors: list[Exception] = []
        closed = self._close_idle(errors.append)
        _raise_first(errors)
        return closed

    def __enter__(self) -> "SessionRegistry":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SessionRegistry, {len(self)} sessions>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "'SessionRegistry' can't be copied or pickled, as its sessions can't: "
            "send their ids, and have one registry in each process"
        )

    # The books

    def _add(self, session: Session) -> bool:
        """Add a session, if there's room for it.

        Raises:
            SessionExistsError: if there is one with its id.
            RuntimeError: if the registry was closed.
        """
        key = session._id.int
        now = self._now()
        with _lock:
            exists, closed = key in self._sessions, self._closed
            if not exists and not closed and self._room > 0:
                self._sessions[key] = session
                self._room -= 1
                session._registration = now
                return True
        if closed:
            raise RuntimeError("the registry is closed; open sessions in another one")
        if exists:
            raise SessionExistsError(session.id)
        return False

    def _remove(
        self, session: Session, lease: Lease | None = None, used: Registration | None = None
    ) -> bool:
        """Remove a session and have it closed, and return whether it was there.

        If a lease is given, that is done only while the session has it, and has not been used since.
        """
        key, lease_key = session._id.int, id(session)
        sessions, kv_bytes = self._sessions, self._kv_bytes
        with _lock:
            if lease is not None:
                try:
                    if leases[lease_key] is not lease or session._registration is not used:
                        return False
                except KeyError:
                    return False
                for first in sessions:  # where every use would have moved it away
                    if first != key:
                        return False
                    break
            found = key in sessions and sessions[key] is session
            if found:
                del sessions[key]
                self._room += 1
                if key in kv_bytes:
                    self._kv_total -= kv_bytes[key]
                    del kv_bytes[key]
            session._closed = True
            session._registration = None
            return found

    def _measure(self, ledger: RegisteredLedger[Any]) -> int:
        return 0 if self._kv_limit == math.inf else ledger.nbytes()

    def _note(self, ledger: RegisteredLedger[Any], nbytes: int) -> None:
        """Take note of the use of a session, and of how many bytes its KV cache holds."""
        key = ledger.session_id.int
        now = self._now()
        sessions, kv_bytes = self._sessions, self._kv_bytes
        moves = map(_move_to_end, self._orders, (key, key))
        with _lock:
            if key not in sessions or sessions[key]._ledger is not ledger:
                return
            sessions[key]._registration = now
            for _ in moves:
                break
            if key in kv_bytes:
                self._kv_total -= kv_bytes[key]
                if nbytes == 0:
                    del kv_bytes[key]
            if nbytes > 0:
                self._kv_total += nbytes
                kv_bytes[key] = nbytes
                for _ in moves:
                    break

    def _forget_cache(self, session: Session) -> None:
        key = session._id.int
        kv_bytes = self._kv_bytes
        with _lock:
            if key in kv_bytes and key in self._sessions and self._sessions[key] is session:
                self._kv_total -= kv_bytes[key]
                del kv_bytes[key]

    def _first(self) -> Session | None:
        """Return the least recently used session."""
        with _lock:
            for key in self._sessions:
                return self._sessions[key]
        return None

    def _first_with_cache(self) -> Session | None:
        """Return the least recently used session that has a KV cache."""
        with _lock:
            for key in self._kv_bytes:
                return self._sessions[key]
        return None

    def _snapshot(self) -> list[Session]:
        sessions = self._sessions.values()
        with _lock:
            return [*sessions]

    def _now(self) -> Registration:
        """Return what tells that a session was used now."""
        latest = self._latest
        if self._idle_timeout is None:
            return latest
        now = monotonic()
        if now < latest.until:
            return latest  # against its promise, the clock has gone back
        if now - latest.since <= self._resolution:
            latest.until = now
        else:
            self._latest = latest = Registration(latest.registry, now, now)
        return latest

    # Closing and eviction

    def _close_idle(self, say: Callable[[Exception], None]) -> int:
        closed = 0
        while (first := self._first()) is not None and self._is_idle(used := first._registration):
            done = self._close_unused(first, used, say)
            if done:
                closed += 1
            elif done is None:
                self.get(first.id)  # it's being used
        return closed

    def _is_idle(self, used: Registration | None) -> bool:
        return (
            self._idle_timeout is not None
            and used is not None
            and monotonic() - used.until > self._idle_timeout
        )

    def _close_unused(
        self, session: Session, used: Registration | None, say: Callable[[Exception], None]
    ) -> bool | None:
        """Close the first session, unless it was used since; return whether that was done, or None if it's borrowed."""
        keeper: Keeper | None = Keeper()
        try:
            lease = session._hold(ref(keeper))
            if lease is None:
                return None
            removed = self._remove(session, lease, used)
        finally:
            keeper = None  # a traceback must not keep the lease alive
        if session._closed:
            try:
                session._free()
            except Exception as error:  # noqa: BLE001 it's said
                say(error)
        return removed

    def _evict_over_budget(self) -> None:
        borrowed: set[Session] = set()
        while self._kv_total > self._kv_limit:
            if len(borrowed) >= len(self._kv_bytes):
                return
            first = self._first_with_cache()
            if first is not None and not self._evict(first):
                borrowed.add(first)
                self.get(first.id)  # it's being used

    def _evict(self, session: Session) -> bool:
        """Evict a session's KV cache, unless it's borrowed, and return whether it isn't."""
        try:
            if not session._while_free(partial(self._discard_cache, session)):
                return False
            if session._closed:
                session._free()
        except Exception as error:  # noqa: BLE001 it's said
            _say(error)
        return True

    def _discard_cache(self, session: Session) -> None:
        ledger = session._ledger
        try:
            if ledger is not None and not session._is_forked():
                ledger.close()
        finally:
            self._forget_cache(session)


def _check_limit(name: str, limit: int | None, least: int) -> None:
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"{name} must be an int, got {type(limit).__name__!r}")
    if limit < least:
        raise ValueError(f"{name} must be at least {least}, got {limit}")


def _check_timeout(seconds: float | None) -> None:
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"idle_timeout must be seconds, got {type(seconds).__name__!r}")
    if not seconds > 0:
        raise ValueError(f"idle_timeout must be more than 0 seconds, got {seconds}")


def _key(id: UUID) -> int:  # noqa: A002
    try:
        return id.int
    except AttributeError:
        raise not_a_uuid(id) from None


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        first, *others = errors
        for error in others:
            first.add_note(f"Then another release(kv_cache) raised {type(error).__name__}.")
        raise first


def _say(error: Exception) -> None:
    """Have `sys.unraisablehook` told of an error that nobody is there to catch."""
    _Unraisable(error)


class _Unraisable:
    """An error that nobody is there to catch."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error
