"""The lease: who has a session now, and how it ends, whatever happens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import ref

from attrs import define, field

from inference_session import _fork


Lease: TypeAlias = Callable[[], object]
"""A weak reference to something that lives as long as a borrow; then it returns None."""

# Who has which session now, by the session's id(). A session with an entry is taken, while that lease lives. Whoever
# took it removes the entry when the work is done; a dead lease has left work to undo. `setdefault` and `pop` are
# atomic, with and without the GIL; only to replace a dead lease takes a lock.
leases: Final[dict[int, Lease]] = {}
_replacing = RLock()


@_fork.in_child
def _forget_leases() -> None:
    global _replacing  # noqa: PLW0603 a lock that another thread held can't be made new in place
    leases.clear()
    _replacing = RLock()


def replace_dead(session_key: int, dead: Lease, lease: Lease) -> bool:
    """Put a lease in the place of a dead one, unless somebody else did."""
    with _replacing:  # no call in here, which could let a signal handler in; a finalizer that comes in does no harm
        try:
            if leases[session_key] is dead:
                leases[session_key] = lease
                return True
        except KeyError:
            pass
        return False


def expired() -> None:
    """Be the lease of a borrow that isn't under way."""


def no_exit(*exc_info: object) -> None:
    """Be the `__exit__` of a block that a `with` statement ends, or that is over."""
    raise RuntimeError("a borrow is ended only once, and by its `with` statement if it has one")


class _Exit(property):
    """`__exit__` of a block, as something that its `with` statement has and nothing else does.

    A signal can strike on the entry of `__exit__`, before anything is done. The traceback then keeps the arguments of
    that call, in a notebook for good, and so the block. Therefore a lease isn't on the block, but on the callable that
    the `with` statement takes from it for the end: whatever happens, that dies with the statement. It is a `partial`
    because CPython takes a bound method apart before the call, which ends its life too early.
    """

    def __call__(
        self, block: "LeasedBlock", *exc_info: Any
    ) -> None:  # contextlib.ExitStack asks the class
        block._end(*exc_info)


@define(eq=False, repr=False)
class LeasedBlock(ABC):
    """A context manager whose lease dies with its `with` statement."""

    _exit: object = field(init=False)
    """What is called at the end. A `with` statement asks for it before it enters the block, which then forgets it."""

    if TYPE_CHECKING:

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
            /,
        ) -> None: ...

    else:
        __exit__ = _Exit(attrgetter("_exit"))

    def _begin(self) -> Lease:
        """Forget the end, and return a lease that dies with the `with` statement that has it."""
        if self._exit.__class__ is not partial:
            raise RuntimeError("a borrow can be entered only once; borrow the session again")
        lease = ref(self._exit)
        self._exit = no_exit
        return self._keep() if lease() is None else lease

    def _keep(self) -> Lease:
        """Return a lease that lives as long as this object, for want of a `with` statement."""
        self._exit = _ManualEnd(ref(self))
        return ref(self._exit)

    @abstractmethod
    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Commit or roll back, and give back what was taken.

        Where this is interrupted nothing is given back, but the lease dies, and the next to take the session rolls it
        back first.
        """


@define(eq=False, repr=False)
class _ManualEnd:
    """The end of a block that no `with` statement ends."""

    _block: Callable[[], LeasedBlock | None]

    def __call__(self, *exc_info: Any) -> None:
        block = self._block()
        if block is not None:
            block._end(*exc_info)
