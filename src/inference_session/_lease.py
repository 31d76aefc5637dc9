"""The lease: exclusive use of a session, and how it ends, whatever happens.

A session is taken for one `with` block, and the end of the block gives it back. But that end may never run: an
interrupt can arrive just before it, or a generator suspended in its block can be dropped. Nobody is left to repair the
session then. So the next borrow must see from the session alone that its last holder is gone.

**Dead ends**

- *A flag, reset at the end of the block.* CPython raises asynchronous exceptions (from signal handlers and from
  `PyThreadState_SetAsyncExc`) on entering a Python function, after the call of a C function, and on backward jumps.
  The entry of `__exit__` is such a place. An interrupt there ends the block before any of `__exit__` has run, and the
  flag stays set for ever.
- *A weak reference to the context manager, or to the state.* The interrupt's traceback holds the frame of `__exit__`,
  the frame holds its arguments, and a notebook holds the traceback: so both stay alive.
- *A weak reference and nothing else.* Up to CPython 3.14, the garbage collector clears all weak references to garbage
  before it runs the first finalizer. A generator in a cycle, suspended in its block, is closed by its finalizer: the
  block ends *after* its lease has died, when another borrow may have taken the session.
- *A table of leases by `id(session)`.* A proxy has another `id`.
- *Testing whether a weak reference is dead, to learn whether a `with` statement holds its object.* Without a GIL, an
  object made by another thread dies some time after its last reference.

**The solution**

- A `with` statement looks up `__exit__` before it calls `__enter__`, keeps the result on the stack of its frame, and
  calls it at the end. No traceback exposes the stack. So `__exit__` is a property that makes a new callable at each
  look-up, and the *lease* is a weak reference to this callable: it dies with the `with` statement, at once. The
  callable is a `functools.partial`, because CPython may take a bound method apart before calling it, and a `__call__`
  written in Python leaves its `self` in the traceback.
- If nothing has looked up `__exit__` on the block before `__enter__`, the block was entered by hand, or by an
  `ExitStack` of CPython 3.14 or older, which looks it up on the class. Then the block itself holds the lease's
  referent, until it has ended.
- The session stores the lease of its holder. A lease is replaced only once it is dead, by a compare-and-set in one
  instant, which also records the new holder; without a GIL, this takes a lock. After replacing a dead lease, a borrow
  first undoes the leftovers of the last one.
- To end, a borrow first makes sure that the session's lease is its own. If the lease died too early, the session is
  taken back. If another borrow has taken it meanwhile, it is left alone: it was rolled back already.
- Besides the lease, a session has a *writer*: the lease of the block that may still change it. The end of a borrow
  begins by clearing the writer. After each call into the engine or the caller's code, the library checks the writer
  again before it writes, in the same instant. So a straggler in another thread, still in `create` or in the caller's
  iterable, changes nothing.
- An *instant* is a stretch of bytecode without calls or backward jumps. It excludes signal handlers; the garbage
  collector, from 3.12 on (on 3.11 it runs when a container is made); and, with a GIL, other threads. One turn of a
  `for` loop over an iterator written in C belongs to the instant, and so does unpacking such an iterator. Hence a
  loop over a `starmap` stores the result of an engine's function, a loop over `locked` takes the lock, and
  `[file] = map(os.open, ...)` opens a file. `with lock:` would leak the lock on 3.14, where an interrupt can arrive
  between the call of `__enter__` and the block.

**Remaining gaps**

- If a block is entered by hand or by an `ExitStack`, an interrupt before its end has begun leaves the session borrowed
  for as long as the traceback is kept.
- In a generator ended by the garbage collector, up to 3.14, the block's own `finally` clauses find the borrow expired.
  The rollback afterwards is right.
- Without a GIL, two threads sharing one state can collide in the few bytecodes between the last check of the writer
  and the write. Give a state to one thread at a time.
- CPython swallows an interrupt on the entry of a finalizer, and the finalizer with it.

**Tests**: `tests/test_interrupts.py` interrupts at every such place; `tests/test_generators.py` covers generators,
cycles and `ExitStack`s; `tests/test_stragglers.py`, stragglers; `tests/test_threads.py`, races; and
`tests/test_delivery.py` fails if an interpreter delivers signals anywhere else.
"""

import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias
from weakref import ref

from attrs import define, field

from inference_session._lock import lock, locked


Lease: TypeAlias = Callable[[], object]
"""A weak reference, or one of the two functions below: returns its referent, or None once that is gone."""


def nobody() -> None:
    """Return None: the lease of a free session, and of a borrow that hasn't begun."""


def expired() -> None:
    """Return None: the lease of a borrow that is over."""


ONCE: Final = ((),)
"""Makes `starmap` call a function once, without arguments."""


class Leased(Protocol):
    """An object with one holder at a time."""

    _lease: Lease


def take(session: Leased, lease: Lease) -> Lease | None:
    """Take a session, at once or not at all.

    Return the previous lease: `nobody`, or a dead one with leftovers to undo. Return None if the session has a holder.
    """
    last = session._lease
    if last() is not None or not replace(session, last, lease):
        return None
    return last


_ALONE: Final = sys.implementation.name == "cpython" and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)
"""Whether an instant excludes other threads. Then no lock is needed; it would cost a tenth of a step."""


def replace(session: Leased, last: Lease, lease: Lease) -> bool:
    """Replace the last lease, unless another thread was faster; return whether it was replaced."""
    replaced = False
    if _ALONE:
        if session._lease is last:
            session._lease = lease
            replaced = True
        return replaced
    for _ in locked:
        try:
            if session._lease is last:
                session._lease = lease
                replaced = True
        finally:
            lock.release()
        break
    return replaced


def no_exit(*exc_info: object) -> None:
    """Refuse a call of `__exit__` by hand, if the block has ended or its `with` statement will end it."""
    raise RuntimeError("a borrow is ended only once, and by its `with` statement if it has one")


class _Exit(property):
    """`__exit__` of a block, made anew at each look-up."""

    def __call__(self, block: "LeasedBlock", *exc_info: Any) -> None:
        """End a block for `contextlib.ExitStack`, which looks up `__exit__` on the class."""
        block._end(*exc_info)


class _Hold:
    """Referent of a lease without a `with` statement: the block holds it until it has ended."""


@define(eq=False, repr=False, getstate_setstate=False)
class LeasedBlock:
    """A context manager whose lease dies with its `with` statement. Not an ABC: creation would be slower."""

    _lease: Lease = field(init=False, repr=False)
    _exit: Lease = field(init=False, repr=False)
    """Refers to the last callable handed out as `__exit__` before the block began."""
    _hold: _Hold | None = field(init=False, repr=False)

    if TYPE_CHECKING:

        def _end(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
            /,
        ) -> None:
            """Commit or roll back, give back every session taken, and hold nothing any more.

            If this is interrupted, nothing is given back, but the lease dies, and the next borrow of the session rolls
            it back first.
            """

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
            /,
        ) -> None: ...

    else:

        @_Exit
        def __exit__(self) -> Callable[..., None]:  # noqa: PLE0302 a property
            if self._lease is nobody:
                end = partial(self._end)
                self._exit = ref(end)
                return end
            return no_exit if self._hold is None else self._end

    def _begin(self) -> Lease:
        """Return the lease of the block that begins now."""
        if self._lease is not nobody:
            raise RuntimeError("a borrow can be entered only once; borrow the session again")
        return self._exit if self._exit() is not None else self._hold_by_hand()

    def _hold_by_hand(self) -> Lease:
        """Return a lease that lives until the block ends or is dropped."""
        self._hold = hold = _Hold()
        return ref(hold)
