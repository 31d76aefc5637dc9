"""Threads for tests: some that race, and one that is held up."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar


T = TypeVar("T")
PATIENCE: Final = 30


def race(*actions: Callable[[], T]) -> list[T]:
    """Let threads begin at the same time, and return what they return."""
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], T]) -> T:
        start.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(run, action) for action in actions]]


def in_thread(action: Callable[[], T]) -> T:
    """Return what something returns in another thread."""
    [result] = race(action)
    return result


class Straggler:
    """A thread that is held up in the middle of a call until it's told to go on."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.held_up = threading.Event()
        self.may_go_on = threading.Event()
        self.outcome: object = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.call: Callable[[], object] = self.run

    def begin(self, call: Callable[[], object], place: str) -> None:
        """Call something, and return as soon as that is held up."""
        self.call, self.place = call, place
        self.thread.start()
        assert self.held_up.wait(PATIENCE), f"never came to {place!r}: {self.outcome!r}"

    def run(self) -> None:
        """Note what the call returns or raises."""
        try:
            self.outcome = self.call()
        except BaseException as error:  # noqa: BLE001 told to the main thread
            self.outcome = error.with_traceback(None)

    def pause(self, place: str) -> None:
        """Be held up here, once."""
        if self.place == place:
            self.place = None
            self.held_up.set()
            assert self.may_go_on.wait(PATIENCE)

    def go_on(self) -> object:
        """Let it go on to its end, and return what it got."""
        self.may_go_on.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.outcome
