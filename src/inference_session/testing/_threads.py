"""Calls in another thread, which are not waited for in vain."""

from collections.abc import Callable
from threading import Thread
from typing import Final, Generic, TypeVar

from attrs import define, field


T = TypeVar("T")

PATIENCE: Final = 30.0
"""Seconds after which a call that can only wait for a lock is taken to wait for ever."""


@define(eq=False)
class Elsewhere(Generic[T]):
    """A call that another thread makes."""

    _call: Callable[[], T]
    _results: list[T] = field(init=False, factory=list[T])
    _error: BaseException | None = field(init=False, default=None)
    _thread: Thread = field(init=False)

    def start(self) -> "Elsewhere[T]":
        """Begin the call."""
        self._thread = Thread(target=self._run, daemon=True)  # one that hangs must not outlive all
        self._thread.start()
        return self

    def done(self, seconds: float) -> bool:
        """Wait for the end, but not longer than this; return whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return what the call returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 it's raised where the result is asked for
            self._error = error
