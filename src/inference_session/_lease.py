"""The lease: who has a session now, and how that ends, whatever happens.

A session is taken for the length of one `with` block, and the end of the block gives it back. But that end can fail
to come: an interrupt can strike before it has begun, and a generator that is suspended in its block can be dropped.
Nobody is there to repair the session then. So the next to come must see from the session alone that whoever took it
is gone.

**What doesn't work**

- *A flag that the end of the block resets.* CPython raises what signal handlers raise (and
  `PyThreadState_SetAsyncExc`) on entering a Python function, after the call of a C function, and when jumping
  backwards. The entry of `__exit__` is such a place. An interrupt there ends the block without its end having run,
  and the flag stays up for ever.
- *A weak reference to the context manager, or to the state.* The traceback of that interrupt has the frame of
  `__exit__`, the frame has its arguments, and a notebook keeps the traceback: so both stay alive.
- *A weak reference and nothing else.* Up to CPython 3.14 the garbage collector clears the weak references to all that
  is garbage before it runs the first finalizer. A generator in a cycle, suspended in its block, is closed by its
  finalizer: its block ends *after* its lease has died, when somebody else may have taken the session.
- *A table of leases by `id(session)`.* A proxy has another `id`.
- *To look whether a weak reference is dead, so as to learn whether a `with` statement holds its object.* Without a
  GIL, an object that another thread made dies some time after its last reference.

**What does**

- A `with` statement asks for `__exit__` before it calls `__enter__`, keeps what it got on the stack of its frame, and
  calls that in the end. No traceback shows the stack. So `__exit__` is a property that makes a new callable for
  whoever asks, and the *lease* is a weak reference to that callable: it dies with the `with` statement, at once. The
  callable is a `functools.partial`. CPython may take a bound method apart before it calls it, and a `__call__` that is
  written in Python has its `self` in the traceback.
- Where nobody asked for `__exit__` before `__enter__`, the block was entered by hand, or by an `ExitStack` of CPython
  3.14 or older, which asks the class. Then the block itself holds what its lease refers to, until it has ended.
- The session has the lease that took it. A lease is replaced only when it is dead, by comparing and setting in one
  instant, which also records who has the session: without a GIL under a lock. Whoever replaces a dead lease first
  undoes what was left.
- Whoever ends a borrow first makes sure that the session's lease is its own. If that lease died too early, the
  session is taken back. If somebody else took it meanwhile, it is left alone: it was rolled back already.
- Beside the lease, a session has a *writer*: the lease of the block that may still change it. The end of a borrow
  begins by taking that away. Whatever calls the engine or the caller's code looks at the writer again before it
  writes, in the same instant. So a straggler in another thread, still in `create` or in the caller's iterable,
  changes nothing.
- An *instant* is a stretch of bytecode without a call and without a jump backwards. No signal handler comes in there;
  nor does the garbage collector, from 3.12 on (on 3.11 it runs when a container is made); nor, with a GIL, another
  thread. A turn of a `for` loop over an iterator that is written in C belongs to the instant. That is why what an
  engine's function returns is stored by a loop over a `starmap`, and why the lock is taken by a loop over `locked`. A
  `with lock:` would leak the lock on 3.14, where an interrupt can strike between the call of `__enter__` and the
  block.

**What can still fail**

- Where a block is entered by hand or by an `ExitStack`, an interrupt before its end has begun leaves the session
  borrowed for as long as the traceback is kept.
- In a generator that the garbage collector ends, up to 3.14, the block's own `finally` clauses find the borrow
  expired. The rollback that follows is right.
- Without a GIL, two threads that share one state can meet in the few bytecodes between the last look at the writer
  and the write. Give a state to one thread at a time.
- CPython swallows an interrupt on the entry of a finalizer, and the finalizer with it.

**Which test shows it**: `tests/test_interrupts.py` strikes at every such place; `tests/test_generators.py` has
generators, cycles and `ExitStack`s; `tests/test_stragglers.py` has stragglers; `tests/test_threads.py` has races; and
`tests/test_delivery.py` fails when an interpreter delivers signals elsewhere than is said here.
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
"""Returns what it depends on, or None if that is gone: a weak reference, or one of the two below."""


def nobody() -> None:
    """Be the lease of a session that nobody has, and of a borrow that has not begun."""


def expired() -> None:
    """Be the lease of a borrow that is over."""


ONCE: Final = ((),)
"""For `starmap`: call a function without arguments, once."""


class Leased(Protocol):
    """What one at a time can have."""

    _lease: Lease


def take(session: Leased, lease: Lease) -> Lease | None:
    """Take a session, at once or not at all.

    Return the lease before, which is `nobody`, or a dead one that has left work to undo; or None if somebody has it.
    """
    last = session._lease
    if last() is not None or not replace(session, last, lease):
        return None
    return last


_ALONE: Final = sys.implementation.name == "cpython" and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)
"""Whether no other thread comes in during an instant. Then no lock is needed, which would be a tenth of a step."""


def replace(session: Leased, last: Lease, lease: Lease) -> bool:
    """Put a lease in the place of the last one, unless somebody else did; return whether that was done."""
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
    """Be the `__exit__` of a block that a `with` statement ends."""
    raise RuntimeError("a borrow is ended only once, and by its `with` statement if it has one")


class _Exit(property):
    """`__exit__` of a block, made anew for whoever asks."""

    def __call__(self, block: "LeasedBlock", *exc_info: Any) -> None:
        """End a block for `contextlib.ExitStack`, which asks the class."""
        block._end(*exc_info)


class _Hold:
    """What the lease of a block depends on that no `with` statement holds: the block has it until it has ended."""


@define(eq=False, repr=False, getstate_setstate=False)
class LeasedBlock:
    """A context manager whose lease dies with its `with` statement. No ABC, which would make new objects dearer."""

    _lease: Lease = field(init=False, repr=False)
    _exit: Lease = field(init=False, repr=False)
    """Refers to what was last given away as `__exit__` before the block began."""
    _hold: _Hold | None = field(init=False, repr=False)

    if TYPE_CHECKING:

        def _end(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
            /,
        ) -> None:
            """Commit or roll back, give back what was taken, and hold nothing any more.

            Where this is interrupted nothing is given back, but the lease dies, and the next to take the session rolls
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
        """Return a lease that lives until the block has ended, or is dropped."""
        self._hold = hold = _Hold()
        return ref(hold)
