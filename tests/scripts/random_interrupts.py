"""Random interrupts of sessions at work: `python -m tests.scripts.random_interrupts (signals|exceptions) SEED NUMBER`.

Run by test_interrupts.py in a process of its own, which fails if a session ends up borrowed, torn or half-stepped, or
if a KV cache is leaked or freed twice.
"""

import ctypes
import faulthandler
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from tests.stories import BEGINNINGS, AnyStory


class Handler:
    """The switch of the signal handler."""

    raises = False


def interrupt_by_signals(work: Callable[[], None], dice: random.Random) -> None:
    """Work until a signal handler raises, which may do so again on the way out."""

    def interrupt(signum: int, frame: object) -> None:
        if Handler.raises:
            signal.setitimer(
                signal.ITIMER_REAL, dice.choice((2e-6, 2e-5, 1e-4)) * (0.1 + dice.random())
            )
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    Handler.raises = True
    try:
        signal.setitimer(
            signal.ITIMER_REAL, dice.choice((1e-5, 1e-4, 1e-3)) * (0.1 + dice.random())
        )
        work()
    except KeyboardInterrupt:
        pass
    finally:
        Handler.raises = False  # no call before this


def interrupt_by_exceptions(work: Callable[[], None], dice: random.Random) -> None:
    """Work in another thread until it gets an exception from here."""
    begun = threading.Event()
    died_of: list[BaseException] = []

    def worker() -> None:
        try:
            begun.set()
            work()
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001 raised in the main thread
            died_of.append(error)

    thread = threading.Thread(target=worker)
    thread.start()
    begun.wait()
    time.sleep(dice.choice((1e-5, 1e-4, 1e-3)) * dice.random())
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
    )
    thread.join()
    for error in died_of:
        raise error


def tell(stories: list[AnyStory]) -> None:
    """Tell one story after the other, and wait to be interrupted."""
    for story in stories:
        story.run()
    while True:
        time.sleep(0)


def main(source: str, seed: str, number: str) -> None:
    """Interrupt stories with every kind of engine, again and again."""
    faulthandler.dump_traceback_later(100, exit=True)
    sys.setswitchinterval(1e-4)
    dice = random.Random(int(seed))
    interrupt = interrupt_by_signals if source == "signals" else interrupt_by_exceptions
    for _ in range(int(number)):
        for begin in BEGINNINGS.values():
            stories = [begin() for _ in range(8)]  # all stay alive to the end
            interrupt(partial(tell, stories), dice)
            for story in stories:
                story.check()
                story.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
