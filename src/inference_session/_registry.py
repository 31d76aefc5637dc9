"""The registry: many sessions by their ids, and the limits they share.

The lock guards the books, and no foreign code runs while it is held: code under it makes no calls and no containers, so
neither signal handlers nor finalizers come in (`_lease` explains why). Hence the order of use is a linked list, whose
links are set one by one. The engine's functions (`nbytes`, `release`) are called before or after, with the session
taken.
"""

import logging
import math
from collections.abc import Callable, Iterator
from operator import index
from time import monotonic
from types import TracebackType
from typing import Any, Final, final
from uuid import UUID
from weakref import ReferenceType, ref

from attrs import define, field

from inference_session._lease import Lease, nobody, take
from inference_session._lock import lock as _lock
from inference_session._lock import locked as _locked
from inference_session._never_copied import NeverCopied
from inference_session._session import (
    NO_CACHE,
    CacheFunctions,
    Maintenance,
    Session,
    not_a_uuid,
)
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionExistsError,
    SessionForkedError,
    SessionNotFoundError,
)


_log: Final = logging.getLogger("inference_session")


class _All:
    def __repr__(self) -> str:
        return "<all>"  # as `help` shows it


_ALL: Final[Any] = _All()


@define(eq=False, repr=False)
class _Use:
    """A time of use, to a thousandth of the timeout: sessions last used at about the same time share it."""

    time: float
    registry: "ReferenceType[SessionRegistry]"
    """Weak, or else a registry and its sessions would form a cycle."""


@define(eq=False, repr=False, weakref_slot=False)
class _Link:
    """A place in the order of use, between the next older and the next newer one."""

    key: int
    """The int of the session's id."""
    use: _Use
    """The time of the last use."""
    older: "_Link" = field(init=False)
    newer: "_Link" = field(init=False)


class _Entry(_Link):
    """A session in the books, and the observer of its steps. It is small, as there may be millions."""

    __slots__ = ()

    def borrowing(
        self, slots: CacheFunctions[Any], lease: Lease
    ) -> tuple[CacheFunctions[Any], Lease]:
        """Return both as they are."""
        return slots, lease

    def committing(self, session: Session) -> None:
        """Record a step, and the size of the KV cache. The step fails if `nbytes` does."""
        registry = self.use.registry()
        if registry is not None:
            registry._use(session, self, registry._measure(session))

    def rolled_back(self, session: Session, failure: BaseException | None) -> None:
        """Record a failed step; release the KV cache if it can't be measured."""
        registry = self.use.registry()
        if registry is None:
            return
        try:
            nbytes = registry._measure(session)
        except Exception:  # noqa: BLE001 the tokens are safe; it's computed anew
            session._release_cache(session._writer, failure)
            nbytes = 0
        registry._use(session, self, nbytes)

    def settled(self, session: Session) -> None:
        """Evict KV caches, least recently used first, until the others are within the budget."""
        registry = self.use.registry()
        if registry is None:
            return
        if session._at_the_end is not None:
            registry._look_again(session, self)
        if registry._kv_total > registry._kv_limit:
            registry._evict_over_budget()

    def close(self, session: Session) -> None:
        """Close a session, and in the same instant remove it from the registry."""
        registry = self.use.registry()
        if registry is None:
            session._closed = True
        else:
            registry._remove(session, self)


@final
@define(eq=False, repr=False, init=False, match_args=False, getstate_setstate=False)
class SessionRegistry(NeverCopied):
    """The open sessions of a process by their ids, under limits on their number and memory.

    A session is used when it is borrowed or looked up. The registry never closes or evicts a borrowed session, whatever
    the limits. A session closed by anyone leaves the registry. Every method may be called from any thread. Nothing
    happens in the background. A registry is always true, even if empty.

    As a context manager, a registry closes itself at the end of the block.

    Each session closed as idle or to make room, and each evicted KV cache, is logged by
    `logging.getLogger("inference_session")`, at the level INFO: ids and reasons, nothing else.

    Args:
        max_sessions: how many sessions may be open. Before `open` would exceed it, the least recently used session is
            closed, except for borrowed ones.
        idle_timeout: seconds without use after which a session may be closed (give or take a thousandth). `close_idle`
            closes it, and so does `open` before anything else; until then it can be found, and used again.
        max_kv_bytes: how many bytes all KV caches may hold together, by `StateSlots(nbytes=...)`. If a borrow has
            exceeded it, its commits and its end evict KV caches, least recently used first. No token is lost: the next
            step of those sessions computes the cache anew. An engine without `nbytes` gets a `TypeError` at the end of
            its first borrow.

    Raises:
        TypeError, ValueError: if a limit has the wrong type, or is too low.
    """

    __module__ = "inference_session"

    _max_sessions: int | None = field(repr=False)
    _idle_timeout: float | None = field(repr=False)
    _kv_limit: float = field(repr=False)

    _sessions: dict[int, Session] = field(repr=False)
    """By the ids' ints, as hashing a UUID is slow."""
    _order: _Link = field(repr=False)
    """Both ends of the order of use: its `newer` is the oldest session, its `older` the newest."""
    _passed: _Link = field(repr=False)
    """A mark in the order: older sessions have no KV cache to evict, or were borrowed when it was their turn."""
    _room: float = field(repr=False)
    """How many more sessions may be opened."""
    _kv_total: int = field(repr=False)
    _closed: bool = field(repr=False)
    _kv_bytes: dict[int, int] = field(repr=False)
    """The bytes of each session's KV cache, without those that hold none."""
    _latest: _Use = field(repr=False)

    _instead = "as its sessions can't: send their ids, and have one registry in each process"

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
        self._sessions = {}
        self._kv_bytes = {}
        self._latest = never = _Use(-math.inf, ref(self))
        self._order, self._passed = order, passed = _Link(-1, never), _Link(-1, never)
        order.older = order.newer = passed
        passed.older = passed.newer = order
        self._room = math.inf if max_sessions is None else max_sessions
        self._kv_total = 0
        self._closed = False

    def open(self, id: UUID | None = None) -> Session:  # noqa: A002 its natural name
        """Return a new session, with a random id if none is given.

        Errors of `release` for sessions closed on the way go to `sys.unraisablehook`, as they don't concern this one.

        Raises:
            SessionExistsError: if there is an open session with this id.
            RegistryFullError: if there are `max_sessions` already, and all of them are borrowed.
            TypeError: if `id` isn't a `uuid.UUID`.
            RuntimeError: if the registry was closed.
        """
        session = Session() if id is None else Session.with_id(id)
        self._take_in(session)
        return session

    def add(self, session: Session) -> None:
        """Take in a session that was made elsewhere: branched or restored, say.

        Room is made for it as by `open`, and its KV cache counts for the budget.

        Raises:
            SessionExistsError: if there is an open session with its id.
            RegistryFullError: if there are `max_sessions` already, and all of them are borrowed.
            SessionBusyError, SessionClosedError, SessionForkedError: as `StateSlots.borrow`.
            TypeError: if it isn't a `Session`; or from an engine without `nbytes`, if there is `max_kv_bytes`.
            ValueError: if it is in another registry.
            RuntimeError: if the registry was closed.
            Exception: any error of `nbytes`.
        """
        if type(session) is not Session:
            raise TypeError(f"only a Session can be added, got {type(session).__name__!r}")
        if session._is_forked():
            raise SessionForkedError(session._id)
        if not session._maintain(lambda: self._take_in(session, self._measure(session))):
            raise SessionBusyError(session._id)
        self._evict_over_budget()

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
        session = self._sessions.get(_key(id))
        if session is None:
            return None
        entry = session._observer
        return session if isinstance(entry, _Entry) and self._use(session, entry) else None

    def __contains__(self, id: UUID) -> bool:  # noqa: A002
        return _key(id) in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[UUID]:
        """Iterate over the ids of the sessions open now, whatever becomes of them."""
        return iter([session.id for session in self.values()])

    def values(self) -> list[Session]:
        """Return the sessions open now. Unlike looking them up, this doesn't count as a use."""
        return list(self._sessions.values())

    def close(self, id: UUID = _ALL) -> None:  # noqa: A002
        """Close the session with this id; or, without an argument, close all of them, and open no more.

        Raises:
            SessionNotFoundError: if there's no open session with this id.
            TypeError: if `id` isn't a `uuid.UUID`.
            Exception: any error of `release`. The sessions are closed all the same.
        """
        if id is not _ALL:
            session = self._sessions.get(_key(id))
            if session is None:
                raise SessionNotFoundError(id)
            session.close()
            return
        for _ in _locked:
            try:
                self._closed = True
            finally:
                _lock.release()
            break
        errors: list[Exception] = []
        for session in self.values():
            try:
                session.close()
            except Exception as error:  # noqa: BLE001 raised when all are closed
                errors.append(error)
        _raise_first(errors)

    def close_idle(self) -> int:
        """Close all sessions unused for longer than `idle_timeout`, and return their number.

        Raises:
            Exception: any error of `release`. The sessions are closed all the same.
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

    # The books

    def _take_in(self, session: Session, nbytes: int = 0) -> None:
        """Add a session; make room for it first, if needed. See `add` for the errors."""
        if self._idle_timeout is not None:
            self._close_idle(_report)
        borrowed = 0
        while not self._add(session, nbytes):
            oldest = self._oldest()
            if oldest is not None and self._close_unused(*oldest, "to make room", _report) is None:
                borrowed += 1
                if borrowed >= len(self) and self._all_borrowed():
                    raise RegistryFullError(self._max_sessions or 0)

    def _add(self, session: Session, nbytes: int) -> bool:
        """Add a session, if there's room for it, and the bytes of its KV cache."""
        key, order = session._id.int, self._order
        entry = _Entry(key, self._now())
        exists = closed = gone = elsewhere = added = False
        for _ in _locked:
            try:
                exists, closed = key in self._sessions, self._closed
                gone, elsewhere = session._closed, session._observer is not None
                if not (exists or closed or gone or elsewhere) and self._room > 0:
                    room, total = self._room - 1, self._kv_total + nbytes
                    self._sessions[key] = session
                    if nbytes > 0:
                        self._kv_bytes[key] = nbytes
                    self._room, self._kv_total, session._observer = room, total, entry
                    entry.older, entry.newer = order.older, order
                    order.older.newer = order.older = entry
                    added = True
            finally:
                _lock.release()
            break
        if closed:
            raise RuntimeError("the registry is closed; open sessions in another one")
        if exists:
            raise SessionExistsError(session.id)
        if gone:
            raise SessionClosedError(session.id)
        if elsewhere:
            raise ValueError(f"session {session.id} is in another registry")
        return added

    def _use(self, session: Session, entry: _Entry, nbytes: int | None = None) -> bool:
        """Record a use of a session, and the bytes of its KV cache; return False if the session is gone."""
        use, order, key = self._now(), self._order, entry.key
        sizes = self._kv_bytes
        present = False
        for _ in _locked:
            try:
                present = session._observer is entry
                if present:
                    if nbytes is not None:
                        total = self._kv_total + nbytes - (sizes[key] if key in sizes else 0)  # noqa: SIM401
                        if nbytes > 0:
                            sizes[key] = nbytes
                        elif key in sizes:
                            del sizes[key]
                        self._kv_total = total
                    session._at_the_end = None
                    entry.use = use
                    entry.older.newer, entry.newer.older = entry.newer, entry.older
                    entry.older, entry.newer = order.older, order
                    order.older.newer = order.older = entry
            finally:
                _lock.release()
            break
        return present

    def _remove(
        self,
        session: Session,
        entry: _Entry,
        lease: Lease | None = None,
        use: _Use | None = None,
    ) -> bool:
        """Remove a session and mark it as closed; return whether it was there.

        With a lease, do so only while the session has this lease and hasn't been used since.
        """
        order, passed, key, sizes = self._order, self._passed, entry.key, self._kv_bytes
        removed = False
        for _ in _locked:
            try:
                if lease is not None:
                    oldest = passed.newer if order.newer is passed else order.newer
                    if session._lease is not lease or oldest is not entry or entry.use is not use:
                        break
                if session._observer is entry:
                    room = self._room + 1
                    if key in sizes:
                        self._kv_total -= sizes[key]
                        del sizes[key]
                    del self._sessions[key]
                    self._room = room
                    entry.older.newer, entry.newer.older = entry.newer, entry.older
                    session._observer = None
                    removed = True
                session._closed = True
            finally:
                _lock.release()
            break
        return removed

    def _forget_cache(self, session: Session, entry: _Entry) -> None:
        """Record the loss of a session's KV cache."""
        key, sizes = entry.key, self._kv_bytes
        for _ in _locked:
            try:
                if session._observer is entry and key in sizes:
                    self._kv_total -= sizes[key]
                    del sizes[key]
            finally:
                _lock.release()
            break

    def _pass(self, entry: _Entry) -> None:
        """Move the mark past an entry, if it is the next."""
        passed = self._passed
        for _ in _locked:
            try:
                if passed.newer is entry:
                    passed.older.newer, entry.older = entry, passed.older
                    passed.newer, entry.newer.older = entry.newer, passed
                    passed.older, entry.newer = entry, passed
            finally:
                _lock.release()
            break

    def _look_again(self, session: Session, entry: _Entry) -> None:
        """Move the mark back to right before an entry passed earlier and not used since."""
        passed = self._passed
        for _ in _locked:
            try:
                if session._observer is entry and session._at_the_end is not None:
                    session._at_the_end = None
                    passed.older.newer, passed.newer.older = passed.newer, passed.older
                    passed.older, passed.newer = entry.older, entry
                    entry.older.newer = entry.older = passed
            finally:
                _lock.release()
            break

    def _oldest(self) -> tuple[Session, _Entry, _Use] | None:
        """Return the least recently used session, its entry and the time of its last use."""
        return self._newer_than(self._order)

    def _newer_than(self, link: _Link) -> tuple[Session, _Entry, _Use] | None:
        """Return the next newer session, its entry and the time of its last use."""
        session, observer, use = None, None, link.use
        order, passed = self._order, self._passed
        for _ in _locked:
            try:
                newer = link.newer
                if newer is passed:
                    newer = newer.newer
                if newer is not order:
                    session, use = self._sessions[newer.key], newer.use
                    observer = session._observer
            finally:
                _lock.release()
            break
        if session is None or not isinstance(observer, _Entry):
            return None
        return session, observer, use

    def _all_borrowed(self) -> bool:
        """Whether all sessions were borrowed at one instant: no borrow ended between two looks at all of them."""
        found = [(session, session._lease) for session in self.values()]
        if len(found) != self._max_sessions or not all(one.borrowed for one, _ in found):
            return False
        return found == [(session, session._lease) for session in self.values()]

    def _measure(self, session: Session) -> int:
        """Return the bytes of a session's KV cache, by the engine's own `nbytes`."""
        slots = session._slots
        if self._kv_limit == math.inf or session._kv_cache is NO_CACHE or slots is None:
            return 0
        if slots.nbytes is None:
            raise TypeError(
                "the registry has max_kv_bytes, so it must know what a KV cache holds: give StateSlots an nbytes"
            )
        nbytes = index(slots.nbytes(session._kv_cache))
        if nbytes < 0:
            raise ValueError(f"nbytes(kv_cache) must not be negative, got {nbytes}")
        return nbytes

    def _now(self) -> _Use:
        """Return the present time of use: the latest one again, if nearly the same."""
        if self._idle_timeout is None:
            return self._latest
        now = monotonic()
        if now - self._latest.time > self._idle_timeout / 1024:
            self._latest = _Use(now, self._latest.registry)
        return self._latest

    # Closing and eviction

    def _close_idle(self, report: Callable[[Exception], None]) -> int:
        closed = 0
        while (oldest := self._oldest()) is not None and self._is_idle(oldest[2]):
            closed += self._close_unused(*oldest, "idle", report) is True
        return closed

    def _is_idle(self, use: _Use) -> bool:
        return self._idle_timeout is not None and monotonic() - use.time > self._idle_timeout

    def _close_unused(
        self,
        session: Session,
        entry: _Entry,
        use: _Use,
        reason: str,
        report: Callable[[Exception], None],
    ) -> bool | None:
        """Close the oldest session, unless it was used since.

        Return whether it was closed; None if it is borrowed, which counts as a use.
        """
        holder: Maintenance | None = Maintenance()
        try:
            mine: Lease = ref(holder)
            last = None if session._is_forked() else take(session, mine)
            lease = session._lease if last is None else mine
            if last is None and session.borrowed:
                self._use(session, entry)
                return None
            removed = self._remove(session, entry, lease, use)
            if last is nobody:
                session._lease = nobody
        finally:
            holder = None  # a traceback must not keep the lease alive
        try:
            if session._closed:
                session._free()
        except Exception as error:  # noqa: BLE001 reported
            report(error)
        if removed:
            _log.info("closed session %s: %s", session.id, reason)
        return removed

    def _evict_over_budget(self) -> None:
        while self._kv_total > self._kv_limit:
            found = self._newer_than(self._passed)
            if found is None:
                return
            session, entry, _ = found
            if (
                entry.key not in self._kv_bytes
                or self._evict(session, entry)
                or session._settle_at_the_end()
            ):
                self._pass(entry)

    def _evict(self, session: Session, entry: _Entry) -> bool:
        """Evict a session's KV cache; return False if the session is borrowed."""

        def evict() -> None:
            try:
                session._release_caches()
            finally:
                if not session._holds_cache():
                    self._forget_cache(session, entry)

        if session._is_forked():
            self._forget_cache(session, entry)
            return True
        try:
            if not session._maintain(evict):
                return False
            if session._closed:
                session._free()
        except Exception as error:  # noqa: BLE001 reported
            _report(error)
        _log.info("evicted the KV cache of session %s: over the budget", session.id)
        return True


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


def _report(error: Exception) -> None:
    """Pass an error to `sys.unraisablehook`, as no caller is there to catch it."""
    _Unraisable(error)


class _Unraisable:
    """Raises an error where no caller can catch it."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error
