"""The lock: held for instants only, and never left locked by an interrupt.

`with lock:` would leak it on CPython 3.14, where an interrupt can strike between the call of `__enter__` and the block.
A loop over `locked` does not:

    for _ in locked:
        try:
            ...
        finally:
            lock.release()
        break

What is done under the lock makes no call and no container. So no signal handler, no finalizer and no code of others
ever runs there, and nobody waits for long. `_lease` tells why that is so, and `tests/test_delivery.py` shows it.
"""

import os
from collections.abc import Iterator
from threading import RLock
from typing import Final


lock: Final = RLock()
locked: Final[Iterator[object]] = iter(lock.acquire, False)  # noqa: FBT003 it never returns that

if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
    # Another thread may have held it, which the child doesn't have.
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportAttributeAccessIssue]
