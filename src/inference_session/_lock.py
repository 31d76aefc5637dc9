"""The lock: held for instants only, and never left locked by an interrupt.

`with lock:` would leak it on CPython 3.14, where an interrupt can arrive between the call of `__enter__` and the block.
A loop over `locked` does not:

    for _ in locked:
        try:
            ...
        finally:
            lock.release()
        break

Code under the lock makes no calls and no containers. So no signal handler, no finalizer and no foreign code ever runs
there, and nobody waits for long. `_lease` explains why, and `tests/test_delivery.py` shows it.
"""

import os
from collections.abc import Iterator
from threading import RLock
from typing import Final


lock: Final = RLock()
locked: Final[Iterator[object]] = iter(lock.acquire, False)  # noqa: FBT003 never returned

if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
    # A thread that is missing in the child may have held it.
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportAttributeAccessIssue]
