"""Calls in another thread, with a limit on waiting."""

from collections.abc import Callable
from threading import Thread
from typing import Final, Generic, TypeVar

from attrs import define, field


T = TypeVar("T")

PATIENCE: Final = 30.0
"""How many seconds a call may take, before it is assumed to wait for a lock for ever."""


@define(eq=False)
class Elsewhere(Generic[T]):
    """A call in another thread."""

    _call: Callable[[], T]
    _results: list[T] = field(init=False, factory=list[T])
    _error: BaseException | None = field(init=False, default=None)
    _thread: Thread = field(init=False)

    def start(self) -> "Elsewhere[T]":
        """Begin the call."""
        self._thread = Thread(target=self._run, daemon=True)  # if it hangs, the process can exit
        self._thread.start()
        return self

    def done(self, seconds: float) -> bool:
        """Wait for the end for up to some seconds; return whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return the result of the call, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 raised by `result`
            self._error = error
